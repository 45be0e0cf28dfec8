"""Which tensors of a Hugging Face checkpoint hold which of our parameters, and in what order of rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deltajax.models.config import LayerKind, ModelConfig
from deltajax.models.groups import layer_groups

FLA = ("delta_net", "gated_deltanet", "kda")  # flash-linear-attention's
QWEN = ("qwen3_next", "qwen3_5_text", "qwen3_5")  # the last: with images, whose text part is read
MODEL_TYPES = (*FLA, "kimi_linear", *QWEN, "olmo_hybrid")
EXPERT = "{expert}"  # in a name: one tensor per expert
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs (one per expert, if its name says so) and the parameters of ours that it holds.

    Attributes:
      ours: dotted paths in a block, or in the model.
      theirs: the name, behind the layer's prefix; the first is written, any is read.
      transposed: theirs has outputs first, ours inputs.
      groups: theirs has its rows in so many groups, each with a share of every part's.
      form: "taps": theirs is [D, 1, W]; "rates": theirs is [1, 1, H, 1], or [H]; "vector": theirs is flat.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False
    groups: int = 1
    form: str = ""

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return EXPERT in self.theirs[0]

    def shape(self, parts: Sequence[Shape]) -> Shape:
        """Of their tensor, from the shapes of one layer's (and expert's) parts."""
        rows = [self._rows(part) for part in parts]
        whole = (sum(n[0] for n in rows), *rows[0][1:])
        if self.form == "taps":
            return whole[0], 1, whole[1]
        return (1, 1, *whole, 1) if self.form == "rates" else whole

    def accepts(self, shape: Shape, parts: Sequence[Shape]) -> bool:
        """Whether their tensor may have that shape."""
        expected = self.shape(parts)
        if self.form == "rates":
            return math.prod(shape) == max(shape, default=0) == math.prod(expected)
        return tuple(shape) == expected

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor, of one layer's (and expert's) parts."""
        rows = [part.T if self.transposed else part.reshape(self._rows(part.shape)) for part in parts]
        rows = [part.reshape(self.groups, -1, *part.shape[1:]) for part in rows]
        return np.concatenate(rows, axis=1).reshape(self.shape([part.shape for part in parts]))

    def take(self, tensor: np.ndarray, part: int, parts: Sequence[Shape]) -> np.ndarray:
        """That part of their tensor, in our order."""
        rows = [self._rows(shape) for shape in parts]
        each = [n[0] // self.groups for n in rows]
        first = sum(each[:part])
        tensor = tensor.reshape(self.groups, sum(each), *rows[0][1:])[:, first : first + each[part]]
        own = tensor.reshape(rows[part])
        return own.T if self.transposed else own.reshape(parts[part])

    def _rows(self, shape: Shape) -> Shape:
        if self.transposed:
            return shape[::-1]
        return (math.prod(shape),) if self.form in ("vector", "rates") else shape


@dataclass(frozen=True)
class Entry:
    """A rule, for the model or for one of its layers.

    Attributes:
      rule: it.
      prefix: what their names begin with.
      ours: dotted paths of our (stacked) parameters.
      repeat: the layer's place in these; None where they are of the whole model.
      nested: what may stand for `model.` in their names.
    """

    rule: Rule
    prefix: str
    ours: tuple[str, ...]
    repeat: int | None
    nested: str = ""

    def names(self, expert: int | None = None) -> tuple[str, ...]:
        """Their names; the first is written, any is read."""
        names = tuple(self.prefix + name.replace(EXPERT, str(expert)) for name in self.rule.theirs)
        return names + tuple(n.replace("model.", self.nested, 1) for n in names if self.nested)

    def parts(self, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """Shapes of one layer's (and expert's) parts, from those of our parameters."""
        leading = (self.repeat is not None) + self.rule.per_expert
        return tuple(shape[leading:] for shape in shapes)


def entries(model_type: str, config: ModelConfig) -> Iterator[Entry]:
    """All of a model's."""
    table = "model.embeddings.weight" if model_type in FLA else "model.embed_tokens.weight"
    whole = [_plain("embedding", table), _plain("norm.scale", "model.norm.weight")]
    if not config.tie_embeddings:
        whole.append(_matrix("lm_head", "lm_head.weight"))
    nested = "model.language_model." if model_type in QWEN[1:] else ""
    for rule in whole:
        yield Entry(rule, "", rule.ours, None, nested)
    for g, group in enumerate(layer_groups(config)):
        for repeat in range(group.repeats):
            for b, kind in enumerate(group.unit):
                prefix = f"model.layers.{group.start + repeat * len(group.unit) + b}."
                for rule in _block_rules(model_type, config, kind):
                    ours = tuple(f"groups.{g}.blocks.{b}.{o}" for o in rule.ours)
                    yield Entry(rule, prefix, ours, repeat, nested)


def ignored(model_type: str, config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint may have that tensor although the model does not need it."""
    if config.tie_embeddings and name == "lm_head.weight":
        return True
    # Heads that predict further tokens, and what reads images.
    return model_type in QWEN and name.startswith(("mtp.", "model.visual."))


def _plain(ours: str, *theirs: str, form: str = "") -> Rule:
    return Rule((ours,), theirs, form=form)


def _matrix(ours: str, *theirs: str) -> Rule:
    return Rule((ours,), theirs, transposed=True)


def _linear(ours: str, theirs: str, names: str) -> list[Rule]:
    return [_matrix(f"{ours}.{n}_proj.kernel", f"{theirs}.{n}_proj.weight") for n in names.split()]


def _block_rules(model_type: str, config: ModelConfig, kind: LayerKind) -> list[Rule]:
    rules = [
        _plain(f"{ours}.scale", *(f"{name}.weight" for name in theirs.split()))
        for ours, theirs in zip(("attn_norm", "mlp_norm"), _norms(model_type, kind), strict=True)
    ]
    if kind.mixer == "latent_attention":
        rules += _latent_rules(config)
    elif kind.mixer in ("sliding_window", "full_attention"):
        rules += _attention_rules(config, "attn" if model_type in FLA else "self_attn")
    elif model_type in QWEN:
        rules += _qwen_delta_rules(model_type, config)
    elif model_type == "kimi_linear":
        rules += _kimi_delta_rules()
    else:
        rules += _fla_delta_rules(config, kind.mixer, "attn" if model_type in FLA else "linear_attn")
    if kind.mlp == "dense":
        return rules + _dense_rules(model_type)
    return rules + (_kimi_expert_rules(config) if model_type == "kimi_linear" else _qwen_expert_rules())


def _norms(model_type: str, kind: LayerKind) -> tuple[str, str]:
    """Names of a block's two norms; a name that is read too stands behind the one that is written."""
    if model_type in FLA:
        return "attn_norm", "mlp_norm"
    if model_type != "olmo_hybrid":
        return "input_layernorm", "post_attention_layernorm"
    if kind.mixer == "full_attention":  # transformers 5.24 writes the first under the other name
        return "post_attention_layernorm feedforward_layer_norm", "post_feedforward_layernorm"
    return "attention_layer_norm input_layernorm", "feedforward_layer_norm post_attention_layernorm"


def _convolutions(theirs: str) -> list[Rule]:
    return [_plain(f"mixer.{n}_conv", f"{theirs}.{n}_conv1d.weight", form="taps") for n in "qkv"]


def _fla_delta_rules(config: ModelConfig, mixer: str, theirs: str) -> list[Rule]:
    rules = _linear("mixer", theirs, "q k v b o") + _convolutions(theirs)
    rules.append(_plain("mixer.o_norm.scale", f"{theirs}.o_norm.weight"))
    if mixer == "delta_net":
        return rules + (_linear("mixer", theirs, "g") if config.use_gate else [])
    rules.append(_plain("mixer.A_log", f"{theirs}.A_log"))
    rules.append(_plain("mixer.dt_bias", f"{theirs}.dt_bias", form="vector"))
    if mixer == "gated_delta_net":
        return rules + _linear("mixer", theirs, "a" if config.use_gate is False else "a g")
    for n in "fg":
        rules += [
            _matrix(f"mixer.{n}_{x}_proj.kernel", f"{theirs}.{n}_proj.{i}.weight") for i, x in enumerate("ab")
        ]
    return [*rules, _plain("mixer.g_b_proj.bias", f"{theirs}.g_proj.1.bias")]


def _kimi_delta_rules() -> list[Rule]:
    rules = _linear("mixer", "self_attn", "q k v b f_a f_b g_a g_b o") + _convolutions("self_attn")
    rules.append(_plain("mixer.A_log", "self_attn.A_log", form="rates"))
    rules.append(_plain("mixer.dt_bias", "self_attn.dt_bias", form="vector"))
    return [*rules, _plain("mixer.o_norm.scale", "self_attn.o_norm.weight")]


def _qwen_delta_rules(model_type: str, config: ModelConfig) -> list[Rule]:
    name, H = "linear_attn", config.num_heads

    def joint(letters: str, tensor: str, groups: int = 1) -> Rule:
        kernels = tuple(f"mixer.{n}_proj.kernel" for n in letters)
        return Rule(kernels, (f"{name}.in_proj_{tensor}.weight",), transposed=True, groups=groups)

    if model_type == "qwen3_next":
        projections = [joint("qkvg", "qkvz", H), joint("ba", "ba", H)]
    else:
        projections = [joint("qkv", "qkv"), joint("g", "z"), joint("b", "b"), joint("a", "a")]
    return [
        *projections,
        Rule(tuple(f"mixer.{n}_conv" for n in "qkv"), (f"{name}.conv1d.weight",), form="taps"),
        _plain("mixer.A_log", f"{name}.A_log"),
        _plain("mixer.dt_bias", f"{name}.dt_bias"),
        _plain("mixer.o_norm.scale", f"{name}.norm.weight"),
        _matrix("mixer.o_proj.kernel", f"{name}.out_proj.weight"),
    ]


def _attention_rules(config: ModelConfig, theirs: str) -> list[Rule]:
    rules = _linear("mixer", theirs, "q k v o")
    if config.attn_qk_norm:
        rules += [_plain(f"mixer.{n}_norm.scale", f"{theirs}.{n}_norm.weight") for n in "qk"]
    return rules


def _latent_rules(config: ModelConfig) -> list[Rule]:
    rules = _linear("mixer", "self_attn", "kv_b o")
    rules.append(_matrix("mixer.kv_a_proj.kernel", "self_attn.kv_a_proj_with_mqa.weight"))
    rules.append(_plain("mixer.kv_a_norm.scale", "self_attn.kv_a_layernorm.weight"))
    if config.q_lora_rank is None:
        return rules + _linear("mixer", "self_attn", "q")
    rules.append(_plain("mixer.q_a_norm.scale", "self_attn.q_a_layernorm.weight"))
    return rules + _linear("mixer", "self_attn", "q_a q_b")


def _dense_rules(model_type: str) -> list[Rule]:
    # transformers writes Kimi's dense layer under the other name.
    homes = ("mlp", "block_sparse_moe") if model_type == "kimi_linear" else ("mlp",)
    return [
        _matrix(f"mlp.{n}_proj.kernel", *(f"{home}.{n}_proj.weight" for home in homes))
        for n in ("gate", "up", "down")
    ]


def _kimi_expert_rules(config: ModelConfig) -> list[Rule]:
    home = "block_sparse_moe"
    experts = (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    shared = _linear("mlp.shared", f"{home}.shared_experts", "gate up down")
    return [
        _matrix("mlp.router.kernel", f"{home}.gate.weight"),
        _plain("mlp.correction_bias", f"{home}.gate.e_score_correction_bias"),
        *(_matrix(f"mlp.experts.{n}_proj", f"{home}.experts.{EXPERT}.{w}.weight") for n, w in experts),
        *(shared if config.num_shared_experts else ()),
    ]


def _qwen_expert_rules() -> list[Rule]:
    return [
        _matrix("mlp.router.kernel", "mlp.gate.weight"),
        *(
            _matrix(f"mlp.experts.{n}_proj", f"mlp.experts.{EXPERT}.{n}_proj.weight")
            for n in ("gate", "up", "down")
        ),
        *_linear("mlp.shared", "mlp.shared_expert", "gate up down"),
        _matrix("mlp.shared_gate.kernel", "mlp.shared_expert_gate.weight"),
    ]
