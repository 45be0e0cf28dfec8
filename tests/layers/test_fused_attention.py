"""Attention through cuDNN: which programs hold its kernels; with others in their place, what comes out."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import Attention, LatentAttention, cudnn_attention, fused_attention, ragged_rows
from deltajax.layers.layout import layout_of
from deltajax.models.remat import rematerialized

D, T = 32, 256


def attention(**options):
    options = dict(num_heads=4, num_kv_heads=2, head_dim=16, initializer_range=0.3) | options
    return Attention(hidden_size=D, rngs=nnx.Rngs(0), **options)


def latent(**options):
    sizes = dict(kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12) | options
    return LatentAttention(
        hidden_size=D, num_heads=2, rope_theta=1e4, initializer_range=0.3, rngs=nnx.Rngs(0), **sizes
    )


LAYERS = {
    "full": attention,
    "heads of 256": functools.partial(attention, head_dim=256),
    "wide window": functools.partial(attention, window_size=100),
    "window": functools.partial(attention, window_size=5),
    "odd heads": functools.partial(attention, head_dim=20),
    "latent": latent,
}


def packing(length):
    """Segments with padding before, between and behind; and a row of one segment."""
    ids = np.ones((2, length), np.int32)
    for i, end in enumerate((5, 30, 37, 60, length - 9)):
        ids[0, end:] = (1, 0, 4, 2, 0)[i]
    ids[0, :5] = 0
    return jnp.asarray(ids)


def gradients(layer, packed=False, length=T, remat="none"):
    """Of a loss in the parameters and the input, and the output: a function and its arguments."""
    graph, state = nnx.split(layer)
    x, weight = jax.random.normal(jax.random.key(1), (2, 2, length, D))
    ids = packing(length) if packed else None

    def loss(state, x):
        call = lambda state, x: nnx.merge(graph, state)(x, segment_ids=ids)  # noqa: E731
        y = rematerialized(call, remat, in_loop=False)(state, x)
        return jnp.sum(weight * y), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)), (state, x)


def kernels_for(platform, layer, **options):
    """Names of cuDNN's kernels in the lowered gradient, and the program."""
    f, args = gradients(layer, **options)
    text = f.trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"__cudnn\$fmha(\w+)", text), text


class Forward:
    """What cuDNN's forward kernel computes, as far as JAX's own lowering of it says."""

    @staticmethod
    def listed(q, key, value, bias, length, _, first, __, *rest, **options):
        """Every segment's own tokens, one row of them all: what is not of a segment is NaN."""
        B, T, H, K = q.shape
        n = jnp.arange(B * T)
        begin = first.ravel()[: length.size, None] // (H * K)
        mine = (n >= begin) & (n < begin + length.ravel()[:, None])  # [segments, tokens]
        place = jnp.where(mine, n - begin, 0).sum(axis=0)
        own = jnp.where(mine.any(axis=0), mine.argmax(axis=0), length.size)
        hidden = jnp.where(own[:, None] == own, 0.0, -jnp.inf)
        joined = lambda x: x.reshape(1, B * T, *x.shape[2:])  # noqa: E731
        causal = options | dict(mask_type=cudnn_attention._masks.CAUSAL, variadic_args=(True, False))
        return [joined(x) for x in (q, key, value)], hidden, (own, place), causal

    @staticmethod
    def weights(q, key, bias, options):
        n, m = jnp.arange(q.shape[1])[:, None], jnp.arange(key.shape[1])
        logits = jnp.einsum("bthk,bshk->bhts", q, key) * options["scale"]
        if options["variadic_args"][0]:
            logits += bias
        if options["mask_type"] == cudnn_attention._masks.CAUSAL:
            seen = n >= m
            if options["sliding_window_length"]:
                seen &= n - m < options["sliding_window_length"]
            logits = jnp.where(seen, logits, -jnp.inf)
        return logits

    def bind(self, q, key, value, bias, *rest, **options):
        if options["mask_type"] == cudnn_attention._masks.PADDING_CAUSAL:
            arrays, hidden, (own, place), causal = self.listed(q, key, value, bias, *rest, **options)
            o, lse = self.bind(*arrays, hidden, **causal)
            o = jnp.where((own < rest[0].size)[:, None, None], o[0], jnp.nan)
            sums = jnp.full((rest[0].size, q.shape[2], q.shape[1]), jnp.nan)
            return o.reshape(*q.shape[:3], -1), sums.at[own, :, place].set(lse[0].T, mode="drop")
        key, value = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (key, value))
        logits = self.weights(q, key, bias, options)
        p = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("bhts,bshv->bthv", p, value), jax.nn.logsumexp(logits, axis=-1)


class Backward:
    """Its backward kernel, from the log-sum-exps."""

    def bind(self, q, key, value, bias, *rest, **options):
        *_, lse, o, do = rest
        if options["mask_type"] == cudnn_attention._masks.PADDING_CAUSAL:
            arrays, hidden, (own, place), causal = Forward.listed(q, key, value, bias, *rest, **options)
            own_lse = lse.at[own, :, place].get(mode="fill", fill_value=0).T[None]
            joined = (x.reshape(1, -1, *x.shape[2:]) for x in (o, do))
            found = self.bind(*arrays, hidden, own_lse, *joined, **causal)
            real = (own < rest[0].size)[:, None, None]
            pairs = zip(found, (q, key, value), strict=True)
            return [jnp.where(real, d[0], jnp.nan).reshape(x.shape) for d, x in pairs]
        groups = key.shape[2]
        key, value = (jnp.repeat(x, q.shape[2] // groups, axis=2) for x in (key, value))
        p = jnp.exp(Forward.weights(q, key, bias, options) - lse[..., None])
        delta = jnp.einsum("bthv,bthv->bht", do, o)
        d = p * (jnp.einsum("bthv,bshv->bhts", do, value) - delta[..., None]) * options["scale"]
        dq, dk = jnp.einsum("bhts,bshk->bthk", d, key), jnp.einsum("bhts,bthk->bshk", d, q)
        dv = jnp.einsum("bhts,bthv->bshv", p, do)
        dk, dv = (x.reshape(*x.shape[:2], groups, -1, x.shape[3]).sum(3) for x in (dk, dv))
        return dq, dk, dv


@pytest.fixture
def small_blocks(monkeypatch):
    """Packed rows of the "window" layer go by blocks."""
    monkeypatch.setattr(fused_attention, "UNIT", 8)


@pytest.fixture
def stand_ins(monkeypatch, small_blocks):
    """Plain float32 functions in the place of cuDNN's kernels, on any platform."""
    forms = {
        cudnn_attention._forward: cudnn_attention._forward_cudnn,
        cudnn_attention._backward: cudnn_attention._backward_cudnn,
    }
    monkeypatch.setattr(cudnn_attention, "_bind", lambda p, call, *arrays: forms[p](call, *arrays))
    monkeypatch.setattr(cudnn_attention, "_kernels", (Forward(), Backward()))
    monkeypatch.setattr(cudnn_attention, "HALF", (jnp.dtype(jnp.float32),))


# Names of `LAYERS`, and whether rows are packed.
FORMS = [("latent", True), ("window", True), ("wide window", False), ("full", False)]
MORE = [("odd heads", True), ("latent", False), ("window", False), ("wide window", True)]
MORE = [pytest.param(*form, marks=pytest.mark.slow) for form in MORE]


@pytest.mark.parametrize(("name", "packed"), [*FORMS, *MORE])
def test_the_kernels_get_what_makes_the_layers_outputs_and_gradients(stand_ins, name, packed):
    length = 115  # no multiple of anything: the rest is filled up
    found = []
    for implementation in ("cudnn", "xla"):
        f, args = gradients(LAYERS[name](implementation=implementation), packed, length)
        found.append(f(*args))
    for (path, a), b in zip(jax.tree.leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 1e-5, f"{jax.tree_util.keystr(path)} is off by {error:.1e}"
    (_, dx), y = found[0]
    if packed:
        padding = packing(length)[..., None] == 0
        np.testing.assert_array_equal(jnp.where(padding, y, 0), 0)
        np.testing.assert_array_equal(jnp.where(padding, dx, 0), 0)


@pytest.mark.parametrize(
    ("ids", "segments", "bias", "form"),
    [
        (packing(90), 2, 2**30, 2),  # four segments in all: a list
        (packing(90), 1, 2**30, 0),  # a bias
        (packing(90), 0, 0, 0),  # plain JAX
        (packing(90).at[0].set(packing(90)[1]), 2, 0, 1),  # whole rows: causality alone
    ],
)
@pytest.mark.parametrize("V", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_packed_rows_go_by_the_form_that_holds_them(stand_ins, monkeypatch, ids, segments, bias, form, V):
    chosen = []

    def switch(which, forms, *args):
        chosen.append(int(which))
        return forms[int(which)](*args)

    monkeypatch.setattr(cudnn_attention, "lax", types.SimpleNamespace(switch=switch))
    monkeypatch.setattr(cudnn_attention, "MAX_BIAS", bias)
    monkeypatch.setattr(ragged_rows, "num_segments", lambda *sizes: segments)
    ids = ids.at[1, -7:].set(0)
    real = (ids != 0)[..., None, None]
    call, layouts = cudnn_attention.Call(None, 0.3, False), (layout_of(2, 90, ids, None),)
    q, key, value, do = jax.random.normal(jax.random.key(0), (4, 2, 90, 4, 12))
    key, value, do = key[:, :, :2], value[:, :, :2, :V], jnp.where(real, do[..., :V], 0)
    o, lse = cudnn_attention.forward(call, q, key, value, layouts)
    got = o, *cudnn_attention.backward(call, q, key, value, layouts, o, lse, do)
    want = cudnn_attention._forward_plain(call, q, key, value, *layouts[0])[0]
    want = want, *cudnn_attention._backward_plain(call, q, key, value, o, lse, do, *layouts[0])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(*(jnp.where(real, x, 0) for x in (a, b)), rtol=1e-4, atol=1e-5)
    for gradient in got[1:]:
        np.testing.assert_array_equal(jnp.where(real, 0, gradient), 0)
    assert chosen == [form] * 2


@pytest.mark.parametrize(("name", "packed"), [*FORMS, *MORE, ("heads of 256", True)])
def test_a_program_holds_the_kernels_where_it_is_lowered_for_cuda(name, packed):
    layer, asked = (LAYERS[name](dtype=jnp.bfloat16, implementation=i) for i in (None, "cudnn"))
    kinds = ["ScaleBiasSoftmax"] if packed else ["Softmax"]
    if packed and "window" not in name:  # of whole rows, and by a list of segments
        kinds += ["Softmax"] * 2
    kernels = sorted(kinds + [kind + "Backward" for kind in kinds])
    assert sorted(kernels_for("cuda", asked, packed=packed)[0]) == kernels
    assert sorted(kernels_for("cuda", layer, packed=packed)[0]) == kernels
    for platform in ("cpu", "tpu"):
        assert kernels_for(platform, layer, packed=packed)[0] == []


@pytest.mark.parametrize("name", ["full", "latent"])
def test_a_program_for_cuda_makes_no_product_of_all_pairs(name):
    f, args = gradients(LAYERS[name](dtype=jnp.bfloat16, implementation="cudnn"))
    lowered = f.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert not [x for x in lowered.splitlines() if "dot_general" in x and f"{T}x{T}x" in x.split("->")[-1]]


@pytest.mark.parametrize(
    "layer",
    [
        attention(),
        attention(dtype=jnp.bfloat16, head_dim=264),
        latent(dtype=jnp.bfloat16, v_head_dim=300),
        attention(dtype=jnp.bfloat16, implementation="xla"),
        latent(dtype=jnp.bfloat16, implementation="xla"),
    ],
)
def test_other_calls_are_plain_on_cuda_too(layer):
    assert kernels_for("cuda", layer)[0] == []


def test_short_rows_and_large_biases_are_plain_unless_cudnn_is_asked_for(monkeypatch, small_blocks):
    layer, asked = (attention(dtype=jnp.bfloat16, implementation=i) for i in (None, "cudnn"))
    assert kernels_for("cuda", layer, length=100)[0] == []
    assert len(kernels_for("cuda", asked, length=100)[0]) == 2
    monkeypatch.setattr(cudnn_attention, "MAX_BIAS", 2 * 2 * T * T - 1)
    assert "ScaleBiasSoftmax" not in kernels_for("cuda", layer, packed=True)[0]
    assert "ScaleBiasSoftmax" in kernels_for("cuda", asked, packed=True)[0]
    wide, asked = (attention(dtype=jnp.bfloat16, window_size=100, implementation=i) for i in (None, "cudnn"))
    assert kernels_for("cuda", wide, packed=True)[0] == []
    assert len(kernels_for("cuda", asked, packed=True)[0]) == 2
    assert len(kernels_for("cuda", wide)[0]) == 2


@pytest.mark.parametrize(
    ("host", "options", "reason"),
    [
        ((7.5, 91300), {}, "cuDNN 91300 has none for compute capability 7.5"),
        ((9.0, None), {}, "cuDNN is not installed"),
        ((10.0, 91300), dict(head_dim=136), "need a Hopper GPU"),
    ],
)
def test_a_host_without_fit_gpu_or_cudnn_gets_the_plain_form_or_an_error(monkeypatch, host, options, reason):
    monkeypatch.setattr(cudnn_attention, "_host", lambda: host)
    layer, asked = (attention(dtype=jnp.bfloat16, implementation=i, **options) for i in (None, "cudnn"))
    assert kernels_for("cuda", layer)[0] == []
    with pytest.raises(NotImplementedError, match=f"implementation='cudnn': .*{reason}"):
        kernels_for("cuda", asked)


def test_the_plain_form_on_cuda_is_attention_too():
    call = cudnn_attention.Call(20, 0.3, False)
    q, key, value, do = jax.random.normal(jax.random.key(0), (4, 2, 40, 2, 8))
    layout = jnp.ones((2, 40), jnp.int32), jnp.tile(jnp.arange(40), (2, 1))

    @jax.jit
    def want(*arrays):
        options = dict(is_causal=True, scale=0.3, local_window_size=(19, 0))
        o, pull = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, **options), *arrays)
        return o, *pull(do)

    @jax.jit
    def got(*arrays, flat):
        o, lse = cudnn_attention._forward_plain(call, *arrays, *flat)
        return o, *cudnn_attention._backward_plain(call, *arrays, o, lse, do, *flat)

    for flat in ((), layout):
        for a, b in zip(got(q, key, value, flat=flat), want(q, key, value), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_where_cudnn_is_asked_for():
    with pytest.raises(NotImplementedError, match=r"implementation='cudnn': q, k and v .* got float32"):
        kernels_for("cuda", attention(implementation="cudnn"))
    with pytest.raises(NotImplementedError, match="at most 256 channels, got 264"):
        kernels_for("cuda", attention(implementation="cudnn", head_dim=264, dtype=jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="is for cuda; this program is lowered for cpu"):
        kernels_for("cpu", attention(implementation="cudnn", dtype=jnp.bfloat16))


@pytest.mark.parametrize(("remat", "forwards"), [("full", 2), ("save_delta_rule", 1), ("save_dots", 1)])
def test_policies_that_keep_outputs_do_not_run_the_kernel_again(remat, forwards):
    layer = LAYERS["latent"](dtype=jnp.bfloat16, implementation="cudnn")
    names, _ = kernels_for("cuda", layer, remat=remat)
    assert sorted(names) == ["Softmax"] * forwards + ["SoftmaxBackward"]


def test_mapped_axes_join_the_rows_and_a_shard_map_keeps_its_types():
    layer = attention(dtype=jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda x, ids: layer(x, segment_ids=ids), mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x")
    )
    x, ids = jnp.zeros((3, 2, T, D), jnp.bfloat16), jnp.ones((2, T), jnp.int32)
    for f, rows in (
        (lambda x: jax.vmap(lambda x: layer(x, segment_ids=ids))(x), 6),
        (lambda x: split(x[0], ids), 2),
    ):
        grad = jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x).astype(jnp.float32))))
        text = grad.trace(x).lower(lowering_platforms=("cuda",)).as_text()
        calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
        assert len(calls) == 6 and all(f"tensor<{rows}x{T}x4x16xbf16>" in line for line in calls)


def test_a_gpus_program_keeps_nothing_of_the_plain_forms_logits(stand_ins, monkeypatch):
    """Here the CPU takes the GPU's branch, with kernels that hold no pairs."""
    choose = jax.lax.platform_dependent

    def swapped(*args, cuda, default):
        return choose(*args, cpu=cuda, cuda=default)

    monkeypatch.setattr(fused_attention, "lax", types.SimpleNamespace(platform_dependent=swapped))
    wide = lambda q, x: jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)  # noqa: E731
    forward = lambda q, k, v, *_, **__: (q * wide(q, k) + wide(q, v), q[..., 0].mT)  # noqa: E731
    backward = lambda q, k, v, *rest, **_: (q * rest[-1], k * rest[-3].mT[:, :, :2, None], v)  # noqa: E731
    fakes = types.SimpleNamespace(bind=forward), types.SimpleNamespace(bind=backward)
    monkeypatch.setattr(cudnn_attention, "_kernels", fakes)
    graph, state = nnx.split(attention())
    states = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
    length = 1024

    def loss(states, x):
        y, _ = jax.lax.scan(lambda x, state: (nnx.merge(graph, state)(x), None), x, states)
        return jnp.sum(y)

    program = jax.jit(jax.grad(loss)).lower(states, jnp.zeros((1, length, D))).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * length * length  # a byte for each pair
