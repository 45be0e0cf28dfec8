"""Mixture of experts against float64 NumPy, token by token; and what it owes to packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import MixtureOfExperts

B, T, D, F, E, J = 2, 9, 8, 6, 5, 2
FORMS = {
    "kimi linear": dict(router="sigmoid", correction_bias=True, num_shared_experts=1, scale=2.446),
    "qwen3-next": dict(router="softmax", num_shared_experts=1, shared_gate=True),
    "plain": dict(renormalize=False),
    "two shared, one chosen": dict(num_shared_experts=2, experts_per_token=1),
}
IDS = np.array([[3] * 3 + [1] * 4 + [0] * 2, [0] + [5] * 8])


def build(form, **options):
    options = dict(intermediate_size=F, experts_per_token=J) | FORMS[form] | options
    layer = MixtureOfExperts(hidden_size=D, num_experts=E, initializer_range=0.5, rngs=nnx.Rngs(1), **options)
    if layer.correction_bias is not None:
        layer.correction_bias[...] = jnp.linspace(-0.4, 0.4, E)
    return layer


def inputs(seed=0):
    return np.random.default_rng(seed).standard_normal((B, T, D), np.float32)


call = jax.jit(lambda graph, state, x, ids: nnx.merge(graph, state)(x, segment_ids=ids), static_argnums=0)


def definition(layer, x):
    """One token [D] in float64."""

    def of(variable):
        return np.asarray(variable[...], np.float64)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def swiglu(x, gate, up, down):
        z = x @ gate
        return (z * sigmoid(z) * (x @ up)) @ down

    x = np.asarray(x, np.float64)
    logits = x @ of(layer.router.kernel)
    scores = sigmoid(logits) if layer.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    bias = 0 if layer.correction_bias is None else of(layer.correction_bias)
    chosen = np.argsort(-(scores + bias))[: layer.experts_per_token]
    weight = scores[chosen] / (scores[chosen].sum() if layer.renormalize else 1) * layer.scale
    kernels = [of(w) for w in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj)]
    y = sum(w * swiglu(x, *(kernel[e] for kernel in kernels)) for w, e in zip(weight, chosen, strict=True))
    if layer.shared is not None:
        parts = layer.shared.gate_proj, layer.shared.up_proj, layer.shared.down_proj
        shared = swiglu(x, *(of(p.kernel) for p in parts))
        y = y + shared * (1 if layer.shared_gate is None else sigmoid(x @ of(layer.shared_gate.kernel)))
    return y, chosen


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_definition(form):
    layer, x = build(form), inputs()
    want = np.stack([[definition(layer, token)[0] for token in row] for row in x])
    np.testing.assert_allclose(call(*nnx.split(layer), x, None), want, rtol=1e-4, atol=1e-5)
    y = np.asarray(call(*nnx.split(layer), x, jnp.asarray(IDS)))
    np.testing.assert_allclose(y[IDS != 0], want[IDS != 0], rtol=1e-4, atol=1e-5)
    few = np.asarray(call(*nnx.split(layer), x[:, :1], jnp.asarray(IDS)[:, :1]))  # one token and padding
    np.testing.assert_allclose(few[0], want[0, :1], rtol=1e-4, atol=1e-5)


def dense(layer, x, ids):
    """The same in plain JAX: every token through every expert, for the gradients that JAX makes of it."""
    choice, weight = layer.route(x)
    share = jnp.einsum("btj,btje->bte", weight, jax.nn.one_hot(choice, E)) * (ids != 0)[..., None]
    gate, up, down = (getattr(layer.experts, f"{name}_proj")[...] for name in ("gate", "up", "down"))
    middle = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    y = jnp.einsum("btef,efd,bte->btd", middle, down, share)
    if layer.shared is None:
        return y
    shared = layer.shared(x)
    return y + (shared if layer.shared_gate is None else shared * jax.nn.sigmoid(layer.shared_gate(x)))


# Two tokens make fewer rows than there are experts.
@pytest.mark.parametrize(
    "form, tokens", [("kimi linear", T), ("qwen3-next", T), ("plain", T), ("kimi linear", 1)]
)
def test_gradients_are_those_of_every_expert_on_every_token(form, tokens):
    graph, state = nnx.split(build(form))
    x, dy, ids = (a[:, -tokens:] for a in (inputs(), inputs(1), jnp.asarray(IDS)))

    def gradients(apply):
        return jax.jit(jax.grad(lambda s, x: jnp.sum(dy * apply(nnx.merge(graph, s), x, ids)), (0, 1)))(
            state, x
        )

    got = gradients(lambda layer, x, ids: layer(x, segment_ids=ids))
    want = gradients(dense)
    for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(t) for t in (got, want)), strict=True):
        if "correction_bias" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(path))
            assert np.abs(a).max() > 0, path


def test_tokens_depend_on_no_neighbour_even_when_all_choose_the_same_experts():
    graph, state = nnx.split(build("qwen3-next"))
    x, ids = inputs(), jnp.asarray(IDS)
    alone = np.asarray(call(graph, state, x, ids))
    other = x.copy()
    other[1] = x[0, 0]  # a row of one token, again and again
    other[0, IDS[0] == 0] = np.nan  # what stands in padding enters nothing
    got = np.asarray(call(graph, state, other, ids))
    np.testing.assert_array_equal(got[0, IDS[0] != 0], alone[0, IDS[0] != 0])
    np.testing.assert_allclose(got[1, 1:], np.broadcast_to(alone[0, 0], (T - 1, D)), rtol=1e-5)


def test_load_is_the_share_of_the_choices():
    layer, x = build("kimi linear"), inputs()
    chosen = [definition(layer, token)[1] for token in x[IDS != 0]]
    want = np.bincount(np.concatenate(chosen), minlength=E) / (J * len(chosen))
    np.testing.assert_allclose(layer.load(x, jnp.asarray(IDS)), want, atol=1e-6)
    assert layer.load(x).sum() == pytest.approx(1)


def test_the_biass_derivative_is_how_many_tokens_too_many_chose_each_expert():
    layer, x, ids = build("kimi linear"), inputs(), jnp.asarray(IDS)
    chosen = np.concatenate([definition(layer, token)[1] for token in x[IDS != 0]])
    want = np.bincount(chosen, minlength=E) - chosen.size / E
    graph, state = nnx.split(layer)
    gradient = jax.jit(jax.grad(lambda state, by: by * jnp.sum(nnx.merge(graph, state)(x, segment_ids=ids))))
    for by in (1.0, -3.0):  # of any loss
        np.testing.assert_allclose(gradient(state, by)["correction_bias"][...], want, atol=1e-5)


def test_bfloat16_compute_stays_near_float32_and_routes_in_float32():
    x = inputs().astype(jnp.bfloat16)
    want, layer = build("qwen3-next"), build("qwen3-next", dtype=jnp.bfloat16)
    np.testing.assert_array_equal(layer.route(x)[0], want.route(x)[0])
    assert layer.route(x)[1].dtype == jnp.float32
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state):
        def loss(state):
            y = nnx.merge(graph, state)(x)
            return jnp.sum(y.astype(jnp.float32)), y

        return jax.grad(loss, has_aux=True)(state)

    grads, y = run(state)
    expected = call(*nnx.split(want), x, None)
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y, np.float32) - expected).max() < 0.03 * np.abs(expected).max()
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(intermediate_size=0), "intermediate_size=0: expected a positive integer"),
        (dict(experts_per_token=6), "experts_per_token=6: expected 1 to num_experts=5"),
        (dict(experts_per_token=0), "experts_per_token=0: expected 1 to num_experts=5"),
        (dict(router="tanh"), "router='tanh': expected 'softmax' or 'sigmoid'"),
        (dict(num_shared_experts=-1), "num_shared_experts=-1: expected at least 0"),
        (dict(shared_gate=True), "num_shared_experts=0: expected at least 1, with shared_gate"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("plain", **options)
