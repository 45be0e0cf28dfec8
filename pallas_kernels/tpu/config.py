"""The static side of a kernel call, and how it is cut into blocks."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

VMEM_LANES = 128


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
    def work(self) -> jnp.dtype:
        """What matrix operands are kept in."""
        return jnp.dtype(jnp.bfloat16 if self.passes == 1 else jnp.float32)

    @property
    def ragged(self) -> bool:
        """Whether the last block reaches past the row's end."""
        return self.T % self.tokens != 0


def choose_blocks(T: int, H: int, HV: int, K: int, V: int, dtype, config: Config, interpret: Any) -> Blocks:
    """Blocks of whole memory tiles (8 heads, or all) with about 16 chunks of one head in each."""
    group = HV // H
    heads = next((n * group for n in (8, 16) if H % n == 0 and n * group <= 16), HV)
    wide = (K // VMEM_LANES or 1) * (V // VMEM_LANES or 1)
    chunks = max(1, 16 // (heads * wide))
    tokens = min(chunks, -(-T // config.chunk)) * config.chunk
    return Blocks(T, K, V, group, heads, tokens, 1 if jnp.dtype(dtype).itemsize < 4 else 3, interpret)
