"""What is kept, what is refused, and that a damaged checkpoint is noticed."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.models import ModelConfig
from tests.train.train_common import environment
from train.checkpoint import CheckpointError, Checkpoints
from train.config import ConfigError
from train.step import TrainState

MODEL = {"hidden_size": 32, "layers": ["kda"], "remat": "none", "implementation": "scan"}
ADAMW = {"name": "adamw", "moment_dtype": "float32"}


def state_at(step: int) -> TrainState:
    params = {"w": jnp.arange(5000.0) + step, "groups": {0: {"b": jnp.full((3,), step, jnp.bfloat16)}}}
    return TrainState(jnp.asarray(step, jnp.int32), params, (jnp.int32(step),))


def numbers():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def save(directory: Path, eval_losses: list[float | None], keep: int = 2, first: int = 1, **more) -> None:
    checkpoints, data = Checkpoints(directory, keep), numbers()
    config = {"model": MODEL, "optimizer_state": ADAMW, **more}
    for step, loss in enumerate(eval_losses, start=first):
        next(data)
        checkpoints.save(step, state_at(step), data, config, loss)
    checkpoints.close()


def restore(directory: Path, model=MODEL, optimizer=ADAMW, **more):
    checkpoints, data, said = Checkpoints(directory, 2), numbers(), []
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0)
    )
    try:
        config = {"model": model, "optimizer_state": optimizer, **more}
        return checkpoints.restore_newest(abstract, data, config, said.append), data, said
    finally:
        checkpoints.close()


def damage(directory: Path, part: str, how: str) -> None:
    """Cuts, flips or removes the largest file of one item of a checkpoint."""
    files = [f for f in (directory / part).rglob("*") if f.is_file() and f.name != "commit_success.txt"]
    file = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)


def test_state_and_data_position_come_back_bit_for_bit(tmp_path):
    save(tmp_path / "c", [None, None])
    restored, data, said = restore(tmp_path / "c")
    assert jax.tree.structure(restored.state) == jax.tree.structure(state_at(2)) and not said
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(2))
    assert next(data) == 2
    assert restored.config == {"model": MODEL, "optimizer_state": ADAMW}


def test_newest_and_best_are_kept(tmp_path):
    save(tmp_path / "c", [3.0, 1.0, 2.0, None, 4.0, 5.0])
    checkpoints = Checkpoints(tmp_path / "c", 2)
    assert checkpoints.steps() == [2, 5, 6]
    checkpoints.close()


def test_the_best_is_kept_by_a_resumed_run(tmp_path):
    save(tmp_path / "c", [3.0, 1.0, 2.0])
    save(tmp_path / "c", [4.0, None, 6.0], first=4)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "5", "6"]


def test_checkpoints_of_before_losses_were_kept_are_resumed(tmp_path):
    save(tmp_path / "c", [3.0, 1.0])
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / "c" / step / "metrics")
    assert int(restore(tmp_path / "c")[0].state.step) == 2
    save(tmp_path / "c", [5.0, 4.0, 6.0], first=3)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["4", "5"]


def test_no_checkpoints_means_a_new_run(tmp_path):
    assert restore(tmp_path / "c")[0] is None


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_damaged_loss_is_none(tmp_path, how):
    save(tmp_path / "c", [1.0, 3.0, 2.0])
    damage(tmp_path / "c" / "1", "metrics", how)
    assert int(restore(tmp_path / "c")[0].state.step) == 3
    save(tmp_path / "c", [4.0, 5.0], first=4)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["3", "4", "5"]


@pytest.mark.parametrize(
    "part,how",
    [*list(itertools.product(["state", "data", "config"], ["removed", "cut"])), ("state", "flipped")],
)
def test_damaged_newest_is_reported_set_aside_and_passed_over(tmp_path, part, how):
    save(tmp_path / "c", [None, None])
    damage(tmp_path / "c" / "2", part, how)
    restored, data, said = restore(tmp_path / "c")
    assert int(restored.state.step) == 1 and next(data) == 1
    assert len(said) == 1 and str(tmp_path / "c" / "2") in said[0] and "cannot be read" in said[0]
    assert (tmp_path / "unreadable" / "2").is_dir() and not (tmp_path / "c" / "2").exists()


def test_when_all_are_damaged_nothing_starts_over(tmp_path):
    save(tmp_path / "c", [None, None])
    for step in ("1", "2"):
        damage(tmp_path / "c" / step, "state", "cut")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        restore(tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "2"]  # they are left for a human


def test_another_model_is_refused_naming_the_fields(tmp_path):
    save(tmp_path / "c", [None])
    other = {**MODEL, "hidden_size": 64}
    with pytest.raises(ConfigError, match=r"hidden_size is 32 there and 64 here"):
        restore(tmp_path / "c", other)
    assert (tmp_path / "c" / "1").is_dir()  # and left alone


def test_another_optimizer_is_refused_naming_the_fields(tmp_path):
    save(tmp_path / "c", [None])
    with pytest.raises(ConfigError, match=r"another optimizer: name is 'adamw' there and 'muon' here"):
        restore(tmp_path / "c", optimizer=ADAMW | {"name": "muon"})
    with pytest.raises(ConfigError, match=r"moment_dtype is 'float32' there and 'bfloat16' here"):
        restore(tmp_path / "c", optimizer=ADAMW | {"moment_dtype": "bfloat16"})


def test_the_same_model_computed_otherwise_is_accepted(tmp_path):
    save(tmp_path / "c", [None])
    other = {**MODEL, "remat": "full", "implementation": None, "dtype": "bfloat16", "chunk_size": 32}
    assert int(restore(tmp_path / "c", other)[0].state.step) == 1


def test_a_field_younger_than_the_checkpoint_had_its_default(tmp_path):
    save(tmp_path / "c", [None])
    restored, _, _ = restore(tmp_path / "c", {**MODEL, "window_size": ModelConfig.window_size})
    assert restored.config["model"]["window_size"] == ModelConfig.window_size
    with pytest.raises(ConfigError, match=rf"window_size is {ModelConfig.window_size} there and 7 here"):
        restore(tmp_path / "c", {**MODEL, "window_size": 7})


def test_another_tokenizer_is_refused(tmp_path):
    save(tmp_path / "c", [None], corpus={"tokenizer": "bytes"})
    assert int(restore(tmp_path / "c", corpus={"tokenizer": "bytes"})[0].state.step) == 1
    with pytest.raises(ConfigError, match=r"another tokenizer: bytes there and abc here; .*--run-dir"):
        restore(tmp_path / "c", corpus={"tokenizer": "abc"})


# Leaves of several ranks and dtypes, one of them split along each dimension of a [2, 2] mesh.
DIGEST = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from train.checkpoint import _digest
from train.step import TrainState

rng = np.random.default_rng(0)
leaves = [rng.normal(size=s).astype(np.float32) for s in [(), (6,), (4, 8), (2, 4, 6)]]
leaves += [rng.integers(0, 9, size=(4, 4)).astype(np.int32), rng.normal(size=(8,)).astype(jnp.bfloat16)]
total = 0
for x in leaves:  # the flattened array's bits, weighted by odd numbers, modulo 2**32
    bits = x.reshape(-1).view({2: np.uint16, 4: np.uint32}[x.itemsize]).astype(object)
    total = (total * 31 + sum(int(b) * (2 * i + 1) for i, b in enumerate(bits))) % 2**32
mesh = jax.make_mesh((2, 2), ("data", "fsdp"))
specs = [P(), P("fsdp"), P("data", "fsdp"), P(None, "fsdp"), P(), P("data")]
split = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(leaves, specs, strict=True)]
whole, split = TrainState(leaves[0], leaves[1:], ()), TrainState(split[0], split[1:], ())
assert int(_digest(split)) == int(_digest(jax.tree.map(jnp.asarray, whole))) == total
text = _digest.lower(split).compile().as_text()
assert "all-reduce" in text and "all-gather" not in text, text
"""


def test_checksum_of_a_sharded_state_gathers_nothing_and_is_that_of_the_flat_arrays():
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env=environment(devices=4),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_position_of_one_of_several_processes_is_noticed(tmp_path):
    save(tmp_path / "c", [None, None])
    place = tmp_path / "c" / "2" / "data"
    (place / "process_0-of-1.json").rename(place / "process_0-of-2.json")
    restored, _, said = restore(tmp_path / "c")
    assert int(restored.state.step) == 1 and "1 of 2 positions" in said[0]
