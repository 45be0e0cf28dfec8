"""Run by test_linear_cross_entropy.py in a process of its own, with 8 CPU devices."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltajax.layers import linear_cross_entropy, shard_ops

B, T, D, VOCAB, CHUNK = 8, 48, 32, 80, 16
TOLERANCE = 1e-5
_COLLECTIVE = re.compile(r"= (?P<type>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all)\(")


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


# Name -> mesh, where rows, the kernel's two dimensions lie, and whether the kernel has to be gathered.
LAYOUTS = {
    "data": (mesh(data=8), dict(batch="data")),
    "fsdp": (mesh(fsdp=8), dict(batch="fsdp", embed="fsdp")),
    "data and fsdp": (mesh(data=2, fsdp=4), dict(batch=("data", "fsdp"), embed="fsdp")),
    "vocabulary on a row axis": (mesh(data=2, fsdp=4), dict(batch=("data", "fsdp"), vocab="fsdp")),
    "vocabulary on its own axis": (mesh(data=4, tensor=2), dict(batch="data", vocab="tensor")),
    "all three": (
        mesh(data=2, fsdp=2, tensor=2),
        dict(batch=("data", "fsdp"), embed="fsdp", vocab="tensor"),
    ),
    "embed on both row axes": (mesh(data=2, fsdp=4), dict(batch=("data", "fsdp"), embed=("data", "fsdp"))),
    "embed off the rows": (mesh(data=2, tensor=4), dict(batch="data", embed="tensor")),
    "rows that do not split": (mesh(data=1, fsdp=3), dict(batch="fsdp", embed="fsdp", vocab="fsdp")),
}


def problem(dtype):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    kernel = jnp.asarray(rng.normal(size=(D, VOCAB)) / 2, jnp.float32)
    mask = rng.random((B, T)) < 0.5
    return hidden, kernel, np.where(mask, rng.integers(0, VOCAB, (B, T)), -1).astype(np.int32), mask


def check(name: str) -> list[str]:
    """What is wrong with a layout."""
    where, axes = LAYOUTS[name]
    wrong = []
    row, place = P(axes["batch"]), P(axes.get("embed"), axes.get("vocab"))
    if name.startswith("rows that do not"):
        row = place = P()
    shardings = [NamedSharding(where, spec) for spec in (row, place, row, row)]

    def loss(*x):
        with shard_ops(where, **axes):
            return linear_cross_entropy(*x, chunk_size=CHUNK, z_loss=0.1)

    def alone(*x):
        return linear_cross_entropy(*x, chunk_size=CHUNK, z_loss=0.1)

    x = problem(jnp.float32)
    step = jax.jit(
        jax.value_and_grad(loss, (0, 1)),
        in_shardings=shardings,
        out_shardings=(NamedSharding(where, P()), tuple(shardings[:2])),
    )
    value, grads = step(*x)
    expected = jax.jit(jax.value_and_grad(alone, (0, 1)))(*x)
    evaluated = jax.jit(loss, in_shardings=shardings)(*x)
    for part, a, b in zip(
        ("loss", "value", "d_hidden", "d_kernel"),
        (value, evaluated, *grads),
        (expected[0], expected[0], *expected[1]),
        strict=True,
    ):
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error < TOLERANCE:
            wrong.append(f"{part} is off by {error}")

    # Of what moves, only the kernel and its gradient are as large as D x vocab; nothing is of tokens x D.
    text = step.lower(*x).compile().as_text()
    for found in _COLLECTIVE.finditer(text):
        for shape in re.findall(r"\w+\[([\d,]+)\]", found["type"]):
            sizes = [int(n) for n in shape.split(",")]
            if found["kind"] != "all-reduce" and not set(sizes) <= {D, VOCAB, *_parts(D), *_parts(VOCAB)}:
                wrong.append(f"{found['kind']} of {found['type']}")
    return wrong


def _parts(size: int) -> list[int]:
    return [size // n for n in (2, 4, 8) if size % n == 0]


def check_gather_is_narrow() -> list[str]:
    """A bfloat16 program rounds the float32 kernel and then gathers it, once, outside the loop over chunks.

    (The CPU's compiler widens any bfloat16 collective again, so the gather's own dtype says nothing here.)
    """
    where, axes = LAYOUTS["data and fsdp"]
    shardings = [NamedSharding(where, s) for s in (P(axes["batch"]), P("fsdp"), P(axes["batch"]))]

    def loss(*x):
        with shard_ops(where, **axes):
            return linear_cross_entropy(*x, chunk_size=CHUNK)

    hidden, kernel, targets, _ = problem(jnp.bfloat16)
    step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=shardings)
    lowered = step.lower(hidden, kernel, jnp.maximum(targets, 0))
    gathered = re.findall(r" all-gather\(%([\w.]+)", lowered.compile().as_text())
    return [] if len(gathered) == 1 and "convert" in gathered[0] else [f"gathers of {gathered}"]


def check_users_shard_map() -> list[str]:
    """Inside a caller's own shard_map the kernel's gradient is summed over the rows."""
    where, x = mesh(data=8), problem(jnp.float32)

    def local(*x):
        return jax.lax.psum(linear_cross_entropy(*x, chunk_size=CHUNK), "data")

    rows = P("data")
    split = jax.shard_map(local, mesh=where, in_specs=(rows, P(), rows, rows), out_specs=P())
    got = jax.jit(jax.value_and_grad(split, (0, 1)))(*x)
    expected = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)))(*x)
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), got, expected)
    return [f"errors {errors}"] if max(jax.tree.leaves(errors)) > TOLERANCE else []


def main() -> int:
    """Prints one line per check."""
    checks = {name: lambda name=name: check(name) for name in LAYOUTS}
    checks |= {
        "the gathered kernel is rounded": check_gather_is_narrow,
        "user's shard_map": check_users_shard_map,
    }
    failed = 0
    print()
    for name, run in checks.items():
        wrong = run()
        failed += bool(wrong)
        print(f"{'FAILED' if wrong else 'ok'} {name} {'; '.join(wrong)}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
