"""Keyed orders: bijective, the same everywhere, and random enough."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagate.data.hashing import mix64, stable_key
from megagate.data.permutation import MATERIALISED_LIMIT, KeyedPermutation

LARGE = MATERIALISED_LIMIT + 1


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3_000) | st.integers(LARGE - 3, LARGE + 3) | st.integers(LARGE, 200_000), key=st.integers(0, 2**64 - 1))
def test_every_thing_comes_once(n: int, key: int) -> None:
    order = KeyedPermutation(n, key).lookup(np.arange(n))
    assert np.array_equal(np.bincount(order, minlength=n), np.ones(n))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(LARGE, 10**13) | st.integers(2**61, 2**62), start=st.integers(0, 2**64 - 1))
def test_huge_orders_have_no_collision_and_stay_inside(n: int, start: int) -> None:
    positions = (start % n + np.arange(4_000)) % n
    order = KeyedPermutation(n, 1).lookup(positions)
    assert np.unique(order).size == np.unique(positions).size
    assert 0 <= order.min() and order.max() < n


@pytest.mark.parametrize("n", [1, 1_000, LARGE, 10**12])
def test_one_block_and_any_shape_agree(n: int) -> None:
    permutation = KeyedPermutation(n, 7)
    positions = np.arange(min(n, 24))
    order = permutation.lookup(positions)
    assert [permutation[int(p)] for p in positions] == order.tolist()
    if n >= 24:
        assert np.array_equal(permutation.lookup(positions.reshape(2, 3, 4)), order.reshape(2, 3, 4))
    assert len(permutation) == n


def test_the_order_never_changes() -> None:
    # A resumed run must meet the samples that it has not seen: these values may change only with PERMUTATION_VERSION.
    assert stable_key("order", 1, 2) == 8450733596631107022
    assert KeyedPermutation(10, 3).lookup(np.arange(10)).tolist() == [4, 8, 6, 1, 0, 3, 5, 7, 2, 9]
    assert KeyedPermutation(10**12, 3).lookup(np.arange(4)).tolist() == [836400818502, 307698169632, 71323821082, 870398492351]


def test_keys_keep_types_and_borders_apart() -> None:
    parts: list[tuple[str | int, ...]] = [("a", "b"), ("ab",), ("b", "a"), (1,), ("1",), ("1", 2), (12,)]
    keys = [stable_key(*part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)


def test_mixing_is_a_bijection_of_words() -> None:
    # The values of splitmix64 started at 0, from the published generator.
    increments = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(word) for word in mix64(increments)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize("n", [50_000, 103_623])
def test_orders_look_random(n: int) -> None:
    figures = []
    for key in range(16):
        order = KeyedPermutation(n, key).lookup(np.arange(n))
        correlation = np.corrcoef(order[:-1], order[1:])[0, 1] * n**0.5
        cells = np.histogram2d(np.arange(n), order, bins=32)[0]
        expected = n / 32**2
        chi2 = (((cells - expected) ** 2 / expected).sum() - 31**2) / (2 * 31**2) ** 0.5
        runs = np.count_nonzero(np.diff(np.sign(np.diff(order)))) + 1
        runs_z = (runs - (2 * n - 1) / 3) / ((16 * n - 29) / 90) ** 0.5
        figures.append((correlation, chi2, runs_z))
        assert np.count_nonzero(order == np.arange(n)) <= 8  # expected 1
        assert np.count_nonzero(np.abs(np.diff(order)) == 1) <= 12  # expected 2
    # Each figure has mean 0 and deviation 1 for a fair shuffle; two Feistel rounds give 20 and more.
    assert (np.sqrt(np.mean(np.square(figures), axis=0)) < 1.6).all()


def test_all_orders_of_a_few_things_are_equally_likely() -> None:
    counts = Counter(tuple(KeyedPermutation(4, key).lookup(np.arange(4))) for key in range(4_800))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 50  # chi2 of 23 degrees: 49.7 at 0.1 %


def test_positions_outside_are_refused() -> None:
    for n in (10, LARGE):
        for position in (-1, n):
            with pytest.raises(IndexError):
                KeyedPermutation(n, 0)[position]
    with pytest.raises(ValueError, match="n must be in"):
        KeyedPermutation(0, 0)
