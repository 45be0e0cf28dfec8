"""The mixers under `shard_ops` on 8 CPU devices, their tokens and heads spread, in a process of its own."""

import pytest

from tests import eight_devices


def test_mixers_spread_over_devices_equal_one_devices_in_outputs_and_gradients():
    eight_devices.check("tests.layers.sharded_mixers", least=30)


@pytest.mark.slow
def test_mixers_of_whole_rows_too():
    eight_devices.check("tests.layers.sharded_mixers", "--all", least=100)
