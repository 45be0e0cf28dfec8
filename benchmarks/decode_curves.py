"""Inference of a scaled-down Kimi Linear on one card: KDA and latent attention 3:1, or latent attention only.

    python -m benchmarks.decode_curves --json decode.json           # cache bytes, time per output token
    python -m benchmarks.decode_curves --prefill --json prefill.json
    python -m benchmarks.decode_curves --plot decode.json           # writes decode.png, needs matplotlib
    python -m benchmarks.decode_curves --check                      # anywhere: decoding equals full forwards

8 layers of Kimi Linear 48B's sizes (width 2304, 32 heads of 128, latents of 512 + 64 channels) with dense
MLPs and 8192 tokens in the vocabulary, random bfloat16 weights. Decoding starts from caches filled with
random values in place of a prefill. A time is the median of blocked calls, each of `steps` chained steps in
one compiled loop of `deltajax.models.decoding.advance`, the caches donated; "largest" is the batch that fits
the memory with a margin, by the bytes of caches and weights and what the compiled program asks for.
"""

import dataclasses
import functools
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from benchmarks import curve_plots, prefill_curve
from benchmarks.curve_models import (
    Form,
    cache_bytes,
    filled_cache,
    make_form,
    memory_limit,
    nbytes,
    with_length,
)
from deltajax.models.decoding import Decoding, Options, advance
from deltajax.models.sampling import Sampling

CONTEXTS = (4096, 32768, 131072, 524288, 1048576)
GREEDY = Options(Sampling(0.0, None, None), stop_tokens=(), pad_token=0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    contexts: tuple[int, ...] | None = None
    """Tokens of each sequence when decoding ends (4k, 32k, 128k, 512k, 1M); with --prefill, of the one
    sequence read (64k, 128k, 256k, 512k, 1M)."""
    forms: tuple[str, ...] = ("hybrid", "mla")
    """Models to decode with; --prefill measures the hybrid, and KDA alone."""
    batch: int | None = None
    """Sequences in place of the largest number that fits."""
    max_batch: int = 4096
    """More are not tried."""
    memory_gib: float | None = None
    """Memory for weights, caches and temporaries; the default is what JAX takes of the card."""
    margin: float = 0.04
    """Share of that memory to leave free."""
    steps: int = 32
    """Decoding steps in a compiled loop."""
    repeats: int = 5
    """Calls of the loop to time."""
    prefill: bool = False
    """Measure chunked prefill instead."""
    prefill_chunk: int = 16384
    """Tokens of a prefill that are read at once."""
    prefill_seconds: float = 120.0
    """Stop a prefill that takes longer and report what it had read."""
    small: bool = False
    """A tiny model, for machines without an accelerator."""
    json: str | None = None
    """File for the results."""
    plot: str | None = None
    """Draw this file of results, measure nothing."""
    check: bool = False
    """Only check, with the tiny model, that decoding equals the full forward pass."""


class Program(NamedTuple):
    """A compiled loop of decoding steps for a batch of sequences of one length."""

    form: Form
    context: int
    batch: int
    kind: str  # "one" or "largest"
    compiled: Any


def loop(form: Form, steps: int):
    """(params, decoding, length) -> decoding after `steps` tokens, and these; jitted.

    The sequences are taken to have `length` tokens before.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params, state: Decoding, length):
        model = form.model(params)
        state = state._replace(cache=with_length(state.cache, length))

        def turn(state: Decoding, _) -> tuple[Decoding, jax.Array]:
            state = advance(model, state, GREEDY)
            return state, state.last

        return jax.lax.scan(turn, state, None, length=steps)

    return run


def beginning(cache) -> Decoding:
    """Decoding from that cache, of unfinished rows."""
    batch = jax.tree.leaves(cache)[0].shape[1]
    return Decoding(
        step=jnp.zeros((), jnp.int32),
        last=jnp.arange(batch, dtype=jnp.int32) % 7,
        finished=jnp.zeros((batch,), bool),
        keys=jax.random.split(jax.random.key(0), batch),
        cache=cache,
    )


def compile_loop(form: Form, batch: int, context: int, steps: int):
    """The loop, compiled for those shapes."""
    shapes = jax.eval_shape(beginning, form.cache_shapes(batch, context))
    return loop(form, steps).lower(form.params, shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def bytes_needed(compiled) -> int:
    """Of arguments, results that do not overwrite them, and temporaries."""
    found = compiled.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def largest_program(form: Form, context: int, settings: Settings, limit: int) -> Program:
    """The loop for as many sequences as fit in `limit` bytes."""
    room = limit - nbytes(form.params)
    each = nbytes(form.cache_shapes(1, context))
    batch = settings.batch or min(settings.max_batch, room // each)
    while True:
        if batch < 1:
            raise ValueError(
                f"{form.name}: a cache of {context} tokens has {each / 2**30:.2f} GiB, but weights leave "
                f"{room / 2**30:.2f} GiB of the memory: expected more (--memory-gib) or fewer --contexts"
            )
        compiled = compile_loop(form, batch, context, settings.steps)
        needed = bytes_needed(compiled)
        if settings.batch or needed <= limit:
            return Program(form, context, batch, "largest", compiled)
        batch = min(batch - 1, batch * room // (needed - nbytes(form.params)))


def programs(form: Form, settings: Settings, limit: int) -> list[Program]:
    """All loops of a form, compiled side by side."""

    def one(context: int) -> Program:
        return Program(form, context, 1, "one", compile_loop(form, 1, context, settings.steps))

    def largest(context: int) -> Program:
        return largest_program(form, context, settings, limit)

    contexts = settings.contexts or CONTEXTS
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        made = [pool.submit(kind, context) for context in contexts for kind in (one, largest)]
        return [future.result() for future in made]


def measure(program: Program, settings: Settings) -> dict:
    """A row of the results."""
    form, context, batch, kind, compiled = program
    shapes = form.cache_shapes(1, context)
    state = beginning(filled_cache(form, batch, context))
    start = jnp.int32(context - settings.steps)
    seconds = []
    for _ in range(settings.repeats + 1):
        state = jax.block_until_ready(state)
        begin = time.perf_counter()
        state = jax.block_until_ready(compiled(form.params, state, start)[0])
        seconds.append(time.perf_counter() - begin)
    found = compiled.memory_analysis()
    step = statistics.median(seconds[1:]) / settings.steps
    return dict(
        form=form.name,
        context=context,
        kind=kind,
        batch=batch,
        cache_bytes=cache_bytes(shapes),
        step_ms=step * 1e3,
        tokens_per_s=batch / step,
        cache_gb_per_s=batch * nbytes(shapes) / step / 1e9,
        temporary_bytes=found.temp_size_in_bytes,
        updated_bytes=found.alias_size_in_bytes,
        steps_ms=[s / settings.steps * 1e3 for s in seconds],
    )


def decode(settings: Settings) -> dict:
    """All rows, printed as they come."""
    total = memory_limit(settings.memory_gib)
    limit = int(total * (1 - settings.margin))
    rows, weights = [], {}
    for name in settings.forms:
        begin = time.perf_counter()
        form = make_form(name, small=settings.small)
        weights[name] = nbytes(form.params)
        compiled = programs(form, settings, limit)
        print(f"{name}: {weights[name] / 2**30:.2f} GiB of weights, compiled in "
              f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
        for program in compiled:
            try:
                rows.append(measure(program, settings))
            except jax.errors.JaxRuntimeError as error:  # out of memory: the others may still run
                reason = str(error).splitlines()[0][:200]
                rows.append(dict(form=name, context=program.context, kind=program.kind, batch=program.batch,
                                 cache_bytes=cache_bytes(form.cache_shapes(1, program.context)),
                                 error=reason))  # fmt: skip
            print(line(rows[-1]), flush=True)
        del form, compiled, program
    result = dict(measured="decode", **setting(settings), memory_bytes=total, limit_bytes=limit,
                  weight_bytes=weights, rows=rows)  # fmt: skip
    result["comparison"] = comparison(rows)
    for row in result["comparison"]:
        print(f"{row['context']:9,} tokens: hybrid has {row['cache_less']:.2%} less cache", end="")
        for kind, text in (("one", "batch 1"), ("largest", "largest batch")):
            if f"speed_{kind}" in row:
                print(f", {row[f'speed_{kind}']:.2f} x the tokens/s at {text}", end="")
        print()
    return result


def setting(settings: Settings) -> dict:
    """What a file of results says of where it comes from."""
    return dict(
        card=jax.devices()[0].device_kind,
        jax=jax.__version__,
        date=time.strftime("%Y-%m-%d"),
        settings=dataclasses.asdict(settings),
    )


def line(row: dict) -> str:
    """A row as text."""
    size = row["cache_bytes"]
    text = (
        f"{row['form']:7s} {row['context']:9,} tokens  cache {size['total'] / 2**20:9.2f} MiB ("
        f"latent {size['latent'] / 2**20:.2f}, states {size['states'] / 2**20:.2f}, "
        f"conv {size['conv'] / 2**20:.3f})  {row['kind']:7s} B {row['batch']:4d}"
    )
    if "error" in row:
        return f"{text}  {row['error']}"
    return (
        f"{text}  {row['step_ms']:8.3f} ms a step  {row['tokens_per_s']:9,.1f} tokens/s  caches read at "
        f"{row['cache_gb_per_s']:5.0f} GB/s  temporaries {row['temporary_bytes'] / 2**20:.0f} MiB"
    )


def comparison(rows: list[dict]) -> list[dict]:
    """The hybrid against latent attention only, at each context that both have."""
    by = {(r["form"], r["context"], r["kind"]): r for r in rows}
    found = []
    for context in sorted({r["context"] for r in rows}):
        entry: dict[str, Any] = dict(context=context)
        for kind in ("one", "largest"):
            pair = [by.get((form, context, kind)) for form in ("hybrid", "mla")]
            if None in pair:
                continue
            hybrid, mla = pair
            entry["cache_less"] = 1 - hybrid["cache_bytes"]["total"] / mla["cache_bytes"]["total"]
            if "error" not in hybrid and "error" not in mla:
                entry[f"speed_{kind}"] = hybrid["tokens_per_s"] / mla["tokens_per_s"]
        if "cache_less" in entry:
            found.append(entry)
    return found


def check() -> bool:
    """Whether the loop's tokens, and a step's logits, are those of a full forward pass."""
    ok = True
    B, T, N = 3, 40, 8
    for name in ("hybrid", "mla"):
        form = make_form(name, small=True)
        prompt = jax.random.randint(jax.random.key(1), (B, T), 0, form.config.vocab_size)

        def read(params, tokens, cache=None, form=form):
            model = form.model(params)
            return model(tokens, cache=model.init_cache(B, T + N) if cache is None else cache)

        def whole(params, tokens, form=form):
            return form.model(params)(tokens)

        with jax.default_matmul_precision("highest"):
            logits, cache = jax.jit(read)(form.params, prompt)
            first = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
            stepped, _ = jax.jit(read)(form.params, first[:, None], cache)
            state = beginning(cache)._replace(last=first + 0)
            _, tokens = loop(form, N)(form.params, state, jnp.int32(T))
            tokens = jnp.concatenate([prompt, first[:, None], tokens.T], axis=1)
            full = jax.jit(whole)(form.params, tokens)
        error = float(jnp.max(jnp.abs(stepped[:, 0] - full[:, T])) / jnp.max(jnp.abs(full)))
        same = bool(jnp.array_equal(jnp.argmax(full[:, T - 1 : -1], axis=-1), tokens[:, T:]))
        ok &= error < 1e-4 and same
        print(f"{name}: error of a step's logits {error:.1e}, the same {N} tokens: {same}")
    print(f"check: {'ok' if ok else 'FAILED'}, {jax.devices()[0].device_kind}")
    return ok


def main(settings: Settings) -> int:
    """Measures, checks or draws."""
    if settings.plot:
        print(curve_plots.draw(Path(settings.plot)))
        return 0
    if settings.check:
        return 0 if check() else 1
    if settings.prefill:
        result = prefill_curve.measure(
            settings.contexts or prefill_curve.CONTEXTS,
            chunk=settings.prefill_chunk,
            seconds=settings.prefill_seconds,
            small=settings.small,
        )
        result = dict(measured="prefill", **setting(settings), **result)
    else:
        result = decode(settings)
    if settings.json:
        Path(settings.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of the card, for JAX
    raise SystemExit(main(tyro.cli(Settings, description=__doc__)))
