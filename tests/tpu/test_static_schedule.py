"""The static report counts what programs of known size execute, and the ops' schedules do not get worse."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks import tpu_dump, tpu_report, tpu_static
from train import tpu_aot

needs_libtpu = pytest.mark.skipif(
    not tpu_aot.available(), reason="libtpu cannot be imported: uv run --with libtpu pytest"
)
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")


# Programs: functions returning (function, arguments), called in the compiling process.


def tiled_matmul(M=1024, N=1024, K=1024):
    """Blocks of 256 x 256 by 256 x 512, each step another block of both operands."""

    def kernel(x, y, out, total):
        k = pl.program_id(2)

        @pl.when(k == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(k == K // 256 - 1)
        def _():
            out[...] = total[...].astype(out.dtype)

    call = pl.pallas_call(
        kernel,
        grid=(M // 256, N // 512, K // 256),
        in_specs=[
            pl.BlockSpec((256, 256), lambda i, j, k: (i, k)),
            pl.BlockSpec((256, 512), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((256, 512), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, N), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((256, 512), jnp.float32)],
        name="tiled",
    )
    return call, (jax.ShapeDtypeStruct((M, K), jnp.bfloat16), jax.ShapeDtypeStruct((K, N), jnp.bfloat16))


def kept_blocks(rows=512):
    """12 steps that read block i // 6 of x, block i % 6 of y."""

    def kernel(x, y, out):
        out[...] = x[...] + y[...]

    call = pl.pallas_call(
        kernel,
        grid=(12,),
        in_specs=[
            pl.BlockSpec((rows, 128), lambda i: (i // 6, 0)),
            pl.BlockSpec((rows, 128), lambda i: (i % 6, 0)),
        ],
        out_specs=pl.BlockSpec((rows, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((12 * rows, 128), jnp.float32),
        name="kept",
    )
    x = jax.ShapeDtypeStruct((2 * rows, 128), jnp.float32)
    return call, (x, jax.ShapeDtypeStruct((6 * rows, 128), jnp.float32))


def scan_like(steps, calls=1):
    """A recurrence over the grid with its state in scratch, called in a loop."""

    def kernel(x, out, state):
        @pl.when(pl.program_id(0) == 0)
        def _():
            state[...] = jnp.zeros_like(state)

        h = jnp.dot(state[...].astype(jnp.bfloat16), x[...], preferred_element_type=jnp.float32) + 1
        state[...] = h
        out[...] = h.astype(out.dtype)

    call = pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[pl.BlockSpec((128, 128), lambda t: (t, 0))],
        out_specs=pl.BlockSpec((128, 128), lambda t: (t, 0)),
        out_shape=jax.ShapeDtypeStruct((128 * steps, 128), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((128, 128), jnp.float32)],
        name="scanning",
    )
    x = jax.ShapeDtypeStruct((128 * steps, 128), jnp.bfloat16)
    return lambda x: jax.lax.fori_loop(0, calls, lambda _, x: call(x), x), (x,)


def dots(dependent, n=8):
    """n products of [64, 64], each of the last one's result or of an operand of its own."""

    def kernel(x, y, out):
        last = x[0]
        for i in range(n):
            left = last if dependent else x[i]
            last = jnp.dot(left, y[i], preferred_element_type=jnp.float32).astype(jnp.bfloat16)
            out[i] = last

    x = jax.ShapeDtypeStruct((n, 64, 64), jnp.bfloat16)
    return pl.pallas_call(kernel, out_shape=x, name="dots"), (x, x)


def many_live_values(n=96):
    """More vectors alive at once than there are registers."""

    def kernel(x, out):
        values = [jnp.exp(x[i]) for i in range(n)]
        total = functools.reduce(jnp.add, values)
        for i in range(n):
            out[i] = values[i] * total

    x = jax.ShapeDtypeStruct((n, 8, 128), jnp.float32)
    return pl.pallas_call(kernel, out_shape=x, name="live"), (x,)


def refused():
    def fn(x):
        raise NotImplementedError("not this one")

    return fn, (jax.ShapeDtypeStruct((8, 128), jnp.float32),)


JOBS = {
    "matmul": ("tiled_matmul", {}),
    "kept": ("kept_blocks", {}),
    "refused": ("refused", {}),
    "scan 8": ("scan_like", {"steps": 8}),
    "scan 16": ("scan_like", {"steps": 16}),
    "scan 32": ("scan_like", {"steps": 32}),
    "scan in a loop": ("scan_like", {"steps": 8, "calls": 10}),
    "dependent": ("dots", {"dependent": True}),
    "independent": ("dots", {"dependent": False}),
    "spilling": ("many_live_values", {}),
}


@functools.cache
def compiled(topology):
    here = pathlib.Path(__file__)
    jobs = [tpu_report.Job(name, f"{here}:{make}", options) for name, (make, options) in JOBS.items()]
    return {r.name: r for r in tpu_report.reports(jobs, topology)}


def kernel(topology, name):
    report = compiled(topology)[name]
    assert report.error is None
    (operation,) = report.pallas
    return operation


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
class TestPrograms:
    def test_grid_matrix_unit_and_buffers(self, topology):
        matmul = kernel(topology, "matmul")
        assert matmul.grid_steps == 4 * 2 * 4
        side = 128 if topology.startswith("v5") else 256
        assert matmul.matmuls == 32 * (256 // 16) * (256 // side) * (512 // side)
        blocks = 2 * (2 * 256 * 256 + 2 * 256 * 512 + 2 * 256 * 512)  # double buffers, bfloat16
        scratch = 4 * 256 * 512
        assert matmul.vmem in (blocks + scratch, blocks + scratch - 2 * (2 * 256 * 512 + 2 * 256 * 256))

    def test_hbm_bytes(self, topology):
        matmul, kept = kernel(topology, "matmul"), kernel(topology, "kept")
        assert matmul.hbm_write == 2 * 1024 * 1024
        assert kept.hbm_write == 12 * 512 * 128 * 4
        if topology.startswith("tpu7x"):  # XLA brings operands this small to VMEM first
            program = sum(o.hbm_read for o in compiled(topology)["matmul"].operations)
            assert program in (2 * 2 * 1024 * 1024, 32 * 2 * (256 * 256 + 256 * 512))
        else:
            assert matmul.hbm_read == 32 * 2 * (256 * 256 + 256 * 512)
            assert kept.hbm_read == (2 + 12) * 512 * 128 * 4

    def test_bundles_are_affine_in_the_grid(self, topology):
        issue, cycles = (
            [getattr(kernel(topology, f"scan {n}"), c) for n in (8, 16, 32)] for c in ("issue", "cycles")
        )
        for x in (issue, cycles):
            assert x[2] - x[1] == 2 * (x[1] - x[0]) > 0

    def test_calls_in_a_loop(self, topology):
        assert kernel(topology, "scan in a loop").calls == 10

    def test_waits_of_dependent_products(self, topology):
        dependent, independent = kernel(topology, "dependent"), kernel(topology, "independent")
        assert dependent.cycles > 3 * independent.cycles
        assert dependent.issue < 2 * independent.issue

    def test_spills(self, topology):
        assert kernel(topology, "spilling").spills >= 24
        assert kernel(topology, "matmul").spills == kernel(topology, "matmul").fills == 0

    def test_nothing_is_guessed(self, topology):
        assert not [o.notes for r in compiled(topology).values() for o in r.operations if o.notes]

    def test_errors_are_reported_beside_the_rest(self, topology):
        assert compiled(topology)["refused"].error == "NotImplementedError: not this one"


@needs_libtpu
@pytest.mark.parametrize(
    "topology",
    [
        tpu_static.CHECK_TOPOLOGIES[0],
        *(pytest.param(other, marks=pytest.mark.slow) for other in tpu_static.CHECK_TOPOLOGIES[1:]),
    ],
)
def test_the_ops_are_no_worse_than_stored(topology):
    worse, _ = tpu_static.check([topology])
    assert not worse, "\n".join(worse)


def test_compare_allows_the_tolerance():
    stored = {"cycles": 1000, "spills": 0, "temp": 0}
    assert tpu_static.compare(stored, {"cycles": 1050, "spills": tpu_static.SPILLS, "temp": 0}) == ([], [])
    assert tpu_static.compare(stored, {"cycles": 940, "spills": 0, "temp": 0})[1] == ["cycles 1,000 -> 940"]
    worse, better = tpu_static.compare(stored, {"cycles": 1051, "spills": 99, "temp": 8})
    assert worse == ["cycles 1,000 -> 1,051", "spills 0 -> 99", "temp 0 -> 8"] and not better


def test_libtpu_missing_is_said(monkeypatch):
    monkeypatch.setattr(tpu_aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="uv run --with libtpu"):
        tpu_aot.prepare()
    with pytest.raises(RuntimeError, match="uv run --with libtpu"):
        tpu_report.reports([], "v6e:2x2")


def test_flags_come_too_late(monkeypatch, tmp_path):
    monkeypatch.setattr(tpu_aot, "available", lambda: True)
    monkeypatch.setattr(tpu_dump, "_loaded", lambda: True)
    with pytest.raises(RuntimeError, match="new process"):
        tpu_dump.prepare(tmp_path)
