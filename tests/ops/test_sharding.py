"""The ops inside `jax.shard_map` on 8 CPU devices, in a process of its own."""

from tests import eight_devices


def test_sharded_ops_equal_unsharded_ones_in_outputs_states_and_gradients():
    eight_devices.check("tests.ops.sharded_checks", least=29)
