"""`python -m train.plan`: real compilations of small pods' steps (where libtpu is), and its errors."""

import math
import re
import types

import pytest
from rich.console import Console

from deltajax.models import get_preset
from train import plan, pod_step, tpu_aot
from train.config import OptimizerConfig
from train.mesh import make_mesh
from train.plan import main
from train.pod_step import compile_step

needs_libtpu = pytest.mark.skipif(not tpu_aot.available(), reason="needs `uv run --with libtpu`")
SMALL = ["--preset", "tiny_delta_net", "--batch", "8", "--seq-len", "256"]


def number(out: str, row: str) -> float:
    """The first number in a table's row."""
    (line,) = [line for line in out.splitlines() if re.match(rf"│ {row}\s", line)]
    return float(line.split("│")[2].replace(",", ""))


@needs_libtpu
@pytest.mark.parametrize("topology, devices", [("v5e:2x2", 4), ("tpu7x:2x2x1", 8)])
def test_a_small_step_fits_with_kernels_and_the_report_adds_up(topology, devices, tmp_path, capsys):
    report = tmp_path / "report.txt"
    args = [*SMALL, "--topology", topology, "--mesh.fsdp", "2", "--model.remat", "save_delta_rule"]
    assert main([*args, "--output", str(report)]) == 0
    out = capsys.readouterr().out
    assert f"{devices} devices as data {devices // 2} x fsdp 2" in out
    # Four layers, and the forward half is not run again.
    assert "Pallas kernels: delta_rule_backward x 4, delta_rule_forward x 4" in out
    assert number(out, "optimizer state") == pytest.approx(2 * number(out, "parameters"), abs=2e-3)
    assert number(out, "HBM") == {"v5e": 16, "tpu7x": 96}[topology.split(":")[0]]
    assert number(out, "all-gather") > 4 and number(out, "reduce-scatter") > 0
    assert "model FLOPs of a step" in out and "\nfits\n" in out
    assert report.read_text() in out and "compiled in" not in report.read_text()


@needs_libtpu
def test_kernels_run_on_parts_of_heads_and_of_rows(capsys):
    args = ["--topology", "v5e:2x2", "--preset", "tiny_delta_net", "--model.num-layers", "1", "--batch", "2"]
    assert main([*args, "--seq-len", "512", "--mesh.context", "2", "--mesh.tensor", "2"]) == 0
    out = capsys.readouterr().out
    assert "data 1 x fsdp 1 x context 2 x tensor 2" in out
    # One call gives a device's outputs, what its tokens do to the state that enters them, and their response.
    assert "Pallas kernels: delta_rule_backward x 1, delta_rule_forward x 1" in out


@needs_libtpu
@pytest.mark.slow
def test_experts_are_planned_on_an_axis_of_their_own(capsys):
    config = get_preset("tiny_qwen3_next").replace(
        num_layers=1, layer_pattern=("gated_delta_net",), head_dim=64
    )
    mesh = make_mesh(1, 2, tpu_aot.devices_of("v5e:2x2"), expert=2)
    found = compile_step(config, OptimizerConfig(), mesh, batch=4, seq_len=256)
    assert found.memory.fits and found.kernels["delta_rule_backward"] == 1
    # Three products forward; two again, three back to rows and three to kernels.
    assert found.kernels["ragged-dot"] == 3 + 2 + 3 + 3 and "other" not in found.kernels
    total, experts = found.model.num_parameters, 8 * 3 * 128 * 96
    assert found.memory.parameters == pytest.approx(4 * ((total - experts) / 2 + experts / 4), rel=0.02)
    options = plan.Plan(topology="v5e:2x2", batch=4, preset="tiny_qwen3_next", seq_len=256)
    plan.show(options, found, Console(width=100))
    out = capsys.readouterr().out
    assert "4 devices as data 1 x fsdp 2 x expert 2;" in out and " active), adamw" in out


@needs_libtpu
def test_gradients_of_a_bfloat16_model_are_summed_over_devices_in_float32_and_to_their_places():
    config = get_preset("tiny_kda").replace(dtype="bfloat16", num_layers=2, remat="save_dots")
    mesh = make_mesh(2, 2, tpu_aot.devices_of("v5e:2x2"))
    found = compile_step(config, OptimizerConfig(), mesh, batch=4, seq_len=256)
    sums = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", found.text)
    assert sums and not [kind for kind in sums if "bf16" in kind]
    assert not re.search(r"rematted_computation/[^\"]*dot_general", found.text)  # products are saved
    # Nearly all parameters lie in two parts: devices receive the sums of their own part only.
    assert found.collectives["reduce-scatter"].bytes > 0.75 * 4 * found.model.num_parameters


@needs_libtpu
@pytest.mark.parametrize("topology, fsdp", [("v5p:8x8x8", 16), ("v5p:8x8x8", 64), ("v5e:16x16", 4)])
def test_the_mesh_keeps_a_pods_neighbours_together_and_may_split_its_axes(topology, fsdp):
    devices = tpu_aot.devices_of(topology)
    mesh = make_mesh(-1, fsdp, devices)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    for group in mesh.devices.reshape(-1, fsdp):  # along fsdp, in one box of exactly their number
        ranges = zip(*(d.coords for d in group), strict=True)
        assert math.prod(max(x) - min(x) + 1 for x in ranges) == fsdp


@needs_libtpu
def test_a_step_too_large_says_so_in_the_compilers_words(capsys):
    args = ["--preset", "tiny_delta_net", "--topology", "v5e:2x2", "--model.num-layers", "1"]
    assert main([*args, "--batch", "32768", "--seq-len", "512"]) == 1
    out = capsys.readouterr().out
    assert "\ndoes not fit\n" in out and "the compiler: " in out and "Pallas" not in out
    assert number(out, "total") > 16


@needs_libtpu
@pytest.mark.parametrize(
    "change, message",
    [
        (["--mesh.fsdp", "4", "--model.hidden-size", "130"], "not divisible by mesh axis 'fsdp' of size 4"),
        (["--mesh.fsdp", "3"], "argument --mesh: data -1 x fsdp 3 is 3 devices, expected all 4 of v5e:2x2"),
        (["--mesh.fsdp", "8"], "argument --mesh: data -1 x fsdp 8 is 8 devices, expected all 4 of v5e:2x2"),
        (["--mesh.fsdp", "0"], "mesh sizes must be positive (or data -1), got data=-1, fsdp=0"),
        (
            ["--mesh.context", "3", "--mesh.data", "1"],
            "data 1 x fsdp 1 x context 3 is 3 devices, expected all 4",
        ),
        (["--mesh.context", "4", "--seq-len", "130"], "seq_len 130: expected a multiple of --mesh.context 4"),
        (["--mesh.tensor", "4"], "--mesh.tensor 4: expected a divisor of the model's num_heads 2"),
        (["--batch", "6"], "batch 6: expected a multiple of 4 devices x 1 micro-batches"),
        (["--topology", "v5e:3x5"], "topology 'v5e:3x5'"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_named(change, message, capsys):
    assert main([*SMALL, "--topology", "v5e:2x2", *change]) == 2
    assert message in (err := capsys.readouterr().err) and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (["--topology", "v9:2x2"], "argument --topology: 'v9:2x2', expected one of v5e, v5p, v6e, tpu7x"),
        (["--seq-len", "0"], "argument --seq-len: must be positive, got 0"),
        (["--model.head-dim", "300"], "--model.head-dim 300"),
        (["--optimizer.b1", "1.5"], "argument --optimizer.b1"),
    ],
)
def test_wrong_options_are_named(change, message, capsys):
    assert main([*SMALL, "--topology", "v5e:2x2", *change]) == 2
    assert message in (err := capsys.readouterr().err) and err.startswith("error: ")


def test_a_missing_libtpu_is_said_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(tpu_aot, "available", lambda: False)
    assert main([*SMALL, "--topology", "v5e:2x2"]) == 2
    assert "uv run --with libtpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "said, temporaries, total",
    [
        ("Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.", None, int(21.5 * 2**30)),
        (
            "total memory required for HLO temporaries (20.00G) exceeds HBM (15.75G).",
            20 * 2**30,
            20 * 2**30 + 6,
        ),
        ("in words that are new", None, 6),
    ],
)
def test_the_compilers_refusal_is_read(said, temporaries, total):
    arguments = dict(parameters=1, optimizer=2, batch=3)
    memory = pod_step._exceeded(f"RESOURCE_EXHAUSTED: {said}\nand more", arguments, 16 * 2**30)
    assert (memory.temporaries, memory.total) == (temporaries, total)
    assert not memory.fits and said in str(memory.over)


@pytest.mark.parametrize(
    "kind, generation",
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")],
)
def test_every_generation_has_its_memory(kind, generation):
    class Devices:
        flat = (types.SimpleNamespace(device_kind=kind),)

    assert pod_step._generation(types.SimpleNamespace(devices=Devices())) == generation
    assert generation in pod_step.HBM_GIB and plan.peak_flops(kind)
