"""One head's [C, D] out of blocks [1, tokens, heads, D] as the caller laid them out, and back.

Heads lie in sublanes there, so one head's tokens are a strided read; only blocks of at most 128 lanes can be
read so, and more channels come as several. Two bfloat16 heads share a 32-bit word: they are read together and
told apart by shifts, which costs less than unpacking one.
"""

from typing import Any

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


def _plain(ref, interpret: Any) -> bool:
    """Whether heads are indexed one by one: where they do not fill memory tiles, or in interpret mode."""
    heads = ref.shape[2]
    whole = heads % 8 == 0 or heads in ((1, 2, 4) if ref.dtype.itemsize == 4 else (2, 4))
    return bool(interpret) or not whole


def load(parts, start, size: int, heads: list[int], interpret: Any = False) -> list[jax.Array]:
    """float32 [size, D] of each head in ``heads``, tokens ``start`` to ``start + size``."""
    columns = [_load(ref, start, size, heads, interpret) for ref in parts]
    return [x[0] if len(x) == 1 else jnp.concatenate(x, axis=1) for x in zip(*columns, strict=True)]


def _load(ref, start, size: int, heads: list[int], interpret: Any) -> list[jax.Array]:
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


def store(ref, start, heads: list[int], values: list[jax.Array], interpret: Any = False):
    """Writes float32 [size, D] of each head; half-precision heads (2j, 2j + 1) together."""
    size = values[0].shape[0]
    if _plain(ref, interpret):
        for h, x in zip(heads, values, strict=True):
            ref[0, pl.ds(start, size), h, :] = x.astype(ref.dtype)
        return
    rows = dict(zip(heads, values, strict=True))
    if ref.dtype.itemsize == 2:
        rows = {
            heads[j] // 2: pltpu.bitcast(
                pltpu.pack_elementwise(values[j : j + 2], packed_dtype=ref.dtype), jnp.uint32
            )
            for j in range(0, len(heads), 2)
        }
    wide = ref.shape[3] > 128
    words = (ref if ref.dtype.itemsize == 4 else ref.bitcast(jnp.uint32)) if wide else _words(ref)
    stride = ref.shape[2] // (4 // ref.dtype.itemsize)
    for row, x in rows.items():
        if wide:
            words[0, pl.ds(start, size), row, :] = x
        else:
            words[0, pl.ds(start * stride + row, size, stride=stride), :] = x
