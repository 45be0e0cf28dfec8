"""Attention of a call's own tokens by cuDNN, in layers: errors and times, for `benchmarks.long_attention`.

Errors are those of a layer in bfloat16 beside its dense form's, against the dense form in float32; on a GPU
the program must hold cuDNN's kernels (`deltajax.layers.fused_attention`).
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from deltajax.layers import Attention, LatentAttention, blockwise

LATENT = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
# What is checked: name -> tokens, tokens of a packed row's document (0: not packed), dtype and the layer's
# options.
CASES: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
    "full": (2048, 0, jnp.bfloat16, dict(num_kv_heads=4)),
    "full, odd length": (1531, 0, jnp.bfloat16, {}),
    "full, packed": (2048, 400, jnp.bfloat16, dict(num_kv_heads=4)),
    "full, a document a row": (2048, 2048, jnp.bfloat16, {}),
    "full, packed, odd": (1531, 400, jnp.bfloat16, {}),
    "full, float16": (1024, 400, jnp.float16, {}),
    "heads of 256": (2048, 0, jnp.bfloat16, dict(head_dim=256)),
    "heads of 256, packed": (2048, 400, jnp.bfloat16, dict(head_dim=256, num_kv_heads=2)),
    "heads of 100": (1024, 0, jnp.bfloat16, dict(head_dim=100)),
    "window": (2048, 0, jnp.bfloat16, dict(window_size=512)),
    "window, odd": (1531, 0, jnp.bfloat16, dict(window_size=100, num_kv_heads=4)),
    "wide window, packed": (2048, 400, jnp.bfloat16, dict(window_size=700)),
    "window, packed": (2048, 400, jnp.bfloat16, dict(window_size=200, num_kv_heads=4)),
    "latent": (2048, 0, jnp.bfloat16, LATENT),
    "latent, packed": (2048, 400, jnp.bfloat16, LATENT),
    "latent, heads of 64": (
        1531,
        400,
        jnp.bfloat16,
        LATENT | dict(qk_nope_head_dim=32, qk_rope_head_dim=32),
    ),
}


def asked() -> str | None:
    """cuDNN, where it may be."""
    return "cudnn" if jax.default_backend() == "gpu" else None


def build(options: dict[str, Any], dtype: Any, implementation: str | None, heads: int) -> Any:
    """A layer without rotation, of which only the attention is used."""
    common: dict[str, Any] = dict(hidden_size=64, num_heads=heads, rope_theta=None, dtype=dtype)
    common |= dict(implementation=implementation, rngs=nnx.Rngs(0))
    if "kv_lora_rank" in options:
        return LatentAttention(**options, **common)
    return Attention(**({"head_dim": 128} | options), **common)


def packing(B: int, T: int, document: int) -> jax.Array:
    """Documents of about that many tokens; the first row has padding before, between and behind.

    Where a document is as long as a row, every row is one, the first with padding behind.
    """
    if document >= T:
        return jnp.where(jnp.arange(T) < jnp.array([T - T // 8] + [T] * (B - 1))[:, None], 1, 0)
    place = jnp.arange(T)[None] + jnp.arange(B)[:, None] * (document // 3)
    ids = (place // document + 1).astype(jnp.int32)
    padding = (place < document // 8) | (place % (3 * document) > 3 * document - 40) | (place > T - 20)
    return jnp.where(padding & (jnp.arange(B)[:, None] == 0), 0, ids)


def inputs(layer: Any, B: int, T: int) -> tuple[jax.Array, ...]:
    """A cotangent of the output, then what `_attend_alone` takes before the segment ids."""
    heads, keys = layer.num_heads, iter(jax.random.split(jax.random.key(0), 4))
    draw = lambda *shape: jax.random.normal(next(keys), shape, layer.dtype)  # noqa: E731
    if isinstance(layer, Attention):
        size, groups = layer.head_dim, layer.num_kv_heads
        d_o, q, k, v = (draw(B, T, n, size) for n in (heads, heads, groups, groups))
        return d_o, 2 * q, k, v
    rank, N, R, V = layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim
    d_o, q, latent = draw(B, T, heads, V), draw(B, T, heads, N + R), draw(B, T, rank + R)
    kernel = jax.random.normal(next(keys), (rank, heads, N + V)) * rank**-0.5  # in float32, as parameters are
    return d_o, 2 * q, latent, kernel


def both(layer: Any, ids: jax.Array | None) -> tuple[Any, Any]:
    """The layer's attention, and with the gradients of all it takes; functions of `inputs`."""

    def forward(d_o, *arrays):
        o = layer._attend_alone(*arrays, ids, None)
        return o if ids is None else jnp.where((ids != 0)[..., None, None], o, 0)

    def gradients(d_o, *arrays):
        o, pull = jax.vjp(lambda *x: forward(d_o, *x), *arrays)
        return o, *pull(d_o)

    return forward, gradients


def form_of(lowered: Any) -> str:
    """The kernels that a lowered program holds."""
    names = sorted(set(re.findall(r"__cudnn\$fmha(\w+)", lowered.as_text())))
    return "cuDNN " + "+".join(names) if names else "plain"


@contextlib.contextmanager
def dense() -> Iterator[None]:
    """While it is active, plain attention holds all logits at once."""
    with mock.patch.object(blockwise, "MAX_LOGITS", 2**62):
        yield


def check() -> bool:
    """Whether all cases are good; a line of each."""
    ok, on_gpu = True, jax.default_backend() == "gpu"
    for name, (T, document, dtype, options) in CASES.items():
        if dtype == jnp.float16 and not on_gpu:  # the CPU has no such products
            continue
        try:
            good, text = checked(T, document, dtype, options)
        except (RuntimeError, NotImplementedError) as error:
            good, text = False, str(error).splitlines()[0][:200]
        ok &= good
        print(f"{'ok  ' if good else 'FAIL'} {name}: {text}", flush=True)
    return ok


def checked(T: int, document: int, dtype: Any, options: dict[str, Any]) -> tuple[bool, str]:
    """Errors by norm, at most 1.5 times the dense form's (behind them); padding; and the form."""
    ids = packing(2, T, document) if document else None
    chosen, plain = (build(options, dtype, i, 8) for i in (asked(), "xla"))
    exact = build(options, jnp.float32, "xla", 8)
    args = inputs(chosen, 2, T)
    with dense(), jax.default_matmul_precision("highest"):
        want = jax.jit(both(exact, ids)[1])(*(x.astype(jnp.float32) for x in args))
    with dense():
        other = jax.jit(both(plain, ids)[1])(*args)
    lowered = jax.jit(both(chosen, ids)[1]).lower(*args)
    got, text = lowered.compile()(*args), form_of(lowered)
    good = "Backward" in text if jax.default_backend() == "gpu" else text == "plain"
    names = ("o", "dq", "dk", "dv") if isinstance(chosen, Attention) else ("o", "dq", "dlatent", "dkernel")
    for what, *arrays in zip(names, want, got, other, strict=True):
        a, b, c = (x.astype(jnp.float32) for x in arrays)
        mine, theirs = (float(jnp.linalg.norm((x - a).ravel()) / jnp.linalg.norm(a)) for x in (b, c))
        text += f"  {what} {mine:.1e} ({theirs:.1e})"
        fit = bool(jnp.isfinite(b).all())
        if ids is not None and what != "dkernel":
            fit &= not bool(jnp.any(b[ids == 0]))
        good &= fit and mine < 1.5 * theirs
        text += "" if fit else " NOT FINITE, or padding not 0"
    return good, text


def programs(heads: int, channels: int, window: int | None) -> Iterator[tuple[str, Any, bool]]:
    """What is timed: a name, the layer, and whether rows are packed."""
    latent = LATENT | dict(qk_nope_head_dim=channels, v_head_dim=channels)
    of_layers: dict[str, dict[str, Any]] = dict(
        layer=dict(head_dim=channels, window_size=window), latent=latent
    )
    for name, options in of_layers.items():
        for packed in (False, True):
            for implementation in (asked(), "xla"):
                layer = build(options, jnp.bfloat16, implementation, heads)
                text = f"{name}{', packed' if packed else ''}{', xla' if implementation == 'xla' else ''}"
                yield text, layer, packed
