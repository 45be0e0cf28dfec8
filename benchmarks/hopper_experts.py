"""Checks and times the Hopper kernels of a mixture's experts: sizes of Kimi Linear 48B, 64 of its experts.

    python -m benchmarks.hopper_experts --check    # against float32, expert by expert; equal bits on 5 runs
    python -m benchmarks.hopper_experts            # milliseconds of the layer, and of each kernel
    python -m benchmarks.hopper_experts --tilings 2,4,3 1,3,2 1,4,3 --parts kernels

A tiling is the warpgroups that multiply, then the stages of `grouped_product` and of `grouped_outer`.
"""

import dataclasses
import time
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.hopper import card
from benchmarks.op_times import busy_ms, elapsed_ms, print_profile
from deltajax.layers import expert_rows
from deltajax.layers.experts import Experts
from pallas_kernels.gpu import grouped

LIMIT = 1e-2  # of an expert's or all tokens' results: those between products are rounded to x's dtype
# Hidden size, width of an expert, experts, tokens, choices of each, how uneven (see `choices`), dtype.
CASES = [
    (256, 128, 5, 75, 4, "none", "bfloat16"),
    (256, 128, 5, 75, 4, "none", "float16"),
    (384, 640, 7, 1000, 2, "random", "bfloat16"),
    (512, 256, 16, 700, 8, "uneven", "float16"),
    (512, 256, 8, 513, 2, "one", "bfloat16"),
    (2304, 1024, 16, 1500, 8, "uneven", "bfloat16"),
    (2304, 1024, 64, 8, 8, "random", "bfloat16"),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    check: bool = False
    """Check errors instead of timing."""
    only: tuple[int, ...] = tuple(range(len(CASES)))
    """With --check: numbers of the cases."""
    repeats: int = 5
    """With --check: runs that must agree bit by bit."""
    hidden: int = 2304
    width: int = 1024
    experts: int = 64
    tokens: tuple[int, ...] = (8192, 8)
    """How many, each time with 8 choices."""
    tilings: tuple[str, ...] = ("2,4,3",)
    parts: tuple[Literal["layer", "kernels", "ragged"], ...] = ("layer", "kernels", "ragged")
    """What to time: the layer, each kernel by itself, the form without kernels (1024 tokens at most)."""
    profile: int = 0
    """Print so many of the kernels that take longest."""
    interpret: bool = False
    """Run on the CPU, in the interpreter, tiny sizes; with --check, so choose --only 0."""


def use(tiling: str) -> None:
    """Makes programs compiled from now on use a tiling."""
    warpgroups, *stages = map(int, tiling.split(","))
    grouped.PRODUCT, grouped.OUTER = (grouped.Tiling(warpgroups, n) for n in stages)
    jax.clear_caches()


def choices(rng: np.random.Generator, tokens: int, choices: int, experts: int, loads: str) -> jax.Array:
    """int32 [1, tokens, choices], different experts for a token but with "one" and "none".

    "one" gives all rows to an expert; "uneven" is a power law, so that some experts have hardly a row;
    "none" leaves every second expert without a row, and rows that go to no expert.
    """
    if loads == "one":
        found = np.full((tokens, choices), experts - 2)
    elif loads == "none":
        found = rng.choice([*range(0, experts, 2), experts], (tokens, choices))
    else:
        weight = np.zeros(experts) if loads == "random" else -2.5 * np.log1p(rng.permutation(experts))
        found = np.argsort(-(weight + rng.gumbel(size=(tokens, experts))), axis=1)[:, :choices]
    return jnp.asarray(found[None], jnp.int32)


def arguments(rng, hidden: int, width: int, experts: int, choice: jax.Array, dtype) -> tuple[Any, ...]:
    """x, choice, weight, the kernels' state, and dy."""
    shape = (*choice.shape[:2], hidden)
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 6)
    x, dy = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    weight = jax.random.uniform(keys[2], choice.shape, jnp.float32, 0.1, 1)
    sizes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
    kernels = [jax.random.normal(k, s, dtype) * s[1] ** -0.5 for k, s in zip(keys[3:], sizes, strict=True)]
    return x, choice, weight, kernels, dy


def layer(implementation: str | None, hidden: int, width: int, experts: int, dtype) -> Any:
    """The layer as a function of x, choice, weight and its kernels: gate, up, down."""
    sizes: dict[str, Any] = dict(
        hidden_size=hidden, intermediate_size=width, num_experts=experts, dtype=dtype
    )
    sizes |= dict(param_dtype=dtype, implementation=implementation)
    graph, state = nnx.split(nnx.eval_shape(lambda: Experts(**sizes, rngs=nnx.Rngs(0))))

    def run(x, choice, weight, kernels):
        gate, up, down = kernels
        parameters = jax.tree.unflatten(jax.tree.structure(state), (down, gate, up))  # by name
        return nnx.merge(graph, parameters)(x, choice, weight)

    return run


def both(run, x, choice, weight, kernels, dy) -> dict[str, Any]:
    """The result and its gradients."""
    y, pull = jax.vjp(lambda x, weight, kernels: run(x, choice, weight, kernels), x, weight, kernels)
    dx, dweight, (gate, up, down) = pull(dy)
    return dict(y=y, dx=dx, dweight=dweight, gate=gate, up=up, down=down)


@jax.jit
def expected(x, choice, weight, kernels, dy) -> dict[str, Any]:
    """The same in float32: every expert with all tokens, and shares of zero."""

    def run(x, choice, weight, kernels):
        def add(y, each):
            number, gate, up, down = each
            share = jnp.sum(jnp.where(choice == number, weight, 0), axis=-1, keepdims=True)
            return y + share * ((jax.nn.silu(x @ gate) * (x @ up)) @ down), None

        numbers = jnp.arange(len(kernels[0]))
        return jax.lax.scan(jax.checkpoint(add), jnp.zeros_like(x), (numbers, *kernels))[0]

    with jax.default_matmul_precision("highest"):
        x, dy, kernels = jax.tree.map(lambda a: a.astype(jnp.float32), (x, dy, kernels))
        return both(run, x, choice, weight, kernels, dy)


@jax.jit
def errors_of(got: dict[str, Any], want: dict[str, Any]) -> dict[str, jax.Array]:
    """Relative; of the experts' kernels, that of the worst expert: one without rows must have zeros."""

    def error(name, a, b):
        difference = jnp.linalg.norm((a.astype(jnp.float32) - b).reshape(len(a), -1), axis=1)
        size = jnp.linalg.norm(b.reshape(len(b), -1), axis=1)
        if name in ("y", "dx", "dweight"):
            difference, size = jnp.linalg.norm(difference), jnp.linalg.norm(size)
        return jnp.max(difference / jnp.maximum(size, 1e-30))

    return {name: error(name, got[name], want[name]) for name in got}


def check(options: Options) -> bool:
    """Errors of every case and tiling, and equal bits on repeated runs."""
    seed = int(time.time())
    rng, ok = np.random.default_rng(seed), True
    for tiling in options.tilings:
        use(tiling)
        for D, F, E, T, J, loads, dtype in (CASES[i] for i in options.only):
            choice = choices(rng, T, J, E, loads)
            args = arguments(rng, D, F, E, choice, jnp.dtype(dtype))
            run = jax.jit(partial(both, layer("pallas", D, F, E, jnp.dtype(dtype))))
            got = run(*args)
            same = all(
                bool(jnp.array_equal(got[name], other[name]))
                for other in (run(*args) for _ in range(options.repeats))
                for name in got
            )
            errors = jax.device_get(errors_of(got, expected(*args)))
            good = same and all(e < LIMIT for e in errors.values())
            ok &= good
            print(
                f"{'ok  ' if good else 'FAIL'} {tiling} {dtype} {D}x{F} E {E} T {T}x{J} {loads}:",
                *(f"{name} {error:.1e}" for name, error in errors.items()),
                f"same={same}",
                flush=True,
            )
    print(f"check: {'ok' if ok else 'FAILED'}, seed {seed}, {card()}")
    return ok


def report(name: str, f, args, flops: float, profile: int = 0) -> None:
    """A line of times, of throughput and of memory."""
    compiled = jax.jit(f).lower(*args).compile()
    groups = 1 if jax.default_backend() == "cpu" else 7  # the interpreter is slow
    ms, busy = elapsed_ms(compiled, args, groups=groups), busy_ms(compiled, args)
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    text = f"  {name:34s} {ms:8.3f} ms"
    text += "" if busy is None else f", kernels alone {busy:.3f}"
    print(f"{text}, {flops / ms / 1e9:.0f} TFLOP/s, {temporary:.0f} MiB temporary", flush=True)
    if profile and busy is not None:
        print_profile(compiled, args, profile, compiled.as_text())


def time_layer(implementation: str | None, options: Options, T: int) -> None:
    """Forward, and forward + backward."""
    D, F, E = options.hidden, options.width, options.experts
    rng = np.random.default_rng(int(time.time()))
    args = arguments(rng, D, F, E, choices(rng, T, 8, E, "random"), jnp.bfloat16)
    run = layer(implementation, D, F, E, jnp.bfloat16)
    flops = 2 * 3 * T * 8 * D * F
    name = implementation or "XLA"
    report(f"layer by {name}, forward", run, args[:-1], flops, options.profile)
    report(f"layer by {name}, forward + backward", partial(both, run), args, 11 / 3 * flops, options.profile)


def time_kernels(options: Options, T: int) -> None:
    """Each kernel, beside one product of as many rows with a single matrix."""
    D, F, E = options.hidden, options.width, options.experts
    rng = np.random.default_rng(int(time.time()))
    choice = choices(rng, T, 8, E, "random")
    rows = jax.jit(expert_rows.Blocks.of, static_argnums=(1, 2))(choice, 0, E)
    used = (rows.first[-1:] + rows.blocks[-1:]).astype(jnp.int32)
    keys = jax.random.split(jax.random.key(0), 4)
    M, flops = rows.order.size, 2 * T * 8 * D * F
    wide, narrow = (jax.random.normal(k, (M, n), jnp.bfloat16) for k, n in zip(keys, (D, F), strict=False))
    up, down = (
        jax.random.normal(k, (E, *s), jnp.bfloat16) for k, s in zip(keys[2:], ((D, F), (F, D)), strict=True)
    )
    back = partial(grouped.grouped_product, transposed=True)
    products = (
        (f"product {D} -> {F}", grouped.grouped_product, (wide, up, rows.group, used)),
        (f"product {F} -> {D}", grouped.grouped_product, (narrow, down, rows.group, used)),
        (f"product transposed {D} -> {F}", back, (wide, down, rows.group, used)),
        (f"product transposed {F} -> {D}", back, (narrow, up, rows.group, used)),
        (f"outer {D} x {F}", grouped.grouped_outer, (wide, narrow, rows.first, rows.blocks)),
        (f"outer {F} x {D}", grouped.grouped_outer, (narrow, wide, rows.first, rows.blocks)),
        ("one matrix", jnp.matmul, (wide[: T * 8], up[0])),
        ("all rows' outer", lambda x, y: x.T @ y, (wide[: T * 8], narrow[: T * 8])),
    )
    for name, f, args in products:
        report(name, f, args, flops)


def main(options: Options) -> int:
    """Runs the check or the table."""
    if options.interpret:
        expert_rows.KERNEL_ROWS = {"cpu": expert_rows.Blocks}
        options = dataclasses.replace(options, hidden=256, width=128, experts=3, tokens=(20,), repeats=1)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            return run(options)
    return run(options)


def run(options: Options) -> int:
    """What `main` does, in the interpreter or on a card."""
    if options.check:
        return 0 if check(options) else 1
    print(
        f"{card()}, jax {jax.__version__}, bf16,"
        f" {options.experts} experts of {options.hidden} x {options.width}"
    )
    for tiling in options.tilings:
        use(tiling)
        for T in options.tokens:
            print(f"tiling {tiling}, {T} tokens x 8 choices", flush=True)
            if "layer" in options.parts:
                time_layer("pallas", options, T)
            if "kernels" in options.parts and options.experts < 8 * T:
                time_kernels(options, T)
    if "ragged" in options.parts:
        for T in sorted({min(1024, T) for T in options.tokens}):  # the full size needs 16 GiB a product
            print(f"{T} tokens x 8 choices, the form without kernels")
            time_layer(None, options, T)
            if T not in options.tokens or "layer" not in options.parts:
                time_layer("pallas", options, T)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
