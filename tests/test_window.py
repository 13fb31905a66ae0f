"""Windows: the geometry, held to brute force over addresses and to numpy's own views."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardtool import window as module
from shardtool.errors import UnsupportedTransform
from shardtool.window import Window, aligned, flat, join, row_major, simplify, tiles, union, without
from tests.strategies import View, addresses, shapes, views, windows

# A window beside numpy's view.


@given(views())
def test_a_chain_of_views_looks_at_the_elements_that_numpy_looks_at(view: View):
    assert np.array_equal(addresses(view.window), view.array)
    assert view.window.size == view.array.size


@given(views())
def test_the_bounds_are_the_first_address_and_one_past_the_last(view: View):
    found = addresses(view.window).reshape(-1)
    assert view.window.bounds == ((found.min(), found.max() + 1) if found.size else (view.window.offset,) * 2)


@given(views())
def test_contiguous_means_that_the_elements_follow_each_other(view: View):
    lo, hi = view.window.bounds
    assert view.window.contiguous == np.array_equal(addresses(view.window).reshape(-1), np.arange(lo, hi))


@given(views(), st.data())
def test_a_reshape_is_numpys_or_is_refused_where_numpy_would_copy(view: View, data: st.DataObject):
    divisor = data.draw(st.sampled_from([n for n in range(1, view.array.size + 1) if view.array.size % n == 0]))
    shape = (divisor, view.array.size // divisor)
    try:
        made = view.window.reshape(*shape)
    except UnsupportedTransform:
        assert not np.shares_memory(view.array, view.array.reshape(shape))
    else:
        assert np.array_equal(addresses(made), view.array.reshape(shape))


@pytest.mark.parametrize(
    ("start", "length", "step"), [(-1, 1, 1), (0, 6, 1), (5, 1, 1), (1, 3, 2), (0, 1, 0), (0, -1, 1)]
)
def test_indices_that_leave_a_dimension_are_refused(start: int, length: int, step: int):
    with pytest.raises(UnsupportedTransform, match="leave a dimension of 5"):
        row_major((5,)).narrow(0, start, length, step)


def test_a_reshape_to_another_number_of_elements_is_refused():
    with pytest.raises(UnsupportedTransform, match="cannot become"):
        row_major((4, 3)).reshape(5, 2)


def test_an_empty_window_may_take_any_empty_shape():
    empty = row_major((4, 3)).narrow(0, 4, 0)
    assert (empty.size, empty.contiguous, empty.reshape(0).shape, empty.bounds) == (0, True, (0,), (0, 0))


# Pairs.


@given(windows(still=True), windows(still=True))
def test_simplify_keeps_the_pairs_and_their_order(a: Window, b: Window):
    b = Window(b.offset, a.shape, (*b.strides, 0, 0, 0)[: len(a.shape)])
    c, d = simplify(a, b)
    assert np.array_equal(addresses(c).reshape(-1), addresses(a).reshape(-1))
    assert np.array_equal(addresses(d).reshape(-1), addresses(b).reshape(-1))
    assert 1 not in c.shape
    assert c.shape == d.shape


def met(k1: Window, v1: Window, k2: Window, v2: Window) -> Counter[tuple[int, int]]:
    """What ``join`` should say, address by address."""
    found: Counter[tuple[int, int]] = Counter()
    theirs = list(zip(addresses(k2).flat, addresses(v2).flat, strict=True))
    for address, at in zip(addresses(k1).flat, addresses(v1).flat, strict=True):
        found.update((int(at), int(to)) for other, to in theirs if other == address)
    return found


def joined(*pairs: Window) -> Counter[tuple[int, int]]:
    """What it says."""
    return Counter(
        (int(at), int(to)) for a, b in join(*pairs) for at, to in zip(addresses(a).flat, addresses(b).flat, strict=True)
    )


@given(windows(still=True), windows())
def test_any_two_windows_meet_where_their_addresses_do(k1: Window, k2: Window):
    """Broadcast and entangled strides included; only a window that may meet itself is refused."""
    pairs = k1, row_major(k1.shape, 1000), k2, row_major(k2.shape, 5000)
    try:
        found = joined(*pairs)
    except UnsupportedTransform:
        assert crowded(k1) or crowded(k2)
    else:
        assert found == met(*pairs)


@given(st.data())
def test_two_views_of_one_tensor_meet_without_refusal(data: st.DataObject):
    shape = data.draw(shapes())
    k1, k2 = data.draw(views(shape)).window, data.draw(views(shape)).window
    v1, v2 = row_major(k1.shape), row_major(k2.shape)
    assert joined(k1, v1, k2, v2) == met(k1, v1, k2, v2)


@given(shapes(dims=3), st.data())
def test_a_tile_that_straddles_rows_meets_a_view_in_its_own_elements(shape: tuple[int, ...], data: st.DataObject):
    view = data.draw(views(shape)).window
    start = data.draw(st.integers(0, max(0, math.prod(shape) - 1)))
    band = flat(start, data.draw(st.integers(0, math.prod(shape) - start)))
    assert joined(view, row_major(view.shape), band, band) == met(view, row_major(view.shape), band, band)


def test_a_join_of_regular_windows_is_a_few_pairs_and_not_one_per_row():
    """The partition that a rank's columns make of a band of rows: one pair, whatever the size."""
    columns = row_major((8192, 8192)).narrow(1, 1024, 1024)
    assert len(join(columns, row_major((8192, 1024)), flat(0, 4096 * 8192), flat(0, 4096 * 8192))) == 1
    other = row_major((8192, 8192)).narrow(1, 0, 2048)
    assert len(join(columns, row_major((8192, 1024)), other, row_major((8192, 2048)))) == 1


def test_windows_whose_strides_do_not_divide_are_refused_rather_than_taken_apart_forever(monkeypatch):
    monkeypatch.setattr(module, "MAX_PEELED", 16)
    wide, odd = Window(0, (20, 3), (10, 1)), Window(0, (20, 3), (7, 1))
    with pytest.raises(UnsupportedTransform, match="do not fit together"):
        join(wide, row_major(wide.shape, 1), odd, row_major(odd.shape, 1))


# Unions.


# What one window has beside another.


def left(k1: Window, k2: Window) -> list[tuple[int, int]]:
    """Address by address: those of ``k1`` that ``k2`` does not have, with their places in ``k1``."""
    taken = set(addresses(k2).reshape(-1).tolist())
    return [(a, i) for i, a in enumerate(addresses(k1).reshape(-1).tolist()) if a not in taken]


@given(windows(), windows())
def test_a_window_without_another_has_the_addresses_that_the_other_has_not(k1: Window, k2: Window):
    try:
        found = without(k1, row_major(k1.shape), k2)
    except UnsupportedTransform:
        assert crowded(k1) or crowded(k2)
        return
    pairs = [p for a, b in found for p in zip(addresses(a).reshape(-1), addresses(b).reshape(-1), strict=True)]
    assert sorted(pairs) == sorted(left(k1, k2))


@given(st.data())
def test_a_view_without_another_of_the_same_tensor_is_never_refused(data: st.DataObject):
    shape = data.draw(shapes())
    k1, k2 = (data.draw(views(shape)).window for _ in range(2))
    found = without(k1, row_major(k1.shape), k2)
    pairs = [p for a, b in found for p in zip(addresses(a).reshape(-1), addresses(b).reshape(-1), strict=True)]
    assert sorted(pairs) == sorted(left(k1, k2))


def test_a_large_matrix_without_its_middle_is_four_windows():
    whole = row_major((10_000, 10_000))
    middle = whole.narrow(0, 100, 5_000).narrow(1, 7, 20)
    assert len(without(whole, whole, middle)) == 4


@given(st.lists(windows(still=True), max_size=4))
@example([flat(0, 3), flat(2, 3), flat(1, 5)])
def test_a_union_counts_each_address_once(found: list[Window]):
    """However many windows hold it. Only one that meets itself other than by standing still is refused."""
    try:
        together = union(found)
    except UnsupportedTransform:
        assert any(crowded(w) for w in found)
    else:
        assert together == len({int(address) for w in found for address in addresses(w).flat})


def test_a_union_of_many_windows_that_overlap_does_not_double_with_each():
    assert union(flat(k, 500) for k in range(5_000)) == 5_499
    rows = [row_major((64, 64)).narrow(0, k, 32).narrow(1, k, 32) for k in range(33)]
    assert union(rows) == len({int(address) for row in rows for address in addresses(row).flat})


def test_a_union_of_thousands_of_windows_apart_from_each_other_compares_none_of_them(monkeypatch):
    monkeypatch.setattr(module, "MAX_COMPARED", 0)
    assert union(flat(1000 * k, 1000) for k in range(5000)) == 5_000_000
    with pytest.raises(UnsupportedTransform, match="overlap in too many ways: more than 0 pairs"):
        union([flat(0, 3), flat(2, 3)])


def test_a_union_that_would_fall_into_too_many_pieces_is_refused(monkeypatch):
    combs = [Window(k, (100, 2), (20, 1)) for k in range(5)]
    assert union([*combs, flat(0, 1500)]) == len({int(a) for w in combs for a in addresses(w).flat} | {*range(1500)})
    monkeypatch.setattr(module, "MAX_COMPARED", 10)
    with pytest.raises(UnsupportedTransform, match="overlap in too many ways"):
        union([*combs, flat(0, 1500)])


def test_a_long_window_without_many_rows_that_do_not_divide_is_taken_apart_once(monkeypatch):
    """Each row is held against what is left beside it, not against all that is left."""
    rows = Window(5, (2_000, 2), (1003, 7))
    monkeypatch.setattr(module, "MAX_COMPARED", 10 * 2_000)
    found = without(flat(0, 1 << 30), flat(0, 1 << 30), rows)
    assert sum(kept.size for kept, _ in found) == (1 << 30) - rows.size
    assert len(found) < 3 * 2_000


def crowded(window: Window) -> bool:
    """Whether one row of a window begins before another ends, so that the window may meet itself."""
    moving = sorted((s, n) for s, n in zip(window.strides, window.shape, strict=True) if s and n > 1)
    extents = [1 + sum(s * (n - 1) for s, n in moving[:i]) for i in range(len(moving))]
    return any(s < extent for (s, _), extent in zip(moving, extents, strict=True))


@given(shapes(), st.data())
def test_the_union_of_views_of_one_tensor_is_never_refused(shape: tuple[int, ...], data: st.DataObject):
    found = data.draw(st.lists(views(shape), max_size=4))
    assert union(view.window for view in found) == len({int(n) for view in found for n in view.array.flat})


# Tiles.


@given(shapes(smallest=0), st.integers(0, 200))
def test_tiles_cover_a_tensor_exactly_and_in_order(shape: tuple[int, ...], most: int):
    at = 0
    for start, count in tiles(shape, most):
        assert start == at
        assert 0 < count <= max(1, most)
        at += count
    assert at == math.prod(shape)


@given(shapes(least=1), st.integers(1, 200))
def test_a_tile_is_as_many_whole_rows_as_fit(shape: tuple[int, ...], most: int):
    size = aligned(shape, most)
    inner = next(n for n in (math.prod(shape[dim + 1 :]) for dim in range(len(shape))) if n <= most)
    assert size % inner == 0
    assert size <= most < size + inner
