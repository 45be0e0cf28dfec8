"""The language model's configuration: one frozen, JSON-serialisable dataclass."""

import dataclasses
import json
from typing import Any, NamedTuple, Self

from deltajax.layers.rotary import rotated_channels
from deltajax.ops.checks import MAX_K, MAX_V

MIXERS = ("delta_net", "gated_delta_net", "kda", "sliding_window", "full_attention", "latent_attention")
DELTA_MIXERS = ("delta_net", "gated_delta_net", "kda")
ATTENTION_MIXERS = ("sliding_window", "full_attention")
REMAT = ("none", "save_dots", "save_delta_rule", "full")
_DTYPES = ("float32", "bfloat16", "float16")
_ROUTERS = ("softmax", "sigmoid")
_IMPLEMENTATIONS = ("pallas", "chunked", "scan")
_ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn")
_EXPERT_IMPLEMENTATIONS = ("pallas",)

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "head_dim",
    "intermediate_size",
    "conv_size",
    "window_size",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "latent_v_head_dim",
    "experts_per_token",
)
_OPTIONAL_POSITIVE = (
    "num_v_heads",
    "head_v_dim",
    "attn_num_heads",
    "attn_num_kv_heads",
    "attn_head_dim",
    "q_lora_rank",
    "num_experts",
    "expert_intermediate_size",
    "chunk_size",
)
_COUNTS = ("num_shared_experts", "num_dense_layers")


class LayerKind(NamedTuple):
    """What a block is made of: one of `MIXERS`, and "dense" (SwiGLU) or "experts"."""

    mixer: str
    mlp: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides a `LanguageModel`'s shape and arithmetic.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: width D of the residual stream.
      num_layers: number of blocks.
      layer_pattern: kinds of mixer (`MIXERS`), one per layer, or a shorter unit repeated to fill
        `num_layers`.
      num_heads: query/key heads H of the delta-rule layers.
      num_v_heads: value heads HV, a multiple of `num_heads`; None means `num_heads`.
      head_dim: query/key head size K of the delta-rule layers, at most 256.
      head_v_dim: value head size V, at most 512; None means `head_dim`.
      intermediate_size: width of the SwiGLU MLP of layers without experts.
      conv_size: taps of the short convolutions.
      allow_neg_eigval: beta in [0, 2] instead of [0, 1].
      use_gate: output gate of `delta_net` and `gated_delta_net` layers; None means each layer's own
        default (off, on).
      lower_bound: KDA's bounded gate (a negative number), or None for the softplus gate.
      kda_gate_bias: whether the second projection of KDA's output gate has a bias.
      attn_num_heads: softmax attention heads; None means `num_heads`.
      attn_num_kv_heads: grouped key/value heads, except in `latent_attention` layers; None means
        `attn_num_heads`.
      attn_head_dim: head size of `sliding_window` and `full_attention` layers; None means
        `hidden_size // attn_num_heads`.
      attn_rope_fraction, attn_qk_norm, attn_qk_norm_joint, attn_output_gate: of these layers, see
        `layers.Attention`.
      attn_post_norm: their blocks normalise what mixer and MLP return, not what these read (no experts).
      window_size: tokens a `sliding_window` layer sees, itself included.
      kv_lora_rank: channels of the latent that a `latent_attention` layer makes keys and values of.
      q_lora_rank: channels of its queries' low-rank projection; None for one full matrix.
      qk_nope_head_dim: channels of its heads' own keys, never rotated.
      qk_rope_head_dim: channels of the key its heads share, rotated where `rope_theta` is set.
      latent_v_head_dim: size of its value heads.
      rope_theta: base of the rotary embedding of attention layers, None for no position embedding.
      num_experts: routed experts of a layer; None for no layers with experts.
      experts_per_token: how many of them serve a token.
      expert_intermediate_size: width of each, needed with `num_experts`.
      num_shared_experts: experts of that width that serve every token.
      shared_expert_gate, router, router_bias, router_renormalize, router_scale: the arguments `shared_gate`,
        `router`, `correction_bias`, `renormalize` and `scale` of `layers.MixtureOfExperts`.
      num_dense_layers: the first layers, which have one MLP although others have experts.
      norm_eps: epsilon of every RMSNorm but those inside `latent_attention` layers, theirs being 1e-6 as in
        the published models.
      delta_norm_eps: of the norm of delta-rule outputs; None means `norm_eps`.
      zero_centered_norm: norms of blocks, of attention's queries and keys and before the head multiply by
        `1 + scale`, see `layers.RMSNorm`; those of delta-rule outputs and latents do not.
      tie_embeddings: reuse the embedding table as the LM head.
      initializer_range: standard deviation of embeddings and projections at initialisation.
      dtype: compute dtype.
      param_dtype: parameter dtype (`A_log` and `dt_bias` are float32 always).
      remat: what blocks keep for the backward pass, one of `REMAT`, from fastest to smallest; see
        `models.remat.rematerialized`.
      scan_layers: one loop over equal layers; False writes them all out: compiling takes longer, and a step
        less time, since what the loop stacks and copies for the backward pass stays where it is.
      stack_layers: keep the parameters and caches of repeated layers in one array each, for a loop over them;
        False gives every layer its own, so that decoding reads and updates them where they lie.
      chunk_size: chunk of the delta-rule ops, a power of two >= 16; None for the op's choice.
      implementation: backend of the delta-rule ops, None for the op's choice.
      attention_implementation: of softmax attention in calls without a cache: None for cuDNN's kernels in
        programs for NVIDIA GPUs (see `layers.Attention`), "xla" for none, "cudnn" for an error where they do
        not run.
      expert_implementation: "pallas" for Hopper kernels of the experts' products, see `layers.Experts`, or
        None.

    Raises:
      ValueError: naming the field, the value seen and what was expected.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    layer_pattern: tuple[str, ...]
    num_heads: int
    head_dim: int
    intermediate_size: int
    num_v_heads: int | None = None
    head_v_dim: int | None = None
    conv_size: int = 4
    allow_neg_eigval: bool = False
    use_gate: bool | None = None
    lower_bound: float | None = None
    kda_gate_bias: bool = True
    attn_num_heads: int | None = None
    attn_num_kv_heads: int | None = None
    attn_head_dim: int | None = None
    attn_rope_fraction: float = 1.0
    attn_qk_norm: bool = False
    attn_qk_norm_joint: bool = False
    attn_output_gate: bool = False
    attn_post_norm: bool = False
    window_size: int = 2048
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    latent_v_head_dim: int = 128
    rope_theta: float | None = 10000.0
    num_experts: int | None = None
    experts_per_token: int = 1
    expert_intermediate_size: int | None = None
    num_shared_experts: int = 0
    shared_expert_gate: bool = False
    router: str = "softmax"
    router_bias: bool = False
    router_renormalize: bool = True
    router_scale: float = 1.0
    num_dense_layers: int = 0
    norm_eps: float = 1e-6
    delta_norm_eps: float | None = None
    zero_centered_norm: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    stack_layers: bool = True
    chunk_size: int | None = None
    implementation: str | None = None
    attention_implementation: str | None = None
    expert_implementation: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if isinstance(self.layer_pattern, str) or not self.layer_pattern:
            self._fail("layer_pattern", f"a non-empty tuple of kinds among {MIXERS}")
        object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
        for kind in self.layer_pattern:
            if kind not in MIXERS:
                self._fail("layer_pattern", f"kinds among {MIXERS}, not {kind!r}")
        if len(self.layer_pattern) > self.num_layers:
            self._fail("layer_pattern", f"at most num_layers={self.num_layers} kinds")
        if self.value_heads % self.num_heads:
            self._fail("num_v_heads", f"a multiple of num_heads={self.num_heads}")
        if self.attention_heads % self.attention_kv_heads:
            self._fail("attn_num_kv_heads", f"a divisor of the {self.attention_heads} attention heads")
        if self.has_attention:
            self._check_attention()
        if self.has_latent_attention:
            self._check_rotary("qk_rope_head_dim", self.qk_rope_head_dim)
        if self.has_delta:
            self._check_delta()
        self._check_experts()
        if self.conv_size < 2:
            self._fail("conv_size", "at least 2 taps")
        size = self.chunk_size
        if size is not None and (size < 16 or size & (size - 1)):
            self._fail("chunk_size", "a power of two >= 16, or None")
        if self.lower_bound is not None and not self.lower_bound < 0:
            self._fail("lower_bound", "a negative number or None")
        if not self.norm_eps > 0:
            self._fail("norm_eps", "a positive number")
        if self.delta_norm_eps is not None and not self.delta_norm_eps > 0:
            self._fail("delta_norm_eps", "a positive number or None")
        if self.attn_qk_norm_joint and not self.attn_qk_norm:
            self._fail("attn_qk_norm", "True, with attn_qk_norm_joint")
        if self.attn_post_norm and self.num_experts is not None:
            self._fail("attn_post_norm", "False, with num_experts")
        if not self.initializer_range > 0:
            self._fail("initializer_range", "a positive number")
        self._check_choice("dtype", _DTYPES)
        self._check_choice("param_dtype", _DTYPES)
        self._check_choice("remat", REMAT)
        self._check_choice("stack_layers", (True, False))
        self._check_choice("implementation", (None, *_IMPLEMENTATIONS))
        self._check_choice("attention_implementation", (None, *_ATTENTION_IMPLEMENTATIONS))
        self._check_choice("expert_implementation", (None, *_EXPERT_IMPLEMENTATIONS))

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of every layer: `layer_pattern` repeated to length `num_layers`."""
        repeats = -(-self.num_layers // len(self.layer_pattern))
        return (self.layer_pattern * repeats)[: self.num_layers]

    @property
    def blocks(self) -> tuple[LayerKind, ...]:
        """What every layer is made of."""
        dense = self.num_layers if self.num_experts is None else self.num_dense_layers
        return tuple(
            LayerKind(mixer, "dense" if i < dense else "experts") for i, mixer in enumerate(self.layers)
        )

    @property
    def has_attention(self) -> bool:
        """Whether any layer is softmax attention with keys and values of its own."""
        return any(kind in ATTENTION_MIXERS for kind in self.layer_pattern)

    @property
    def has_latent_attention(self) -> bool:
        """Whether any layer is multi-head latent attention."""
        return "latent_attention" in self.layer_pattern

    @property
    def has_delta(self) -> bool:
        """Whether any layer is a delta-rule layer."""
        return any(kind in DELTA_MIXERS for kind in self.layer_pattern)

    @property
    def value_heads(self) -> int:
        """HV, resolved."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def value_dim(self) -> int:
        """V, resolved."""
        return self.head_dim if self.head_v_dim is None else self.head_v_dim

    @property
    def attention_heads(self) -> int:
        """Softmax attention heads, resolved."""
        return self.num_heads if self.attn_num_heads is None else self.attn_num_heads

    @property
    def attention_kv_heads(self) -> int:
        """Softmax attention key/value heads, resolved."""
        return self.attention_heads if self.attn_num_kv_heads is None else self.attn_num_kv_heads

    @property
    def attention_head_dim(self) -> int:
        """Softmax attention head size, resolved."""
        if self.attn_head_dim is not None:
            return self.attn_head_dim
        return self.hidden_size // self.attention_heads

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The configuration as a JSON object; `from_json` inverts it."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
          ValueError: on text that is not a JSON object, or names an unknown field.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object of ModelConfig fields, got {type(fields).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown ModelConfig fields {unknown}; expected some of {sorted(known)}")
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(fields)):
            raise ValueError(f"missing ModelConfig fields {missing}")
        return cls(**fields)

    def _fail(self, field: str, expected: str) -> None:
        raise ValueError(f"ModelConfig.{field}={getattr(self, field)!r}: expected {expected}")

    def _check_choice(self, field: str, choices: tuple[str | bool | None, ...]) -> None:
        if getattr(self, field) not in choices:
            self._fail(field, f"one of {choices}")

    def _check_types(self) -> None:
        for field in _POSITIVE:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                self._fail(field, "a positive integer")
        for field in _OPTIONAL_POSITIVE:
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                self._fail(field, "a positive integer or None")
        for field in _COUNTS:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                self._fail(field, "a whole number")

    def _check_delta(self) -> None:
        if self.head_dim > MAX_K:
            self._fail("head_dim", f"at most {MAX_K}, for the delta-rule layers")
        if self.value_dim > MAX_V:
            self._fail("head_v_dim", f"at most {MAX_V}, for the delta-rule layers")

    def _check_attention(self) -> None:
        if self.attn_head_dim is None and self.hidden_size % self.attention_heads:
            self._fail("hidden_size", f"a multiple of the {self.attention_heads} attention heads")
        if self.rope_theta is not None:
            try:
                rotated = rotated_channels(self.attention_head_dim, self.attn_rope_fraction)
            except ValueError:
                self._fail(
                    "attn_rope_fraction", f"a share of the {self.attention_head_dim} channels of a head"
                )
            self._check_rotary("attn_head_dim", rotated)

    def _check_rotary(self, field: str, size: int) -> None:
        if self.rope_theta is None:
            return
        if not self.rope_theta > 0:
            self._fail("rope_theta", "a positive number or None")
        if size % 2:
            self._fail(field, "an even size, for the rotary embedding")

    def _check_experts(self) -> None:
        self._check_choice("router", _ROUTERS)
        if self.num_dense_layers > self.num_layers:
            self._fail("num_dense_layers", f"at most num_layers={self.num_layers}")
        if not self.router_scale > 0:
            self._fail("router_scale", "a positive number")
        if self.shared_expert_gate and not self.num_shared_experts:
            self._fail("num_shared_experts", "at least 1, with shared_expert_gate")
        if self.num_experts is None:
            return
        if self.expert_intermediate_size is None:
            self._fail("expert_intermediate_size", "a positive integer, with num_experts")
        if self.experts_per_token > self.num_experts:
            self._fail("experts_per_token", f"at most num_experts={self.num_experts}")
