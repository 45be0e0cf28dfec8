"""One list of mixers, shared by every property test of this folder."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deltajax.layers import Attention, DeltaNet, GatedDeltaNet, KimiDeltaAttention, LatentAttention

HIDDEN = 24

MIXERS = {
    "delta_net": functools.partial(DeltaNet, num_heads=2, head_dim=8),
    "delta_net_gated_negative": functools.partial(
        DeltaNet, num_heads=2, head_dim=8, expand_v=2, use_gate=True, allow_neg_eigval=True
    ),
    "gated_delta_net": functools.partial(GatedDeltaNet, num_heads=2, head_dim=8, expand_v=2),
    "gated_delta_net_grouped": functools.partial(
        GatedDeltaNet, num_heads=2, num_v_heads=4, head_dim=8, head_v_dim=4, use_gate=False
    ),
    "kda": functools.partial(KimiDeltaAttention, num_heads=2, head_dim=8),
    "kda_bounded_grouped": functools.partial(
        KimiDeltaAttention, num_heads=1, num_v_heads=2, head_dim=8, head_v_dim=4, lower_bound=-5.0
    ),
    # With all that Qwen3-Next's has.
    "full_attention": functools.partial(
        Attention,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_fraction=0.25,
        qk_norm=True,
        output_gate=True,
        zero_centered_norm=True,
    ),
    "full_attention_nope": functools.partial(Attention, num_heads=2, head_dim=8, rope_theta=None),
    "sliding_window": functools.partial(Attention, num_heads=2, head_dim=8, window_size=3),
    # With a cache, up to 6 tokens are absorbed.
    "latent_attention": functools.partial(
        LatentAttention,
        num_heads=2,
        kv_lora_rank=6,
        q_lora_rank=5,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=3,
        rope_theta=100.0,
    ),
}
SOFTMAX = (Attention, LatentAttention)


# These programs run once or twice each: compiling them is the cost, so compile them quickly.
_compiled = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)


class Mixer:
    """A layer built from one case, with its calls compiled and its cache made uniformly.

    The op is the scan by default: it compiles fastest, and the ops' own tests compare the others to it.
    """

    def __init__(self, name: str, *, implementation: str | None = "scan", **options):
        if MIXERS[name].func not in SOFTMAX:
            options["implementation"] = implementation
        # Wide kernels: with the default 0.02 outputs would be too small to tell right from wrong.
        self.layer = MIXERS[name](hidden_size=HIDDEN, initializer_range=0.4, rngs=nnx.Rngs(1), **options)
        self.graph, self.state = nnx.split(self.layer)

    def __call__(self, x, segment_ids=None, cache=None, num_segments=None, hold=False):
        return _call(self.graph, self.state, x, segment_ids, cache, num_segments, hold)

    def keep(self, pending, counts):
        """The cache with some of the tokens that a call held."""
        return _keep(pending, counts)

    def gradients(self, x, segment_ids, weight):
        """Output, and the gradients of `sum(weight * y)` to parameters and input."""
        return _gradients(self.graph, self.state, x, segment_ids, weight)

    def cache(self, batch: int, max_length: int = 16):
        if isinstance(self.layer, SOFTMAX):
            return self.layer.init_cache(batch, max_length)
        return self.layer.init_cache(batch)


@functools.partial(_compiled, static_argnums=(0, 5, 6))
def _call(graph, state, x, segment_ids, cache, num_segments, hold):
    layer = nnx.merge(graph, state)
    return layer(x, segment_ids=segment_ids, cache=cache, num_segments=num_segments, hold=hold)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _keep(pending, counts):
    return pending.keep(counts)


@_compiled
def _gradients(graph, state, x, segment_ids, weight):
    def loss(state, x):
        y = nnx.merge(graph, state)(x, segment_ids=segment_ids)
        return jnp.sum((weight * y).astype(jnp.float32)), y

    grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)
    return y, grads


@pytest.fixture(params=MIXERS, scope="session")
def mixer(request) -> Mixer:
    return Mixer(request.param)


@pytest.fixture(params=["delta_net", "gated_delta_net", "kda"], scope="session")
def default_mixer(request) -> Mixer:
    return Mixer(request.param, implementation=None)


@pytest.fixture(params=["delta_net", "gated_delta_net", "kda"])
def default_and_scan(request) -> tuple[Mixer, Mixer]:
    return Mixer(request.param, implementation=None), Mixer(request.param)


@pytest.fixture(params=["delta_net", "gated_delta_net", "kda", "sliding_window"])
def bfloat16_mixer(request) -> Mixer:
    return Mixer(request.param, dtype="bfloat16")
