"""Checkpoints in Hugging Face's form: round trips, names and orders of rows, files that are refused."""

import functools
import json

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from deltajax.models import LanguageModel
from deltajax.models.huggingface import from_hf, load_pretrained, save_pretrained, to_hf
from tests import eight_devices
from tests.models.drawn import drawn_model, params_of
from tests.models.huggingface_configs import CONFIGS


@functools.cache
def model_of(name: str) -> LanguageModel:
    return drawn_model(CONFIGS[name])


def bytes_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: a model of that name in a directory, nothing to be changed there."""

    @functools.cache
    def save(name: str):
        path = tmp_path_factory.mktemp(name) / "m"
        save_pretrained(model_of(name), path)
        return path

    return save


def rewritten(path, to, tensors=None, **fields):
    """A copy of a checkpoint with other tensors or fields."""
    to.mkdir()
    config = json.loads((path / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | fields))
    save_file(load_file(path / "model.safetensors") if tensors is None else tensors, to / "model.safetensors")
    return to


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_and_is_saved_to_the_same_bytes(name, saved, tmp_path):
    model, path = model_of(name), saved(name)
    back = load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, params_of(back), params_of(model))
    assert to_hf(back.config) == to_hf(model.config)
    chex.assert_trees_all_equal_dtypes(params_of(back), params_of(model))
    save_pretrained(back, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(path)


def test_layers_may_have_arrays_of_their_own(saved):
    apart = load_pretrained(saved("kimi_linear"), stack_layers=False, dtype="bfloat16")
    assert apart.config.dtype == "bfloat16" and apart.config.param_dtype == "float32"
    stacked = model_of("kimi_linear")
    want = stacked.groups[1].blocks[0].mlp.experts.up_proj[...][1]
    np.testing.assert_array_equal(apart.groups[2].blocks[0].mlp.experts.up_proj[...][0], want)


def test_shards_have_an_index_and_hold_the_same(saved, tmp_path):
    save_pretrained(model_of("qwen3_next"), tmp_path / "m", max_shard_bytes=5000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    whole = load_file(saved("qwen3_next") / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    shards = {name: load_file(tmp_path / "m" / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 5 and max(sum(x.nbytes for x in s.values()) for s in shards.values()) <= 5000
    for name, x in whole.items():
        np.testing.assert_array_equal(shards[index["weight_map"][name]][name], x)
    back = load_pretrained(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, params_of(back), params_of(model_of("qwen3_next")))


def test_qwen_rows_are_interleaved_by_key_head(saved):
    config, mixer = CONFIGS["qwen3_next"], model_of("qwen3_next").groups[0].blocks[0].mixer
    tensors = load_file(saved("qwen3_next") / "model.safetensors")
    name = "model.layers.0.linear_attn."
    q, k, v, z = (getattr(mixer, f"{n}_proj").kernel[...][0] for n in "qkvg")
    b, a = mixer.b_proj.kernel[...][0], mixer.a_proj.kernel[...][0]
    K, V, r = config.head_dim, config.value_dim, 2
    qkvz, ba = tensors[name + "in_proj_qkvz.weight"], tensors[name + "in_proj_ba.weight"]
    for head in range(2):
        own = qkvz[head * (2 * K + 2 * r * V) :]
        np.testing.assert_array_equal(own[:K], q.T[head * K :][:K])
        np.testing.assert_array_equal(own[K : 2 * K], k.T[head * K :][:K])
        np.testing.assert_array_equal(own[2 * K :][: r * V], v.T[head * r * V :][: r * V])
        np.testing.assert_array_equal(own[2 * K + r * V :][: r * V], z.T[head * r * V :][: r * V])
        np.testing.assert_array_equal(ba[4 * head :][:2], b.T[2 * head :][:2])
        np.testing.assert_array_equal(ba[4 * head + 2 :][:2], a.T[2 * head :][:2])
    taps = tensors[name + "conv1d.weight"]
    assert taps.shape == (2 * 2 * K + 4 * V, 1, 4)
    np.testing.assert_array_equal(taps[2 * K : 4 * K, 0], mixer.k_conv[...][0])
    assert tensors["model.layers.3.self_attn.q_proj.weight"].shape == (2 * 2 * 8, 16)
    assert tensors["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 16)
    assert "model.layers.2.mlp.experts.2.down_proj.weight" in tensors


def test_kimi_has_the_published_names_and_the_dense_layer_may_have_the_other(saved, tmp_path):
    tensors = load_file(saved("kimi_linear") / "model.safetensors")
    shapes = {name: x.shape for name, x in tensors.items()}
    assert shapes["model.layers.0.self_attn.A_log"] == (1, 1, 2, 1)
    assert shapes["model.layers.1.self_attn.dt_bias"] == (16,)
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (12, 16)
    assert shapes["model.layers.1.block_sparse_moe.experts.2.w2.weight"] == (16, 8)
    assert shapes["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"] == (3,)
    assert "model.layers.0.mlp.gate_proj.weight" in shapes and "model.embed_tokens.weight" in shapes

    def other(name, x):
        x = x.reshape(-1) if name.endswith("A_log") else x
        return name.replace("layers.0.mlp.", "layers.0.block_sparse_moe."), x

    renamed = dict(other(name, x) for name, x in tensors.items())
    assert renamed.keys() != tensors.keys()
    back = load_pretrained(rewritten(saved("kimi_linear"), tmp_path / "m", renamed))
    jax.tree.map(np.testing.assert_array_equal, params_of(back), params_of(model_of("kimi_linear")))


def test_the_text_part_of_a_qwen_that_reads_images_is_read(saved, tmp_path):
    path, text = saved("qwen3_5_text"), to_hf(CONFIGS["qwen3_5_text"])
    nest = lambda name: name.replace("model.", "model.language_model.", 1)  # noqa: E731
    tensors = {nest(name): x for name, x in load_file(path / "model.safetensors").items()}
    assert (
        "lm_head.weight" in tensors
        and "model.language_model.layers.0.linear_attn.in_proj_z.weight" in tensors
    )
    more = {"model.visual.x": np.zeros(3, np.float32), "mtp.fc.weight": np.zeros(3, np.float32)}
    copy = rewritten(path, tmp_path / "m", tensors | more)
    outer = dict(model_type="qwen3_5", text_config=text, vision_config={}, tie_word_embeddings=False)
    (copy / "config.json").write_text(json.dumps(outer))
    back = load_pretrained(copy)
    assert back.config == load_pretrained(path).config
    old = outer | dict(torch_dtype="bfloat16", text_config=text | dict(dtype=None))
    assert from_hf(old).dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, params_of(back), params_of(model_of("qwen3_5_text")))


def test_olmo_norms_have_other_names_by_kind_of_layer(saved, tmp_path):
    tensors = load_file(saved("olmo_hybrid") / "model.safetensors")
    names = {n.removeprefix("model.layers.").removesuffix(".weight") for n in tensors if "norm" in n}
    for name in ("0.attention_layer_norm", "0.feedforward_layer_norm", "0.linear_attn.o_norm"):
        assert name in names
    for name in ("2.post_attention_layernorm", "2.post_feedforward_layernorm", "2.self_attn.q_norm"):
        assert name in names
    renames = {
        "attention_layer_norm": "input_layernorm",
        "feedforward_layer_norm": "post_attention_layernorm",
    }

    def other(name):
        for old, new in renames.items():
            name = name.replace(f".{old}.", f".{new}.")
        return name

    copy = rewritten(saved("olmo_hybrid"), tmp_path / "m", {other(n): x for n, x in tensors.items()})
    jax.tree.map(
        np.testing.assert_array_equal, params_of(load_pretrained(copy)), params_of(model_of("olmo_hybrid"))
    )


@pytest.mark.slow
def test_each_device_reads_its_part_of_the_checkpoint(tmp_path):
    config = CONFIGS["kimi_linear"].replace(num_experts=4, num_layers=2, layer_pattern=("kda",))
    save_pretrained(drawn_model(config), tmp_path / "m")
    eight_devices.check("tests.models.sharded_checkpoint", str(tmp_path / "m"), least=2)


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_any_part_of_a_parameter_is_read_alone(name, saved):
    from deltajax.models.huggingface.files import opened
    from deltajax.models.huggingface.pretrained import _dotted, _read, _sources

    params = {_dotted(p): x[...] for p, x in nnx.to_flat_state(nnx.state(model_of(name)))}
    shapes = {n: x.shape for n, x in params.items()}
    with opened(saved(name)) as file:
        sources = _sources(file, name, CONFIGS[name], shapes)
        for n, x in params.items():
            index = tuple(slice(size // 2, None) if size > 1 else slice(None) for size in x.shape)
            np.testing.assert_array_equal(_read(file, sources[n], x.shape, x.dtype, index), x[index])


def test_tensors_that_do_not_fit_are_named_together(saved, tmp_path):
    path = saved("kimi_linear")
    tensors = load_file(path / "model.safetensors")
    layer = "model.layers.1."
    gone = tensors.pop(layer + "block_sparse_moe.experts.1.w3.weight")
    tensors[layer + "self_attn.q_proj.weight"] = gone
    tensors["model.layers.9.x"] = gone
    broken = rewritten(path, tmp_path / "m", tensors)
    with pytest.raises(ValueError) as error:
        load_pretrained(broken)
    for text in (
        f"no tensor {layer}block_sparse_moe.experts.1.w3.weight",
        f"{layer}self_attn.q_proj.weight has shape (8, 16), expected (16, 16)",
        "model.layers.9.x belongs to no parameter",
    ):
        assert text in str(error.value)


def test_extra_heads_of_qwen_and_a_tied_head_are_passed_over(saved, tmp_path):
    extra = {"qwen3_next": "mtp.fc.weight", "delta_net_gated_tied": "lm_head.weight"}
    for name, more in extra.items():
        tensors = load_file(saved(name) / "model.safetensors")
        load_pretrained(rewritten(saved(name), tmp_path / name, tensors | {more: np.zeros(3, np.float32)}))


def test_damaged_and_missing_files_are_named(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_pretrained(path)
    save_pretrained(model_of("kda"), path, max_shard_bytes=5000)
    shards = sorted(path.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    for damaged in (whole[:-8], b"\xff" * 64, b"", whole[:4]):
        shards[1].write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{shards[1].name}: not a whole safetensors file"):
            load_pretrained(path)
    shards[1].unlink()
    shards[3].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name}, {shards[3].name}"):
        load_pretrained(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of safetensors files"):
        load_pretrained(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
        load_pretrained(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_pretrained(path)


def test_what_is_there_is_not_overwritten(saved, tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="an empty directory"):
        save_pretrained(model_of("kda"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    (tmp_path / "m.tmp").mkdir()
    (tmp_path / "m.tmp" / "x").write_text("mine")
    (tmp_path / "m").mkdir()
    save_pretrained(model_of("kda"), tmp_path / "m", eos_token_id=7)
    assert (tmp_path / "m.tmp" / "x").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.tmp", "x"]
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "m.tmp").stat().st_mode
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] == 7


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"path='\.': expected another directory than the working one"):
        save_pretrained(model_of("kda"), ".")
