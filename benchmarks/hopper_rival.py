"""Errors of the Hopper kernels beside those of flash-linear-attention's Triton kernels, on the same inputs.

    python -m benchmarks.hopper_rival        # needs a Hopper card, torch and flash-linear-attention 0.6

Both are compared with the float64 recurrence on the same bf16 inputs: outputs, final states and every
gradient, by |x - reference| / |reference|. With a per-head gate the rival's backward refuses Hopper.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.hopper import FULL_WIDTH, KERNEL, card, recurrence
from deltajax.ops import dispatch
from tests import cases


@dataclasses.dataclass(frozen=True)
class Options:
    """Which cases."""

    only: tuple[str, ...] = ("",)
    """Only cases whose name contains one of these."""


def rival(case: cases.Case, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs and gradients of flash-linear-attention, by the names of `cases.outputs_and_gradients`."""
    import torch
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    def tensor(name):
        a = x[name]
        half = torch.bfloat16 if a.dtype == jnp.bfloat16 else torch.float32
        return torch.from_numpy(np.array(a, np.float32)).to("cuda", half)

    leaves = {name: tensor(name).requires_grad_() for name in x if name not in cases.NOT_DIFFERENTIATED}
    group = case.HV // case.H
    q, k = (leaves[name].repeat_interleave(group, dim=2) for name in ("q", "k"))
    options = dict(
        initial_state=leaves.get("initial_state"),
        output_final_state=True,
        use_qk_l2norm_in_kernel=case.normalize,
    )
    if case.gate == "none":
        o, state = chunk_delta_rule(q, k, leaves["v"], leaves["beta"], **options)
    else:
        op = chunk_kda if case.gate == "channel" else chunk_gated_delta_rule
        if "A_log" in leaves:
            options |= dict(
                use_gate_in_kernel=True, A_log=leaves["A_log"], dt_bias=leaves["dt_bias"].flatten()
            )
            if case.decay == "bounded":
                options |= dict(safe_gate=True, lower_bound=-5.0)
        o, state = op(q, k, leaves["v"], g=leaves["g"], beta=leaves["beta"], **options)
    got = {"o": o, "final_state": state}
    if case.gate != "head":
        loss = (o.float() * tensor("do").float()).sum() + (state * tensor("dstate").float()).sum()
        loss.backward()
        got |= {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: a.detach().float().cpu().numpy() for name, a in got.items()}


def main(options: Options) -> int:
    """Prints, for every case and result, our error and the rival's."""
    dispatch.PALLAS = {"cuda": KERNEL}
    seed, larger, compared = int(time.time()), [], 0
    for case in FULL_WIDTH:
        if case.segments != "none" or not any(part in str(case) for part in options.only):
            continue
        x = cases.arrays(case, jnp.bfloat16, seed)
        expected = recurrence(case, x)
        ours = jax.device_get(cases.outputs_and_gradients(case, jax.tree.map(jnp.asarray, x), "pallas"))
        try:
            theirs = rival(case, x)
        except Exception as error:  # whatever Triton makes of a shape
            print(f"{case}: the rival fails ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
            theirs = {}
        parts = []
        for name, want in expected.items():
            mine = cases.relative_error(ours[name], want)
            if name not in theirs:
                parts.append(f"{name} {mine:.1e} / -")
                continue
            other = cases.relative_error(theirs[name], want)
            compared += 1
            if mine > other:
                larger.append((mine / other, f"{case} {name}"))
            parts.append(f"{name} {mine:.1e} / {other:.1e}")
        print(f"{case}: " + ", ".join(parts), flush=True)
    print(f"{compared} compared, {len(larger)} larger than the rival's; seed {seed}, {card()}")
    for ratio, what in sorted(larger, reverse=True):
        print(f"  {ratio:.2f} times  {what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
