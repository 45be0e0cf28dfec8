"""Mosaic GPU kernels for Hopper: the chunkwise delta rule with no gate, a per-head or a per-channel gate."""
