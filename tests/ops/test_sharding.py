"""The ops inside `jax.shard_map` on 8 CPU devices, in a process of its own."""

import pytest

from tests import eight_devices


def test_sharded_ops_equal_unsharded_ones_in_outputs_states_and_gradients():
    eight_devices.check("tests.ops.sharded_checks", least=20)


@pytest.mark.slow  # every gate with every kind of rows
def test_all_sharded_ops_equal_unsharded_ones():
    eight_devices.check("tests.ops.sharded_checks", "--all", least=34)
