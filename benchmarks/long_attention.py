"""Checks and times attention block by block (`deltajax.layers.blockwise`), forward and forward + backward.

    python -m benchmarks.long_attention --check    # errors in bfloat16 beside those of all logits at once
    python -m benchmarks.long_attention            # times by the logits of a step, and of other forms
    python -m benchmarks.long_attention --shapes 2 8192 8192 --step-logits 25 26
    python -m benchmarks.long_attention --shapes 2 8192 8192 --step-logits --layers   # the layers, by cuDNN

A shape is rows, queries of a row, and keys, of which the queries are the last. `dense` holds all logits (left
out above `--dense-gib`), `cudnn` is cuDNN's fused kernel (as many keys as queries). `--check` also compares
`Attention` and `LatentAttention` with cuDNN asked for, and says what runs; `--layers` times it, of
rows that are one segment and of packed ones, beside plain JAX (as many keys as queries). `temp` is GiB of the
compiled program's temporaries, TFLOP/s count 2 products forward and 7 in all of the pairs that are seen (in
rows that are one segment).
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import tyro

from benchmarks import attention_layers
from benchmarks.op_times import elapsed_ms
from deltajax.layers import attention_blocks
from deltajax.layers.attention_blocks import Source
from deltajax.layers.blockwise import blockwise_attention
from deltajax.layers.layout import Layout, causal_mask, layout_of

SCALE = 0.08


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    check: bool = False
    """Check errors instead of timing."""
    shapes: tuple[tuple[int, int, int], ...] = ((2, 8192, 8192), (1, 32768, 32768), (1, 32768, 131072))
    heads: int = 16
    channels: int = 128
    step_logits: tuple[int, ...] = (24, 25, 26)
    """Logits of a step, as powers of two."""
    window: int | None = None
    dense_gib: float = 10.0
    """Most float32 logits for which the dense form is timed."""
    layers: bool = False
    """Time the layers with cuDNN too; with `--check`, check nothing else."""
    document: int = 2000
    """Tokens of a document of packed rows."""


def layouts(B: int, T: int, S: int, ids=None) -> tuple[Layout, Layout]:
    """Of a row's last T tokens, and of all S."""
    keys = layout_of(B, S, ids, None)
    return jax.tree.map(lambda x: x[:, S - T :], keys), keys


def by_blocks(q, k, v, queries, keys, window=None):
    """The form that is checked."""
    source = Source((k, v), keys)
    return blockwise_attention(q, queries, [source], lambda k, v: (k, v), window=window, scale=SCALE)


def dense(q, k, v, queries, keys, window=None):
    """All logits at once."""
    mask = causal_mask(queries, keys, window)
    o = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=SCALE)
    return jnp.where((queries.run != 0)[..., None, None], o, 0)


def cudnn(q, k, v, queries, keys, window=None):
    """cuDNN's kernel, which takes no layouts."""
    reach = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, scale=SCALE, local_window_size=reach, implementation="cudnn"
    )


def both(attention, window=None):
    """Forward, and forward with the gradients of q, k and v."""

    def forward(q, k, v, d_o, queries, keys):
        return attention(q, k, v, queries, keys, window)

    def gradients(q, k, v, d_o, queries, keys):
        o, pull = jax.vjp(lambda *x: forward(*x, d_o, queries, keys), q, k, v)
        return o, pull(d_o)

    return forward, gradients


def inputs(B: int, T: int, S: int, heads: int, channels: int):
    """Random q, k, v and a cotangent of the output, in bfloat16."""
    shapes = [(B, n, heads, channels) for n in (T, S, S, T)]
    pairs = zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in pairs]


def check(options: Options) -> bool:
    """Errors by norm in bfloat16 against float32, at most twice those of the dense form."""
    ok = True
    B, T, S = 2, 1536, 3000
    ids = jnp.array([[0] * 100 + [1] * 1200 + [2] * 1500 + [3] * 150 + [0] * 50, [1] * 3000])
    for window in () if options.layers else (None, 700):
        args = (*inputs(B, T, S, options.heads, options.channels), *layouts(B, T, S, ids))
        exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, args)
        with jax.default_matmul_precision("highest"):
            want = jax.jit(both(dense, window)[1])(*exact)
        errors = []
        for form in (by_blocks, dense):
            with mock.patch.object(attention_blocks, "STEP_LOGITS", 2**23):
                got = jax.jit(both(form, window)[1])(*args)
            pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
            errors.append([float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b)) for a, b in pairs])
        for name, mine, other in zip(("o", "dq", "dk", "dv"), *errors, strict=True):
            good = mine < 2 * other
            ok &= good
            print(f"{'ok  ' if good else 'FAIL'} window {window} {name}: {mine:.1e}, dense {other:.1e}")
    ok &= attention_layers.check()
    print(f"check: {'ok' if ok else 'FAILED'}, {jax.devices()[0].device_kind}")
    return ok


def timed(name: str, functions, args, pairs: float, options: Options) -> None:
    """Prints a line: milliseconds, TFLOP/s and temporaries of the forward half and of both."""
    text = f"  {name:20s}"
    for function, what, products in zip(functions, ("forward", "both"), (2, 7), strict=True):
        try:
            program = jax.jit(function).lower(*args).compile()
            ms = elapsed_ms(program, args, groups=3)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            text += f"  {what}: {str(error).splitlines()[0][:80]}"
            continue
        rate = products * 2 * pairs * options.heads * options.channels / ms / 1e9
        temp = program.memory_analysis().temp_size_in_bytes / 2**30
        text += f"  {what} {ms:9.2f} ms {rate:6.1f} TFLOP/s temp {temp:6.2f}"
    print(text, flush=True)


def main(options: Options) -> int:
    """Runs the check or the table."""
    if options.check:
        return 0 if check(options) else 1
    heads, window = options.heads, options.window
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}, {heads} heads of {options.channels}, bfloat16")
    for B, T, S in options.shapes:
        args = (*inputs(B, T, S, heads, options.channels), *layouts(B, T, S))
        most = S if window is None else window
        pairs = float(B * sum(min(t + 1, most) for t in range(S - T, S)))
        print(f"{B} rows, {T} queries, {S} keys, window {window}")
        for power in options.step_logits:
            with mock.patch.object(attention_blocks, "STEP_LOGITS", 2**power):
                timed(f"blocks, 2^{power}", both(by_blocks, window), args, pairs, options)
        if B * heads * T * S * 4 <= options.dense_gib * 2**30:
            timed("dense", both(dense, window), args, pairs, options)
        if T == S and jax.default_backend() == "gpu":
            timed("cudnn", both(cudnn, window), args, pairs, options)
        if T == S and options.layers:
            ids = attention_layers.packing(B, T, options.document)
            for name, layer, packed in attention_layers.programs(heads, options.channels, window):
                functions = attention_layers.both(layer, ids if packed else None)
                timed(name, functions, attention_layers.inputs(layer, B, T), pairs, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
