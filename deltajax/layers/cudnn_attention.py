"""cuDNN's fused attention and its derivative as two primitives, which ask for cuDNN when lowered for a GPU.

`jax.nn.dot_product_attention` asks for it when traced: a program that is traced for several platforms, or for
devices that are not there, could not hold it. Lowered for a GPU where cuDNN cannot run the call, the
primitives are plain JAX, or an error if cuDNN was asked for.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from deltajax.layers import ragged_rows
from deltajax.layers.attention_blocks import Source, one_size, widened
from deltajax.layers.blockwise import attend
from deltajax.layers.layout import Layout, causal_mask, layout_of
from deltajax.ops.problem import vary_alike

try:  # JAX has the backward half, and float32 log-sum-exps of the forward half, under private names only
    from jax._src.cudnn import fused_attention_stablehlo as _jax_cudnn

    _kernels: Any = _jax_cudnn._dot_product_attention_fwd_p, _jax_cudnn._dot_product_attention_bwd_p
    _masks: Any = _jax_cudnn.MaskType
    # JAX 0.12's take a function of the logits, too; none is None.
    _names = inspect.signature(_jax_cudnn._dot_product_attention_fwd_cuda_lowering).parameters
    _later = {name: None for name in ("score_mod_name", "score_mod_jaxpr") if name in _names}
except (ImportError, AttributeError):
    _kernels = None

HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
MAX_HEAD = 256
# Where packed rows are read with a bias for each pair of tokens, it has at most so many bytes.
MAX_BIAS = 2**30
LATENT = (192, 128)  # sizes of keys and values that cuDNN takes as they are, from this version on
LATENT_VERSION = 91000


@dataclasses.dataclass(frozen=True)
class Call:
    """What a call is besides its arrays.

    Attributes:
      window: tokens seen, the current one included; None for all.
      scale: multiplies the logits.
      asked: whether it is an error where cuDNN cannot run.
    """

    window: int | None
    scale: float
    asked: bool


def unsupported(q: Array, key: Array, value: Array) -> str | None:
    """Why cuDNN takes no such arrays on any GPU, or None if it does on some."""
    if _kernels is None:
        return f"JAX {jax.__version__} has no such kernel where 0.11 has it"
    dtypes = {x.dtype for x in (q, key, value)}
    if len(dtypes) != 1 or not dtypes <= set(HALF):
        return f"q, k and v must be all bfloat16 or all float16, got {', '.join(sorted(map(str, dtypes)))}"
    size = max(key.shape[-1], value.shape[-1])
    return None if size <= MAX_HEAD else f"heads must be of at most {MAX_HEAD} channels, got {size}"


def forward(
    call: Call,
    q: Float[Array, "B T H K"],
    key: Float[Array, "B S KV K"],
    value: Float[Array, "B S KV V"],
    layouts: tuple[Layout, ...],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]:
    """Outputs, and what `backward` wants of the logits: each query's log-sum-exp.

    Args:
      call: see there.
      q, key, value: arrays that `unsupported` has nothing against.
      layouts: of queries and keys that are not the same tokens, else one for both, or none: then a row is one
        segment. Padding sees padding, so that every query sees something; its output is of no use.
    """
    o, lse = _bind(_forward, call, q, key, value, *_flat(layouts))
    return o, lse


def backward(
    call: Call,
    q: Array,
    key: Array,
    value: Array,
    layouts: tuple[Layout, ...],
    o: Array,
    lse: Array,
    do: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of q, key and value, of a call whose `forward` gave o and lse; do must be 0 at padding."""
    dq, dk, dv = _bind(_backward, call, q, key, value, o, lse, do, *_flat(layouts))
    return dq, dk, dv


def _flat(layouts: tuple[Layout, ...]) -> list[Array]:
    return [x for layout in layouts for x in layout]


@functools.partial(jax.jit, static_argnums=(0, 1))  # for a caller outside jit
def _bind(primitive: Primitive, call: Call, *arrays: Array) -> list[Array]:
    return primitive.bind(*arrays, call=call)


def _layouts(flat: tuple[Array, ...]) -> tuple[Layout, ...]:
    return tuple(Layout(*flat[i : i + 2]) for i in range(0, len(flat), 2))


def _forward_cudnn(call: Call, q, key, value, *flat) -> tuple[Array, ...]:
    def run(found, q, key, value, *flat):
        arrays, others, options = _operands(call, found, q, key, value, flat)
        o, lse = _kernels[0].bind(*arrays, *others, **options, is_training=True)
        o = o[..., : value.shape[-1]]
        if found is None:
            return o, lse
        (layout,) = _layouts(flat)
        lse = ragged_rows.by_token(lse, layout, found.own)
        return *_without_padding(layout, o), lse

    return _either(call, run, _forward_plain, (q, key, value), flat)


def _backward_cudnn(call: Call, q, key, value, o, lse, do, *flat) -> tuple[Array, ...]:
    def run(found, q, key, value, o, lse, do, *flat):
        arrays, others, options = _operands(call, found, q, key, value, flat)
        o, do = (widened(x, arrays[2].shape[-1]) for x in (o, do.astype(q.dtype)))
        if found is not None:
            (layout,) = _layouts(flat)
            lse = ragged_rows.by_segment(lse, layout, found.own, found.length.shape[1])
        gradients = _kernels[1].bind(*arrays, *others, lse, o, do, **options)
        gradients = tuple(d[..., : x.shape[-1]] for d, x in zip(gradients, (q, key, value), strict=True))
        return gradients if found is None else _without_padding(layout, *gradients)

    return _either(call, run, _backward_plain, (q, key, value, o, lse, do), flat)


def _operands(call: Call, found: ragged_rows.Segments | None, q, key, value, flat):
    """The kernels' arrays, their other arguments and options, by a list of segments or by a mask."""
    if found is None:
        return _sized(q, key, value), _rest(call, q, flat), _options(call, flat)
    arrays = one_size(q, key, value, unit=8)
    return arrays, _places(found, arrays), _options(call, (), listed=True)


def _without_padding(layout: Layout, *arrays: Array) -> tuple[Array, ...]:
    real = (layout.run != 0)[..., None, None]
    return tuple(jnp.where(real, x, 0) for x in arrays)


def _either(call: Call, run, plain, arrays, flat) -> tuple[Array, ...]:
    """A call by one of its forms; of packed rows, it is known when the program runs by which.

    Rows of one segment each, with padding at most behind, need no more than causality. Few segments go as a
    list. Else cuDNN reads a bias for each pair of tokens, the same for all heads, or if that were large it is
    plain JAX. A window is with a bias only.

    Args:
      call: see there.
      run: the cuDNN form, a function of the list of segments or None, the arrays and the layouts.
      plain: the same in plain JAX, of the call, the arrays and the layouts.
      arrays: first q, key and value.
      flat: the layouts' arrays.
    """
    by_mask = functools.partial(run, None)
    q, key, value = arrays[:3]
    if not flat:
        return by_mask(*arrays)
    large = 2 * q.shape[0] * q.shape[1] * key.shape[1] > MAX_BIAS and not call.asked
    forms: list[Callable[..., tuple[Array, ...]]] = [functools.partial(plain, call) if large else by_mask]
    layouts = _layouts(flat)
    if len(layouts) > 1 or call.window is not None:
        return forms[0](*arrays, *flat)
    forms.append(lambda *x: by_mask(*x[: -len(flat)]))
    which = jnp.where(ragged_rows.whole(layouts[0]), 1, 0)
    if M := _listed(q, key, value):
        found = ragged_rows.segments(layouts[0], M)
        forms.append(functools.partial(run, found))
        which = jnp.where((which == 0) & found.fit, 2, which)
    alike = lambda form: lambda *x: tuple(vary_alike(*form(*x), q)[:-1])  # noqa: E731
    return lax.switch(which, [alike(form) for form in forms], *arrays, *flat)


def _listed(q: Array, key: Array, value: Array) -> int:
    """How many segments of each packed row may go to cuDNN as a list; 0: none."""
    capability, size = _host()[0], max(key.shape[-1], value.shape[-1])
    if capability is not None and capability < 9:
        return 0
    B, T, H, _ = q.shape
    return ragged_rows.num_segments(B, T, H * size)


def _places(found: ragged_rows.Segments, arrays: tuple[Array, ...]) -> list[Array]:
    """The kernels' other arguments where a list says which tokens see each other."""
    q, key, _ = arrays
    absent = jnp.zeros(0, q.dtype)
    first = [found.first * (x.shape[2] * x.shape[3]) for x in (q, key)]  # counted in numbers
    return [absent, found.length, found.length, *first, absent, absent]


def _sized(q: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """With heads of one size, a multiple of 8, zeros filling the smaller; those of `LATENT` as they are."""
    version = _host()[1]
    if (key.shape[-1], value.shape[-1]) == LATENT and (version is None or version >= LATENT_VERSION):
        return q, key, value
    return one_size(q, key, value, unit=8)


def _rest(call: Call, q: Array, flat: tuple[Array, ...]) -> list[Array]:
    """The kernels' other arguments: a bias that hides pairs, and absent ones."""
    absent = jnp.zeros(0, q.dtype)
    if not flat:
        return [absent] * 7
    layouts = _layouts(flat)
    # What cuDNN's own Python interface takes; far below any logit, and sums with one are finite.
    hidden = -(2.0**41) if q.dtype == jnp.bfloat16 else -(2.0**15)
    seen = _seen(layouts[0], layouts[-1], call.window)
    return [jnp.where(seen, 0, hidden).astype(q.dtype), *[absent] * 6]


def _seen(queries: Layout, keys: Layout, window: int | None) -> Bool[Array, "B 1 T S"]:
    """`causal_mask` in which padding sees padding: what cuDNN makes of nothing seen is not defined."""
    queries, keys = (Layout(x.run + 1, x.position) for x in (queries, keys))
    return causal_mask(queries, keys, window)


def _options(call: Call, flat: tuple[Array, ...], *, listed: bool = False) -> dict[str, Any]:
    """The kernels' static arguments. Their own causal mask skips what lies behind a token of the same row."""
    mask = _masks.PADDING_CAUSAL if listed else _masks.CAUSAL if len(flat) <= 2 else _masks.NO_MASK
    window = call.window if not flat else None  # cuDNN takes no bias beside it
    return dict(
        scale=call.scale,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(bool(flat), False),  # whether there is a bias, and whether its gradient is wanted
        mask_type=mask,
        layout=0,  # [B, T, H, K]
        sliding_window_length=window,
        **_later,
    )


def _plain(call: Call, q, key, value, *flat) -> Array:
    """The call in plain JAX."""
    layouts = _layouts(flat) or (layout_of(q.shape[0], q.shape[1], None, None),)
    both: Callable[..., tuple[Array, Array]] = lambda key, value: (key, value)  # noqa: E731

    def dense(q, key, value, mask):
        q, key, wide = one_size(q, key, value)
        return jax.nn.dot_product_attention(q, key, wide, mask=mask, scale=call.scale)[..., : value.shape[-1]]

    source = Source((key, value), layouts[-1])
    return attend(q, layouts[0], [source], both, dense, window=call.window, scale=call.scale)


def _forward_plain(call: Call, q, key, value, *flat) -> tuple[Array, Array]:
    B, T, H, _ = q.shape
    return _plain(call, q, key, value, *flat), jnp.zeros((B, H, T), jnp.float32)


def _backward_plain(call: Call, q, key, value, o, lse, do, *flat) -> tuple[Array, ...]:
    return jax.vjp(lambda *x: _plain(call, *x, *flat), q, key, value)[1](do)


@functools.cache
def _host() -> tuple[float | None, int | None]:
    """Compute capability of the GPUs here and cuDNN's version, None where there is none."""
    try:
        gpu = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None, None
    try:
        version = _jax_cudnn.check_cudnn_version()
    except RuntimeError:
        version = None
    return float(getattr(gpu, "compute_capability", "9.0")), version


def _missing(ctx: mlir.LoweringRuleContext, key: Any, value: Any) -> str | None:
    """Why cuDNN cannot run a call that is lowered here, or None: it may be lowered for another host."""
    where: Any = ctx.module_context.axis_context
    manual = getattr(where, "manual_axes", None)
    whole = where.num_devices == 1 if manual is None else set(manual) == set(where.mesh.axis_names)
    if not whole:
        return "XLA cannot split it over devices: call it inside jax.shard_map or layers.shard_ops"
    capability, version = _host()
    if capability is None:
        return None
    if version is None:
        return "cuDNN is not installed"
    if capability < 8 or (capability == 10.3 and version < 91100):
        return f"cuDNN {version} has none for compute capability {capability}"
    sizes = key.shape[-1], value.shape[-1]
    if max(sizes) <= 128 or (capability >= 9 and sizes == LATENT and version >= LATENT_VERSION):
        return None
    return None if 9 <= capability < 10 else f"heads of {sizes} channels need a Hopper GPU, not {capability}"


def _lower(cudnn: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def rule(ctx, *arrays, call: Call):
        reason = _missing(ctx, *ctx.avals_in[1:3])
        if reason is not None and call.asked:
            raise NotImplementedError(f"implementation='cudnn': {reason}")
        form = cudnn if reason is None else plain
        return mlir.lower_fun(functools.partial(form, call), multiple_results=True)(ctx, *arrays)

    return rule


def _lower_elsewhere(ctx, *arrays, call: Call):
    platforms = ", ".join(ctx.module_context.platforms)
    raise NotImplementedError(f"implementation='cudnn' is for cuda; this program is lowered for {platforms}")


def _primitive(name: str, outputs: Callable[..., list[Any]], cudnn, plain) -> Primitive:
    made = Primitive(f"deltajax_cudnn_attention_{name}")
    made.multiple_results = True

    def batch(arrays, dims, *, call):  # a mapped axis joins the rows
        n = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
        arrays = [
            jnp.broadcast_to(x, (n, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
            for x, d in zip(arrays, dims, strict=True)
        ]
        found = made.bind(*(x.reshape(-1, *x.shape[2:]) for x in arrays), call=call)
        return [x.reshape(n, -1, *x.shape[1:]) for x in found], [0] * len(found)

    made.def_abstract_eval(outputs)
    batching.primitive_batchers[made] = batch
    mlir.register_lowering(made, _lower_elsewhere)
    mlir.register_lowering(made, _lower(cudnn, plain), platform="cuda")
    return made


def _alike(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of an array that varies over the mesh axes that one of type x varies over."""
    return x.update(shape=shape, dtype=dtype, weak_type=False, sharding=NamedSharding(x.sharding.mesh, P()))


def _forward_types(q, key, value, *flat, call: Call):
    B, T, H, _ = q.shape
    return [_alike(q, (B, T, H, value.shape[-1]), q.dtype), _alike(q, (B, H, T), jnp.dtype(jnp.float32))]


def _backward_types(q, key, value, *rest, call: Call):
    return [_alike(x, x.shape, x.dtype) for x in (q, key, value)]


_forward = _primitive("forward", _forward_types, _forward_cudnn, _forward_plain)
_backward = _primitive("backward", _backward_types, _backward_cudnn, _backward_plain)
