"""One token of the recurrence on Hopper: the state is read once and written once, in place.

Columns of the state are independent of each other, so the state is cut in tiles [K, width] of one head.
Persistent blocks walk over them: TMA brings the next tiles into a ring of buffers and takes the last ones
back while the warps update one in registers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.channel_decay import LOG2E, sigmoid, softplus
from pallas_kernels.gpu.limits import MULTIPROCESSORS
from pallas_kernels.gpu.tiles import store

WARPS = 4  # of a block
LANES = 32
VECTOR = 4  # numbers a thread takes at once
TILE = 8192  # numbers of a tile: 64 registers a thread
NARROWEST, WIDEST = 32, 64  # columns: 8 or 16 lanes side by side
BUFFERS = 3  # of a block: a tile that comes, one that is updated, one that goes
MOST_BLOCKS = 4  # of a multiprocessor
SHARED = 232448  # bytes of a multiprocessor
RESERVED = 4096  # of them by each block, for sums across warps and barriers


def tile_width(B: int, HV: int, K: int, V: int) -> int:
    """Columns of a block's tile."""
    width = max(NARROWEST, min(WIDEST, TILE // K))
    while V % width:
        width //= 2
    # Few heads: narrower tiles occupy more of the chip.
    while width > NARROWEST and B * HV * (V // width) < 2 * MULTIPROCESSORS:
        width //= 2
    return width


def step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    A_log: jax.Array | None,
    dt_bias: jax.Array | None,
    *,
    lower_bound: float | None,
    normalize: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Outputs and the new state.

    Args:
      state: [B, HV, K, V], K a multiple of 64 up to 256, V of 32; in place where the caller donates it.
      q, k: [B, H, K], HV a multiple of H.
      v: [B, HV, V].
      beta: [B, HV].
      g: log decay, or raw where ``A_log`` is given: [B, HV], [B, HV, K] or None.
      A_log: [HV] or None.
      dt_bias: [HV] or [HV, K], as g, or None.
      lower_bound: of the gate.
      normalize: L2-normalise q and k.
      scale: multiplies q.

    Returns:
      o [B, HV, V] in v's dtype, the state in its own.
    """
    B, HV, K, V = state.shape
    width = tile_width(B, HV, K, V)
    tiles = B * HV * (V // width)
    fitting = SHARED // (BUFFERS * K * width * state.dtype.itemsize + RESERVED)
    blocks = min(tiles, MULTIPROCESSORS * min(fitting, MOST_BLOCKS))
    kernel = plgpu.kernel(
        partial(
            _body,
            lower_bound=lower_bound,
            normalize=normalize,
            scale=scale,
            width=width,
            tiles=tiles,
            blocks=blocks,
        ),
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        scratch_types=[
            plgpu.SMEM((BUFFERS, K, width), state.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=BUFFERS),
        ],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="delta_step",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    ref = jax.new_ref(state)  # a reference is read and written: the kernel's operand is its result
    o = kernel(ref, q, k, v, beta, g, A_log, dt_bias)
    return o, ref[...]


def _body(state_ref, *refs, width, tiles, blocks, **options):
    *operands, o_ref, buffer, loaded = refs
    HV, V = state_ref.shape[1], state_ref.shape[3]
    block = lax.axis_index("block")
    count = lax.div(tiles - block + blocks - 1, blocks)  # tiles of this block

    def place(i):
        """Row, head and columns of the block's i-th tile: a head's tiles follow each other."""
        row_head, column = (f(block + i * blocks, V // width) for f in (lax.div, lax.rem))
        return lax.div(row_head, HV), lax.rem(row_head, HV), pl.ds(column * width, width)

    def fetch(i):
        b, h, columns = place(i)
        slot = lax.rem(i, BUFFERS)
        plgpu.copy_gmem_to_smem(state_ref.at[b, h, :, columns], buffer.at[slot], loaded.at[slot])

    @pl.loop(0, lax.min(BUFFERS - 1, count))
    def _first(i):
        fetch(i)

    @pl.loop(0, count)
    def _turn(i):
        b, h, columns = place(i)
        slot = lax.rem(i, BUFFERS)
        _update(buffer.at[slot], loaded.at[slot], operands, o_ref, b, h, columns, **options)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer.at[slot], state_ref.at[b, h, :, columns])

        @pl.when(i + BUFFERS - 1 < count)
        def _next():
            # Into the buffer of the tile before, once it is written out.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            fetch(i + BUFFERS - 1)

    plgpu.wait_smem_to_gmem(0)


def _update(tile_ref, loaded, operands, o_ref, b, h, columns, *, normalize, scale, lower_bound):
    """One tile by one token, in its buffer; the token's vectors are loaded while the tile still comes."""
    q_ref, k_ref, v_ref, beta_ref, g_ref, A_log_ref, dt_bias_ref = operands
    K, width = tile_ref.shape
    qk_head = h // (v_ref.shape[1] // q_ref.shape[1])
    tile = _layout(K, width)
    along_k, along_v = tile.reduce(1), tile.reduce(0)

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def by_row(x):
        return lax.broadcast_in_dim(x, (K, width), [0])

    k = load(k_ref.at[b, qk_head], along_k)
    q = load(q_ref.at[b, qk_head], along_k)
    v = load(v_ref.at[b, h, columns], along_v)
    beta = beta_ref[b, h].astype(jnp.float32)

    if g_ref is not None:
        channel = len(g_ref.shape) == 3
        g = load(g_ref.at[b, h], along_k) if channel else g_ref[b, h].astype(jnp.float32)
        if A_log_ref is not None:
            rate = jnp.exp2(A_log_ref[h].astype(jnp.float32) * LOG2E)
            if dt_bias_ref is not None:
                g = g + (load(dt_bias_ref.at[h], along_k) if channel else dt_bias_ref[h].astype(jnp.float32))
            g = -rate * softplus(g) if lower_bound is None else lower_bound * sigmoid(rate * g)
        decay = jnp.exp2(g * LOG2E)
        decay = by_row(decay) if channel else decay
    # Norms multiply what is summed, not the vectors.
    k_factor = lax.rsqrt(jnp.sum(k * k) + 1e-6) if normalize else 1.0
    q_factor = lax.rsqrt(jnp.sum(q * q) + 1e-6) * scale if normalize else scale
    plgpu.barrier_wait(loaded)
    S = plgpu.load(tile_ref, layout=tile).astype(jnp.float32)
    if g_ref is not None:
        S = S * decay
    read = (by_row(k) * S).sum(axis=0) * k_factor
    u = (v - read) * beta
    S = S + by_row(k) * lax.broadcast_in_dim(u * k_factor, (K, width), [1])
    tile_ref[...] = S.astype(tile_ref.dtype)
    o = (by_row(q) * S).sum(axis=0) * q_factor
    store(o_ref.at[b, h, columns], o.astype(o_ref.dtype))


def _layout(K: int, width: int):
    """[K, width] over a block's threads: warps and lanes own runs of rows, neighbouring lanes share a row."""
    rows = K // WARPS
    lanes_across = width // VECTOR
    run = rows // (LANES // lanes_across)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((K, width), (rows, width), (run, VECTOR))),
        warp_dims=(-6,),
        lane_dims=(-4, -3),
        vector_dim=-1,
    )
