"""Pallas kernels of the delta rule: arrays in, arrays out. Knows JAX and nothing else."""
