"""One token of the recurrence, for decoding: checks, choice of a kernel, derivative."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops import checks, gates, step_kernels
from deltajax.ops.gates import Gate
from deltajax.ops.problem import l2_normalize, vary_alike
from deltajax.ops.refusal import on_platforms, refuse, supporting
from deltajax.ops.scan import decay_of, delta_update
from deltajax.ops.step_kernels import StepInputs, StepOptions


def delta_rule_step(
    state: Float[Array, "B HV K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    beta: Float[Array, "B HV"],
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None = None,
    *,
    gate: Gate | None = None,
    normalize_qk: bool = False,
    scale: float | None = None,
    implementation: Literal["pallas", "scan"] | None = None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Advances the state by one token; under ``jit`` with ``state`` donated, in place.

    The gate kind follows from ``g``: None (DeltaNet), [B, HV] (Gated DeltaNet) or [B, HV, K] (KDA).

    Args:
      state: [B, HV, K, V] float32, as an op's ``final_state`` or zeros.
      q: [B, H, K] query. k: [B, H, K] key. v: [B, HV, V] value, HV a multiple of H.
      beta: [B, HV] write strength, activated.
      g: log decay <= 0, or the raw gate projection when ``gate`` is given.
      gate: fuses the gate activation, see `Gate`.
      normalize_qk: L2-normalise q and k over K.
      scale: multiplies q; K^-1/2 if None.
      implementation: "pallas": a kernel that reads the state once and writes it once; "scan": `jax.numpy`, as
        the definition has it; None: the kernel where the program is lowered for a TPU or a Hopper GPU and the
        call is one that it takes.

    Returns:
      o: [B, HV, V] in v's dtype. state: [B, HV, K, V] in ``state``'s dtype.

    Raises:
      ValueError, TypeError: an argument's shape or dtype does not fit; the message names it.
      NotImplementedError: "pallas", and no kernel takes the call.
    """
    checks.check_step(state, q, k, v, beta, g, gate)
    checks.check_scale(scale)
    inputs = StepInputs(
        state, q, k, v, beta, g, None if gate is None else gate.A_log, None if gate is None else gate.dt_bias
    )
    inputs = StepInputs(*vary_alike(*inputs))
    options = StepOptions(
        lower_bound=None if gate is None else gate.lower_bound,
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        normalize=normalize_qk,
    )
    if implementation == "scan":
        return _plain(inputs, options)
    if implementation not in ("pallas", None):
        raise ValueError(f"implementation must be 'pallas', 'scan' or None, got {implementation!r}")
    reasons = {p: kernel.unsupported(inputs) for p, kernel in step_kernels.STEP_KERNELS.items()}
    platforms = supporting(reasons, asked=implementation == "pallas", what="step")
    return _step(inputs, options, platforms, implementation is None)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _step(inputs: StepInputs, options: StepOptions, platforms: tuple[str, ...], fall_back: bool) -> Any:
    """The step as kernels on ``platforms`` and, if ``fall_back``, as `_plain` on all others."""
    return _by_platform(options, platforms, fall_back, inputs)


def _step_fwd(inputs, options, platforms, fall_back):
    return _by_platform(options, platforms, fall_back, inputs), inputs


def _step_bwd(options, platforms, fall_back, inputs, cotangents):
    return jax.vjp(lambda inputs: _plain(inputs, options), inputs)[1](cotangents)


_step.defvjp(_step_fwd, _step_bwd)


@partial(jax.jit, static_argnums=(0, 1, 2))  # one program also for a caller outside jit
def _by_platform(
    options: StepOptions, platforms: tuple[str, ...], fall_back: bool, inputs: StepInputs
) -> tuple[Array, Array]:
    def kernel(platform):
        def run(inputs):
            # Inside a shard_map all branches' results vary as the inputs do.
            o, state = step_kernels.STEP_KERNELS[platform].run(inputs, options)
            return vary_alike(o, state, inputs.state)[:2]

        return run

    def plain(inputs):
        if not fall_back:
            inputs = inputs._replace(q=refuse(inputs.q, platforms, "step"))
        return _plain(inputs, options)

    if not platforms:
        return plain(inputs)

    @step_kernels.vmapped_as_one
    def dispatched(inputs):
        return on_platforms(inputs, default=plain, kernels={p: kernel(p) for p in platforms})

    return dispatched(inputs)


def _plain(inputs: StepInputs, options: StepOptions) -> tuple[Array, Array]:
    """The step in `jax.numpy`, in float32 (float64 if any input is)."""
    state, q, k, v, beta, g, A_log, dt_bias = inputs
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(inputs)))
    o_dtype, state_dtype = v.dtype, state.dtype
    state, q, k, v, beta = (x.astype(dtype) for x in (state, q, k, v, beta))
    if options.normalize:
        q, k = l2_normalize(q), l2_normalize(k)
    kind = "none" if g is None else "channel" if g.ndim == 3 else "head"
    if g is not None:
        g = g.astype(dtype)
        if A_log is not None:
            g = gates.activate(g, A_log, dt_bias, options.lower_bound, per_channel=kind == "channel")
    group = v.shape[1] // q.shape[1]
    q, k = jnp.repeat(q, group, axis=1), jnp.repeat(k, group, axis=1)
    o, state = delta_update(state, q * options.scale, k, v, decay_of(g, kind), beta)
    return o.astype(o_dtype), state.astype(state_dtype)
