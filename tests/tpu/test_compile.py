"""The ops compile for every TPU with their kernels in, and without copies or exchanges of activations."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deltajax.models import get_preset
from deltajax.ops import dispatch, short_convolution
from tests import cases
from tests.cases import Case
from tests.tpu.programs import exchanges, kernels, moves, operations
from train import tpu_aot
from train.config import OptimizerConfig
from train.mesh import make_mesh
from train.pod_step import compile_step

pytestmark = pytest.mark.skipif(
    not tpu_aot.available(), reason="libtpu cannot be imported: uv run --with libtpu pytest"
)
# A small topology of each generation.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
MIB = 2**20
# Temporary memory at B 1, T 8192, H 32, K = V = 128 in bfloat16. tokamax's KDA takes 640 and 1790 MiB.
FORWARD_TEMP, GRADIENT_TEMP = 64 * MIB, 300 * MIB

KINDS = {  # name -> (gate, decay)
    "delta": ("none", "random"),
    "gated": ("head", "softplus"),
    "kda bounded": ("channel", "bounded"),
    "kda unbounded": ("channel", "softplus"),
}
FORWARD, GRADIENT = "forward", "gradient"
KERNELS = {FORWARD: {"delta_rule_forward"}, GRADIENT: {"delta_rule_forward", "delta_rule_backward"}}


def problem(kind: str, T: int, **options) -> Case:
    gate, decay = KINDS[kind]
    return Case(gate, T=T, **{"decay": decay, "initial": False, "K": 128, "V": 128, **options})


def shapes(case: Case, dtype=jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
    """What `cases.arrays` draws, not drawn."""
    B, T, H, HV, K, V = case.B, case.T, case.H, case.HV, case.K, case.V
    out = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "beta": (B, T, HV), "do": (B, T, HV, V)}
    per_head = (HV, K) if case.gate == "channel" else (HV,)
    if case.gate != "none":
        out["g"] = (B, T, *per_head)
    out = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in out.items()}
    single = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    if case.decay in ("softplus", "bounded"):
        out |= {"A_log": single(HV), "dt_bias": single(*per_head)}
    segments = (cases.NUM_SEGMENTS,) if case.segments == "states" else ()
    out["dstate"] = single(B, *segments, HV, K, V)
    if case.initial:
        out["initial_state"] = out["dstate"]
    if case.segments != "none":
        out["segment_ids"] = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return out


def function(case: Case, mode: str, implementation: str | None = None):
    """(o, final_state) of a dict of arrays; of a gradient, o, final_state and all gradients."""

    def forward(x):
        return cases.call(case, x, implementation)

    def gradient(x):
        floats = {n: a for n, a in x.items() if n not in cases.NOT_DIFFERENTIATED}
        out, pull = jax.vjp(lambda floats: forward({**x, **floats}), floats)
        return out, pull((x["do"].astype(out[0].dtype), x["dstate"]))

    return forward if mode == FORWARD else gradient


def compile_case(case: Case, mode: str, topology: str, dtype=jnp.bfloat16):
    dispatch._by_platform.clear_cache()  # of other tests' patches
    return tpu_aot.compile_for(function(case, mode), (shapes(case, dtype),), topology)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SMALL = [  # every generation sees every kind of gate in one of the two modes, and both modes
    (topology, kind, mode)
    for i, topology in enumerate(TOPOLOGIES)
    for j, kind in enumerate(KINDS)
    for mode in (FORWARD, GRADIENT)
]


@pytest.mark.parametrize(
    "topology, kind, mode",
    [
        (t, kind, mode) if (mode == GRADIENT) == ((i // 2) % 2 == (i // 8) % 2) else slow(t, kind, mode)
        for i, (t, kind, mode) in enumerate(SMALL)
    ],
)
def test_small_shapes_compile_on_every_generation(topology, kind, mode):
    compiled = compile_case(problem(kind, T=130, B=2, H=2, HV=2, initial=True), mode, topology)
    assert kernels(compiled.as_text()) == KERNELS[mode]


def test_compiles_under_x64():
    with jax.enable_x64(True):
        compiled = compile_case(problem("kda bounded", T=130, H=2, HV=2), GRADIENT, "v5e:2x2")
    assert kernels(compiled.as_text()) == KERNELS[GRADIENT]


ACCEPTANCE = [  # in the default set: both modes once on each generation
    ("v5e:2x2", "kda unbounded", GRADIENT),
    ("v5p:2x2x1", "delta", GRADIENT),
    ("v6e:2x2", "kda unbounded", FORWARD),
    ("tpu7x:2x2x1", "gated", GRADIENT),
]


@pytest.mark.parametrize("topology, kind, mode", [p if p in ACCEPTANCE else slow(*p) for p in SMALL])
def test_the_acceptance_shape_needs_little_memory_and_no_copy(topology, kind, mode):
    case = problem(kind, T=8192, H=32, HV=32)
    compiled = compile_case(case, mode, topology)
    text = compiled.as_text()
    assert kernels(text) == KERNELS[mode]
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < (FORWARD_TEMP if mode == FORWARD else GRADIENT_TEMP), f"{temp / MIB:.0f} MiB"
    assert not moves(text, case.T * case.H * case.K)


WIDE = [("v5e:2x2", "kda unbounded", GRADIENT), ("v6e:2x2", "gated", GRADIENT)]


@pytest.mark.parametrize("topology, kind, mode", [p if p in WIDE else slow(*p) for p in SMALL])
def test_wide_heads_compile(topology, kind, mode):
    case = problem(kind, T=8192, H=8, HV=8, K=256, V=512)
    text = compile_case(case, mode, topology).as_text()
    assert kernels(text) == KERNELS[mode]
    assert not moves(text, case.T * case.H * case.K)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("heads", (1, 2, 3, 4, 6, 12, 16, 24))
def test_every_number_of_heads_compiles(heads, dtype):
    case = problem("delta", T=64, H=heads, HV=heads)
    assert kernels(compile_case(case, FORWARD, "v5e:2x2", dtype).as_text()) == KERNELS[FORWARD]


VARIANTS = {
    "grouped heads": (dict(H=16, HV=32), jnp.bfloat16),
    "four value heads to a key head": (dict(H=8, HV=32), jnp.bfloat16),
    "packed rows": (dict(H=8, HV=8, segments="packed"), jnp.bfloat16),
    "float32": (dict(H=8, HV=8), jnp.float32),
    "odd heads": (dict(H=3, HV=3), jnp.bfloat16),
    "one head": (dict(H=1, HV=1), jnp.bfloat16),
    "states of segments": (dict(H=8, HV=8, segments="states", initial=True), jnp.bfloat16),
    "initial state": (dict(H=8, HV=8, initial=True), jnp.bfloat16),
    "narrow heads": (dict(H=8, HV=8, K=64, V=64), jnp.bfloat16),
    "192 channels": (dict(H=8, HV=8, K=192, V=192), jnp.bfloat16),
    "wide float32": (dict(H=8, HV=8, K=256, V=256), jnp.float32),
}


OLDEST_AND_NEWEST = ("v5e:2x2", "tpu7x:2x2x1")


def variant_parameters():
    """By default each variant with one kind of gate on one generation, each kind on both."""
    for i, variant in enumerate(VARIANTS):
        for j, kind in enumerate(KINDS):
            for g, topology in enumerate(OLDEST_AND_NEWEST):
                values = variant, kind, topology
                yield values if j == i % 4 and g == (i + i // 4) % 2 else slow(*values)


@pytest.mark.parametrize("variant, kind, topology", list(variant_parameters()))
def test_variants_compile_with_their_gradients(variant, kind, topology):
    options, dtype = VARIANTS[variant]
    compiled = compile_case(problem(kind, T=1000, B=2, **options), GRADIENT, topology, dtype)
    assert kernels(compiled.as_text()) == KERNELS[GRADIENT]


@pytest.mark.parametrize("kind", ("delta", "kda unbounded"))
def test_vmap_and_remat_and_scan_compile(kind):
    case = problem(kind, T=130, H=2, HV=2)
    run = function(case, GRADIENT)
    dispatch._by_platform.clear_cache()
    stack = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)  # noqa: E731
    x = shapes(case)
    text = tpu_aot.compile_for(jax.vmap(run), (jax.tree.map(stack, x),), "v6e:2x2").as_text()
    assert kernels(text) == KERNELS[GRADIENT]

    def layers(x, ks):
        @jax.checkpoint
        def layer(v, k):
            return cases.call(case, {**x, "v": v, "k": k}, None)[0], None

        return jax.vjp(lambda v, ks: jax.lax.scan(layer, v, ks)[0], x["v"], ks)[1](x["do"])

    text = tpu_aot.compile_for(layers, (x, stack(x["k"])), "v6e:2x2").as_text()
    assert kernels(text) == KERNELS[GRADIENT]


# Pods


TOKENS, STATE, HEADS = P("rows", None, "heads"), P("rows", "heads"), P("heads")


def specs(case: Case) -> dict[str, P]:
    """Rows over one mesh axis, heads over the other."""
    out = dict.fromkeys(("q", "k", "v", "g", "beta", "do"), TOKENS) | dict.fromkeys(
        ("A_log", "dt_bias"), HEADS
    )
    out |= dict.fromkeys(("initial_state", "dstate"), TOKENS if case.segments == "states" else STATE)
    out |= {"segment_ids": P("rows")}
    return {name: out[name] for name in shapes(case)}


def on_pod(case: Case, topology: str, mesh_shape: tuple[int, int]):
    """Mesh, and the case's arrays sharded over it."""
    dispatch._by_platform.clear_cache()
    mesh = tpu_aot.mesh_for(topology, mesh_shape, ("rows", "heads"))
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    return mesh, {name: place(x, specs(case)[name]) for name, x in shapes(case).items()}


def sharded_gradient(case: Case, mesh):
    """Outputs and gradients, the op inside `jax.shard_map`, differentiated from outside."""
    arrays = [n for n in shapes(case) if n not in ("do", "dstate")]
    op = jax.shard_map(
        lambda x: cases.call(case, x, None),
        mesh=mesh,
        in_specs=({n: specs(case)[n] for n in arrays},),
        out_specs=(specs(case)["do"], specs(case)["dstate"]),
    )

    def run(x):
        floats = {n: x[n] for n in arrays if n != "segment_ids"}
        out, pull = jax.vjp(lambda f: op({**{n: x[n] for n in arrays}, **f}), floats)
        return out, pull((x["do"], x["dstate"]))

    return run


@pytest.mark.parametrize(
    "topology, mesh_shape, kind, segments",
    [
        ("v5p:8x8x8", (64, 8), "delta", "packed"),
        ("v6e:16x16", (32, 8), "kda unbounded", "none"),
        ("v6e:16x16", (64, 4), "gated", "states"),
        slow("v5p:8x8x8", (128, 4), "kda unbounded", "packed"),
        slow("v6e:16x16", (16, 16), "kda bounded", "none"),
    ],
)
def test_on_a_pod_under_shard_map_only_gradients_of_parameters_are_summed(
    topology, mesh_shape, kind, segments
):
    rows, parts = mesh_shape
    case = problem(kind, T=2048, B=rows, H=4 * parts, HV=4 * parts, segments=segments, initial=True)
    mesh, x = on_pod(case, topology, mesh_shape)
    text = tpu_aot.compile_for(sharded_gradient(case, mesh), (x,), mesh=mesh).as_text()
    assert kernels(text) == KERNELS[GRADIENT]
    assert not exchanges(text)
    sums = [(n, line) for operation, n, line in operations(text) if operation.startswith("all-reduce")]
    assert all(n <= case.H * case.K for n, _ in sums), sums  # of gate parameters' gradients
    assert bool(sums) == (kind != "delta")


@pytest.mark.parametrize("kind", ("delta", "kda unbounded"))
def test_under_plain_jit_a_sharded_call_is_refused_and_not_gathered(kind):
    """XLA cannot partition a kernel; `deltajax.layers.shard_ops` or a `jax.shard_map` must."""
    case = problem(kind, T=256, B=64, H=16, HV=16)
    mesh, x = on_pod(case, "v6e:16x16", (64, 4))
    with pytest.raises(NotImplementedError, match="shard_map"):
        tpu_aot.compile_for(function(case, FORWARD), (x,), mesh=mesh)


# Training


@pytest.mark.parametrize(
    "preset, topology, fsdp, rows, seq_len",
    [
        ("tiny_delta_net", "v6e:2x2", 2, 1, 256),
        slow("tiny_kda", "v5e:2x2", 4, 2, 256),
        slow("delta_net_1p3b", "v5p:8x8x8", 16, 1, 4096),
        slow("delta_net_1p3b", "v6e:16x16", 16, 1, 4096),
        slow("kda_hybrid_1p3b", "v5p:8x8x8", 16, 1, 4096),
        slow("kda_hybrid_1p3b", "v6e:16x16", 16, 1, 4096),
    ],
)
def test_a_training_step_holds_the_kernels_and_fits(preset, topology, fsdp, rows, seq_len):
    config = dataclasses.replace(get_preset(preset), remat="full")
    mesh = make_mesh(-1, fsdp, tpu_aot.devices_of(topology))
    found = compile_step(config, OptimizerConfig(), mesh, batch=rows * mesh.size, seq_len=seq_len)
    assert set(found.kernels) == KERNELS[GRADIENT]
    assert found.memory.over is None and found.memory.total < found.memory.hbm
    # q, k, v of one device's rows stay; what is exchanged are parameters, gradients and looked-up embeddings.
    heads = config.num_heads * config.head_dim
    shape = re.compile(rf"\[(\d+,)?{rows},{seq_len},({config.num_heads},{config.head_dim}|{heads})\]")
    assert not [line for line in exchanges(found.text) if shape.search(line) and "jit(_take)" not in line]


def test_the_gradient_of_a_packed_convolution_keeps_one_float32_array_at_most():
    T, D = 8192, 2048
    x = jax.ShapeDtypeStruct((1, T, D), jnp.bfloat16)
    weight, ids = jax.ShapeDtypeStruct((D, 4), jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32)

    def gradient(x, weight, ids, dy):
        _, pull = jax.vjp(lambda x, weight: short_convolution(x, weight, segment_ids=ids)[0], x, weight)
        return pull(dy)

    memory = tpu_aot.compile_for(gradient, (x, weight, ids, x), "v5p:2x2x1").memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * 4 * T * D
