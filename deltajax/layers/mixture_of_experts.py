"""Mixture of experts: a router chooses a few of many MLPs for each token; some may serve all tokens."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deltajax.layers.experts import Experts
from deltajax.layers.parameters import INITIALIZER_RANGE, check_sizes, linear, parameter
from deltajax.layers.sharding import op_sharding
from deltajax.layers.swiglu import SwiGLU


class MixtureOfExperts(nnx.Module):
    """`y = scale * sum_j w_j expert_j(x) + shared(x)`, the sum over the experts chosen for each token.

    The router, in float32, scores all experts: `s = sigmoid(router(x))` (DeepSeek-V3, Kimi Linear) or
    `softmax(router(x))` (Qwen3-Next). The `experts_per_token` highest are chosen, by `s + correction_bias`
    where there is such a bias; `w_j` is `s_j` without it, divided by the sum over those chosen with
    `renormalize`. No token is dropped, so that a sequence's output does not depend on others. `Experts` says
    how experts are split over a mesh.

    The bias starts at zero and has no part in the loss. What a derivative gives for it is how many more
    tokens chose each expert than chose the average one, whatever the loss: to descend is to use experts more
    evenly (arXiv 2408.15664 does, by the sign alone; the trainer too).

    Args:
      hidden_size: width D.
      intermediate_size: width of each expert.
      num_experts: E.
      experts_per_token: how many are chosen.
      num_shared_experts: experts that serve every token: one MLP of so many times that width; 0 for none.
      shared_gate: multiply what they return by sigmoid(shared_gate(x)), one number per token.
      router: what makes scores of the router's logits.
      correction_bias: choose by biased scores.
      renormalize: make the weights sum to one, before `scale`.
      scale: of the routed sum.
      initializer_range: standard deviation of the kernels.
      dtype: compute dtype.
      param_dtype: parameter dtype (the bias is float32 always).
      implementation: of the chosen experts' products, see `Experts`.
      rngs: parameter randomness.

    Raises:
      ValueError: on numbers that do not fit together, naming the argument.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        experts_per_token: int,
        num_shared_experts: int = 0,
        shared_gate: bool = False,
        router: Literal["softmax", "sigmoid"] = "softmax",
        correction_bias: bool = False,
        renormalize: bool = True,
        scale: float = 1.0,
        initializer_range: float = INITIALIZER_RANGE,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Literal["pallas"] | None = None,
        rngs: nnx.Rngs,
    ):
        check_sizes(intermediate_size=intermediate_size)
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(
                f"experts_per_token={experts_per_token}: expected 1 to num_experts={num_experts}"
            )
        if num_shared_experts < 0 or (shared_gate and not num_shared_experts):
            raise ValueError(
                f"num_shared_experts={num_shared_experts}: expected at least {int(shared_gate)}"
                + (", with shared_gate" if shared_gate else "")
            )
        if router not in ("softmax", "sigmoid"):
            raise ValueError(f"router={router!r}: expected 'softmax' or 'sigmoid'")
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.scores = router
        self.renormalize = renormalize
        self.scale = scale
        common: dict[str, Any] = dict(
            initializer_range=initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

        def to_numbers(count, dtype, precision=None):
            return linear(
                hidden_size,
                count,
                ("embed", "router"),
                std=initializer_range,
                precision=precision,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        # A choice is not continuous: a router in float32 is one at the highest precision only.
        self.router = to_numbers(num_experts, jnp.float32, jax.lax.Precision.HIGHEST)
        zeros, axes = nnx.initializers.zeros_init(), ("router",)
        bias = parameter(zeros, (num_experts,), axes, jnp.float32, rngs) if correction_bias else None
        self.correction_bias = bias
        self.experts = Experts(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            implementation=implementation,
            **common,
        )
        width = num_shared_experts * intermediate_size
        shared = SwiGLU(hidden_size=hidden_size, intermediate_size=width, **common) if width else None
        self.shared = shared
        self.shared_gate = to_numbers(1, dtype) if shared_gate else None

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Applies the layer to every token by itself; padding (segment id 0) is sent to no expert."""
        choice, weight = self.route(x)
        choice = self._of_real_tokens(choice, segment_ids)
        if self.correction_bias is not None:
            count = self._count(choice)
            weight = _with_surplus(weight, self.correction_bias[...], count - jnp.mean(count))
        y = self.experts(x, choice, weight)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(self.shared_gate(x))
        return y + shared

    def route(self, x: Float[Array, "B T D"]) -> tuple[Int[Array, "B T J"], Float[Array, "B T J"]]:
        """The experts chosen for each token, and their weights in float32."""
        logits = self.router(x)
        scores = jax.nn.sigmoid(logits) if self.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        biased = jax.lax.stop_gradient(scores)
        if self.correction_bias is not None:
            biased = biased + jax.lax.stop_gradient(self.correction_bias[...])
        choice = _highest(biased, self.experts_per_token)
        weight = jnp.take_along_axis(scores, choice, axis=-1)
        if self.renormalize:
            weight = weight / (jnp.sum(weight, axis=-1, keepdims=True) + 1e-20)
        return choice, weight * self.scale

    def load(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, " E"]:
        """Each expert's share of the choices made for these tokens, padding left out; they sum to one."""
        count = self._count(self._of_real_tokens(self.route(x)[0], segment_ids))
        return count / jnp.maximum(jnp.sum(count), 1)

    def _of_real_tokens(self, choice, segment_ids) -> Int[Array, "B T J"]:
        """Choices; of padding, none."""
        if segment_ids is None:
            return choice
        return jnp.where((segment_ids != 0)[..., None], choice, self.num_experts)

    def _count(self, choice: Int[Array, "B T J"]) -> Float[Array, " E"]:
        """How often each expert is chosen."""
        chosen = choice[..., None] == jnp.arange(self.num_experts)
        return jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.float32)


def _highest(scores: Float[Array, "B T E"], count: int) -> Int[Array, "B T J"]:
    """The places of so many highest scores of each token; devices choose for their own tokens."""
    where = op_sharding()
    if where is None:
        return jax.lax.top_k(scores, count)[1]
    rows, sequence = where.token_axes(scores.shape)  # left alone, XLA would gather the scores of all tokens
    spec = P(rows or None, sequence or None)
    own = jax.shard_map(lambda x: jax.lax.top_k(x, count)[1], mesh=where.mesh, in_specs=spec, out_specs=spec)
    return own(scores)


@jax.custom_vjp
def _with_surplus(weight, bias: Float[Array, " E"], surplus: Float[Array, " E"]) -> Array:
    """`weight`; a derivative has `surplus` for the bias."""
    return weight


_with_surplus.defvjp(
    lambda weight, bias, surplus: (weight, surplus), lambda surplus, dweight: (dweight, surplus, None)
)
