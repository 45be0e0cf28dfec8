"""A checkpoint loaded onto 8 devices, each reading its part (run by test_huggingface.py)."""

import functools
import pathlib
import sys

import jax
import numpy as np
from flax import nnx

from deltajax.models.huggingface import load_pretrained, save_pretrained
from train.mesh import ShardingRules, make_mesh


def main(path: pathlib.Path) -> None:
    mesh = make_mesh(1, 2, expert=2, tensor=2)
    sharded = load_pretrained(path, place=functools.partial(ShardingRules().sharding, mesh))
    alone = load_pretrained(path)
    for (name, x), (_, y) in zip(
        nnx.to_flat_state(nnx.state(sharded)), nnx.to_flat_state(nnx.state(alone)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x[...]), np.asarray(y[...]), err_msg=str(name))
    x = sharded.groups[-1].blocks[-1].mlp.experts.up_proj[...]
    assert x.addressable_shards[0].data.size * 8 == x.size and len(jax.devices()) == 8
    print("\nok parts")
    save_pretrained(sharded, path.with_name("again"))
    saved = [(p / "model.safetensors").read_bytes() for p in (path, path.with_name("again"))]
    assert saved[0] == saved[1]
    print("\nok saved from parts")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
