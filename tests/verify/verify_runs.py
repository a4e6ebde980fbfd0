"""Runs of the doctor for tests, in the pool of ranks. A run is told in words: `nano --parallel.tp 2` is that example with that setting."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import ranks

from megagate.config.cli import parse
from megagate.config.run import RunConfig
from megagate.verify.diagnosis import Diagnosis
from megagate.verify.doctor import Order, examine_local, order

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@lru_cache
def config(words: str) -> RunConfig:
    """The run: one or more examples, joined by `+`, then settings."""
    names, *settings = words.split()
    files = [word for name in names.split("+") for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return parse([*files, *settings], prog="test")


def prepare(words: str, world: int, *, fault: str = "") -> Order:
    """What the ranks are told."""
    return order(config(words), world_size=world, gpu=False, fault=fault)


def diagnose(words: str, world: int, *, fault: str = "", examine: Callable[..., Any] = examine_local, args: Any = ()) -> Diagnosis:
    """What the first rank found; `examine(context, order, *args)` runs in every rank."""
    found, *others = ranks.run_ranks(examine, world, prepare(words, world, fault=fault), *args)
    assert others == [None] * (world - 1)
    return found


def wrong(found: Diagnosis) -> list[str]:
    """All rows and numbers that are not as they should be, by what they are about."""
    rows = [*found.gradients, *found.later, *found.outputs, found.initial, found.updates, *found.weights]
    return [row.what for row in rows if not row.ok] + [number.what for number in found.numbers if not number.ok]


def groups(found: Diagnosis, *, ok: bool) -> set[str]:
    """Groups of parameters whose gradients are right, or those whose are not."""
    return {row.what for row in found.gradients if row.ok == ok}
