"""The backward kernel: all gradients in one walk back over the tokens.

Takes the states that entered the chunks and the inverses T from the forward kernel and recomputes the rest.
With dO and the gradient dS of the state a chunk leaves behind:

    dV' = P^T dO + Kbar dS          dY = T^T dV'            dR = beta dY = dV
    dS <- D dS + Q~^T dO - K~^T dR
    dP = dO V'^T    dA = -dY V'^T   dQ~ = dO S^T    dK~ = -dR S^T    dKbar = V' dS^T

where V' = T beta R, R = V - K~ S; then through the relations, the gates and the normalisation to the inputs.
Each unit goes through three stages: what needs no dS, the recurrence, the rest. They run side by side on
different units. What a unit carries from stage to stage lies in registers (`backward_registers`) or, of a
bounded per-channel gate of narrow heads, in scratch memory (`backward_pieces`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import chunk
from pallas_kernels.tpu.backward_memory import in_registers, kept_shapes
from pallas_kernels.tpu.backward_pieces import Pieces
from pallas_kernels.tpu.backward_registers import Registers, Work
from pallas_kernels.tpu.backward_step import Gradients
from pallas_kernels.tpu.chunk import Refs
from pallas_kernels.tpu.config import Blocks, Config
from pallas_kernels.tpu.launch import Layout, Saved, Segments, is_first, is_last, unit_heads, units_of
from pallas_kernels.tpu.weave import staggered, together


def _kernel(
    segments: Segments | None,
    refs: Refs,
    saved: Saved,
    do_ref,
    dfinal_ref,
    *results,
    blocks: Blocks,
    config: Config,
):
    size = len(Gradients._fields)
    out, dstate, mem = Gradients(*results[:size]), results[size], results[size + 1 :]
    row, step = pl.program_id(0), pl.program_id(2)
    block = pl.num_programs(2) - 1 - step

    @pl.when(step == 0)
    def _start():
        for ref in dstate:
            ref[...] = jnp.zeros_like(ref)
        if out.dt_bias is not None:
            out.dt_bias[...] = jnp.zeros_like(out.dt_bias)
            out.log_rate[...] = jnp.zeros_like(out.log_rate)

    @pl.when(is_last(segments, row, block, pl.num_programs(2)))
    def _leave():
        for h in range(blocks.heads):
            dstate[h][0] = dfinal_ref[0, 0, h].T

    s = chunk.scalars(refs, blocks, block, config)
    step_of = refs, saved, do_ref, out, dstate, s, blocks, config
    b: Any = Registers(*step_of) if in_registers(blocks, config) else Pieces(*step_of)
    pairs = unit_heads(blocks)
    stages = []
    for c in reversed(range(blocks.tokens // config.chunk)):
        for first in range(0, len(pairs), blocks.together):  # of one chunk: a head's chunks follow each other
            at = range(first, min(first + blocks.together, len(pairs)))
            group = [(mem[c * len(pairs) + i] if mem else Work(), c, pairs[i]) for i in at]
            stages.append(
                tuple(together([stage(*unit) for unit in group]) for stage in (b.prepare, b.recur, b.finish))
            )
    for _ in staggered(stages):
        pass
    b.store_columns()

    @pl.when(is_first(segments, row, block))
    def _enter():
        for h in range(blocks.heads):
            out.state[0, 0, h] = dstate[h][0].T


def backward(
    arrays: Refs,
    saved: Saved,
    do: jax.Array,
    dfinal: jax.Array,
    segments: Segments | None,
    N: int,
    blocks: Blocks,
    config: Config,
) -> Gradients:
    """Gradients of all inputs.

    Args:
      arrays, segments, N, blocks, config: as of `forward`.
      saved: from it.
      do: [B, T, HV, V].
      dfinal: [B, N, HV, K, V] float32.

    Returns:
      gradients in the inputs' shapes and dtypes; beta and a per-head g float32; log_rate and dt_bias
      [B, HV, K]; state [B, N, HV, K, V] float32, defined where ``segments`` visits it.
    """
    layout = Layout(arrays, blocks, config)
    B, HV, K, V, heads = layout.B, layout.HV, blocks.K, blocks.V, blocks.heads
    at = lambda t: layout.steps - 1 - t  # noqa: E731
    shape, rows = layout.shape, layout.row_block(at)
    like = lambda x: shape(x.shape, x.dtype)  # noqa: E731
    row_shape = shape((B, HV // heads, layout.steps, heads, blocks.tokens), jnp.float32)
    sums = sum_shape = None
    if config.activation is not None:
        sums = pl.BlockSpec((1, 1, heads, K), lambda b, h, t, _: (b, h, 0, 0))
        sum_shape = shape((B, HV // heads, heads, K), jnp.float32)
    keys, values = (layout.token_block(D, H, at) for D, H in ((K, blocks.key_heads), (V, heads)))
    gates = layout.token_block(K, heads, at)
    memory = []
    if not in_registers(blocks, config):
        memory = [kept_shapes(layout.n, blocks, config) for _ in units_of(blocks, config)]
    got = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, config=config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, HV // heads, layout.steps),
            in_specs=[
                layout.input_specs(at),
                layout.saved_specs(at, at),
                layout.token_blocks(V, heads, at),
                layout.state_block(at),
            ],
            out_specs=Gradients(
                q=keys,
                k=keys,
                v=values,
                g={"none": None, "head": rows, "channel": gates}[config.gate],
                beta=rows,
                log_rate=sums,
                dt_bias=sums,
                state=layout.state_block(at),
            ),
            scratch_shapes=[(pltpu.VMEM((1, V, K), jnp.float32),) * heads, *memory],
        ),
        out_shape=Gradients(
            q=like(arrays.q),
            k=like(arrays.k),
            v=like(arrays.v),
            g={"none": None, "head": row_shape, "channel": None if arrays.g is None else like(arrays.g)}[
                config.gate
            ],
            beta=row_shape,
            log_rate=sum_shape,
            dt_bias=sum_shape,
            state=shape((B, N, HV, K, V), jnp.float32),
        ),
        compiler_params=layout.compiler_params(),
        interpret=blocks.interpret,
        name="delta_rule_backward",
    )(segments, layout.inputs(), saved, (do,) * len(layout.token_blocks(V, heads, at)), dfinal)
    by_head = lambda x: None if x is None else x.reshape(B, HV, K)  # noqa: E731
    return got._replace(
        beta=layout.from_blocks(got.beta),
        g=layout.from_blocks(got.g) if config.gate == "head" else got.g,
        log_rate=by_head(got.log_rate),
        dt_bias=by_head(got.dt_bias),
    )
