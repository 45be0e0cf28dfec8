"""The curves of cache and decoding time: the benchmark's CPU form, its arithmetic and its plots."""

import json

import jax
import numpy as np
import pytest

from benchmarks import curve_models, decode_curves, prefill_curve
from benchmarks.decode_curves import Settings


def test_decoding_is_measured_checked_and_drawn(tmp_path):
    out = tmp_path / "decode.json"
    settings = Settings(
        contexts=(48,),
        forms=("hybrid",),
        memory_gib=0.001,
        max_batch=3,
        steps=2,
        repeats=1,
        small=True,
        json=str(out),
    )
    assert decode_curves.main(settings) == 0
    result = json.loads(out.read_text())
    assert [(r["kind"], r["batch"]) for r in result["rows"]] == [("one", 1), ("largest", 3)]
    for row in result["rows"]:
        assert row["step_ms"] > 0 and row["tokens_per_s"] == pytest.approx(
            row["batch"] / row["step_ms"] * 1e3
        )
        assert row["updated_bytes"] >= row["batch"] * row["cache_bytes"]["total"]  # in place
    assert decode_curves.main(Settings(plot=str(out))) == 0
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_forms_are_compared_where_both_were_measured():
    def row(form, context, kind, speed, size):
        size = dict(cache_bytes=dict(total=size))
        return dict(form=form, context=context, kind=kind, **size) | (
            dict(tokens_per_s=speed) if speed else dict(error="out of memory")
        )

    rows = [
        row("hybrid", 4, "one", 6.0, 1), row("hybrid", 4, "largest", 9.0, 1), row("hybrid", 8, "one", 5.0, 2),
        row("mla", 4, "one", 3.0, 4), row("mla", 4, "largest", None, 4),
    ]  # fmt: skip
    assert decode_curves.comparison(rows) == [dict(context=4, cache_less=0.75, speed_one=2.0)]


def test_prefill_is_measured_and_drawn(tmp_path):
    out = tmp_path / "prefill.json"
    result = prefill_curve.measure((32, 64), chunk=16, forms=("hybrid",), seconds=60.0, small=True)
    (run,) = result["runs"]
    assert run["read"] == 64 and run["finite"] and len(run["chunk_ends_s"]) == 4
    assert [row["context"] for row in run["rows"]] == [32, 64]
    result |= dict(measured="prefill", card="cpu", jax="0", date="today")
    out.write_text(json.dumps(result))
    assert decode_curves.main(Settings(plot=str(out))) == 0
    assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")


def test_the_cache_is_counted_by_kind():
    tokens = 2**20
    hybrid, mla = (
        curve_models.cache_bytes(curve_models.abstract_form(name, small=False).cache_shapes(1, tokens))
        for name in ("hybrid", "mla")
    )
    assert mla["latent"] == 8 * tokens * (512 + 64) * 2 and mla["states"] == mla["conv"] == 0
    assert hybrid["latent"] == mla["latent"] // 4
    assert hybrid["states"] == 6 * 32 * 128 * 128 * 4 and hybrid["conv"] == 6 * 3 * 3 * 4096 * 2
    assert 0.748 < 1 - hybrid["total"] / mla["total"] < 0.75


def test_filled_caches_hold_no_zeros():
    form = curve_models.abstract_form("hybrid", small=True)
    cache = curve_models.filled_cache(form, 2, 40)
    for x in jax.tree.leaves(cache):
        assert (x == 40).all() if x.dtype == "int32" else (x != 0).mean() > 0.99


def test_a_line_has_no_bend():
    tokens = np.arange(1, 9) * 100
    line = prefill_curve.fits(tokens, tokens * 0.5)
    assert line["line_error"] < 1e-9 and abs(line["bend"]) < 1e-9
    square = prefill_curve.fits(tokens, tokens.astype(float) ** 2)
    assert square["bend"] == pytest.approx(1) and square["line_error"] > 0.1


def test_what_cannot_be_measured_is_refused():
    form = curve_models.abstract_form("mla", small=True)
    with pytest.raises(ValueError, match="--memory-gib"):
        decode_curves.largest_program(form, 64, Settings(), limit=1000)
    with pytest.raises(ValueError, match="--prefill-chunk"):
        decode_curves.main(Settings(contexts=(64,), prefill=True, prefill_chunk=48, small=True))


def test_other_files_are_not_drawn(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="measured=None"):
        decode_curves.main(Settings(plot=str(tmp_path / "x.json")))
