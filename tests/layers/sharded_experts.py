"""Run by test_sharded_experts.py in a process of its own, with 8 CPU devices."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltajax.layers import MixtureOfExperts, shard_ops

T, D, F, E = 6, 8, 4, 8
TOLERANCE = 1e-5
MESHES = {
    "expert 8": dict(expert=8),
    "fsdp 2, expert 4": dict(fsdp=2, expert=4),
    "data 2, expert 2, tensor 2": dict(data=2, expert=2, tensor=2),
    "fsdp 2, context 2, tensor 2": dict(fsdp=2, context=2, tensor=2),  # every device has all experts
    "expert 2, context 2, tensor 2": dict(expert=2, context=2, tensor=2),
}
# Rows; one is spread over no axis.
CALLS = [(mesh, 8) for mesh in MESHES] + [("expert 8", 1), ("data 2, expert 2, tensor 2", 1)]


def build(name):
    kimi = dict(router="sigmoid", correction_bias=True, scale=2.446)
    options = kimi if name == "kimi" else dict(shared_gate=True)
    layer = MixtureOfExperts(
        hidden_size=D, intermediate_size=F, num_experts=E, experts_per_token=3, num_shared_experts=1,
        initializer_range=0.4, rngs=nnx.Rngs(1), **options,
    )  # fmt: skip
    if name == "kimi":
        layer.correction_bias[...] = jnp.linspace(-0.2, 0.2, E)
    return layer


def sharded(sizes):
    """The mesh, and `shard_ops` on it as the trainer calls it."""
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    has = {axis: axis if axis in sizes else None for axis in ("context", "fsdp", "tensor", "expert")}
    batch = tuple(axis for axis in ("data", "fsdp", "expert") if axis in sizes)
    return mesh, lambda: shard_ops(
        mesh, batch, has["tensor"], sequence=has["context"], embed=has["fsdp"], mlp=has["tensor"],
        experts=has["expert"],
    )  # fmt: skip


def inputs(rows):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(rows, T, D)), jnp.float32) for _ in range(2))
    x = x.at[:, 1].set(x[0, 0])  # many tokens with the same experts
    ids = jnp.asarray(rng.integers(0, 2, size=(rows, T)).astype(np.int32))
    return x, dy, ids


def check(name: str, mesh_name: str, rows: int) -> list[str]:
    """What differs under the mesh: outputs, gradients of input and parameters."""
    graph, state = nnx.split(build(name))
    x, dy, ids = inputs(rows)

    def run(state, x):
        def loss(state, x):
            y = nnx.merge(graph, state)(x, segment_ids=ids)
            return jnp.sum(y * dy), y

        return jax.grad(loss, (0, 1), has_aux=True)(state, x)

    _, over = sharded(MESHES[mesh_name])

    def spread(state, x):
        with over():
            return run(state, x)

    expected, got = jax.jit(run)(state, x), jax.jit(spread)(state, x)
    wrong = []
    for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(t) for t in (got, expected)), strict=True):
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-2)
        if not error < TOLERANCE:
            wrong.append(f"{jax.tree_util.keystr(path)} is off by {error:.1e}")
    return wrong


def gathered() -> list[str]:
    """What a device under an expert axis holds of other experts than its own, or gathers of all rows."""
    mesh, over = sharded(MESHES["fsdp 2, expert 4"])
    graph, state = nnx.split(build("kimi"))
    x, dy, ids = inputs(8)

    def place(path, leaf):
        experts = any(getattr(key, "key", None) == "experts" for key in path)
        spec = (
            P() if not experts else P("expert", None, "fsdp") if "down" in str(path) else P("expert", "fsdp")
        )
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    state = jax.tree.map_with_path(place, state)
    x, dy, ids = jax.device_put((x, dy, ids), NamedSharding(mesh, P(("fsdp", "expert"))))

    def loss(state, x):
        with over():
            return jnp.sum(nnx.merge(graph, state)(x, segment_ids=ids) * dy)

    text = jax.jit(jax.grad(loss)).lower(state, x).compile().as_text()
    shapes = set(re.findall(r"f32\[([\d,]+)\]", text))
    kernels = {(D, F), (F, D), (D // 2, F), (F, D // 2)}
    wrong = [s for s in shapes for e in (E, E // 2) for k in kernels if s == ",".join(map(str, (e, *k)))]
    wrong += re.findall(rf"= (\w+\[8,{T}[,\]]\S*) all-gather\(", text)  # and not the 4 of its experts' axis
    own = f"{E // 4},{D},{F}"  # what it gathers along fsdp
    return [f"holds {shape}" for shape in wrong] + ([] if own in shapes else [f"holds no {own}"])


def refused() -> list[str]:
    """What is not said of experts that do not split."""
    _, over = sharded(dict(expert=8))
    layer = MixtureOfExperts(
        hidden_size=D, intermediate_size=F, num_experts=6, experts_per_token=1, rngs=nnx.Rngs(0)
    )
    try:
        with over():
            layer(jnp.zeros((8, T, D)))
    except ValueError as error:
        return [] if "6 experts do not split over 8 devices" in str(error) else [str(error)]
    return ["no error"]


def main() -> int:
    """Prints one line per check."""
    results = {}
    for mesh, rows in CALLS:
        name = "qwen" if mesh == "fsdp 2, expert 4" else "kimi"
        results[f"{name} on {mesh}, {rows} rows"] = check(name, mesh, rows)
    results["no device holds another's experts"] = gathered()
    results["numbers that do not split are refused"] = refused()
    print()
    for what, wrong in results.items():
        print(f"{'FAILED' if wrong else 'ok'} {what} {'; '.join(wrong)}", flush=True)
    return sum(map(bool, results.values()))


if __name__ == "__main__":
    sys.exit(main())
