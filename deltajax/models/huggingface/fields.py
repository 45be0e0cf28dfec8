"""Fields of a `config.json`: read by their several names, refused where we may not compute, written alike."""

from collections.abc import Mapping
from typing import Any, NoReturn

from deltajax.models.config import ModelConfig


class Fields:
    """A config's fields, read with the names that versions gave them."""

    def __init__(self, fields: Mapping[str, Any], where: str = ""):
        self._fields, self._where = fields, where

    def get(self, *names: str, default: Any = None) -> Any:
        """The first that is there and not null."""
        for name in names:
            if self._fields.get(name) is not None:
                return self._fields[name]
        return default

    def given(self, name: str, default: Any) -> Any:
        """A field where null has a meaning of its own; the default is for one that is not there."""
        return self._fields.get(name, default)

    def within(self, name: str) -> "Fields":
        """The fields of an object among these, none where it is not there."""
        value = self.get(name, default={})
        if not isinstance(value, Mapping):
            self.fail(name, value, "an object")
        return Fields(value, f"{self._where}{name}.")

    def need(self, *names: str) -> Any:
        """The first that is there, of which one must be."""
        value = self.get(*names)
        if value is None:
            raise ValueError(f"config.json: no field {self._where}{' or '.join(names)}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a field that has none of these values, the first being its default."""
        value = self.get(name, default=allowed[0])
        if value not in allowed:
            self.fail(name, value, " or ".join(map(repr, allowed)))

    def fail(self, name: str, value: Any, expected: str) -> NoReturn:
        """Refuses a field's value."""
        raise ValueError(f"config.json: {self._where}{name}={value!r}: expected {expected}")


def whole(c: Fields, name: str, size: float) -> int:
    """A size that a field gives, which must be a whole number."""
    if round(size) < 1 or abs(size - round(size)) > 1e-6 * size:
        c.fail(name, c.get(name), "sizes that are whole numbers")
    return round(size)


def rotary(c: Fields) -> Fields:
    """The fields of the rotary embedding, which must not be scaled."""
    rope = c.within("rope_parameters")
    for name in ("rope_type", "type"):  # as older versions write
        rope.only(name, "default")
    return rope


def kinds_of(c: Fields, types: list[str], linear: str, full: str) -> tuple[str, ...]:
    """Our layer pattern, of their types of layers."""
    kinds = {"linear_attention": linear, "full_attention": full}
    if linear == "kda":
        kinds["kda_attention"] = linear  # as newer versions write
    if len(types) != c.need("num_hidden_layers") or not set(types) <= set(kinds):
        c.fail("layer_types", types, f"one of {', '.join(kinds)} for each of the layers")
    return shortest([kinds[t] for t in types])


def leading(c: Fields, name: str, kind: str, default: int) -> int:
    """How many first layers are of a kind that no later one is."""
    if (types := c.get(name)) is None:
        return default
    count = types.count(kind)
    if types[:count] != [kind] * count:
        c.fail(name, types, f"{kind} layers before all others")
    return count


def shortest(pattern: list[str]) -> tuple[str, ...]:
    """The shortest unit whose repetition is the pattern."""
    n = len(pattern)
    size = next(s for s in range(1, n + 1) if all(pattern[i] == pattern[i % s] for i in range(n)))
    return tuple(pattern[:size])


def hybrid_fields(config: ModelConfig) -> dict[str, Any]:
    """Their fields of Gated DeltaNet and softmax attention in turns, from ours."""
    names = {"gated_delta_net": "linear_attention", "full_attention": "full_attention"}
    return dict(
        hidden_act="silu",
        layer_types=[names[kind] for kind in config.layers],
        linear_num_key_heads=config.num_heads,
        linear_num_value_heads=config.value_heads,
        linear_key_head_dim=config.head_dim,
        linear_value_head_dim=config.value_dim,
        linear_conv_kernel_dim=config.conv_size,
        num_attention_heads=config.attention_heads,
        num_key_value_heads=config.attention_kv_heads,
        attention_bias=False,
        rms_norm_eps=config.norm_eps,
    )
