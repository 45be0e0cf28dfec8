"""One head's [C, D] out of a block [1, tokens, heads, D] as the caller laid it out, and back.

Heads lie in sublanes there, so one head's tokens are a strided read. Two bfloat16 heads share a 32-bit word:
they are read together and told apart by shifts, which costs less than unpacking one.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HIGH_HALF = 0xFFFF0000


def _words(ref):
    """A block as 32-bit rows: [tokens * heads (/ 2), D]."""
    _, tokens, heads, D = ref.shape
    flat = ref.reshape(1, tokens * heads, D)
    return flat if ref.dtype.itemsize == 4 else flat.bitcast(jnp.uint32)


def _plain(ref, interpret: bool) -> bool:
    """Whether heads are indexed one by one: an odd number of half-precision heads, or interpret mode."""
    return interpret or (ref.dtype.itemsize == 2 and ref.shape[2] % 2 == 1)


def load(ref, start, size: int, heads: list[int], interpret: bool = False) -> list[jax.Array]:
    """float32 [size, D] of each head in ``heads``, tokens ``start`` to ``start + size``."""
    if _plain(ref, interpret):
        return [ref[0, pl.ds(start, size), h, :].astype(jnp.float32) for h in heads]
    words, stride = _words(ref), ref.shape[2] // (4 // ref.dtype.itemsize)
    out, read = [], {}
    for h in heads:
        row = h // (4 // ref.dtype.itemsize)
        if row not in read:
            read[row] = words[0, pl.ds(start * stride + row, size, stride=stride), :]
        word = read[row]
        if ref.dtype.itemsize == 2:
            bits = word << 16 if h % 2 == 0 else word & jnp.uint32(HIGH_HALF)
            word = pltpu.bitcast(bits, jnp.float32)
        out.append(word)
    return out


def store(ref, start, heads: list[int], values: list[jax.Array], interpret: bool = False):
    """Writes float32 [size, D] of each head; half-precision heads in pairs (2j, 2j + 1) where they come in pairs."""
    size = values[0].shape[0]
    if _plain(ref, interpret):
        for h, x in zip(heads, values, strict=True):
            ref[0, pl.ds(start, size), h, :] = x.astype(ref.dtype)
        return
    words, stride = _words(ref), ref.shape[2] // (4 // ref.dtype.itemsize)
    if ref.dtype.itemsize == 4:
        for h, x in zip(heads, values, strict=True):
            words[0, pl.ds(start * stride + h, size, stride=stride), :] = x
        return
    for (h, low), high in zip(list(zip(heads, values, strict=True))[::2], values[1::2], strict=True):
        low, high = (pltpu.bitcast(x.astype(ref.dtype).astype(jnp.float32), jnp.uint32) for x in (low, high))
        words[0, pl.ds(start * stride + h // 2, size, stride=stride), :] = low >> 16 | high
