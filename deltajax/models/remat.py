"""What a block keeps of its forward pass for the backward pass; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax

from deltajax.layers.delta_base import OP_OUTPUT
from deltajax.layers.projection import PROJECTION_OUTPUT
from deltajax.ops.dispatch import SAVED

_policies = jax.checkpoint_policies

# The op's output and what its kernels save for their backward halves: with both at hand, and its inputs from
# the projections, the op's forward half does not run again.
_delta_rule = _policies.save_only_these_names(OP_OUTPUT, SAVED)

POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "save_delta_rule": _delta_rule,
    # Products of activations with parameters, not those between activations (attention's T x T scores).
    "save_dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(OP_OUTPUT, SAVED, PROJECTION_OUTPUT),
    ),
}


def rematerialized(block: Callable[..., Any], remat: str, *, in_loop: bool) -> Callable[..., Any]:
    """`block` under the policy that `ModelConfig.remat` names; itself for "none".

    Outside a loop that stays one when compiled (`in_loop`), XLA must be kept from merging the second
    computation with the first.

    | remat | kept of a block, beside its input | computed again |
    |---|---|---|
    | none | all that its derivative uses | the norms, the MLP's activation |
    | save_dots | products with parameters, and as below | convolutions, activations, norms |
    | save_delta_rule | the op's output, what kernels and blockwise attention save | all but these |
    | full | nothing | everything |
    """
    if remat == "none":
        return block
    return jax.checkpoint(block, policy=POLICIES[remat], prevent_cse=not in_loop)
