"""Sharding rules, and that a sharded run is the run of one device."""

import dataclasses
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deltajax.models import get_preset
from tests import eight_devices
from tests.train.train_common import environment
from train.config import ConfigError, DataConfig, MeshConfig, TrainConfig
from train.config_checks import check
from train.mesh import MESH_AXES, ShardingRules, data_group, make_mesh


def test_rules_place_logical_axes():
    embed = ("fsdp", "context")
    assert ShardingRules().spec(("layers", "embed", "mlp")) == PartitionSpec(None, embed, "tensor")
    assert ShardingRules().spec(("batch",)) == PartitionSpec(("data", "fsdp", "expert"))
    assert ShardingRules().spec(("experts", "mlp", "embed")) == PartitionSpec("expert", "tensor", embed)


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


def test_dimension_the_mesh_does_not_divide_is_named():
    mesh = types.SimpleNamespace(shape=dict(data=1, fsdp=3, expert=1, context=1, tensor=1))
    with pytest.raises(
        ValueError, match=r"parameter w: dimension 1 \(embed\) .* not divisible by mesh axis 'fsdp' of size 3"
    ):
        ShardingRules().sharding(mesh, ("layers", "embed"), (3, 32), "parameter w")


def curves(*args):
    """`tests.train.mesh_curves`, in a process of its own with 8 devices."""
    return subprocess.run(
        [sys.executable, "-m", "tests.train.mesh_curves", *args],
        env=environment() | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {eight_devices.OLDER_FUSIONS}"},
        capture_output=True,
        text=True,
    )


def test_meshes_give_one_devices_curve_and_gather_no_activations():
    done = curves("--small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest" in done.stdout


@pytest.mark.slow  # four models on four meshes
def test_every_model_has_one_devices_curve_on_every_mesh():
    done = curves()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "preset, changes, tensor, message",
    [
        (
            "tiny_kimi_linear",
            dict(num_heads=4, expert_intermediate_size=90),
            4,
            "expert_intermediate_size 90",
        ),
        ("tiny_kda", {}, 4, "argument --mesh.tensor 4: expected a divisor of the model's num_heads 2"),
        ("tiny_hybrid", dict(num_heads=4, attn_num_kv_heads=2), 4, "attn_num_kv_heads 2"),
        ("tiny_kda_mla", dict(num_heads=8, attn_num_heads=6), 4, "attn_num_heads 6"),
        ("tiny_delta_net", dict(num_heads=3), 3, "intermediate_size 320"),
        ("tiny_delta_net", dict(num_heads=8), 8, "vocab_size 260"),
    ],
)
def test_what_tensor_parallelism_cannot_split_is_named(preset, changes, tensor, message):
    mesh = types.SimpleNamespace(shape=dict(data=1, fsdp=1, expert=1, context=1, tensor=tensor))
    with pytest.raises(ValueError, match=re.escape(message)):
        ShardingRules().check_model(get_preset(preset).replace(**changes), mesh)


@pytest.mark.parametrize(
    "preset, message",
    [
        ("tiny_qwen3_next", "argument --mesh.expert 3: expected a divisor of the model's num_experts 8"),
        ("tiny_kda", "argument --mesh.expert 3: the model's layers have no experts"),
    ],
)
def test_what_an_expert_axis_cannot_split_is_named(preset, message):
    mesh = types.SimpleNamespace(shape=dict(data=1, fsdp=1, expert=3, context=1, tensor=1))
    with pytest.raises(ValueError, match=re.escape(message)):
        ShardingRules().check_model(get_preset(preset), mesh)


def fake_mesh(shape, processes):
    """A mesh of devices of several processes, in their order."""
    devices = np.array([types.SimpleNamespace(process_index=i) for i in range(processes)])
    devices = devices.repeat(np.prod(shape) // processes).reshape(shape)
    sizes = dict(zip(MESH_AXES, shape, strict=True))
    return types.SimpleNamespace(devices=devices, axis_names=MESH_AXES, shape=sizes)


@pytest.mark.parametrize(
    "shape, processes, groups",
    [
        ((8, 1, 1, 1, 1), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((1, 2, 2, 1, 2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 1, 4, 1), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes hold the same rows
        ((1, 1, 1, 4, 2), 4, [(0, 1)] * 4),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same_rows(shape, processes, groups, monkeypatch):
    mesh = fake_mesh(shape, processes)
    found = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda *_, process=process: process)
        found.append(data_group(mesh, ShardingRules()))
    assert found == groups


def test_processes_that_share_rows_in_part_are_refused():
    with pytest.raises(
        ValueError,
        match="argument --mesh: data 2 x fsdp 1 x expert 1 x context 1 x tensor 3 over 3 processes",
    ):
        data_group(fake_mesh((2, 1, 1, 1, 3), 3), ShardingRules())


def test_a_row_that_context_parallelism_cannot_split_is_named():
    config = TrainConfig(mesh=MeshConfig(context=3), data=DataConfig(seq_len=256))
    with pytest.raises(ConfigError, match=r"argument --mesh.context: 3 does not divide --data.seq-len 256"):
        check(config)
