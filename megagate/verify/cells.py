"""What the doctor of kernels finds: errors beside their bands."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from megagate.verify.bands import Band

Level = Literal["product", "part", "model"]
LEVELS: tuple[Level, ...] = ("product", "part", "model")
QUANTITIES = ("output", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Cell:
    """One quantity of one product, part or parameter, where it fits its band least well.

    Args:
        error: Length of the difference, relative to the reference's length.
        low: The band of it.
        high: And its upper edge.
        where: Weight, expert and rank.
    """

    error: float
    low: float
    high: float
    where: str = ""

    @property
    def excess(self) -> float:
        """Above 1 outside of the band."""
        if not all(map(math.isfinite, (self.error, self.low, self.high))):
            return math.inf  # not NaN, which no comparison would show
        above = self.error / self.high if self.high else math.inf if self.error else 0.0
        below = self.low / self.error if self.error else math.inf if self.low else 0.0
        return max(above, below)

    @property
    def ok(self) -> bool:
        """Whether it lies in the band."""
        return self.excess <= 1.0

    @property
    def text(self) -> str:
        """What is wrong with it."""
        return f"differs by {self.error:.1e}, expected {self.low:.1e} to {self.high:.1e} ({self.where})"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        level: What was fed the reference's numbers.
        name: In the model.
        fp8: Of a product, whether it has to be in FP8.
        cells: By quantity; without those that it has not.
    """

    level: Level
    name: str
    fp8: bool
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all cells are."""
        return all(cell.ok for cell in self.cells.values())


@dataclass(frozen=True)
class RecipeFindings:
    """All rows of a recipe.

    Args:
        recipe: Its name, or `bf16`.
        rows: Products, parts, model.
        loss: Of the whole model, and the reference's.
    """

    recipe: str
    rows: list[Row]
    loss: tuple[float, float]


@dataclass(frozen=True)
class PrecisionFindings:
    """What was found.

    Args:
        recipes: In the order they were asked for.
        causes: What is wrong, worst first; of a recipe the products, and parts and the model only where all products are right.
    """

    recipes: list[RecipeFindings]
    causes: list[str]


@dataclass(frozen=True)
class Sums:
    """Squares of one tensor on one rank."""

    level: Level
    name: str
    fp8: bool
    quantity: str
    where: str
    difference: float
    reference: float
    band: Band


def sums_of(level: Level, name: str, fp8: bool, quantity: str, detail: str, ours: Tensor, wanted: Tensor, band: Band) -> Sums:
    """Of one tensor and the reference's."""
    return Sums(level, name, fp8, quantity, detail, distance(ours, wanted), square(wanted), band)


def distance(ours: Tensor, wanted: Tensor) -> float:
    """Squares of the difference."""
    return (ours.double() - wanted.double()).square().sum().item()


def square(x: Tensor) -> float:
    """Squares of all elements."""
    return x.double().square().sum().item()


def rows_of(ranks: Iterable[list[Sums]]) -> list[Row]:
    """One row for a name, with the worst cell of all its tensors on all ranks for each quantity."""
    rows: dict[tuple[str, str, bool], Row] = {}
    for rank, sums in enumerate(ranks):
        for one in sums:
            row = rows.setdefault((one.level, one.name, one.fp8), Row(one.level, one.name, one.fp8))
            cell = _cell(one, rank)
            if one.quantity not in row.cells or cell.excess > row.cells[one.quantity].excess:
                row.cells[one.quantity] = cell
    return list(rows.values())


def _cell(one: Sums, rank: int) -> Cell:
    where = f"{one.where} on rank {rank}".strip()
    if one.reference == 0.0:  # an expert without rows, or no gradient at all
        return Cell(0.0 if one.difference == 0.0 else math.inf, 0.0, 0.0, where)
    error, low, high = (math.sqrt(square / one.reference) for square in (one.difference, one.band.low, one.band.high))
    return Cell(error, low, high, where)


def causes_of(found: RecipeFindings) -> list[str]:
    """Products explain parts, and parts the model."""
    for level in LEVELS:
        rows = [row for row in found.rows if row.level == level]
        wrong = [(cell, row.name, quantity) for row in rows for quantity, cell in row.cells.items() if not cell.ok]
        if wrong:
            wrong.sort(key=lambda one: -one[0].excess)
            return [f"{found.recipe}: {name}: {quantity} {cell.text}" for cell, name, quantity in wrong]
    return []
