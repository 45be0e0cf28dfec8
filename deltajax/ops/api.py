"""The public ops: contract checks, then dispatch."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.ops import checks, dispatch
from deltajax.ops.gates import Gate
from deltajax.ops.problem import GateKind, Inputs, Options

Implementation = Literal["pallas", "chunked", "scan"]
State = Float[Array, "B HV K V"] | Float[Array, "B N HV K V"]


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "B T HV"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    num_segments: int | None = None,
    padding_is_zero: bool = False,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T HV V"], State]:
    """DeltaNet (arXiv 2406.06484): a matrix memory that is corrected by what it already returns.

    ``u_t = beta_t (v_t - S_{t-1}^T k_t)``, ``S_t = S_{t-1} + k_t u_t^T``, ``o_t = scale * S_t^T q_t``.

    Args:
      q: [B, T, H, K] queries, float. Any T >= 1; K up to 256.
      k: [B, T, H, K] keys.
      v: [B, T, HV, V] values, V up to 512. HV is a multiple of H: value head j reads head j // (HV // H).
      beta: [B, T, HV] write strength, already activated; in [0, 1], or [0, 2] for negative eigenvalues.
      scale: multiplies q, a static number; K^-1/2 if None.
      normalize_qk: L2-normalise q and k over K inside the op: ``x * rsqrt(sum x^2 + 1e-6)``.
      initial_state: [B, HV, K, V], the state before the first token (of the row's first segment); with
        ``num_segments`` [B, N, HV, K, V], one for each segment. Zeros if None.
      segment_ids: integer [B, T] for packed rows. The state resets where the id changes, at any position;
        id 0 is padding: it outputs 0 and leaves the state alone.
      num_segments: static N. Ids are then 1..N in each row, each segment's tokens stand together, and
        final_state holds every segment's own state (its initial state where a segment has no token).
      padding_is_zero: the caller's promise that q, k and v are 0 at padding, as `short_convolution` leaves
        them: kernels then need no copies with zeros there, and gradients at padding may be anything.
      chunk_size: static power of two >= 16; None lets the implementation choose.
      implementation: "scan" (the recurrence, differentiated by JAX), "chunked" (plain JAX on any platform),
        "pallas" (raises if no kernel supports the call), or None: the fastest that supports the call on
        the platform the program is lowered for.
      axis_name: inside `jax.shard_map`, the mesh axis over which T is sharded (context parallelism). All
        arrays are then this device's tokens, initial_state and gate are the same on all devices, and
        final_state belongs to the whole rows and is the same on all devices.

    Differentiable in reverse mode in every float argument and through both results ("scan" in forward mode
    too, but for ``axis_name``); more than once with "scan" and "chunked": kernels have a first derivative.

    Returns:
      o: [B, T, HV, V] in v's dtype.
      final_state: float32 (float64 if an input is) [B, HV, K, V], after the row's last token; with
        ``num_segments`` [B, N, HV, K, V].

    Raises:
      ValueError, TypeError: an argument's shape, dtype or visible values do not fit; the message names it.
      NotImplementedError: "pallas" was asked for and no kernel supports the call; the message says why.
    """
    return _run(
        "none",
        q,
        k,
        v,
        None,
        beta,
        None,
        scale=scale,
        normalize_qk=normalize_qk,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
        padding_is_zero=padding_is_zero,
        chunk_size=chunk_size,
        implementation=implementation,
        axis_name=axis_name,
    )


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    *,
    gate: Gate | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    num_segments: int | None = None,
    padding_is_zero: bool = False,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T HV V"], State]:
    """Gated DeltaNet (arXiv 2412.06464): the delta rule on a memory that each head decays.

    ``S~_t = exp(g_t) S_{t-1}``, ``u_t = beta_t (v_t - S~_t^T k_t)``, ``S_t = S~_t + k_t u_t^T``,
    ``o_t = scale * S_t^T q_t``.

    Args and returns as `delta_rule`, and:
      g: [B, T, HV] log decay <= 0 (0 keeps, -inf forgets everything), or the raw gate projection when
        ``gate`` is given. A positive log decay is refused where its values are visible (outside jit).
      gate: fuses the activation, see `Gate`; A_log [HV], dt_bias [HV]. Differentiable.
    """
    return _run(
        "head",
        q,
        k,
        v,
        g,
        beta,
        gate,
        scale=scale,
        normalize_qk=normalize_qk,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
        padding_is_zero=padding_is_zero,
        chunk_size=chunk_size,
        implementation=implementation,
        axis_name=axis_name,
    )


def kimi_delta_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV K"],
    beta: Float[Array, "B T HV"],
    *,
    gate: Gate | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    num_segments: int | None = None,
    padding_is_zero: bool = False,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T HV V"], State]:
    """Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay for every channel of the key.

    ``S~_t = Diag(exp(g_t)) S_{t-1}``, ``u_t = beta_t (v_t - S~_t^T k_t)``, ``S_t = S~_t + k_t u_t^T``,
    ``o_t = scale * S_t^T q_t``.

    Args and returns as `delta_rule`, and:
      g: [B, T, HV, K] log decay <= 0 (0 keeps, -inf forgets), or the raw gate projection when ``gate`` is
        given. A positive log decay is refused where its values are visible (outside jit).
      gate: fuses the activation, see `Gate`; A_log [HV], dt_bias [HV, K]. Differentiable.
    """
    return _run(
        "channel",
        q,
        k,
        v,
        g,
        beta,
        gate,
        scale=scale,
        normalize_qk=normalize_qk,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
        padding_is_zero=padding_is_zero,
        chunk_size=chunk_size,
        implementation=implementation,
        axis_name=axis_name,
    )


def _run(
    kind: GateKind,
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    gate: Gate | None,
    *,
    scale: float | None,
    normalize_qk: bool,
    initial_state: Any,
    segment_ids: Any,
    num_segments: int | None,
    padding_is_zero: bool,
    chunk_size: int | None,
    implementation: Implementation | None,
    axis_name: str | None,
) -> tuple[Array, Array]:
    checks.check_call(
        q,
        k,
        v,
        g,
        beta,
        kind=kind,
        gate=gate,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
        chunk_size=chunk_size,
        scale=scale,
    )
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        A_log=None if gate is None else gate.A_log,
        dt_bias=None if gate is None else gate.dt_bias,
        initial_state=initial_state,
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32),
    )
    options = Options(
        gate_kind=kind,
        lower_bound=None if gate is None or gate.lower_bound is None else float(gate.lower_bound),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        normalize_qk=bool(normalize_qk),
        num_segments=num_segments,
        padding_is_zero=bool(padding_is_zero),
        chunk_size=chunk_size,
        axis_name=axis_name,
    )
    return dispatch.run(inputs, options, implementation)
