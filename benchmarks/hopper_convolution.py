"""Checks and times the short convolution's Hopper kernels beside XLA's program, on a Hopper card.

python -m benchmarks.hopper_convolution            # device milliseconds, forward and forward + backward
python -m benchmarks.hopper_convolution --check    # errors against float64, equal bits on 20 runs
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.hopper import card
from benchmarks.op_times import busy_ms
from deltajax.ops import short_convolution
from tests.cases import relative_error

LIMIT = 5e-3  # of results that are rounded to x's dtype; the others are sums in float32
SIZES = ((8, 2048, 2048), (1, 32768, 2048), (16, 2048, 4096))


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    check: bool = False
    """Check errors instead of timing."""
    repeats: int = 20
    """With --check: runs that must agree bit by bit."""


def arrays(seed: int, B: int, T: int, D: int, W: int, dtype, packed: bool):
    """x, weight, bias, segment_ids and dy; NaN where there is padding."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 7, (B, T)), axis=1)
    ids[0, T // 3 : T // 3 + 5] = 0
    x, dy = (jnp.asarray(rng.normal(size=(B, T, D)), dtype) for _ in range(2))
    x = jnp.where((ids == 0)[..., None], jnp.nan, x) if packed else x
    weight, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((D, W), (D,)))
    return x, weight, bias, jnp.asarray(ids, jnp.int32) if packed else None, dy


@functools.partial(jax.jit, static_argnames=("implementation", "activation"))
def run(x, weight, bias, ids, dy, *, implementation, activation="silu"):
    """y, dx, dweight, dbias."""

    def f(x, weight, bias):
        return short_convolution(
            x, weight, bias=bias, segment_ids=ids, implementation=implementation, activation=activation
        )[0]

    y, pull = jax.vjp(f, x, weight, bias)
    return y, *pull(dy.astype(y.dtype))


def check(options: Options) -> bool:
    """Whether every result of every case is right."""
    ok, seed = True, int(time.time())
    for B, T, D, W, dtype, packed, activation in (
        (2, 64, 64, 4, jnp.bfloat16, True, "silu"),
        (2, 131, 192, 4, jnp.bfloat16, True, "silu"),
        (3, 2051, 128, 4, jnp.bfloat16, False, "silu"),
        (2, 1000, 256, 2, jnp.float16, True, None),
        (1, 777, 64, 9, jnp.float16, False, "silu"),
    ):
        x, weight, bias, ids, dy = arrays(seed, B, T, D, W, dtype, packed)
        case = (x, weight, bias, ids, dy)
        got = jax.device_get(run(*case, implementation="pallas", activation=activation))
        again = [run(*case, implementation="pallas", activation=activation) for _ in range(options.repeats)]
        same = all(np.array_equal(a, b) for other in again for a, b in zip(got, other, strict=True))
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            wide = [np.asarray(a).astype(np.float64) for a in (x, weight, bias)]
            exact = run(
                *wide, ids, np.asarray(dy).astype(np.float64), implementation="xla", activation=activation
            )
            errors = [relative_error(a, b) for a, b in zip(got, exact, strict=True)]
        good = same and max(errors[:2]) < LIMIT and max(errors[2:]) < 1e-5
        ok &= good
        named = zip(("y", "dx", "dweight", "dbias"), errors, strict=True)
        print(
            f"{'ok  ' if good else 'FAIL'} {B}x{T}x{D} W {W} {jnp.dtype(dtype)} packed={packed}:",
            *(f"{name} {error:.1e}" for name, error in named),
            f"same={same}",
            flush=True,
        )
    print(f"check: {'ok' if ok else 'FAILED'}, seed {seed}, {card()}")
    return ok


def main(options: Options) -> int:
    """Runs the check or the timing."""
    if options.check:
        return 0 if check(options) else 1
    print(f"{card()}, 4 taps, bf16, SiLU, packed rows; milliseconds")
    for B, T, D in SIZES:
        x, weight, _, ids, dy = arrays(int(time.time()), B, T, D, 4, jnp.bfloat16, True)
        times = []
        for implementation in ("pallas", "xla"):
            both = functools.partial(run, implementation=implementation)
            forward = jax.jit(lambda *args, both=both: both(*args)[0])
            times += [busy_ms(f, (x, weight, None, ids, dy)) for f in (forward, jax.jit(both))]
        print("{}x{}x{}: kernels {:.3f} / {:.3f}, XLA {:.3f} / {:.3f}".format(B, T, D, *times), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
