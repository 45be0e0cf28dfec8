"""What the three delta-rule layers share: projections, short convolutions, cache, output."""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deltajax.layers.layout import packs_sequences
from deltajax.layers.norm import GatedRMSNorm, RMSNorm
from deltajax.layers.parameters import check_sizes, linear, parameter
from deltajax.layers.projection import Projection
from deltajax.layers.sharding import run_convolution, run_op, run_step
from deltajax.ops import Gate, delta_rule, delta_rule_step, gated_delta_rule, kimi_delta_attention
from deltajax.ops.api import Implementation
from deltajax.ops.checks import MAX_K, MAX_V, check_rank
from deltajax.ops.gates import activate
from deltajax.ops.packed_convolution import packed_convolution

IMPLEMENTATIONS = (*get_args(Implementation), None)
# Name (of `jax.ad_checkpoint.checkpoint_name`) of the op's output, before norm and gate.
OP_OUTPUT = "delta_rule_output"


class DeltaCache(NamedTuple):
    """What a delta-rule layer remembers between calls; its size does not grow with the sequence."""

    q_conv: Float[Array, "B W1 HK"]  # last conv_size - 1 inputs of each convolution, compute dtype
    k_conv: Float[Array, "B W1 HK"]
    v_conv: Float[Array, "B W1 HVV"]
    state: Float[Array, "B HV K V"]  # float32


class NewDeltaTokens(NamedTuple):
    """A cache and the tokens of a call that would enter it."""

    cache: DeltaCache
    inputs: tuple[Array, Array, Array]  # of the convolutions, [B, T, .] each
    k: Float[Array, "B T H K"]  # not yet normalised
    v: Float[Array, "B T HV V"]
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None  # log decay
    beta: Float[Array, "B T HV"]
    real: Bool[Array, "B T"]  # false for padding, which ends a row

    def keep(self, counts: Int[Array, " B"]) -> DeltaCache:
        """The cache with the first `counts` tokens of each row: the state runs over them once more."""
        kept = self.real & (jnp.arange(self.k.shape[1]) < counts[:, None])
        row, convs = jnp.arange(len(counts))[:, None], []
        for past, x in zip(self.cache[:3], self.inputs, strict=True):
            last = jnp.sum(kept, axis=1)[:, None] + jnp.arange(past.shape[1])
            convs.append(jnp.concatenate([past, x.astype(past.dtype)], axis=1)[row, last])
        arrays = dict(q=self.k, k=self.k, v=self.v, g=self.g, beta=self.beta, gate=None)
        arrays |= dict(initial_state=self.cache.state, segment_ids=kept.astype(jnp.int32))
        _, state = run_op(_op_of, arrays, normalize_qk=True)
        q_conv, k_conv, v_conv = convs
        return DeltaCache(q_conv, k_conv, v_conv, state)


def _op_of(q, k, v, g, beta, gate, **options) -> tuple[Array, Array]:
    """The op whose log decay has that shape."""
    if g is None:
        return delta_rule(q, k, v, beta, **options)
    op = gated_delta_rule if g.ndim == 3 else kimi_delta_attention
    return op(q, k, v, g, beta, **options)


class DeltaLayer(nnx.Module):
    """Base of `DeltaNet`, `GatedDeltaNet` and `KimiDeltaAttention`; not a layer by itself.

    A subclass makes its decay and output-gate parameters and its `o_norm`, and defines `_decay`,
    `_recurrence` and `_output_gate`. See the subclasses for the arguments.
    """

    o_norm: Any

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_v_heads: int,
        head_dim: int,
        head_v_dim: int,
        conv_size: int,
        allow_neg_eigval: bool,
        norm_eps: float,
        initializer_range: float,
        chunk_size: int | None,
        implementation: Any,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        check_sizes(num_heads=num_heads, num_v_heads=num_v_heads, head_dim=head_dim, head_v_dim=head_v_dim)
        for name, size, most in (("head_dim", head_dim, MAX_K), ("head_v_dim", head_v_dim, MAX_V)):
            if size > most:
                raise ValueError(f"{name}={size}: expected at most {most}")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS}")
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads={num_v_heads}: expected a multiple of num_heads={num_heads}")
        if conv_size < 2:
            raise ValueError(f"conv_size={conv_size}: expected at least 2 taps")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        self.head_dim = head_dim
        self.head_v_dim = head_v_dim
        self.conv_size = conv_size
        self.allow_neg_eigval = allow_neg_eigval
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.chunk_size = chunk_size
        self.implementation = implementation
        self.dtype = dtype
        self.param_dtype = param_dtype

        key_dim, value_dim = num_heads * head_dim, num_v_heads * head_v_dim
        self.q_proj = self._linear(hidden_size, key_dim, ("embed", "heads"), rngs)
        self.k_proj = self._linear(hidden_size, key_dim, ("embed", "heads"), rngs)
        self.v_proj = self._linear(hidden_size, value_dim, ("embed", "heads"), rngs)
        self.b_proj = self._linear(hidden_size, num_v_heads, ("embed", "heads"), rngs)
        self.q_conv = self._taps(key_dim, rngs)
        self.k_conv = self._taps(key_dim, rngs)
        self.v_conv = self._taps(value_dim, rngs)
        self.o_proj = self._linear(value_dim, hidden_size, ("heads", "embed"), rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: DeltaCache | None = None,
        num_segments: int | None = None,
        hold: bool = False,
    ) -> Any:
        """Mixes tokens along T.

        Args:
          x: [B, T, D] input.
          segment_ids: int32 [B, T] for packed rows: state and convolutions restart where the id changes;
            id 0 is padding, which outputs 0 and leaves the cache alone. Padding stands between segments or
            at a row's ends, not inside a segment: the convolutions' taps do not skip over it.
          cache: what earlier calls returned (or `init_cache`); it belongs to the row's first segment.
          num_segments: static N: B = 1, and the row packs tokens of sequences 1..N, each together, which
            continue the N rows of `cache`.
          hold: return `NewDeltaTokens`, whose `keep` makes the cache after some of the tokens, instead of a
            cache; rows are then of one segment, with padding behind it.

        Returns:
          y [B, T, D] in the compute dtype; `(y, cache)` when a cache is given.

        Raises:
          TypeError, ValueError: on arguments of wrong shapes or that do not go together.
        """
        check_rank("x", x, "B T D")
        if x.shape[-1] != self.hidden_size or 0 in x.shape:
            expected = f"[B, T, D] with D = {self.hidden_size} and at least one token"
            raise ValueError(f"x must have shape {expected}, got {x.shape}")
        rows = None if cache is None else cache.state.shape[0]
        packed = packs_sequences(x.shape, segment_ids, num_segments, hold, rows)
        inputs, (q, k, v), convs = self._project(x, segment_ids, cache, packed)
        beta = self.write_strength(x)
        g, gate = self._decay(x)
        if cache is not None and x.shape[1] == 1 and not packed and not hold:
            o, state = self._step(cache.state, q, k, v, g, beta, gate, segment_ids)
        else:
            arrays = dict(q=q, k=k, v=v, g=g, beta=beta, gate=gate, segment_ids=segment_ids)
            initial: Any = None if cache is None else cache.state
            arrays["initial_state"] = initial.swapaxes(0, 1)[None] if packed else initial
            o, state = run_op(
                self._packed_recurrence if packed else self._recurrence,
                arrays,
                normalize_qk=True,
                padding_is_zero=True,  # the convolutions leave 0 there
                chunk_size=self.chunk_size,
                implementation=self.implementation,
            )
        y = self._output(checkpoint_name(o, OP_OUTPUT), x)
        if cache is None:
            return y
        if hold:
            real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
            return y, NewDeltaTokens(cache, inputs, k, v, self.log_decay(x), beta, real)
        q_conv, k_conv, v_conv = convs
        if packed:
            state = state[0].swapaxes(0, 1)
        return y, DeltaCache(q_conv, k_conv, v_conv, state)

    def init_cache(self, batch: int) -> DeltaCache:
        """The cache before the first token of `batch` sequences: zeros."""
        taps = (batch, self.conv_size - 1)
        keys, values = self.num_heads * self.head_dim, self.num_v_heads * self.head_v_dim
        return DeltaCache(
            q_conv=jnp.zeros((*taps, keys), self.dtype),
            k_conv=jnp.zeros((*taps, keys), self.dtype),
            v_conv=jnp.zeros((*taps, values), self.dtype),
            state=jnp.zeros((batch, self.num_v_heads, self.head_dim, self.head_v_dim), jnp.float32),
        )

    def write_strength(self, x: Float[Array, "B T D"]) -> Float[Array, "B T HV"]:
        """How much of the new each token writes: in [0, 1], or [0, 2] with `allow_neg_eigval`."""
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        return 2 * beta if self.allow_neg_eigval else beta

    def log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T HV ..."] | None:
        """The log decay that the op makes of each token: [B, T, HV], [B, T, HV, K], or None without decay."""
        g, gate = self._decay(x)
        if g is None or gate is None:
            return g
        g = g.astype(jnp.float32)
        return activate(g, gate.A_log, gate.dt_bias, gate.lower_bound, per_channel=g.ndim == 4)

    def _decay(self, x: Array) -> tuple[Array | None, Gate | None]:
        """The raw decay projection and the gate parameters that turn it into a log decay."""
        raise NotImplementedError

    def _recurrence(self, q, k, v, g, beta, gate, **options) -> tuple[Array, Array]:
        """The layer's op."""
        raise NotImplementedError

    def _output_gate(self, x: Array) -> Array | None:
        """The output gate's pre-activation [B, T, HV * V], or None."""
        raise NotImplementedError

    def _packed_recurrence(self, *, initial_state, **arguments) -> tuple[Array, Array]:
        """The op on one row of sequences; their states are [1, HV, N, K, V], as `run_op` splits heads."""
        o, state = self._recurrence(
            initial_state=initial_state.swapaxes(1, 2), num_segments=initial_state.shape[2], **arguments
        )
        return o, state.swapaxes(1, 2)

    def _project(self, x, segment_ids, cache, packed):
        """Projections before and after the short convolutions: [B, T, .], and q, k [B, T, H, K], v."""
        B, T, _ = x.shape
        inputs, outputs, convs = [], [], []
        for name, size in (("q", self.head_dim), ("k", self.head_dim), ("v", self.head_v_dim)):
            inputs.append(getattr(self, f"{name}_proj")(x))
            weight = getattr(self, f"{name}_conv")[...]
            past: Any = None if cache is None else getattr(cache, f"{name}_conv")
            if packed:
                y, conv = packed_convolution(inputs[-1], weight, segment_ids=segment_ids, cache=past[None])
                conv = conv[0]
            else:
                y, conv = run_convolution(inputs[-1], weight, segment_ids=segment_ids, cache=past)
            outputs.append(y.reshape(B, T, -1, size))
            convs.append(conv)
        return tuple(inputs), outputs, convs

    def _step(self, state, q, k, v, g, beta, gate, segment_ids):
        """One token by the recurrence; padding rows keep their state and output zero."""
        q, k, v, beta = (a[:, 0] for a in (q, k, v, beta))
        g = None if g is None else g[:, 0]
        if segment_ids is not None:
            # Padding writes nothing and does not decay, so that the state is still updated in place.
            real = segment_ids != 0  # [B, 1]
            beta = jnp.where(real, beta, 0)
            k, v = (jnp.where(real[..., None], x, 0) for x in (k, v))
            if g is not None:
                still = 0.0 if gate is None else jnp.finfo(g.dtype).min / 2  # a raw gate's log decay of 0
                g = jnp.where(real.reshape(-1, *(1,) * (g.ndim - 1)), g, still)
        arrays = dict(state=state, q=q, k=k, v=v, beta=beta, g=g, gate=gate)
        plain = self.implementation in ("scan", "chunked")
        o, state = run_step(
            delta_rule_step, arrays, normalize_qk=True, implementation="scan" if plain else None
        )
        if segment_ids is not None:
            o = jnp.where(real[..., None], o, 0)
        return o[:, None], state

    def _output(self, o: Float[Array, "B T HV V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Per-head norm (gated where the layer has a gate) and output projection."""
        gate = self._output_gate(x)
        o = self.o_norm(o) if gate is None else self.o_norm(o, gate.reshape(o.shape))
        return self.o_proj(o.reshape(*o.shape[:2], -1))

    def _linear(self, n_in: int, n_out: int, axes, rngs, *, use_bias: bool = False) -> Projection:
        return linear(
            n_in,
            n_out,
            axes,
            std=self.initializer_range,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def _taps(self, features: int, rngs: nnx.Rngs) -> nnx.Param:
        init = nnx.initializers.normal(self.initializer_range)
        return parameter(init, (features, self.conv_size), ("heads", "conv"), self.param_dtype, rngs)

    def _norm(self, rngs: nnx.Rngs, activation: Any = None) -> RMSNorm:
        options: dict[str, Any] = dict(
            eps=self.norm_eps, axis="head_dim", dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs
        )
        if activation is None:
            return RMSNorm(self.head_v_dim, **options)
        return GatedRMSNorm(self.head_v_dim, activation=activation, **options)


def value_head_size(head_dim: int, head_v_dim: int | None, expand_v: float) -> int:
    """V: `head_v_dim` where given, else `expand_v * head_dim`, which must be whole.

    Raises:
      ValueError: where `expand_v * head_dim` is not a whole number.
    """
    if head_v_dim is not None:
        return head_v_dim
    size = round(head_dim * expand_v)
    if abs(size - head_dim * expand_v) > 1e-6 * size:
        raise ValueError(f"expand_v={expand_v}: expected expand_v * head_dim={head_dim} to be whole")
    return size
