"""Experts split over 8 CPU devices, in a process of its own."""

from tests import eight_devices


def test_experts_spread_over_devices_equal_one_devices_in_outputs_and_gradients():
    eight_devices.check("tests.layers.sharded_experts", least=9)
