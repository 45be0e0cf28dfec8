"""The Hopper kernels on rows spread over the GPUs of a host (`axis_name`), beside one GPU.

    python -m benchmarks.hopper_context --check   # outputs, states and gradients equal one GPU's
    python -m benchmarks.hopper_context           # milliseconds, as many tokens a GPU as on one

Times are wall times of queued calls: with several GPUs, of the slowest.
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import problems
from benchmarks.hopper import TOLERANCE, TOLERANCES
from benchmarks.op_times import elapsed_ms
from tests import cases

ON_AXIS = ("q", "k", "v", "g", "beta", "do", "segment_ids")
TIMED = ("delta", "gated", "kda_safe", "kda_softplus")


def check(mesh, devices: int) -> bool:
    """Whether all of a row spread over the GPUs is as on one; prints the worst of each case."""
    good = True
    for gate in cases.GATES:
        for segments in ("none", "packed"):
            decay = "slow" if gate != "none" else "random"
            # No whole number of chunks a device.
            case = cases.Case(
                gate, T=1040 * devices, B=2, H=2, HV=4, K=128, V=128, decay=decay, segments=segments
            )
            x = jax.tree.map(jnp.asarray, cases.arrays(case, jnp.bfloat16))
            specs = {n: P(None, "context") if n in ON_AXIS else P() for n in x}
            spread = jax.shard_map(
                lambda x, case=case: cases.call(case, x, "pallas", axis_name="context"),
                mesh=mesh,
                in_specs=(specs,),
                out_specs=(P(None, "context"), P()),
            )
            alone = lambda x, case=case: cases.call(case, x, "pallas")  # noqa: E731
            got, expected = (
                jax.jit(lambda x, op=op: cases.with_gradients(op, x))(x) for op in (spread, alone)
            )
            errors = {n: cases.relative_error(got[n], expected[n]) for n in expected}
            bad = {n: e for n, e in errors.items() if not e <= TOLERANCES.get(n, TOLERANCE)}
            top = max(errors, key=lambda n: errors[n])
            print(
                f"{gate} {segments}: {top} {errors[top]:.1e} {f'FAILED {bad}' if bad else 'ok'}", flush=True
            )
            good &= not bad
    return good


def times(mesh, devices: int, rows: int, tokens: int) -> None:
    """Prints forward and forward + backward on one GPU and over all, with as many tokens a GPU."""
    print(f"{jax.devices()[0].device_kind}, {rows} x {tokens} tokens a GPU, 16 heads of 128, bfloat16, ms")
    print("gate | 1 GPU forward, with gradients | over all: the same | times")
    for gate in TIMED:
        row = [[], []]
        for count in (1, devices):
            p = problems.Problem(gate, rows, tokens * count, 16, 16)
            args, do = problems.arguments(p, jax.random.key(0))
            op = problems.function(p, "pallas", axis_name="context" if count > 1 else None)
            if count > 1:
                specs = tuple(on_axis(a, p) for a in args)
                op = jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=P(None, "context"))
                args, do = jax.tree.map(
                    lambda a, p=p: jax.device_put(a, jax.NamedSharding(mesh, on_axis(a, p))), (args, do)
                )
            both = jax.jit(lambda do, *args, op=op: jax.vjp(op, *args)[1](do))
            row[count > 1] = [elapsed_ms(jax.jit(op), args), elapsed_ms(both, (do, *args))]
        text = " | ".join(f"{a:.3f}, {b:.3f}" for a, b in row)
        print(f"{gate} | {text} | {row[1][0] / row[0][0]:.2f}, {row[1][1] / row[0][1]:.2f}", flush=True)


def on_axis(x: jax.Array, p: problems.Problem) -> P:
    """Tokens are spread, the gate's parameters are not."""
    return P(None, "context") if x.ndim > 2 and x.shape[1] == p.T else P()


def main() -> int:
    """Checks or times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32768, help="of a row on each GPU")
    options = parser.parse_args()
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,))
    if options.check:
        ok = check(mesh, devices)
        print(f"check: {'ok' if ok else 'FAILED'}, {devices} x {jax.devices()[0].device_kind}")
        return 0 if ok else 1
    times(mesh, devices, options.rows, options.tokens)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
