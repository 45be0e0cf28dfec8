"""The models whose inference `benchmarks.decode_curves` measures, and caches for them of any length."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deltajax.layers import DeltaCache, LatentCache
from deltajax.models import LanguageModel, ModelConfig, get_preset
from deltajax.models.language_model import ModelCache
from deltajax.models.presets import kda_mla_pattern

LAYERS = 8
# Kimi Linear's hybrid, latent attention alone, KDA alone.
KDA_PER_MLA = {"hybrid": 3, "mla": 0, "kda": None}
BLOCK = 4096  # random tokens of a filled cache, repeated


class Form(NamedTuple):
    """A model without its parameters, and these."""

    name: str
    config: ModelConfig
    graph: Any
    params: Any

    def model(self, params: Any) -> LanguageModel:
        """The model with these parameters."""
        return nnx.merge(self.graph, params)

    def cache_shapes(self, batch: int, length: int) -> ModelCache:
        """Shapes and dtypes of the cache for that many sequences of that many tokens."""
        return jax.eval_shape(lambda params: self.model(params).init_cache(batch, length), self.params)


def config_of(form: str, *, small: bool) -> ModelConfig:
    """Kimi Linear 48B with 8 layers, dense MLPs and few tokens; `small`: 2 layers, tiny, in float32."""
    layers, each = 2 if small else LAYERS, KDA_PER_MLA[form]
    if each is not None and small:
        each = min(each, 1)
    config = get_preset("kimi_linear_48b_a3b").replace(
        num_layers=layers,
        layer_pattern=("kda",) if each is None else kda_mla_pattern(layers, each),
        num_experts=None,
        vocab_size=8192,
        param_dtype="bfloat16",
        stack_layers=False,
    )
    if not small:
        return config
    return config.replace(
        hidden_size=64,
        num_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=61,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        latent_v_head_dim=16,
        initializer_range=0.2,
        dtype="float32",
        param_dtype="float32",
    )


def abstract_form(name: str, *, small: bool) -> Form:
    """The form, its parameters being shapes."""
    config = config_of(name, small=small)
    return Form(name, config, *nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))))


def make_form(name: str, *, small: bool) -> Form:
    """The form with random parameters, made on the device."""
    form = abstract_form(name, small=small)
    init = jax.jit(lambda: nnx.state(LanguageModel(form.config, rngs=nnx.Rngs(0))))
    return form._replace(params=init())


def filled_cache(form: Form, batch: int, length: int, seed: int = 0) -> ModelCache:
    """A cache of sequences of `length` tokens: random latents (of 4096 tokens, repeated), states and taps.

    Decoding takes the same time whatever the values are.
    """
    shapes = form.cache_shapes(batch, length)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [
        jnp.full(x.shape, length, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.integer)
        else _drawn(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return tree.unflatten(made)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """[layers, B, S, ...]: `BLOCK` random tokens over and over, the same in all rows."""
    layers, batch, tokens, *rest = shape
    block = min(tokens, BLOCK)
    times = -(-tokens // block)
    drawn = jax.random.normal(key, (layers, 1, 1, block, *rest), dtype) * 0.5
    tiled = jnp.broadcast_to(drawn, (layers, batch, times, block, *rest))
    return tiled.reshape(layers, batch, times * block, *rest)[:, :, :tokens]


def with_length(cache: ModelCache, length: int | jax.Array) -> ModelCache:
    """The cache as if its sequences had that many tokens."""

    def put(layer):
        if not isinstance(layer, LatentCache):
            return layer
        return layer._replace(length=jnp.full_like(layer.length, length))

    return tuple(tuple(put(layer) for layer in group) for group in cache)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or of arrays of these shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cache_bytes(cache: ModelCache) -> dict[str, int]:
    """Bytes by kind: latents, recurrent states, the convolutions' last inputs, the sequences' lengths."""
    found = dict(latent=0, states=0, conv=0, lengths=0)
    for layer in (layer for group in cache for layer in group):
        if isinstance(layer, LatentCache):
            found["latent"] += nbytes(layer.latent)
            found["lengths"] += nbytes(layer.length)
        elif isinstance(layer, DeltaCache):
            found["states"] += nbytes(layer.state)
            found["conv"] += nbytes(layer[:3])
        else:
            raise TypeError(f"cache: expected LatentCache or DeltaCache, got {type(layer).__name__}")
    return found | dict(total=sum(found.values()))


def memory_limit(given_gib: float | None) -> int:
    """Bytes of a device that arrays may take: as given, or what JAX takes of the card.

    Raises:
      ValueError: not given, and the device does not say.
    """
    if given_gib is not None:
        return int(given_gib * 2**30)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ValueError(
            f"--memory-gib: expected, as {jax.devices()[0].device_kind} does not tell its memory"
        )
    return int(limit)
