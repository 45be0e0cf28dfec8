"""Run by test_sharding.py in a process of its own, with 8 CPU devices.

Each kind of rows, gate and implementation is seen by default; with --all, each combination of them.
"""

import dataclasses
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deltajax import ops
from deltajax.ops import chunked, context, dispatch, problem
from tests import cases
from tests.cases import Case

TOLERANCE = 1e-5
ALL = "--all" in sys.argv
ROWS_AND_HEADS = {
    ("none", "none", "scan"),
    ("none", "packed", None),
    ("head", "none", None),
    ("head", "states", "scan"),
    ("channel", "packed", None),
    ("channel", "states", None),
}
# The summary of a channel's gate is the general one; each gate has its own with and without resets. Devices:
# those of a channel's gate with resets are also the edges', one program for both.
CONTEXT = {
    ("none", "none"): 8,
    ("none", "states"): 2,
    ("head", "none"): 8,
    ("head", "packed"): 4,
    ("channel", "none"): 8,
    ("channel", "packed"): 4,
    ("channel", "states"): 4,
}
EDGES = [
    [0] * 16 + [1] * 8 + [2] * 8 + [0] * 16,  # two devices of padding, a boundary inside the third
    [1] * 12 + [2] * 12 + [3] * 24,  # boundaries at the edges, then two devices of one segment
    [0] * 48,
    [2] * 12 + [0] * 12 + [2] * 6 + [1] * 18,  # padding for a whole device inside a segment
]
PER_TOKEN = ("q", "k", "v", "g", "beta", "do")


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@cache
def sharded(
    case: Case,
    specs: tuple,
    devices,
    implementation,
    check_vma: bool,
    axis_name: str | None,
    by_row: bool = False,
):
    """The jitted outputs and gradients of all cases of one program (`cases.program`), under shard_map.

    ``by_row``: of one call a row, by `jax.vmap`.
    """
    places = dict(specs)

    def call(x: dict):
        return cases.call(case, x, implementation, axis_name=axis_name)

    def mapped(x: dict):
        outputs = jax.vmap(call)(jax.tree.map(lambda a: a[:, None], x))
        return jax.tree.map(lambda a: a[:, 0], outputs)

    def run(x: dict):
        op = jax.shard_map(
            mapped if by_row else call,
            mesh=devices,
            in_specs=({n: places[n] for n in x},),
            out_specs=(places["do"], places["dstate"]),
            check_vma=check_vma,
        )
        return cases.with_gradients(op, x)

    return jax.jit(run)


def errors(
    case: Case, x: dict, specs: dict, devices, implementation, check_vma=True, axis_name=None, by_row=False
) -> dict:
    """Relative errors of outputs and gradients under shard_map against the unsharded float64 scan."""
    places = tuple(specs.items())
    op = sharded(cases.program(case), places, devices, implementation, check_vma, axis_name, by_row)
    got, expected = op(jax.tree.map(jnp.asarray, x)), cases.reference(case, x)
    return {n: cases.relative_error(got[n], expected[n]) for n in expected}


def rows_and_heads():
    """Rows over one axis, heads over another; gate parameters are the same for all rows."""
    tokens = P("data", None, "heads")
    for gate in cases.GATES:
        for segments in ("none", "packed", "states"):
            decay = "softplus" if gate != "none" else "random"
            case = Case(gate, T=33, B=4, H=2, HV=4, K=16, V=8, decay=decay, segments=segments)
            state = P("data", None, "heads") if segments == "states" else P("data", "heads")
            specs = dict.fromkeys(PER_TOKEN, tokens) | dict.fromkeys(("initial_state", "dstate"), state)
            specs |= {"segment_ids": P("data"), "A_log": P("heads"), "dt_bias": P("heads")}
            x = cases.arrays(case, np.float32)
            for implementation in ("scan", None) if segments != "packed" else (None,):
                if not ALL and (gate, segments, implementation) not in ROWS_AND_HEADS:
                    continue
                yield (
                    f"{case} {implementation}",
                    errors(case, x, specs, mesh(data=4, heads=2), implementation),
                )


def context_specs() -> dict:
    specs = dict.fromkeys((*PER_TOKEN, "segment_ids"), P(None, "context"))
    return specs | dict.fromkeys(("initial_state", "dstate", "A_log", "dt_bias"), P())


def context_parallel():
    """Tokens over an axis, with slow decay so that a leak between devices would show."""
    for gate in cases.GATES:
        for segments in ("none", "packed", "states"):
            if not ALL and (gate, segments) not in CONTEXT:
                continue
            decay, parts = "slow" if gate != "none" else "random", CONTEXT.get((gate, segments), 4)
            case = Case(gate, T=48, B=4, HV=2, K=16, V=8, decay=decay, segments=segments, beta_max=2.0)
            x = cases.arrays(case, np.float32)
            check_vma = ALL or (gate, segments) != ("channel", "states")  # as the edges' program
            got = errors(case, x, context_specs(), mesh(context=parts), None, check_vma, axis_name="context")
            yield f"{case} context {parts}", got


def context_parallel_edges():
    """Devices that hold only padding, a boundary at a device's edge, one segment over several devices."""
    for segments in ("packed", "states"):
        case = Case("channel", T=48, B=4, HV=2, K=16, V=8, decay="slow", segments=segments)
        x = cases.arrays(case, np.float32) | {"segment_ids": np.array(EDGES, np.int32)}
        for check_vma in (True, False):
            if not ALL and check_vma == (segments == "states"):
                continue
            got = errors(case, x, context_specs(), mesh(context=4), None, check_vma, axis_name="context")
            yield f"{case} edges, check_vma {check_vma}", got


def context_parallel_by_row():
    """Under `jax.vmap`, whose axis has to find its way through what devices exchange, and its derivative."""
    case = Case("none", T=48, B=4, HV=2, K=16, V=8, segments="packed")
    x = cases.arrays(case, np.float32) | {"segment_ids": np.array(EDGES, np.int32)}
    got = errors(case, x, context_specs(), mesh(context=4), None, axis_name="context", by_row=True)
    yield f"{case} context 4", got


def maps_of_tokens(inputs, options):
    """N and M of the chunked form, without regard to where segments begin."""
    B, T, HV, V = inputs.v.shape
    K = inputs.q.shape[-1]
    v = jnp.concatenate([inputs.v, jnp.zeros((B, T, HV, K))], axis=-1)
    state = jnp.broadcast_to(jnp.eye(K, V + K, V), (B, HV, K, V + K))
    whole = problem.Inputs(*problem.vary_alike(*inputs._replace(v=v, initial_state=state)))
    finals = chunked.forward(whole, dataclasses.replace(options, axis_name=None))[1]
    return finals[..., :V], finals[..., V:]


def spread_forward(inputs, options):
    state = context.enter(*maps_of_tokens(inputs, options), inputs, options)
    return chunked.forward(inputs._replace(initial_state=state), dataclasses.replace(options, axis_name=None))


def spread_backward(inputs, options, do, dfinal):
    added, moved = maps_of_tokens(inputs, options)
    entered = inputs._replace(initial_state=context.enter(added, moved, inputs, options))
    alone = dataclasses.replace(options, axis_name=None)
    back = chunked.backward(entered, alone, do, jnp.zeros_like(dfinal)).initial_state
    leaving = context.leave(back, moved.mT, dfinal, inputs, options)
    found = chunked.backward(entered, alone, do, leaving)
    return found._replace(initial_state=context.of_initial_state(found.initial_state, options))


def context_parallel_of_kernels():
    """What kernels that make their tokens' map call, `context.enter` and `leave`: the chunked form as one."""
    usual = dispatch.CHUNKED
    dispatch.CHUNKED = dispatch.Kernel(
        spread_forward, spread_backward, usual.unsupported, spreads=lambda options: True
    )
    sharded.cache_clear()
    jax.clear_caches()
    try:
        for gate, segments, parts in (("head", "none", 8), ("channel", "packed", 4)):
            if not ALL and segments == "none":
                continue
            case = Case(gate, T=48, B=4, HV=2, K=16, V=8, decay="slow", segments=segments, beta_max=2.0)
            x = cases.arrays(case, np.float32)
            if segments == "packed":
                x |= {"segment_ids": np.array(EDGES, np.int32)}
            got = errors(case, x, context_specs(), mesh(context=parts), "chunked", axis_name="context")
            yield f"{case} context {parts}", got
    finally:
        dispatch.CHUNKED = usual


def convolution():
    """The short convolution reaches over as many devices as it must, and never over documents."""
    rng = np.random.default_rng(cases.SEED)
    packed = np.array(
        [
            [0] * 5 + [1] * 4 + [2] * 3 + [0] * 4,
            [1] * 4 + [2] + [3] * 2 + [3] * 9,
            [0] * 16,
            [1] * 5 + [0] * 11,
        ],
        np.int32,
    )
    shapes = ((4, 16, 6), (6, 4), (4, 16, 6), (4, 3, 6))
    x, weight, dy, dcache = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def all_of(op):
        out, pull = jax.vjp(op, x, weight)
        return dict(zip(("y", "cache", "dx", "dweight"), (*out, *pull((dy, dcache))), strict=True))

    for parts in (2, 8):  # eight tokens a device, and two: fewer than the three before a token
        for ids in ((), (packed,)):

            def op(x, weight, *ids, axis_name=None):
                segment_ids = ids[0] if ids else None
                return ops.short_convolution(x, weight, segment_ids=segment_ids, axis_name=axis_name)

            tokens = P(None, "context")
            split = jax.shard_map(
                partial(op, axis_name="context"),
                mesh=mesh(context=parts),
                in_specs=(tokens, P(), *(tokens for _ in ids)),
                out_specs=(tokens, P()),
            )
            got, expected = (all_of(jax.jit(lambda x, w, f=f, ids=ids: f(x, w, *ids))) for f in (split, op))
            found = {n: cases.relative_error(got[n], expected[n]) for n in expected}
            yield f"context {parts}, {'packed' if ids else 'whole'} rows", found


def main() -> int:
    worst = 0.0
    checks = (
        rows_and_heads,
        context_parallel,
        context_parallel_edges,
        context_parallel_by_row,
        convolution,
        context_parallel_of_kernels,  # last: it empties caches
    )
    for check in checks:
        for name, found in check():
            top = max(found.values(), key=lambda e: e if e == e else np.inf)
            bad = {n: e for n, e in found.items() if not e < TOLERANCE}
            print(f"{'FAIL' if bad else 'ok'} {check.__name__} {name}: {top:.1e} {bad or ''}", flush=True)
            worst = max(worst, top if top == top else np.inf)
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
