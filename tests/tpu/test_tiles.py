"""Heads out of blocks in 32-bit words, and back.

The compiled kernels read two half-precision heads at once, which the interpreter cannot; here NumPy stands
in for the memory.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import tiles
from tests import cases


class Words:
    """A reference to [1, tokens, heads, D] kept in 32-bit words, as a TPU keeps it: ``bitcast`` says which.

    Only what the kernels do with whole words is allowed: reading anything narrower is an error.
    """

    def __init__(self, words: np.ndarray, shape, dtype, tokens: int):
        self.words, self.shape, self.dtype, self.tokens = words, tuple(shape), jnp.dtype(dtype), tokens

    @classmethod
    def of(cls, x):
        """Of an array; its words are made by Pallas' own `bitcast`, of pairs along the second last axis."""
        flat = x.reshape(1, -1, x.shape[-1])
        words = np.array(jax.jit(partial(pltpu.bitcast, ty=jnp.uint32))(flat))
        return cls(words, x.shape, x.dtype, x.shape[1])

    @property
    def array(self):
        return jax.jit(partial(pltpu.bitcast, ty=self.dtype))(
            self.words.reshape(1, -1, self.shape[-1])
        ).reshape(self.shape)

    def reshape(self, *shape):
        assert np.prod(shape) == np.prod(self.shape) and shape[-1] == self.shape[-1]
        return Words(self.words.reshape(1, -1, shape[-1]), shape, self.dtype, self.tokens)

    def bitcast(self, dtype):
        *leading, rows, D = self.shape
        assert (self.dtype.itemsize * rows) % 4 == 0
        shape = (*leading, rows * self.dtype.itemsize // 4, D)
        return Words(self.words.reshape(shape), shape, dtype, self.tokens)

    def _at(self, index):
        assert self.dtype.itemsize == 4, "read half a word"
        out = []
        for i, n in zip(index, self.shape, strict=True):
            if hasattr(i, "stride"):  # of pl.ds
                stop = i.start + (i.size - 1) * i.stride + 1
                assert i.start >= 0 and stop <= n, "out of bounds"
                i = slice(i.start, stop, i.stride)
            out.append(i)
        return tuple(out)

    def __getitem__(self, index):
        return jnp.asarray(self.words.view(self.dtype).reshape(self.shape)[self._at(index)])

    def __setitem__(self, index, value):
        assert value.dtype == self.dtype, f"{value.dtype} into {self.dtype}"
        self.words.view(self.dtype).reshape(self.shape)[self._at(index)] = np.asarray(value)


@pytest.fixture
def words(monkeypatch):
    """Pallas' word operations where they do not lower on the CPU."""

    def pack_elementwise(xs, *, packed_dtype):
        """As documented: the first in the low bits; float32 rounds to the nearest, ties to even."""
        low, high = (np.asarray(x.astype(packed_dtype)).view(np.uint16).astype(np.uint32) for x in xs)
        return jnp.asarray((low | high << 16).view(np.int32))

    bitcast = lambda x, ty: jax.jit(partial(pltpu.bitcast, ty=ty))(x)  # noqa: E731
    fake = SimpleNamespace(bitcast=bitcast, pack_elementwise=pack_elementwise)
    monkeypatch.setattr(tiles, "pltpu", fake)


@pytest.mark.parametrize("heads", (2, 4, 8))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, np.float32))
def test_words_read_equal_the_heads(dtype, heads, words):
    rng = np.random.default_rng(cases.SEED)
    parts = [jnp.asarray(rng.normal(size=(1, 32, heads, 128)), dtype) for _ in range(2)]
    for wanted in (list(range(heads)), [1], [heads - 2, heads - 1]):
        got = tiles.load([Words.of(x) for x in parts], 16, 16, wanted)
        for h, x in zip(wanted, got, strict=True):
            assert x.dtype == jnp.float32
            both = np.concatenate([np.asarray(p[0, 16:, h], np.float32) for p in parts], axis=1)
            np.testing.assert_array_equal(x, both)


@pytest.mark.parametrize("D", (64, 128, 256))
@pytest.mark.parametrize("heads", (2, 4, 8))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, np.float32))
def test_words_written_are_the_heads_rounded(dtype, heads, D, words):
    rng = np.random.default_rng(cases.SEED)
    before = jnp.asarray(rng.normal(size=(1, 32, heads, D)), dtype)
    values = rng.normal(size=(heads, 16, D)).astype(np.float32)
    values[0, 0, :8] = [0.0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, -1e-40]
    ref = Words.of(before)
    for pair in range(0, heads, 2):
        tiles.store(ref, 16, [pair, pair + 1], [jnp.asarray(v) for v in values[pair : pair + 2]])
    after = np.asarray(ref.array, np.float32)
    np.testing.assert_array_equal(after[:, :16], np.asarray(before[:, :16], np.float32))
    np.testing.assert_array_equal(
        after[0, 16:].swapaxes(0, 1), np.asarray(jnp.asarray(values, dtype), np.float32)
    )
