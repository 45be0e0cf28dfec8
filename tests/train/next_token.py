"""The next token's loss and gradients outside of a training step."""

from train.objective import next_token
from train.step import sums_and_grads


def loss_and_grads(build, params, batch, parts, mesh, rules, z_loss=0.0):
    """Mean loss, number of targets and gradients of a batch, see `train.step.sums_and_grads`."""
    loss, sums, grads = sums_and_grads(build, params, batch, parts, mesh, rules, next_token(z_loss))
    return loss, sums["count"], grads
