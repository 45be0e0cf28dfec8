"""Log-probabilities of every answer under the model that is tuned: computed once, kept beside the run."""

import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.mesh import ShardingRules, data_group, global_batch
from train.model_state import ModelState
from train.preference.data import Examples, single_rows, with_reference
from train.preference.loss import Batch, batch_log_probs
from train.step import Params

_ROWS = 64  # lengths of rows are multiples of it


def fingerprint(what: Examples) -> str:
    """Of all answers and their prompts, in order."""
    checksum = 0
    for rows in what.rows:
        for row in rows:
            checksum = zlib.crc32(row["answers"], zlib.crc32(row["tokens"], checksum))
            checksum = zlib.crc32(row["targets"], checksum)
    return f"{len(what)}-{checksum:08x}"


# (params, batch of arrays [B, T]) -> log-probabilities of its targets [B, T]
Step = Callable[[Params, Batch], jax.Array]


def make_log_probs_step(model: ModelState, rules: ShardingRules) -> Step:
    """Builds the jitted `step(params, batch) -> batch_log_probs`, whole on every device."""

    def log_probs(params: Params, batch: Batch) -> jax.Array:
        with rules.shard_ops(model.mesh):
            return batch_log_probs(model.model(params), batch)

    return jax.jit(
        log_probs,
        in_shardings=(model.shardings, rules.tokens(model.mesh)),
        out_shardings=NamedSharding(model.mesh, PartitionSpec()),
    )


def reference_log_probs(
    what: Examples,
    params: Params,
    step: Step,
    mesh: Mesh,
    rules: ShardingRules,
    *,
    seq_len: int,
    batch_size: int,
) -> np.ndarray:
    """The log-probability of every target of every answer, end to end, float32 [N].

    Args:
        what: the answers.
        params: of the model.
        step: see `make_log_probs_step`.
        mesh: where `params` lie.
        rules: how the mesh splits them and the batches.
        seq_len: tokens that a row may have; divided by the mesh's parts of a row.
        batch_size: answers read at a time, over all devices.
    """
    longest = max(len(row["tokens"]) for rows in what.rows for row in rows)
    unit = math.lcm(_ROWS, rules.parts(mesh, "sequence"))
    length = min(seq_len, -(-longest // unit) * unit)
    group, groups = data_group(mesh, rules)
    own = slice(group * (batch_size // groups), (group + 1) * (batch_size // groups))
    found = []
    for batch in single_rows(what, seq_len=length, batch_size=batch_size):
        local = {name: x[own] for name, x in batch.items()}
        there = batch["segment_ids"] > 0
        found.append(np.asarray(step(params, global_batch(local, mesh, rules)))[there])
    return np.concatenate(found)


def cached_reference(
    path: Path, key: str, what: Examples, compute: Callable[[], np.ndarray], write: bool
) -> tuple[Examples, bool]:
    """The examples with their reference's log-probabilities, from a file or computed and written there.

    Args:
        path: the file, .npz.
        key: of the answers and the model; what is stored under another is computed anew.
        what: the examples.
        compute: see `reference_log_probs`.
        write: whether this process writes the file.

    Returns:
        The examples, and whether they were computed.
    """
    flat = _stored(path, key)
    computed = flat is None
    if flat is None:
        flat = compute()
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, key=np.array(key), log_probs=flat)
            os.replace(partial, path)  # whole or not at all
    return attached(what, flat), computed


def attached(what: Examples, flat: np.ndarray) -> Examples:
    """The examples with what `reference_log_probs` found."""
    ends = np.cumsum([len(row["tokens"]) for rows in what.rows for row in rows])
    parts = iter(np.split(flat, ends[:-1]))
    return with_reference(what, [[next(parts) for _ in rows] for rows in what.rows])


def stored_key(path: Path) -> str | None:
    """The key of `cached_reference` that a file holds, None if there is no whole one."""
    try:
        with np.load(path) as file:
            return str(file["key"])
    except (OSError, ValueError, KeyError):
        return None


def _stored(path: Path, key: str) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            return file["log_probs"] if str(file["key"]) == key else None
    except (OSError, ValueError, KeyError):  # damaged: it can be made again
        return None
