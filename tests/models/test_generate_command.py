"""`python -m deltajax.generate`: what it prints and when, and what it says of wrong input."""

import io
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from deltajax import generate as command
from deltajax.models import LanguageModel, generate, save_weights
from deltajax.models.generate import Step
from deltajax.tokenizer import ByteTokenizer, FileTokenizer, TextStream


@pytest.fixture(scope="module")
def model(tmp_path_factory, request):
    config = request.getfixturevalue("tiny").replace(
        vocab_size=257, num_layers=1, layer_pattern=("full_attention",)
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    save_weights(path, params, config, tokenizer="bytes")
    return model, path


def run(capsys, *args) -> tuple[int, str, str]:
    status = command.main(list(map(str, args)))
    return status, *capsys.readouterr()


def test_prompts_from_everywhere_are_continued_and_printed_in_turn(model, tmp_path, capsys, monkeypatch):
    model, path = model
    texts = ["a b", "", "é" * 9]
    monkeypatch.setattr("sys.stdin", io.StringIO(texts[2]))
    args = ["--model", path.parent, "--prompt", *texts[:2], "--prompt-file", "-", "--max-tokens", 7]
    status, out, _ = run(capsys, *args, "--temperature", 0, "--prefill-chunk", 8)
    assert status == 0
    prompts = [[256, *text.encode()] for text in texts]
    new = generate(model, prompts, max_new_tokens=7, stop_tokens=(256,), pad_token=256)
    want = [text + ByteTokenizer().decode(row) for text, row in zip(texts, np.asarray(new), strict=True)]
    assert out == "".join(f"--- {n} of 3 ---\n{text}\n" for n, text in enumerate(want, start=1))


def test_sampling_follows_its_options(model, capsys):
    def draw(*more):
        return run(capsys, "--model", model[1], "--prompt", "a", "--max-tokens", 6, *more)[1]

    assert draw("--temperature", 2) == draw("--temperature", 2) != draw("--temperature", 2, "--seed", 1)
    assert draw("--top-k", 9, "--top-p", 1e-9) == draw("--temperature", 0)


def test_text_is_printed_before_the_next_token_is_asked_for():
    out, seen = io.StringIO(), []
    tokens = [[ord("x"), 0xC3], [256, 0xA9], [256, ord("!")]]

    def steps():
        finished = np.array([False, False])
        for row in tokens:
            finished = finished | (np.array(row) == 256)
            yield Step(np.array(row), finished)
            seen.append(out.getvalue())

    command._print(steps(), ["A", "B"], [[256, 65], [256, 66]], ByteTokenizer(), out)
    first = "--- 1 of 2 ---\nAx"
    assert seen == [first, first + "\n--- 2 of 2 ---\nBé", first + "\n--- 2 of 2 ---\nBé!"]
    assert out.getvalue() == seen[-1] + "\n"


def test_a_text_stream_is_the_text_decoded_at_once():
    text = "aé€😀 b" * 5
    ids = ByteTokenizer().encode(text.encode())
    stream = TextStream(ByteTokenizer(), ids[:1])
    pieces = [stream.push(i) for i in ids[1:]]
    assert "".join(pieces) == text[1:] and stream.finish() == "" and "\ufffd" not in "".join(pieces)
    broken = TextStream(ByteTokenizer())
    assert broken.push(0xF0) + broken.push(0x9F) == "" and broken.finish() == "\ufffd"


def test_a_text_stream_of_any_bytes_is_the_text_decoded_at_once():
    rng, tokenizer = np.random.default_rng(0), ByteTokenizer()
    parts = [*"aé€😀".encode(), 0xFF, 0xF0, 0x98]
    streams = [[226, 240, 152, 159, 159], *rng.choice(parts, (300, 40)), *rng.integers(0, 257, (100, 40))]
    for ids in streams:
        for start in (0, 7):
            stream, before = TextStream(tokenizer, ids[:start]), tokenizer.decode(ids[:start])
            said = "".join(stream.push(i) for i in ids[start:]) + stream.finish()
            assert said == tokenizer.decode(ids)[len(before) :]


def test_a_text_stream_of_tokens_that_are_bytes_is_the_text_decoded_at_once(tmp_path):
    """Such a tokenizer reads bytes in a row as text only where all of them together are."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"ab": 256, "<eos>": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(tmp_path / "t.json")
    text = "日本語😀" * 9
    ids = [*text.encode(), 256, *text.encode()]
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text + "ab" + text == tokenizer.decode(ids)
    assert max(map(len, pieces)) == 2


def damaged(path, tmp_path, change):
    """A copy of the weights, changed."""
    out = tmp_path / "bad.safetensors"
    tensors, text = load_file(path), path.with_suffix(".json").read_text()
    config = json.loads(text)
    change(tensors, config)
    save_file(tensors, out, {"format": "deltajax", "tokenizer": "bytes"})
    out.with_suffix(".json").write_text(json.dumps(config))
    return out


def test_damaged_weights_are_refused_naming_all_that_is_wrong(model, tmp_path, capsys):
    name = "layers.0.mixer.q_proj.kernel"

    def wrong(tensors, _):
        tensors |= {name: tensors[name][:, 1:].copy(), "other": tensors[name]}
        del tensors["lm_head"]

    bad = damaged(model[1], tmp_path, wrong)
    status, out, error = run(capsys, "--model", bad, "--prompt", "a")
    assert (status, out) == (2, "") and error.startswith(f"error: {bad}: ")
    for part in (
        "no parameter lm_head",
        f"{name} has shape (16, 15), expected (16, 16)",
        "other is no parameter of the configuration beside it",
    ):
        assert part in error

    content = bad.read_bytes()
    for damage in (
        content[:-9],
        content[:40],
        b"\xff" * 8 + content[8:],
        content[:8] + b"{" * 20 + content[28:],
    ):
        bad.write_bytes(damage)
        status, out, error = run(capsys, "--model", bad, "--prompt", "a")
        assert (status, out) == (2, "") and f"{bad}: not a whole safetensors file" in error

    bad = damaged(model[1], tmp_path, lambda _, config: config.update(layer_pattern=["mamba"]))
    status, _, error = run(capsys, "--model", bad, "--prompt", "a")
    assert status == 2 and f"{bad.with_suffix('.json')}: " in error and "not 'mamba'" in error
    bad = damaged(model[1], tmp_path, lambda _, config: config.update(architecture="other"))
    status, _, error = run(capsys, "--model", bad, "--prompt", "a")
    assert status == 2 and "unknown ModelConfig fields ['architecture']" in error
    bad.with_suffix(".json").unlink()
    status, _, error = run(capsys, "--model", bad, "--prompt", "a")
    assert status == 2 and f"{bad.with_suffix('.json')}: no such configuration" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "a" * 20, "--max-length", 8], "prompt 0 has 21 tokens: expected at most max_length=8"),
        ([], "argument --prompt: expected a text, or --prompt-file"),
        (["--prompt", "", "--no-document-start"], "an empty prompt has no token to continue"),
        (["--prompt-file", "/nowhere"], "argument --prompt-file: /nowhere"),
        (["--prompt", "a", "--max-tokens", 0], "argument --max-tokens: must be 1 or more, got 0"),
        (["--prompt", "a", "--top-k", 900], "top_k=900: expected 1 to vocab_size=257"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "argument --tokenizer: tokenizer file not found"),
        (["--prompt", "a", "--eos-token", "x"], "argument --eos-token: goes with --tokenizer"),
        (["--model", "/nowhere", "--prompt", "a"], "argument --model: no such file or directory: /nowhere"),
        (["--model", "/", "--prompt", "a"], "expected one .safetensors file in /, found none"),
        (["--model", __file__, "--prompt", "a"], "expected a .safetensors file, got"),
    ],
)
def test_wrong_options_are_named(model, capsys, args, message):
    status, out, error = run(capsys, *([] if "--model" in args else ["--model", model[1]]), *args)
    assert status == 2 and out == "" and message in error
