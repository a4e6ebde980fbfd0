"""Keyed orders: bijective, the same everywhere, and random enough."""

from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagate.data.hashing import IntArray, WordArray, mix64, stable_key
from megagate.data.permutation import MATERIALISED_LIMIT, Feistel, KeyedPermutation

LARGE = MATERIALISED_LIMIT + 1


def network(n: int, key: int, *, rounds: int = 8) -> Feistel:
    return Feistel(n, key, rounds=rounds)


def is_bijection(order: IntArray | WordArray) -> bool:
    """Whether each of 0, ..., size - 1 comes once."""
    seen = np.zeros(order.size, dtype=bool)
    if order.min() < 0 or order.max() >= order.size:
        return False
    seen[order] = True
    return bool(seen.all())


def test_every_small_order_is_a_bijection() -> None:
    for n in range(1, 2_049):
        places = np.arange(n)
        assert all(is_bijection(KeyedPermutation(n, key).lookup(places)) for key in (0, n)), n


def test_every_small_network_is_a_bijection() -> None:
    """As large ones, which never see a table: the network of all a x b, each number of rounds, and cycle walking to each n."""
    for n in range(1, 1_100):
        one = network(n, n)
        assert n <= one.size < n + n**0.5 + 1
        assert is_bijection(one.encrypt(np.arange(one.size, dtype=np.uint64))), n
        assert is_bijection(one.lookup(np.arange(n, dtype=np.uint64))), n
    for rounds in range(1, 12):
        assert all(is_bijection(network(n, 5, rounds=rounds).lookup(np.arange(n, dtype=np.uint64))) for n in (7, 90, 91, 1_000))


@pytest.mark.parametrize("n", [*range(LARGE - 3, LARGE + 4), 10**6 - 1, 10**6, 10**6 + 1, 1_036_231])
def test_every_thing_comes_once(n: int) -> None:
    for key in (1, 2**64 - 1) if n < 10**6 else (3,):
        assert is_bijection(KeyedPermutation(n, key).lookup(np.arange(n)))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 3_000) | st.integers(LARGE, 200_000), key=st.integers(0, 2**64 - 1))
def test_every_thing_comes_once_whatever_the_key(n: int, key: int) -> None:
    assert is_bijection(KeyedPermutation(n, key).lookup(np.arange(n)))


@pytest.mark.parametrize("n", [10**9 + 7, 2_700_000_000, 10**13 - 1, 10**13, 2**62])
def test_huge_orders_have_no_collision_and_stay_inside(n: int) -> None:
    block = 250_000
    starts = (0, n // 3, 2**31 % n, n - block)
    order = np.sort(np.concatenate([KeyedPermutation(n, 1).lookup(start + np.arange(block)) for start in starts]))
    assert (np.diff(order) > 0).all(), "the same thing at two positions"
    assert 0 <= order[0] and order[-1] < n
    assert order[0] < n / 10_000 and order[-1] > n - n / 10_000, "blocks are spread over all"


@settings(max_examples=40, deadline=None)
@given(n=st.integers(LARGE, 10**13) | st.integers(2**61, 2**62), start=st.integers(0, 2**64 - 1), key=st.integers(0, 2**64 - 1))
def test_huge_orders_of_any_size(n: int, start: int, key: int) -> None:
    positions = (start % n + np.arange(4_000)) % n
    order = KeyedPermutation(n, key).lookup(positions)
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


def figures(order: IntArray) -> tuple[list[float], int, int]:
    """Lag-1 correlation, 64 x 64 cells and runs, each with mean 0 and deviation 1 for a fair shuffle; fixed points, of which it has 1, and
    neighbours that stay neighbours, 2."""
    n, places, steps = order.size, np.arange(order.size), np.diff(order)
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1] * n**0.5
    cells = np.bincount(places * 64 // n * 64 + order * 64 // n, minlength=64**2)
    expected = n / 64**2
    chi2 = (((cells - expected) ** 2 / expected).sum() - 63**2) / (2 * 63**2) ** 0.5
    runs = np.count_nonzero((steps[1:] > 0) != (steps[:-1] > 0)) + 1
    runs_z = (runs - (2 * n - 1) / 3) / ((16 * n - 29) / 90) ** 0.5
    return [correlation, chi2, runs_z], np.count_nonzero(order == places), np.count_nonzero(np.abs(steps) == 1)


def looks_random(orders: list[IntArray]) -> dict[str, bool]:
    """Whether what is said of a fair shuffle holds; over so many keys that chance alone crosses no limit (4 deviations)."""
    found = [figures(order) for order in orders]
    rms = np.sqrt(np.mean(np.square([one for one, _, _ in found]), axis=0))
    fixed, neighbours = (sum(one[index] for one in found) for index in (1, 2))
    count = len(orders)
    names = ("correlation", "cells", "runs")
    held = {name: bool(value < 1 + 4 / (2 * count) ** 0.5) for name, value in zip(names, rms, strict=True)}
    return held | {"fixed": abs(fixed - count) < 4 * count**0.5, "neighbours": abs(neighbours - 2 * count) < 4 * (2 * count) ** 0.5}


@pytest.mark.parametrize("n", [50_000, LARGE, 103_623])
def test_orders_look_random(n: int) -> None:
    held = looks_random([KeyedPermutation(n, key).lookup(np.arange(n)) for key in range(48)])
    assert all(held.values()), held


@pytest.mark.parametrize("n", [10**9 + 7, 10**13])
def test_parts_of_huge_orders_look_random(n: int) -> None:
    """The ranks of the things in a part of a fair shuffle are a fair shuffle themselves."""
    parts = [KeyedPermutation(n, key).lookup(key * (n // 60) + np.arange(20_000)) for key in range(48)]
    held = looks_random([np.argsort(np.argsort(part)) for part in parts])
    assert all(held.values()), held


@pytest.mark.parametrize(("rounds", "failed"), [(2, {"correlation", "cells", "runs", "neighbours"}), (3, {"neighbours"}), (8, set())])
def test_fewer_rounds_would_be_found(rounds: int, failed: set[str]) -> None:
    n = 20_011
    orders = [network(n, key, rounds=rounds).lookup(np.arange(n, dtype=np.uint64)).astype(np.int64) for key in range(160)]
    held = looks_random(orders)
    assert {name for name in held if not held[name]} == failed


@pytest.mark.parametrize(("things", "keys"), [(2, 4_000), (3, 6_000), (5, 12_000)])
def test_all_orders_of_a_few_things_are_equally_likely(things: int, keys: int) -> None:
    counts = Counter(tuple(KeyedPermutation(things, key).lookup(np.arange(things)).tolist()) for key in range(keys))
    orders = factorial(things)
    assert len(counts) == orders
    chi2 = sum((count - keys / orders) ** 2 / (keys / orders) for count in counts.values())
    assert (chi2 - (orders - 1)) / (2 * (orders - 1)) ** 0.5 < 4


def test_positions_outside_are_refused() -> None:
    for n in (10, LARGE):
        for position in (-1, n):
            with pytest.raises(IndexError):
                KeyedPermutation(n, 0)[position]
    with pytest.raises(ValueError, match="n must be in"):
        KeyedPermutation(0, 0)


@pytest.mark.parametrize("n", [65_537, 1_000_003, 2_700_000_000, 10**13, 1 << 62])
def test_a_few_lookups_are_those_of_a_block(n: int) -> None:
    order = KeyedPermutation(n, key=7)
    positions = np.unique(np.concatenate([np.arange(40), n - 1 - np.arange(40), np.random.default_rng(1).integers(0, n, size=400)]))
    block = order.lookup(positions)
    assert [order[position] for position in positions.tolist()] == block.tolist()
    for size in (0, 1, 2, 5, 6, 7, 8):
        assert order.lookup(positions[:size]).tolist() == block[:size].tolist()
    assert order.lookup(positions[:6].reshape(2, 3)).tolist() == block[:6].reshape(2, 3).tolist()
    for wrong in (-1, n):
        with pytest.raises(IndexError, match=f"positions 0 to {n} of" if wrong == n else "positions -1 to 0 of"):
            order.lookup(np.array([0, wrong]))


def test_cycle_walking_is_the_same_one_by_one() -> None:
    order = KeyedPermutation(66_050, key=3)  # 258 x 257 cells: 256 of them are beyond
    things = [order[position] for position in range(66_050)]
    assert things == order.lookup(np.arange(66_050)).tolist()
    assert sorted(things) == list(range(66_050))
