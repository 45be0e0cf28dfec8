"""The static side of a kernel call, and how it is cut into blocks."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

VMEM_LANES = 128
STEP_CHUNKS = 16  # of one head of 128 x 128 in a grid step, about
# Value heads of a block of the kernel for one token and bytes of their states (two come and two go), at most.
TOKEN_HEADS, TOKEN_BYTES = 32, 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """One problem, as the kernels see it.

    Attributes:
      gate: "none", "head" (one log decay for each token and head) or "channel" (one for each key channel).
      activation: what turns g into a log decay inside the kernel: None, "softplus" or "bounded".
      lower_bound: of "bounded": g = lower_bound * sigmoid(exp(A_log) (g + dt_bias)).
      scale: multiplies q.
      normalize: L2-normalise q and k over their channels.
      chunk: tokens that are solved together.
    """

    gate: Literal["none", "head", "channel"]
    activation: Literal["softplus", "bounded"] | None
    lower_bound: float | None
    scale: float
    normalize: bool
    chunk: int = 64


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one call's blocks.

    Attributes:
      T, K, V: tokens of a row (before padding), key and value channels.
      group: value heads that share a key head.
      heads: value heads of one block.
      tokens: tokens of one block, a multiple of the chunk.
      passes: bfloat16 passes of a matrix product: 1 for bfloat16 inputs, 3 for float32 ones.
      interpret: False, or the `InterpretParams` to run with.
    """

    T: int
    K: int
    V: int
    group: int
    heads: int
    tokens: int
    passes: int
    interpret: Any = False

    @property
    def key_heads(self) -> int:
        """Key heads of one block."""
        return self.heads // self.group

    @property
    def together(self) -> int:
        """Units that are prepared in lockstep: enough to fill waits, not more values than memory holds."""
        return max(1, 4 // head_tiles(self.K, self.V))

    @property
    def work(self) -> jnp.dtype:
        """What matrix operands are kept in."""
        return jnp.dtype(jnp.bfloat16 if self.passes == 1 else jnp.float32)

    @property
    def ragged(self) -> bool:
        """Whether the last block reaches past the row's end."""
        return self.T % self.tokens != 0


def block_heads(H: int, HV: int) -> int:
    """Value heads of one block: those of 8 key heads (a memory tile) or, where 8 do not divide H, all."""
    return 8 * HV // H if H % 8 == 0 else HV


def head_tiles(K: int, V: int) -> int:
    """[128, 128] tiles of one head's state."""
    return (K // VMEM_LANES or 1) * (V // VMEM_LANES or 1)


def choose_blocks(T: int, H: int, HV: int, K: int, V: int, dtype, config: Config, interpret: Any) -> Blocks:
    """Blocks of `block_heads` heads and as many tokens as make about `STEP_CHUNKS` of one head."""
    heads = block_heads(H, HV)
    chunks = max(1, STEP_CHUNKS // (heads * head_tiles(K, V)))
    tokens = min(chunks, -(-T // config.chunk)) * config.chunk
    passes = 1 if jnp.dtype(dtype).itemsize < 4 else 3
    return Blocks(T, K, V, HV // H, heads, tokens, passes, interpret)
