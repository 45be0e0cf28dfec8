from hypothesis import given
from hypothesis import strategies as st

from deltajax.models import get_preset
from deltajax.models.groups import group_layers


def spelled(groups):
    return tuple(kind for g in groups for kind in g.unit * g.repeats)


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=24))
def test_groups_spell_the_layers_in_order(layers):
    groups = group_layers(layers)
    assert spelled(groups) == tuple(layers)
    assert [g.start for g in groups] == [len(spelled(groups[:i])) for i in range(len(groups))]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), st.integers(1, 6))
def test_a_repeated_unit_is_traced_at_most_once(unit, repeats):
    groups = group_layers(unit * repeats)
    assert sum(len(g.unit) for g in groups) <= len(unit)


def test_the_published_hybrids_are_few_groups():
    def units(name):
        return [(len(g.unit), g.repeats) for g in group_layers(get_preset(name).blocks)]

    assert units("delta_net_1p3b") == [(1, 24)]
    assert units("delta_net_swa_1p3b") == [(2, 12)]
    assert units("gated_delta_net_h1_1p3b") == [(1, 1), (2, 10)]
    assert units("delta_net_global_1p3b") == [(2, 1), (1, 10), (1, 1), (1, 11)]
    # The first layer has no experts: K | K K M K x 6 | K M.
    assert units("kimi_linear_48b_a3b") == [(1, 1), (4, 6), (2, 1)]
    assert units("qwen3_next_80b_a3b") == [(4, 12)]
