"""A whole decoding step, compiled for TPU slices."""

import pytest

from train import tpu_aot
from train.decode_plan import DecodePlan, compile_decode, main
from train.plan import MeshShape

pytestmark = pytest.mark.skipif(
    not tpu_aot.available(), reason="libtpu cannot be imported: uv run --with libtpu pytest"
)
GIB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "expert", "batch", "length"),
    [("v5p:2x2x1", 4, 256, 4096), ("v6e:2x4", 8, 32, 131072)],
)
def test_the_48b_presets_step_fits_with_the_kernels_and_updates_its_caches(topology, expert, batch, length):
    plan = DecodePlan(topology, batch, length, "kimi_linear_48b_a3b", mesh=MeshShape(expert=expert))
    step = compile_decode(plan)
    assert step.kernels["delta_step"] == 20  # KDA layers
    assert step.updated >= step.cache
    assert step.total < step.hbm
    assert sum(traffic.bytes for traffic in step.collectives.values()) < GIB  # tokens, no parameters


SMALL = ["--topology", "v6e:2x2", "--preset", "tiny_kda_mla"]


def test_a_small_hybrids_step_compiles_on_a_mesh(capsys):
    sizes = ["--batch", "8", "--length", "128", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    assert main([*SMALL, *sizes]) == 0
    assert "temporaries" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "3", "--length", "128"], "argument --batch: expected a multiple of 4 devices, got 3"),
        (["--batch", "4", "--length", "0"], "argument --length: must be positive, got 0"),
        (["--batch", "4", "--length", "8", "--topology", "v4:2x2x1"], "argument --topology: 'v4:2x2x1'"),
    ],
)
def test_sizes_that_do_not_go_together_are_named(args, message, capsys):
    assert main([*SMALL, *args]) == 2
    assert message in capsys.readouterr().err
