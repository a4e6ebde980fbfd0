"""Few cases that hold every pair of values, of all combinations."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def pairs_of(row: Mapping[str, Hashable]) -> set[tuple[tuple[str, Hashable], ...]]:
    """Every two of a row's (name, value)."""
    return set(combinations(row.items(), 2))


def every_row(values: Mapping[str, Sequence[Any]]) -> list[Row]:
    """All combinations, in the order of the values."""
    return [dict(zip(values, row, strict=True)) for row in product(*values.values())]


def pairwise(values: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Greedy and always the same: the combination that holds most of the pairs that are still missing, until none is."""
    rows = every_row(values)
    missing = set().union(*map(pairs_of, rows))
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen
