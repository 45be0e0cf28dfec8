"""What the backward pass keeps and what it computes again never changes a gradient."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.models import LanguageModel
from deltajax.models import config as model_config
from deltajax.models.config import REMAT
from deltajax.models.remat import POLICIES
from tests import cases

T = 32
# Second computations may fuse, and so round, differently.
TOLERANCE = dict(rtol=1e-4, atol=1e-6)


def split(tiny, remat, **changes):
    """A model of two layers on the chunked op, which like the kernels has its own derivative."""
    config = tiny.replace(implementation="chunked", chunk_size=16, remat=remat, **changes)
    return nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))


def loss(graph, tokens):
    return lambda state: jnp.mean(nnx.merge(graph, state)(tokens) ** 2)


def tokens():
    return jax.random.randint(jax.random.key(0), (2, T), 0, 17)


def test_layers_written_out_are_the_layers_of_the_loop(tiny):
    def gradient(scan_layers):
        changes = dict(layer_pattern=("delta_net",), num_layers=2, scan_layers=scan_layers)
        graph, state = split(tiny, "save_dots", **changes)
        run = jax.jit(jax.grad(loss(graph, tokens())))
        return run(state), run.lower(state).as_text().count("stablehlo.while")

    (looped, loops), (written_out, fewer) = gradient(True), gradient(False)
    for a, b in zip(jax.tree.leaves(written_out), jax.tree.leaves(looped), strict=True):
        assert cases.relative_error(a, b) < 1e-5
    assert fewer == loops - 2  # of the chunks' and the layers' loops, forward and backward


def kept_bytes(tiny, remat, **changes):
    """Bytes of everything that the backward pass is handed beside the parameters."""
    graph, state = split(tiny, remat, **changes)
    residuals = jax.eval_shape(lambda state: jax.vjp(loss(graph, tokens()), state)[1], state)
    leaves = jax.tree.leaves(residuals)
    own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) - own


def op_halves(tiny, remat, **changes):
    """How often the op's forward or backward half stands in the program of the gradient."""
    graph, state = split(tiny, remat, **changes)
    return str(jax.make_jaxpr(jax.grad(loss(graph, tokens())))(state)).count("name=_by_platform")


@jax.enable_x64(True)
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
@pytest.mark.parametrize("pattern", [("delta_net",), ("gated_delta_net", "kda", "full_attention")])
def test_remat_changes_no_gradient(tiny, remat, pattern, monkeypatch):
    """In float64 but for norms, gates and logits: in float32 some CPUs round by more than the bounds."""
    monkeypatch.setattr(model_config, "_DTYPES", ("float64",))
    wide = dict(dtype="float64", param_dtype="float64")

    def gradient(remat):
        graph, state = split(tiny, remat, layer_pattern=pattern, num_layers=len(pattern), **wide)
        return jax.jit(jax.grad(loss(graph, tokens())))(state)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), gradient(remat), gradient("none")
    )


@pytest.mark.parametrize("kind", ["delta_net", "gated_delta_net", "kda"])
def test_policies_are_listed_from_the_most_kept_to_the_least(tiny, kind):
    kept = [kept_bytes(tiny, remat, layer_pattern=(kind,)) for remat in REMAT]
    assert all(more > less for more, less in itertools.pairwise(kept)), kept


@pytest.mark.parametrize("kind", ["delta_net", "gated_delta_net", "kda"])
def test_only_full_remat_runs_the_op_twice(tiny, kind):
    counts = {remat: op_halves(tiny, remat, layer_pattern=(kind,)) for remat in REMAT}
    once = counts["none"]
    assert counts == {"none": once, "save_dots": once, "save_delta_rule": once, "full": once + 1}


def test_a_single_layer_is_computed_again_although_no_loop_is_left(tiny):
    def products(remat):
        graph, state = split(tiny, remat, num_layers=1)
        program = jax.jit(jax.grad(loss(graph, tokens()))).lower(state).compile()
        return program.as_text().count(" dot(")

    assert products("full") > products("none")


def test_every_choice_has_a_policy():
    assert set(REMAT) == {"none", *POLICIES}
