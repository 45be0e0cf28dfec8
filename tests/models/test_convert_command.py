"""`python -m deltajax.models.convert`, both ways, and what it says of wrong input."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from deltajax import generate
from deltajax.models import abstract_model, convert, load_weights
from deltajax.models.huggingface import save_pretrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, request):
    config = request.getfixturevalue("tiny").replace(num_layers=1, layer_pattern=("kda",))
    path = tmp_path_factory.mktemp("hf") / "m"
    graph, state = nnx.split(abstract_model(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    save_pretrained(nnx.merge(graph, state), path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[end]": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[end]"}}))
    return path


def run(capsys, *args):
    status = convert.main(list(map(str, args)))
    return status, *capsys.readouterr()


def test_there_and_back(checkpoint, tmp_path, capsys):
    ours, back = tmp_path / "m.safetensors", tmp_path / "back"
    status, out, err = run(capsys, checkpoint, ours)
    assert (status, err) == (0, "") and f"--model {ours} --prompt" in out
    assert load_weights(ours).config.layers == ("kda",)
    texts = []
    for model in (ours, checkpoint):
        assert generate.main(["--model", str(model), "--prompt", "a b", "--max-tokens", "3"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("a b")
    assert run(capsys, ours, back)[0] == 0
    assert (back / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    config = json.loads((checkpoint / "config.json").read_text()) | {"eos_token_id": 2}
    assert json.loads((back / "config.json").read_text()) == config
    assert json.loads((back / "tokenizer_config.json").read_text()) == {"eos_token": "[end]"}
    assert (back / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    again = load_file(back / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, load_file(checkpoint / "model.safetensors"))


def test_without_a_tokenizer_it_says_so(checkpoint, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    status, out, err = run(capsys, bare, tmp_path / "m.safetensors")
    assert status == 0 and "no tokenizer.json" in err and "--tokenizer FILE" in out
    (bare / "tokenizer.json").write_text("{}")
    assert "converted without the tokenizer" in run(capsys, bare, tmp_path / "n.safetensors")[2]
    assert run(capsys, tmp_path / "n.safetensors", tmp_path / "back")[0] == 0
    assert not list((tmp_path / "back").glob("tokenizer*"))


def test_wrong_paths_are_named(checkpoint, tmp_path, capsys):
    ours = tmp_path / "m.safetensors"
    for args, text in (
        ((checkpoint, tmp_path / "m"), "must be FILE.safetensors"),
        ((tmp_path, ours), "no config.json in it"),
        ((ours, tmp_path / "x"), "no such file of weights"),
        ((ours, ours), "must be a new directory"),
    ):
        status, _, err = run(capsys, *args)
        assert status == 2 and text in err
    assert not ours.exists()
    assert run(capsys, checkpoint, ours)[0] == 0
    status, _, err = run(capsys, ours, checkpoint)
    assert status == 2 and "an empty directory" in err


@pytest.mark.parametrize("there", ["model.safetensors", "model.json", "model.tokenizer.json"])
def test_files_that_are_there_are_kept(there, checkpoint, tmp_path, capsys):
    (tmp_path / there).write_text("mine")
    status, _, err = run(capsys, checkpoint, tmp_path / "model.safetensors")
    assert status == 2 and f"argument DST: {tmp_path / there} is there" in err
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(there, "mine")]
