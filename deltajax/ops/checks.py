"""Contract checks at the API boundary: every message names the argument, what was seen and what fits.

Values (a positive log decay, an id out of range) are checked where they are visible, that is in calls
outside ``jit``, ``grad`` and ``vmap``; inside, they are the caller's promise.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltajax.ops.gates import Gate
from deltajax.ops.problem import GateKind

MAX_K = 256
MAX_V = 512
FLOATS = ("float16", "bfloat16", "float32", "float64")


def is_concrete(x: Any) -> bool:
    """Whether this process can look at ``x``'s values now: not traced, nor spread over processes."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def check_float(name: str, x: Any) -> None:
    """``x`` is an array of a floating dtype, and no explicit axis of a mesh splits it."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if x.dtype.name not in FLOATS:
        raise TypeError(f"{name} must have a floating dtype ({', '.join(FLOATS)}), got {x.dtype}")
    _no_explicit_axes(name, x)


def _no_explicit_axes(name: str, x: Any) -> None:
    """With explicit axes every intermediate array would have to say how it is split."""
    sharding = jax.typeof(x).sharding
    explicit = {
        axis
        for axis, kind in zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    }
    used = {a for part in sharding.spec for a in (part if isinstance(part, tuple) else (part,))}
    if used & explicit:
        raise ValueError(
            f"{name} is split over explicit axes of a mesh, {sharding.spec}: expected a call inside "
            f"jax.shard_map, or a mesh whose axes are jax.sharding.AxisType.Auto"
        )


def check_rank(name: str, x: Any, layout: str) -> None:
    """``x`` has the axes that ``layout`` names, "B T H K" say."""
    rank = len(layout.split())
    if x.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes [{layout.replace(' ', ', ')}], got shape {x.shape}")


def check_shape(name: str, x: Any, layout: str, shape: tuple[int, ...]) -> None:
    """``x`` has exactly ``shape``, whose axes ``layout`` names."""
    if tuple(x.shape) != shape:
        axes = layout.replace(" ", ", ")
        raise ValueError(f"{name} must have shape [{axes}] = {shape}, got {tuple(x.shape)}")


def _heads(H: int, HV: int) -> None:
    if H == 0 or HV == 0 or HV % H:
        raise ValueError(f"v must have a multiple of q's H = {H} heads (grouped value heads), got HV = {HV}")


def _sizes(K: int, V: int) -> None:
    if not 1 <= K <= MAX_K:
        raise ValueError(f"q and k must have a head size K in 1..{MAX_K}, got K = {K}")
    if not 1 <= V <= MAX_V:
        raise ValueError(f"v must have a head size V in 1..{MAX_V}, got V = {V}")


def check_gate(gate: Any, kind: GateKind, HV: int, K: int) -> None:
    """Checks a `Gate` against the op's gate kind."""
    if not isinstance(gate, Gate):
        raise TypeError(f"gate must be a deltajax.ops.Gate, got {type(gate).__name__}")
    check_float("gate.A_log", gate.A_log)
    check_shape("gate.A_log", gate.A_log, "HV", (HV,))
    if gate.dt_bias is not None:
        check_float("gate.dt_bias", gate.dt_bias)
        if kind == "channel":
            check_shape("gate.dt_bias", gate.dt_bias, "HV K", (HV, K))
        else:
            check_shape("gate.dt_bias", gate.dt_bias, "HV", (HV,))
    bound = gate.lower_bound
    if bound is not None and not (isinstance(bound, int | float | np.number) and bound < 0):
        raise ValueError(f"gate.lower_bound must be a number < 0 or None, got {bound!r}")


def _log_decay_values(g: Any, segment_ids: Any = None) -> None:
    """g > 0 would be growth: chunked forms and kernels rely on exp(G_r - G_i) <= 1, so it is refused.

    At padding anything goes.
    """
    if not is_concrete(g) or g.size == 0 or not (segment_ids is None or is_concrete(segment_ids)):
        return
    with jax.ensure_compile_time_eval():  # a concrete g may be closed over by a function being traced
        if segment_ids is not None:
            g = jnp.where((segment_ids != 0).reshape(*g.shape[:2], *(1,) * (g.ndim - 2)), g, 0)
        top = float(jnp.max(g))
    if top > 0:
        raise ValueError(f"g is a log decay and must be <= 0, got a maximum of {top:.6g}")


def check_call(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    *,
    kind: GateKind,
    gate: Any,
    initial_state: Any,
    segment_ids: Any,
    num_segments: Any,
    chunk_size: Any,
    scale: Any,
) -> None:
    """Checks a whole-sequence call; raises ValueError or TypeError."""
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta)):
        check_float(name, x)
    check_rank("q", q, "B T H K")
    check_rank("v", v, "B T HV V")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    check_shape("k", k, "B T H K", (B, T, H, K))
    check_shape("v", v, "B T HV V", (B, T, HV, V))
    if T < 1 or B < 1:
        raise ValueError(f"q must hold at least one token and one row, got shape {q.shape}")
    _heads(H, HV)
    _sizes(K, V)
    check_shape("beta", beta, "B T HV", (B, T, HV))
    if kind != "none":
        check_float("g", g)
        if kind == "head":
            check_shape("g", g, "B T HV", (B, T, HV))
        else:
            check_shape("g", g, "B T HV K", (B, T, HV, K))
        if gate is not None:
            check_gate(gate, kind, HV, K)
    if chunk_size is not None and not (
        isinstance(chunk_size, int | np.integer) and chunk_size >= 16 and chunk_size & (chunk_size - 1) == 0
    ):
        raise ValueError(f"chunk_size must be a power of two >= 16 or None, got {chunk_size!r}")
    check_scale(scale)
    check_segments(segment_ids, num_segments, B, T)
    if kind != "none" and gate is None:
        _log_decay_values(g, segment_ids)
    if initial_state is not None:
        check_float("initial_state", initial_state)
        if num_segments is None:
            check_shape("initial_state", initial_state, "B HV K V", (B, HV, K, V))
        else:
            check_shape("initial_state", initial_state, "B N HV K V", (B, num_segments, HV, K, V))


def check_scale(scale: Any) -> None:
    """The scale is a number, known when the call is traced."""
    if scale is not None and not isinstance(scale, int | float | np.number):
        raise TypeError(f"scale must be a static number or None, got {type(scale).__name__}")


def check_segment_ids(segment_ids: Any, B: int, T: int) -> None:
    """Checks the ids' type and shape."""
    if not hasattr(segment_ids, "dtype") or not hasattr(segment_ids, "shape"):
        raise TypeError(f"segment_ids must be an array, got {type(segment_ids).__name__}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must have an integer dtype, got {segment_ids.dtype}")
    check_shape("segment_ids", segment_ids, "B T", (B, T))


def check_segments(segment_ids: Any, num_segments: Any, B: int, T: int) -> None:
    """Checks the ids, and their values where these are visible, against the number of segments."""
    if num_segments is not None:
        if not isinstance(num_segments, int | np.integer) or num_segments < 1:
            raise ValueError(f"num_segments must be a static int >= 1 or None, got {num_segments!r}")
        if segment_ids is None:
            raise ValueError("num_segments needs segment_ids, got segment_ids=None")
    if segment_ids is None:
        return
    check_segment_ids(segment_ids, B, T)
    if not is_concrete(segment_ids) or segment_ids.size == 0:
        return
    ids = np.asarray(segment_ids)
    top = np.iinfo(np.int32).max if num_segments is None else num_segments
    if ids.min() < 0 or ids.max() > top:
        raise ValueError(f"segment_ids must lie in 0..{top}, got values from {ids.min()} to {ids.max()}")
    if num_segments is None:
        return
    for b, row in enumerate(ids):
        row = row[row != 0]
        starts = row[np.flatnonzero(np.diff(row, prepend=0))]
        if len(np.unique(starts)) != len(starts):
            raise ValueError(
                f"segment_ids with num_segments must keep each segment's tokens together, "
                f"but row {b} returns to an earlier id"
            )


def check_step(state: Any, q: Any, k: Any, v: Any, beta: Any, g: Any, gate: Any) -> None:
    """Checks a one-token call."""
    for name, x in (("state", state), ("q", q), ("k", k), ("v", v), ("beta", beta)):
        check_float(name, x)
    check_rank("q", q, "B H K")
    check_rank("v", v, "B HV V")
    B, H, K = q.shape
    HV, V = v.shape[1:]
    check_shape("k", k, "B H K", (B, H, K))
    check_shape("v", v, "B HV V", (B, HV, V))
    _heads(H, HV)
    _sizes(K, V)
    check_shape("beta", beta, "B HV", (B, HV))
    check_shape("state", state, "B HV K V", (B, HV, K, V))
    if g is None:
        if gate is not None:
            raise ValueError("gate needs the raw gate projection g, got g=None")
        return
    check_float("g", g)
    kind: GateKind = "channel" if g.ndim == 3 else "head"
    if kind == "channel":
        check_shape("g", g, "B HV K", (B, HV, K))
    else:
        check_shape("g", g, "B HV", (B, HV))
    if gate is None:
        _log_decay_values(g)
    else:
        check_gate(gate, kind, HV, K)
