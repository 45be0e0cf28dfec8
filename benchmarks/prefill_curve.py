"""Chunked prefill of one long sequence: time to have read its first n tokens, and memory.

One compiled program reads a chunk into a cache of the longest length and is called again and again. KDA's
work for a chunk is the same wherever it lies; that of latent attention grows with what came before, so that
its share of the time is quadratic in the tokens.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.curve_models import Form, cache_bytes, make_form, nbytes

CONTEXTS = (65536, 131072, 262144, 524288, 1048576)


def reader(form: Form, chunk: int):
    """(params, cache, key) -> the cache after a chunk of random tokens, and its last hidden state; jitted."""

    @functools.partial(jax.jit, donate_argnums=1)
    def read(params, cache, key):
        tokens = jax.random.randint(key, (1, chunk), 0, form.config.vocab_size)
        hidden, cache = form.model(params).hidden_states(tokens, cache=cache)
        return hidden[:, -1], cache

    return read


def measure(
    contexts: tuple[int, ...] = CONTEXTS,
    *,
    chunk: int,
    forms: tuple[str, ...] = ("hybrid", "kda"),
    seconds: float,
    small: bool = False,
) -> dict:
    """Reads max(contexts) tokens with each form, printed as they are read.

    Raises:
      ValueError: where the contexts are no multiples of the chunk.
    """
    if any(context % chunk for context in contexts):
        raise ValueError(f"--contexts {contexts}: expected multiples of --prefill-chunk {chunk}")
    found = []
    for name in forms:
        form = make_form(name, small=small)
        found.append(read_all(form, sorted(contexts), chunk, seconds))
        del form
    return dict(runs=found)


def read_all(form: Form, contexts: list[int], chunk: int, seconds: float) -> dict:
    """One form: reads up to the last context, or until a chunk ends after `seconds`."""
    shapes = form.cache_shapes(1, contexts[-1])
    key = jax.random.key(0)
    compiled = reader(form, chunk).lower(form.params, shapes, key).compile()
    program = compiled.memory_analysis()
    empty = jax.jit(lambda params: form.model(params).init_cache(1, contexts[-1]))
    jax.block_until_ready(compiled(form.params, empty(form.params), key))  # warm
    cache, hidden = jax.block_until_ready(empty(form.params)), None
    keys = list(jax.random.split(key, contexts[-1] // chunk))
    rows: list[dict[str, Any]] = []
    chunks: list[float] = []  # seconds until each was read
    begin = time.perf_counter()
    for n, key in enumerate(keys, 1):
        hidden, cache = compiled(form.params, cache, key)
        jax.block_until_ready(hidden)
        chunks.append(time.perf_counter() - begin)
        if n * chunk in contexts:
            rows.append(dict(context=n * chunk, seconds=chunks[-1], tokens_per_s=n * chunk / chunks[-1]))
            print(f"{form.name:7s} {n * chunk:9,} tokens read in {chunks[-1]:8.3f} s, "
                  f"{rows[-1]['tokens_per_s']:9,.0f} tokens/s", flush=True)  # fmt: skip
        if chunks[-1] > seconds:
            break
    read = len(chunks) * chunk
    if read < contexts[-1]:
        print(f"{form.name}: stopped after {read:,} tokens, {chunks[-1]:.1f} s", flush=True)
    finite = bool(jnp.isfinite(jnp.sum(jnp.abs(hidden.astype(jnp.float32)))))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    total = program.argument_size_in_bytes + program.temp_size_in_bytes
    result = dict(form=form.name, chunk=chunk, read=read, finite=finite, chunk_ends_s=chunks, rows=rows,
                  weight_bytes=nbytes(form.params), cache_bytes=cache_bytes(shapes),
                  temporary_bytes=program.temp_size_in_bytes, program_bytes=total, peak_bytes=peak,
                  **fits(chunk * np.arange(1, len(chunks) + 1), np.array(chunks)))  # fmt: skip
    print(f"{form.name}: weights {nbytes(form.params) / 2**30:.2f} GiB, cache {nbytes(shapes) / 2**30:.2f}, "
          f"temporaries {program.temp_size_in_bytes / 2**30:.2f}; a line fits the times within "
          f"{result['line_error']:.1%}, its bend is {result['bend']:.1%} of the last time; "
          f"finite {finite}", flush=True)  # fmt: skip
    return result


def fits(tokens: np.ndarray, seconds: np.ndarray) -> dict:
    """Fits of seconds(tokens): b n, its largest error by the last time; b n + c n^2, the share of c there."""
    tokens = tokens.astype(np.float64)
    slope = float(tokens @ seconds / (tokens @ tokens))
    error = float(np.max(np.abs(seconds - slope * tokens)) / seconds[-1])
    both = np.stack([tokens, tokens**2], axis=1)
    if len(tokens) == 1:
        return dict(line_s_per_token=slope, line_error=error, bend=0.0)
    (_, bend), *_ = np.linalg.lstsq(both / both[-1], seconds, rcond=None)  # columns end at 1
    return dict(line_s_per_token=slope, line_error=error, bend=float(bend / seconds[-1]))
