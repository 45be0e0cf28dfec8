"""Run by test_sharded_mixers.py in a process of its own, with 8 CPU devices; with --all, in whole."""

import contextlib
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltajax.layers import (
    Attention,
    GatedDeltaNet,
    KimiDeltaAttention,
    LatentAttention,
    attention_blocks,
    blockwise,
    shard_ops,
)
from tests.layers import sharded_heads

B, T, D = 2, 32, 24
TOLERANCE = 1e-5
MESHES = {
    "context 8": dict(context=8),  # four tokens a device
    "data 2, context 2, tensor 2": dict(data=2, context=2, tensor=2),
    "context 4, tensor 2": dict(context=4, tensor=2),
}
CASES = {
    "gated_delta_net, 9 taps": lambda **o: GatedDeltaNet(
        num_heads=2, num_v_heads=4, head_dim=8, head_v_dim=4, conv_size=9, implementation="scan", **o
    ),
    "kda": lambda **o: KimiDeltaAttention(num_heads=2, head_dim=8, implementation="scan", **o),
    "full attention": lambda **o: Attention(
        num_heads=4, num_kv_heads=2, head_dim=8, rope_fraction=0.5, qk_norm=True, output_gate=True, **o
    ),
    # Both swap tokens for heads on 2 devices and gather on 8.
    "latent attention": lambda **o: LatentAttention(
        num_heads=4,
        kv_lora_rank=6,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=3,
        rope_theta=100.0,
        **o,
    ),
    # By blocks on 2 devices; one device's tokens on 8; over more devices than one, and than there are.
    "window 5": lambda **o: Attention(num_heads=2, head_dim=8, window_size=5, **o),
    "window 1": lambda **o: Attention(num_heads=2, head_dim=8, window_size=1, **o),
    "window 11": lambda **o: Attention(num_heads=2, head_dim=8, window_size=11, **o),
    "window 100": lambda **o: Attention(num_heads=2, head_dim=8, window_size=100, **o),
}
IDS = np.array(
    [
        [0] * 6
        + [1] * 7
        + [2] * 3
        + [3] * 5
        + [4] * 9
        + [0] * 2,  # padding over a device, edges within others
        [7] * 4 + [1] * 4 + [2] * 24,  # edges between devices, one document over six
    ],
    np.int32,
)


_ALONE: dict = {}  # what one device computes


def check(name: str, sizes: dict, packed: bool, cached: bool = False) -> list[str]:
    """What differs under the mesh: outputs, gradients of input and parameters, and the cache."""
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    layer = CASES[name](hidden_size=D, initializer_range=0.4, rngs=nnx.Rngs(1))
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    ids = jnp.asarray(IDS) if packed else None
    start = None
    if cached:
        start = (
            layer.init_cache(B, T) if isinstance(layer, (Attention, LatentAttention)) else layer.init_cache(B)
        )

    def run(state, x):
        def loss(state, x):
            out = nnx.merge(graph, state)(x, segment_ids=ids, cache=start)
            y, cache = out if cached else (out, None)
            return jnp.sum(y * dy), (y, cache)

        grads, out = jax.grad(loss, (0, 1), has_aux=True)(state, x)
        return {"y": out[0], "cache": out[1], "gradients": grads}

    def spread(state, x):
        rows, heads = (axis if axis in sizes else None for axis in ("data", "tensor"))
        with shard_ops(mesh, rows, heads, sequence="context"):
            return run(state, x)

    key = name, packed, cached
    if key not in _ALONE:
        _ALONE[key] = jax.jit(run)(state, x)
    expected, got = _ALONE[key], jax.jit(spread)(state, x)
    wrong = []
    for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(t) for t in (got, expected)), strict=True):
        error = np.abs(a - b).max() / max(
            np.abs(b).max(), 1e-2
        )  # a window of one: gradients of q and k are 0
        if not error < TOLERANCE:
            wrong.append(f"{jax.tree_util.keystr(path)} is off by {error:.1e}")
    return wrong


def blockwise_check(name: str, sizes: dict) -> list[str]:
    """What differs where the logits are too many for one device, which then goes block by block."""
    with contextlib.ExitStack() as stack:
        limits = dict(STEP_LOGITS=1, MAX_QUERIES=4, MIN_KEYS=3)
        stack.enter_context(mock.patch.object(blockwise, "MAX_LOGITS", 0))
        stack.enter_context(mock.patch.multiple(attention_blocks, **limits))
        visited = stack.enter_context(mock.patch.object(blockwise, "_visit", wraps=blockwise._visit))
        wrong = check(name, sizes, packed=True)
    return wrong if visited.called else [*wrong, "no block was visited"]


def continued(name: str, sizes: dict) -> list[str]:
    """What differs under the mesh where one row packs sequences that continue caches of their own."""
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    graph, state = nnx.split(CASES[name](hidden_size=D, initializer_range=0.4, rngs=nnx.Rngs(1)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2 * T, D)), jnp.float32)
    first, second = jnp.split(
        jnp.asarray([[2] * 9 + [3] * (T - 9) + [3] * 7 + [0] * 3 + [1] * (T - 10)]), 2, 1
    )

    def run(state, x):
        layer = nnx.merge(graph, state)
        delta = not isinstance(layer, (Attention, LatentAttention))
        cache = layer.init_cache(3) if delta else layer.init_cache(3, 2 * T)
        _, cache = layer(x[:, :T], segment_ids=first, cache=cache, num_segments=3)
        return layer(x[:, T:], segment_ids=second, cache=cache, num_segments=3)

    def spread(state, x):
        with shard_ops(mesh, "data", "tensor", sequence="context"):
            return run(state, x)

    expected, got = jax.jit(run)(state, x), jax.jit(spread)(state, x)
    return [
        f"{jax.tree_util.keystr(path)} is off"
        for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(t) for t in (got, expected)), strict=True)
        if not np.abs(a - b).max() < TOLERANCE * max(np.abs(b).max(), 1)
    ]


def step_check(name: str) -> list[str]:
    """What differs under a mesh when one token is decoded, a row of it padding, from a state of noise."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)
    layer = CASES[name](hidden_size=D, initializer_range=0.4, rngs=nnx.Rngs(1))
    layer.implementation = None  # the step's own dispatch, as a model has it
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2 * B, 1, D)), jnp.float32)
    cache = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), layer.init_cache(2 * B))
    ids = jnp.asarray([[1], [1], [0], [1]])

    def run(x, cache):
        return layer(x, segment_ids=ids, cache=cache)

    def spread(x, cache):
        with shard_ops(mesh, "data", "tensor", sequence="context"):
            return run(x, cache)

    placed = cache._replace(state=jax.device_put(cache.state, NamedSharding(mesh, P("data", "tensor"))))
    compiled = jax.jit(spread, donate_argnums=1).lower(x, placed).compile()
    wrong = ["gathers"] if "all-gather" in compiled.as_text() else []
    expected, got = jax.jit(run)(x, cache), compiled(x, placed)
    for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(t) for t in (got, expected)), strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error < TOLERANCE:
            wrong.append(f"{jax.tree_util.keystr(path)} is off by {error:.1e}")
    if not np.array_equal(got[1].state[2], cache.state[2]) or np.any(got[0][2]):
        wrong.append("the row of padding changed")
    return wrong


def gathered() -> list[str]:
    """What latent attention gathers under a context axis that is not the latents or the segment ids."""
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    layer = CASES["latent attention"](hidden_size=D, rngs=nnx.Rngs(1))
    tokens = NamedSharding(mesh, P(None, "context"))
    x, ids = jax.device_put((jnp.zeros((B, T, D)), jnp.asarray(IDS)), tokens)
    with shard_ops(mesh, sequence="context"):
        compiled = jax.jit(lambda x, ids: layer(x, segment_ids=ids)).lower(x, ids).compile()
    shapes = re.findall(r"= (\w+\[[\d,]+\])\S* all-gather", compiled.as_text())
    latent = f"f32[{B},{T},{layer.kv_lora_rank + layer.qk_rope_head_dim}]"
    wrong = [f"gathers {shape}" for shape in shapes if shape not in (latent, f"s32[{B},{T}]")]
    return wrong if latent in shapes else [*wrong, f"gathers no {latent}"]


def main() -> int:
    """Prints one line per check."""
    calls = [(name, "context 8", True, False) for name in CASES]
    whole = ("kda", "full attention", "latent attention")  # rows; the ops have their own checks of them
    calls += [(name, "context 8", False, False) for name in (whole if "--all" in sys.argv else whole[1:2])]
    calls += [(name, "context 8", True, True) for name in ("kda", "full attention", "latent attention")]
    four = ("gated_delta_net, 9 taps", "full attention", "latent attention", "window 5")
    calls += [(name, "data 2, context 2, tensor 2", True, False) for name in four]
    failed = 0
    print()
    for name, mesh, packed, cached in calls:
        wrong = check(name, MESHES[mesh], packed, cached)
        failed += bool(wrong)
        what = f"{name} on {mesh}{', packed' if packed else ''}{', with a cache' if cached else ''}"
        print(f"{'FAILED' if wrong else 'ok'} {what} {'; '.join(wrong)}", flush=True)
    for name, mesh in (  # after the calls that hold all logits, with whose single device they are compared
        ("full attention", "context 4, tensor 2"),
        ("latent attention", "data 2, context 2, tensor 2"),
        ("window 11", "context 8"),
    ):
        wrong = blockwise_check(name, MESHES[mesh])
        failed += bool(wrong)
        print(f"{'FAILED' if wrong else 'ok'} {name} on {mesh}, by blocks {'; '.join(wrong)}", flush=True)
    for name in ("kda", "latent attention"):
        wrong = continued(name, MESHES["data 2, context 2, tensor 2"])
        failed += bool(wrong)
        print(f"{'FAILED' if wrong else 'ok'} {name}, packed, with caches {'; '.join(wrong)}", flush=True)
    for name in ("gated_delta_net, 9 taps", "kda"):
        wrong = step_check(name)
        failed += bool(wrong)
        print(f"{'FAILED' if wrong else 'ok'} a step of {name} {'; '.join(wrong)}", flush=True)
    for what, wrong in sharded_heads.checks(every="--all" in sys.argv):
        failed += bool(wrong)
        print(f"{'FAILED' if wrong else 'ok'} {what} {'; '.join(wrong)}", flush=True)
    wrong = gathered()
    print(
        f"{'FAILED' if wrong else 'ok'} latent attention gathers its latents {'; '.join(wrong)}", flush=True
    )
    return failed + bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
