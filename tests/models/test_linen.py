import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltajax.models import LanguageModel

TOKENS = jnp.array([[1, 2, 3, 4, 5]])


def test_the_language_model_trains_in_linen_through_the_bridge(tiny):
    model = nnx.bridge.to_linen(LanguageModel, tiny.replace(layer_pattern=("gated_delta_net",)))
    variables = model.init(jax.random.key(0), TOKENS)
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["lm_head"] == jax.P("embed", "vocab")
    params = nn.meta.unbox(variables)["params"]

    @jax.jit
    def step(params):
        def loss(params):
            logits = model.apply({"params": params}, TOKENS[:, :-1])
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], -1))

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    losses = []
    for _ in range(3):
        value, params = step(params)
        losses.append(float(value))
    assert losses[2] < losses[1] < losses[0]
    assert np.isfinite(losses).all()
