"""`--layout auto`: what it chooses, on the devices that are there and for pods that are not."""

import dataclasses
import types

import pytest

from deltajax.models import get_preset
from tests.train.train_common import TINY, write_text
from train import layout, plan
from train.command import command
from train.config import ConfigError, OptimizerConfig, TrainConfig, parse
from train.config_checks import check
from train.layout import choose, laid_out
from train.loop import Run
from train.pod_step import HBM_GIB
from train.processes import Processes
from train.report import Report


def chosen(preset, topology, rows, seq_len, optimizer=None, **options):
    generation, shape = topology.split(":")
    devices = 1
    for n in shape.split("x"):
        devices *= int(n)
    return choose(
        get_preset(preset),
        optimizer or OptimizerConfig(),
        devices=devices,
        rows=rows,
        seq_len=seq_len,
        memory=HBM_GIB[generation] * 2**30,
        **options,
    )


@pytest.mark.parametrize(
    "topology, rows, seq_len, arguments",
    [  # of docs/pod_plans.md, where each was compiled and fits
        ("v5e:16x16", 256, 8192, "--mesh.fsdp 16 --model.remat save_dots"),
        ("v5p:8x8x8", 512, 8192, "--mesh.fsdp 16 --model.remat none"),
        ("v6e:16x16", 256, 8192, "--mesh.fsdp 16 --model.remat none"),
        ("v5e:16x16", 16, 131072, "--mesh.fsdp 16 --mesh.context 16 --model.remat save_delta_rule"),
        ("v5p:8x8x8", 32, 131072, "--mesh.fsdp 16 --mesh.context 16 --model.remat none"),
        ("v6e:16x16", 16, 131072, "--mesh.fsdp 16 --mesh.context 16 --model.remat none"),
    ],
)
def test_the_plans_of_the_docs_are_chosen(topology, rows, seq_len, arguments):
    found = chosen("delta_net_1p3b", topology, rows, seq_len)
    assert found.arguments == arguments
    assert found.data * found.fsdp * found.context == (512 if "v5p" in topology else 256)


def test_more_tokens_or_less_memory_save_less_and_micro_batches_more():
    at = lambda rows, **o: chosen("delta_net_1p3b", "v6e:16x16", rows, 8192, **o).remat  # noqa: E731
    policies = [at(256 * n) for n in (1, 2, 4, 16)]
    assert policies == ["none", "save_dots", "save_delta_rule", "full"]
    assert at(1024, optimizer=OptimizerConfig(accumulate=4)) == "none"
    assert at(1024, remat="none") == "none"  # what is given stands


def test_a_mixtures_experts_get_an_axis_and_parameters_of_a_device_stay_few():
    found = chosen("kimi_linear_48b_a3b", "v5p:8x8x8", 512, 8192)
    assert (found.expert, found.fsdp, found.data) == (16, 32, 1)
    small = chosen("kimi_linear_48b_a3b", "v5p:2x2x2", 8, 8192)
    assert (small.expert, small.fsdp) == (8, 1)
    assert chosen("tiny_delta_net", "v5e:2x2", 4, 256).mesh == dict(
        data=4, fsdp=1, expert=1, context=1, tensor=1
    )


@pytest.mark.parametrize("rows, seq_len", [(3, 252), (4, 255), (6, 256)])
def test_batches_that_no_mesh_divides_are_refused(rows, seq_len):
    devices = 8 if rows != 6 else 9
    with pytest.raises(ConfigError, match=rf"--layout auto: {rows} rows of {seq_len} tokens"):
        choose(
            get_preset("tiny_delta_net"),
            OptimizerConfig(),
            devices=devices,
            rows=rows,
            seq_len=seq_len,
            memory=None,
        )


def test_sizes_beside_auto_are_refused():
    config = TrainConfig(layout="auto")
    check(config)
    with pytest.raises(ConfigError, match=r"--mesh.fsdp 2: expected none beside --layout auto"):
        check(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=2)))


@pytest.mark.parametrize("gib, remat", [(16, "save_dots"), (80, "none")])
def test_a_device_that_tells_its_memory_decides(monkeypatch, gib, remat):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": gib * 2**30 + 5})
    monkeypatch.setattr(layout.jax, "devices", lambda: [device] * 16)
    monkeypatch.setattr(layout.jax, "local_devices", lambda: [device])
    config = TrainConfig(layout="auto", preset="delta_net_1p3b")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=16, seq_len=8192))
    changed, _ = laid_out(config, get_preset("delta_net_1p3b"))
    assert (changed.layout, changed.mesh.fsdp, changed.model.remat) == ("given", 16, remat)


def test_a_run_is_laid_out_and_says_what_to_give(tmp_path, capsys):
    text = write_text(tmp_path / "text.jsonl")
    config = parse([*TINY, "--data.files", str(text), "--layout", "auto", "--model.remat", "save_dots"])
    run = Run.build(config, tmp_path / "run", Report(enabled=True, every=1), Processes())
    assert "layout: --model.remat save_dots" in capsys.readouterr().out
    assert run.config == dataclasses.replace(config, layout="given") and "--layout" not in command(run.config)


def test_a_plan_goes_on_to_smaller_policies_until_one_fits(monkeypatch, capsys):
    tried = []

    def compiled(options, config, sizes, devices):
        tried.append((config.remat, sizes["fsdp"]))
        memory = types.SimpleNamespace(fits=config.remat == "save_delta_rule")
        return types.SimpleNamespace(memory=memory)

    monkeypatch.setattr(plan, "_compiled", compiled)
    monkeypatch.setattr(plan.tpu_aot, "devices_of", lambda topology: [None] * 256)
    options = plan.Plan(topology="v6e:16x16", batch=256, layout="auto")
    assert plan.make(options).memory.fits
    assert tried == [("none", 16), ("save_dots", 16), ("save_delta_rule", 16)]
    given = dataclasses.replace(options, model=dataclasses.replace(options.model, remat="full"))
    assert not plan.make(given).memory.fits and tried[3:] == [("full", 16)]
