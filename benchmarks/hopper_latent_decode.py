"""Checks and times the Hopper kernel of decoding's attention to latents: 32 heads, 512 + 64 channels.

    python -m benchmarks.hopper_latent_decode --check # against softmax in float32, and equal bits on 20 runs
    python -m benchmarks.hopper_latent_decode --plain # kernel time, and what XLA makes of the plain form

`kernel` is the median time of the kernel alone, `elapsed` a queued run with what joins the shares.
"""

import dataclasses
import statistics
from functools import partial

import jax
import jax.numpy as jnp
import tyro

from benchmarks.op_times import elapsed_ms
from deltajax.layers.attention_cache import LatentCache, held
from deltajax.layers.blockwise import attend
from deltajax.layers.layout import Layout
from pallas_kernels.gpu import latent_decode

H, RANK, SHARED = 32, 512, latent_decode.SHARED_KEY
SCALE = 192**-0.5
TOLERANCE = 5e-3
# Sequences, heads, slots, channels of the latent, tokens of each sequence.
CHECKED = [
    (1, 32, 4096, 512, (4096,)),
    (4, 32, 5000, 512, (5000, 4999, 1, 0)),
    (3, 64, 64, 512, (64, 63, 100)),
    (2, 70, 1000, 256, (1000, 130)),
    (5, 8, 20000, 128, (20000, 12345, 64, 65, 8192)),
    (40, 32, 3000, 384, tuple(range(75, 3001, 75))),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    check: bool = False
    """Check errors instead of timing."""
    shapes: tuple[tuple[int, int], ...] = ((1, 4096), (1, 131072), (1, 1048576), (7, 1048576), (28, 1048576))
    """Sequences and tokens of each, to time."""
    plain: bool = False
    """Also time the plain form."""


def inputs(B: int, heads: int, slots: int, rank: int, dtype=jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    """Random queries, and latents that repeat after 4096 slots."""
    keys = jax.random.split(jax.random.key(B + slots))
    q = jax.random.normal(keys[0], (B, heads, rank + SHARED), dtype)
    block = min(slots, 4096)
    times = -(-slots // block)

    @jax.jit
    def draw():
        drawn = jax.random.normal(keys[1], (1, 1, block, rank + SHARED), dtype)
        tiled = jnp.broadcast_to(drawn, (B, times, *drawn.shape[2:]))
        return tiled.reshape(B, -1, rank + SHARED)[:, :slots]

    return q, draw()


def expected(q, latent, length, rank: int):
    """Softmax in float32."""
    q, latent = (x.astype(jnp.float32) for x in (q, latent))
    seen = (jnp.arange(latent.shape[1]) < length[:, None])[:, None]
    logits = jnp.einsum("bhc,bsc->bhs", q, latent, precision="highest") * SCALE
    logits = jnp.where(seen, logits, -1e30)
    p = jnp.where(seen, jnp.exp(logits - jnp.max(logits, axis=2, keepdims=True)), 0)
    p = p / jnp.maximum(p.sum(axis=2, keepdims=True), 1e-30)
    return jnp.einsum("bhs,bsc->bhc", p, latent[..., :rank], precision="highest")


def check() -> bool:
    """Errors, and equal bits on repeated runs."""
    ok = True
    for dtype in (jnp.bfloat16, jnp.float16):
        for B, heads, slots, rank, lengths in CHECKED:
            q, latent = inputs(B, heads, slots, rank, dtype)
            length = jnp.array(lengths, jnp.int32)
            run = jax.jit(partial(latent_decode.attend, rank=rank, scale=SCALE))
            got, want = run(q, latent, length), expected(q, latent, length, rank)
            norm = jnp.linalg.norm(want, axis=(1, 2))
            errors = jnp.linalg.norm(got.astype(jnp.float32) - want, axis=(1, 2)) / jnp.maximum(norm, 1e-30)
            error = float(jnp.max(errors))  # of the worst sequence; one without tokens must be 0
            same = all(bool(jnp.array_equal(got, run(q, latent, length))) for _ in range(20))
            good = same and error < TOLERANCE
            ok &= good
            what = f"{dtype.__name__} B {B} heads {heads} slots {slots} rank {rank}"
            print(f"{'ok  ' if good else 'FAIL'} {what}: {error:.1e} same={same}", flush=True)
    print(f"check: {'ok' if ok else 'FAILED'}, {jax.devices()[0].device_kind}")
    return ok


def plain(q, latent, length):
    """What runs where the kernel does not."""
    last = Layout(jnp.ones((len(length), 1), jnp.int32), length[:, None] - 1)
    both = lambda x: (x[:, :, None], x[:, :, None])  # noqa: E731

    def softmax(q, key, value, mask):
        return jax.nn.dot_product_attention(q, key, value, mask=mask, scale=SCALE)

    source = held(LatentCache(latent, length), packed=False)
    return attend(q[:, None], last, [source], both, softmax, scale=SCALE)[:, 0, :, :RANK]


def kernel_ms(run, args) -> float:
    """Median device time of the kernel."""
    from jax.experimental.mosaic.gpu import profiler

    times = profiler.measure(run, aggregate=False, iterations=5)(*args)[1]
    runs = times if isinstance(times[0], list) else [times]
    found = [ms for each in runs for name, ms in each if "latent_decode" in name]
    if not found:
        raise RuntimeError(f"no kernel named latent_decode among {sorted({n for r in runs for n, _ in r})}")
    return statistics.median(found)


def main(options: Options) -> int:
    """Runs the check or the table."""
    if options.check:
        return 0 if check() else 1
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {H} heads, milliseconds")
    for B, slots in options.shapes:
        args = (*inputs(B, H, slots, RANK), jnp.full((B,), slots, jnp.int32))
        run = jax.jit(partial(latent_decode.attend, rank=RANK, scale=SCALE))
        ms = kernel_ms(run, args)
        text = f"B {B:3d} {slots:8d} tokens  kernel {ms:.4f} ({args[1].nbytes / ms / 1e6:.0f} GB/s)"
        text += f"  elapsed {elapsed_ms(run.lower(*args).compile(), args):.4f}"
        if options.plain:
            text += f"  plain {elapsed_ms(jax.jit(plain).lower(*args).compile(), args):.4f}"
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
