"""What a study knows of its runs, as statistics read it: the spec's few facts, and the entries of `study.json`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from megagate.errors import ConfigError, RunError

Fate = Literal["finished", "diverged", "missing"]
CONTROL = "half"
"""The variant that halves attention's output and learns no gate: without it an effect of initial scale is credited to the gate."""


_LARGEST = 1e100
"""Figures beyond it count as not finite: their squares are not."""


def _is_number(value: object, *, above: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf


def _is_whole(value: object, *, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_READABLE: Mapping[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "learning_rates": lambda value: isinstance(value, list) and all(_is_number(one, above=0) for one in value),
    "seeds": lambda value: isinstance(value, list) and all(_is_whole(one) for one in value),
    "steps": lambda value: _is_whole(value, least=1),
    "collapsed_above": lambda value: value is None or _is_number(value),
    "top_rungs": lambda value: _is_whole(value, least=1),
    "vocab_size": lambda value: _is_whole(value, least=2),
}
"""What `Facts.from_study` takes."""
_GROWING = {"learning_rates": "later_rates", "seeds": "later_seeds"}


@dataclass(frozen=True)
class Facts:
    """What statistics need of a spec.

    Args:
        name: Of the study.
        variants: The first is the baseline.
        learning_rates: Ascending.
        seeds: Of the pairs.
        steps: Of a run.
        collapsed_above: Held-out loss, nats, above which a finished run counts as collapsed; None for no bar.
        top_rungs: How many of the highest learning rates the interaction is about.
        vocab_size: Its logarithm caps losses.
        later_rates: Those of the learning rates that were added when runs had begun.
        later_seeds: And of the seeds.

    Raises:
        ConfigError: They do not make a study.
    """

    name: str
    variants: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    collapsed_above: float | None
    top_rungs: int
    vocab_size: int
    later_rates: tuple[float, ...] = ()
    later_seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("variants", "learning_rates", "seeds"):
            values = getattr(self, key)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{key} {list(values)} must be one or more, each once; mend the spec")
        if list(self.learning_rates) != sorted(self.learning_rates):
            raise ConfigError(f"learning_rates {list(self.learning_rates)} must ascend; sort them")
        if not 1 <= self.top_rungs < max(len(self.learning_rates), 2):
            raise ConfigError(
                f"top_rungs ({self.top_rungs}) must be at least 1 and leave one of the {len(self.learning_rates)} rungs below; "
                "lower it, or add rungs"
            )

    @staticmethod
    def from_study(study: Mapping[str, Any]) -> "Facts":
        """Of a `study.json`, whose `decides` holds what the spec says.

        Raises:
            RunError: Something is not there.
            ConfigError: See the class.
        """
        try:
            decides = study["decides"]
            variants = tuple(dict.fromkeys(key.split(".")[1] for key in decides if key.startswith("variants.")))
            baseline = decides["baseline"]
            told = {name: decides[name] for name in ("name", "learning_rates", "seeds", "steps", "collapsed_above", "top_rungs")}
            told["vocab_size"] = decides[f"variants.{baseline}.model.vocab_size"]
        except KeyError as error:
            raise RunError(f"study.json holds no {error.args[0]}, so nobody knows what its runs are; run the study again") from None
        for name, value in told.items():
            if not _READABLE[name](value):
                raise RunError(f"study.json: decides: {name} ({value!r}) is none of a study; run the study again")
        began = study.get("began_with", told)
        for name, later in _GROWING.items():
            if not (isinstance(began, Mapping) and _READABLE[name](began.get(name))):
                raise RunError(f"study.json: began_with ({began!r}) is none of a study; run the study again")
            told[name] = tuple(told[name])
            told[later] = tuple(one for one in told[name] if one not in began[name])
        return Facts(variants=(baseline, *(one for one in variants if one != baseline)), **told)

    @property
    def baseline(self) -> str:
        """The first variant."""
        return self.variants[0]

    @property
    def control(self) -> str | None:
        """`half`, where the study has it."""
        return CONTROL if CONTROL in self.variants[1:] else None

    @property
    def references(self) -> tuple[str, ...]:
        """What variants are paired with: the baseline, then the control."""
        return (self.baseline,) if self.control is None else (self.baseline, self.control)

    @property
    def cap(self) -> float:
        """ln V, the loss of a model that knows nothing, nats."""
        return math.log(self.vocab_size)

    @property
    def rungs(self) -> range:
        """Indices of learning rates."""
        return range(len(self.learning_rates))

    @property
    def top(self) -> range:
        """The highest of them."""
        return self.rungs[-self.top_rungs :]

    @property
    def lower(self) -> range:
        """The others."""
        return self.rungs[: -self.top_rungs]


@dataclass(frozen=True)
class Run:
    """An entry of `runs`; None for what it does not tell.

    Args:
        variant: Which.
        lr: Learning rate.
        seed: Of initial weights and order.
        status: As the run's outcome says it.
        val_loss: Held-out, at the end, nats.
        train_loss: nats.
        peak_hidden: The largest absolute hidden state.
        attention_logit_max: The largest.
        gate_mean: Mean gate score.
        first_token_attention: Share of attention on the first token.
        uniform_attention: The same if each query attended alike to all its keys.
        spikes: How many.
        step: The last.
    """

    variant: str
    lr: float
    seed: int
    status: Literal["finished", "diverged"]
    val_loss: float | None = None
    train_loss: float | None = None
    peak_hidden: float | None = None
    attention_logit_max: float | None = None
    gate_mean: float | None = None
    first_token_attention: float | None = None
    uniform_attention: float | None = None
    spikes: float | None = None
    step: float | None = None

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> "Run":
        """Reads an entry; numbers that are not finite, or above 1e100, become None; a finished run with such a held-out loss diverged.

        Raises:
            RunError: A key is missing or of another type.
        """
        where = "/".join(str(entry.get(key)) for key in ("variant", "lr", "seed"))
        if entry.get("status") not in ("finished", "diverged"):
            raise RunError(f"run {where}: status ({entry.get('status')}) must be finished or diverged; run the study again")
        if not (isinstance(entry.get("variant"), str) and _is_number(entry.get("lr"), above=0) and _is_whole(entry.get("seed"))):
            raise RunError(f"run {where}: variant, lr and seed must be a name, a number and a whole number; run the study again")
        numbers = {}
        for field in fields(Run)[4:]:
            value = entry.get(field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise RunError(f"run {where}: {field.name} ({value!r}) must be a number or null; run the study again")
            numbers[field.name] = value if value is not None and abs(value) < _LARGEST else None
        if entry["status"] == "finished" and entry.get("val_loss") is None:
            raise RunError(f"run {where}: finished, and val_loss is null; a finished run has one; run it again")
        status = entry["status"] if numbers["val_loss"] is not None else "diverged"
        return Run(entry["variant"], entry["lr"], entry["seed"], status, **numbers)


class Grid:
    """The runs of a study by variant, rung and seed.

    Args:
        facts: Of the study.
        runs: In any order; not all need be there.

    Raises:
        RunError: A run is there twice, or is of another spec.
    """

    def __init__(self, facts: Facts, runs: Iterable[Run]) -> None:
        self.facts = facts
        self._runs: dict[tuple[str, int, int], Run] = {}
        for run in runs:
            name = f"{run.variant}/{run.lr:g}/{run.seed}"
            rungs = [rung for rung, lr in enumerate(facts.learning_rates) if math.isclose(lr, run.lr, rel_tol=1e-9)]
            if run.variant not in facts.variants or not rungs or run.seed not in facts.seeds:
                raise RunError(f"run {name} is not of the spec {facts.name}; give the spec that it was run with")
            key = (run.variant, rungs[0], run.seed)
            if key in self._runs:
                raise RunError(f"run {name} is there twice; keep one of them")
            self._runs[key] = run

    def __len__(self) -> int:
        return len(self._runs)

    def run(self, variant: str, rung: int, seed: int) -> Run | None:
        """None where it is missing."""
        return self._runs.get((variant, rung, seed))

    def fate(self, variant: str, rung: int, seed: int) -> Fate:
        """How it ended."""
        run = self.run(variant, rung, seed)
        return "missing" if run is None else run.status

    def loss(self, variant: str, rung: int, seed: int) -> float | None:
        """Held-out, of a finished run."""
        run = self.run(variant, rung, seed)
        return run.val_loss if run is not None and run.status == "finished" else None

    def capped(self, variant: str, rung: int, seed: int) -> float | None:
        """Held-out, at most ln V, which stands for a diverged run, too; None where it is missing."""
        fate = self.fate(variant, rung, seed)
        if fate == "missing":
            return None
        loss = self.loss(variant, rung, seed)
        return self.facts.cap if loss is None else min(loss, self.facts.cap)

    def figures(self, variant: str, rung: int, name: str) -> list[float | None]:
        """One figure of finished runs, seed by seed."""
        runs = (self.run(variant, rung, seed) for seed in self.facts.seeds)
        return [getattr(run, name) if run is not None and run.status == "finished" else None for run in runs]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of all; None where one is missing."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there and len(there) == len(values) else None
