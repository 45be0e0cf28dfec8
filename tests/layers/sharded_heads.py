"""Full and latent attention of rows spread over CPU devices: checks that sharded_mixers.py runs.

In the form that swaps tokens for heads and in the one that gathers keys: outputs and all gradients beside one
device's, and what the compiled program moves.
"""

import functools
import re
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deltajax.layers import Attention, LatentAttention, attention, blockwise, latent_attention, shard_ops

B, T, D = 2, 24, 12
IDS = np.array([[0] * 2 + [3] * 7 + [1] * 12 + [2] * 2 + [0], [5] * 6 + [1] * 18], np.int32)
DTYPES = ("float32", "float64")


def _full(heads: int, kv_heads: int, **options):
    return functools.partial(Attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=4, **options)


def _latent(heads: int, **options):
    sizes = dict(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
    return functools.partial(LatentAttention, num_heads=heads, **sizes, **options)


# The layer, and on which numbers of devices it swaps tokens for heads.
CASES = {
    "8 heads": (_full(8, 8), (2, 4)),
    "4 heads of 2": (_full(4, 2, rope_fraction=0.5), (2, 4)),
    # On 4 devices, three query heads each of which two share a key/value head.
    "12 heads of 6": (_full(12, 6, rope_theta=None), (2, 4)),
    "8 heads of 1": (_full(8, 1), (2, 4)),
    "6 heads of 3": (_full(6, 3, output_gate=True, rope_theta=None), (2,)),
    "3 heads of 1": (_full(3, 1), ()),
    "4 latent heads": (_latent(4), (2, 4)),
    "4 latent heads, rotated": (_latent(4, q_lora_rank=5, rope_theta=100.0), (2, 4)),
    "6 latent heads, rotated": (_latent(6, rope_theta=100.0), (2,)),
}
DEFAULT = (
    ("12 heads of 6", 4, True, "float64"),
    ("8 heads of 1", 2, False, "float32"),
    ("6 heads of 3", 4, False, "float64"),
    ("4 latent heads, rotated", 4, True, "float64"),
)
EVERY = tuple(
    (name, devices, packed, dtype)
    for name in CASES
    for devices in (2, 4)
    for packed in (True, False)
    for dtype in DTYPES
)
# All-to-alls of a forward and backward pass, and the floats that are gathered.
MOVED = {"12 heads of 6": (8, []), "4 latent heads, rotated": (4, [f"f32[{B},{T},8]"])}


def _case(name: str, dtype: str):
    """A layer's graph and state, an input, and the gradient of its output."""
    options = dict(hidden_size=D, initializer_range=0.4, dtype=dtype, param_dtype=dtype)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(B, T, D)), dtype) for _ in range(2))
    return nnx.split(CASES[name][0](**options, rngs=nnx.Rngs(1))), x, dy


def _run(graph, devices: int, state, x, dy, ids):
    """The output, and the gradients of parameters and input, rows spread over that many devices."""

    def loss(state, x):
        y = nnx.merge(graph, state)(x, segment_ids=ids)
        return jnp.sum(y * dy), y

    with shard_ops(_mesh(devices), sequence="context"):
        grads, y = jax.grad(loss, (0, 1), has_aux=True)(state, x)
    return {"y": y, "gradients": grads}


def _mesh(devices: int) -> Mesh:
    return jax.make_mesh((devices,), ("context",), (AxisType.Auto,), devices=jax.devices()[:devices])


def _tolerance(layer, dtype: str) -> float:
    """Rotary embeddings and norms compute in float32 whatever the dtype."""
    exact = isinstance(layer, Attention) and layer.rotary is None
    return {"float32": 1e-5, "float64": 1e-13 if exact else 2e-6}[dtype]


def check(name: str, devices: int, packed: bool, dtype: str) -> list[str]:
    """What differs from one device's, or is not of the expected form; in float64 attention goes by blocks."""
    # Where all logits are held, the softmax is in float32.
    limit = 0 if dtype == "float64" else blockwise.MAX_LOGITS
    with jax.enable_x64(dtype == "float64"), mock.patch.object(blockwise, "MAX_LOGITS", limit):
        (graph, state), *arrays = _case(name, dtype)
        arrays.append(jnp.asarray(IDS) if packed else None)
        expected = jax.jit(functools.partial(_run, graph, 1))(state, *arrays)
        module = attention if CASES[name][0].func is Attention else latent_attention
        with mock.patch.object(module, "outputs_by_tokens", wraps=module.outputs_by_tokens) as swap:
            got = jax.jit(functools.partial(_run, graph, devices))(state, *arrays)
    tolerance = _tolerance(nnx.merge(graph, state), dtype)
    wrong = [] if swap.called == (devices in CASES[name][1]) else [f"swapped: {swap.called}"]
    for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(t) for t in (got, expected)), strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        if a.dtype != dtype or not error < tolerance:
            wrong.append(f"{jax.tree_util.keystr(path)} ({a.dtype}) is off by {error:.1e}")
    return wrong


def moved(name: str) -> list[str]:
    """What 4 devices move, forward and backward, that they should not: queries or keys of all heads."""
    (graph, state), *arrays = _case(name, "float32")
    arrays = jax.device_put((*arrays, jnp.asarray(IDS)), NamedSharding(_mesh(4), P(None, "context")))
    compiled = jax.jit(functools.partial(_run, graph, 4)).lower(state, *arrays).compile().as_text()
    found = re.findall(r"= (.*) (all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled)
    swaps = sum(kind == "all-to-all" for _, kind in found)
    others = [re.sub(r"\{.*?\}", "", shape) for shape, kind in found if kind != "all-to-all"]
    wrong = [] if swaps == MOVED[name][0] else [f"{swaps} all-to-alls"]
    return wrong + [f"moves {x}" for x in others if x not in (f"s32[{B},{T}]", *MOVED[name][1])]


def checks(every: bool) -> Iterator[tuple[str, list[str]]]:
    """What each check is, and what is wrong there."""
    for name, devices, packed, dtype in EVERY if every else DEFAULT:
        what = f"{name} on {devices} devices, {dtype}{', packed' if packed else ''}"
        yield what, check(name, devices, packed, dtype)
    for name in MOVED:
        yield f"what {name} move", moved(name)
