"""Sharding rules, and that a sharded run is the run of one device."""

import dataclasses
import json

import pytest
from jax.sharding import PartitionSpec

from tests.train.train_common import TINY, losses, run, write_text
from train.mesh import ShardingRules, make_mesh

# Reductions over devices add in another order than one device does; a few steps amplify that little.
SHARDED_RTOL = 1e-5


def test_rules_place_logical_axes():
    assert ShardingRules().spec(("layers", "embed", "mlp")) == PartitionSpec(None, "fsdp", None)
    assert ShardingRules().spec(("batch",)) == PartitionSpec(("data", "fsdp"))


def test_two_dimensions_on_one_mesh_axis_collide():
    rules = dataclasses.replace(ShardingRules(), mlp="fsdp")
    with pytest.raises(ValueError, match=r"w: logical axes 'embed' and 'mlp' both lie on mesh axis 'fsdp'"):
        rules.spec(("embed", "mlp"), where="w")
    with pytest.raises(ValueError, match="'batch' and 'embed' both"):
        rules.spec(("batch", "embed"))


def test_unknown_logical_axis_is_named():
    with pytest.raises(ValueError, match=r"w: unknown logical axis 'width'"):
        ShardingRules().spec(("width",), where="w")


def test_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match=r"needs \d+ devices"):
        make_mesh(1, 4096)
    with pytest.raises(ValueError, match="must be positive"):
        make_mesh(0, 1)
    assert dict(make_mesh(-1, 1).shape)["fsdp"] == 1


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_sharded_run_equals_one_device(tmp_path, text, optimizer):
    common = [*TINY, "--data.files", text, "--data.batch-size", "8", "--steps", "4"]
    common += ["--optimizer.accumulate", "2", "--preset", "tiny_kda", "--optimizer.name", optimizer]
    for name, mesh in {"one": (1, 1), "four": (2, 2)}.items():
        done = run(
            *common, "--run-dir", tmp_path / name, "--mesh.data", mesh[0], "--mesh.fsdp", mesh[1], devices=8
        )
        assert done.returncode == 0, done.stderr
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert list(one) == list(four) == [1, 2, 3, 4]
    assert list(four.values()) == pytest.approx(list(one.values()), rel=SHARDED_RTOL)
    final = [
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("one", "four")
    ]
    assert final[1]["eval_loss"] == pytest.approx(final[0]["eval_loss"], rel=SHARDED_RTOL)


def test_dimension_the_mesh_does_not_divide_is_named(tmp_path, text):
    done = run(
        *TINY, "--data.files", text, "--data.batch-size", "6", "--run-dir", tmp_path / "r", "--steps", "1",
        "--mesh.fsdp", "3", "--mesh.data", "1", devices=8,
    )  # fmt: skip
    assert done.returncode == 2
    assert "parameter" in done.stderr and "not divisible by mesh axis 'fsdp' of size 3" in done.stderr
