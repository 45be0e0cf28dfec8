"""Packed rows as lists of segments: places and lengths, and when a list will not do."""

import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.layers import ragged_rows
from deltajax.layers.layout import layout_of

IDS = jnp.array([[0, 1, 1, 0, 3, 1, 1, 1], [2, 2, 2, 2, 2, 2, 2, 2], [5, 5, 4, 0, 0, 4, 0, 0]])


def listed(rows, M):
    return ragged_rows.segments(layout_of(len(rows), rows.shape[1], rows, None), M)


def test_segments_of_all_rows_stand_one_after_the_other():
    found = listed(IDS[:2], 3)
    np.testing.assert_array_equal(found.length, [[2, 1, 3], [8, 0, 0]])
    np.testing.assert_array_equal(found.first, [[1, 4, 5, 8], [16, 16, 16, 16]])
    np.testing.assert_array_equal(found.own[0], [6, 0, 0, 6, 1, 2, 2, 2])
    assert found.fit


@pytest.mark.parametrize(
    ("rows", "M", "fit"),
    [
        (IDS[:2], 2, True),
        (IDS[:1], 2, False),  # three segments
        (IDS[2:], 4, False),  # one in two pieces
        (IDS[2:, :4], 4, True),
        (jnp.zeros((1, 8), jnp.int32), 2, True),
    ],
)
def test_a_list_fits_where_it_holds_all_segments_each_in_one_piece(rows, M, fit):
    found = listed(rows, M)
    assert bool(found.fit) == fit
    assert int(found.length.sum()) <= int((rows != 0).sum())


def test_sums_go_to_their_segments_and_back():
    layout = layout_of(2, 8, IDS[:2], None)
    found = ragged_rows.segments(layout, 3)
    sums = jnp.arange(1.0, 1 + 2 * 3 * 8).reshape(2, 3, 8)
    there = ragged_rows.by_segment(sums, layout, found.own, 3)
    np.testing.assert_array_equal(there[2, :, :4], np.pad(sums[0, :, 5:], ((0, 0), (0, 1))))
    np.testing.assert_array_equal(
        ragged_rows.by_token(there, layout, found.own), jnp.where(IDS[:2, None] != 0, sums, 0)
    )


def test_lists_have_as_many_segments_as_their_sums_leave_room_for():
    assert ragged_rows.num_segments(2, 8192, 2048) == 32  # 4 GiB of sums
    assert ragged_rows.num_segments(1, 1024, 2048) == 64
    assert ragged_rows.num_segments(1, 2**15, 2048) == 16
    assert ragged_rows.num_segments(128, 256, 512) == 0  # no segments to speak of
    assert ragged_rows.num_segments(1, 2**20, 2048) == 0
    assert ragged_rows.num_segments(4, 2**17, 2**13) == 0  # numbers past int32


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ([1, 1, 1, 1], True),
        ([7, 7, 0, 0], True),
        ([0, 0, 0, 0], True),
        ([0, 1, 1, 1], False),
        ([1, 0, 1, 1], False),
        ([1, 1, 2, 2], False),
    ],
)
def test_a_whole_row_is_one_segment_with_padding_behind(row, whole):
    rows = jnp.array([[1, 1, 1, 1], row])
    assert bool(ragged_rows.whole(layout_of(2, 4, rows, None))) == whole
