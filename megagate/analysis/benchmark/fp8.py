"""`tools/benchmark.py fp8`: what emulated FP8 recipes do to the loss that a job ends with, beside what rounding and chance do to it.

The same job for every row and seed (of initial weights and of the order of samples), compared with bf16 of the same seed, which takes out
most of what a seed does. Two rows say what a gap means: fp32 is bf16's own distance from exact numbers, and the twin is bf16 again from
initial weights that differ by less than bf16 rounds, so that its gap is chance and nothing else.

This file is arithmetic and text; `fp8_runs.py` has the processes.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from megagate.analysis.benchmark import record as records
from megagate.analysis.lr.interval import t_975
from megagate.config.run import Fp8Config, Fp8Recipe, PrecisionConfig, RunConfig
from megagate.data.hashing import canonical_sha256
from megagate.errors import RunError

BASE, EXACT, TWIN = "bf16", "fp32", "twin"
RECIPES = tuple(recipe for recipe in get_args(Fp8Recipe) if recipe != "none")
ROWS = {
    BASE: "bf16",
    EXACT: "fp32",
    TWIN: "chance: bf16, initial weights 0.01 % larger",
    **{recipe: f"{recipe}, emulated" for recipe in RECIPES},
}
NUDGE = 1e-4
"""Of the twin's initial weights; bf16 keeps 8 bits of a number."""
TAIL = 50
"""Steps at the end whose training losses are averaged."""
LONGER = 10
"""Than the config's is the validation, where the split has as much."""
CODE = ("backend", "config", "data", "engine", "model", "nn", "parallel", "train")


class Key(NamedTuple):
    """One run."""

    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}-{self.seed}"


@dataclass(frozen=True)
class Numbers:
    """What a run ended with.

    Args:
        val_loss: After the last step, nats.
        train_loss: Mean of the last `TAIL` steps, nats.
        step_seconds: Median.
    """

    val_loss: float
    train_loss: float
    step_seconds: float


@dataclass
class Record:
    """The finished runs, and what they are only comparable under.

    Args:
        conditions: Config, steps, data, machine and versions, and a digest of the code.
        runs: By `str(Key)`.
    """

    conditions: dict[str, Any]
    runs: dict[str, Numbers]

    @classmethod
    def empty(cls, base: RunConfig, *, steps: int, **others: Any) -> "Record":
        """Nothing yet."""
        digest = canonical_sha256(asdict(base))[:12]
        return cls({"config": digest, "steps": steps, **others, "code": records.code_digest(CODE)}, {})

    def write(self, path: Path) -> None:
        """Replace the file."""
        records.write(path, asdict(self))

    def resume(self, path: Path) -> None:
        """Take what the file holds; also runs that this call does not ask for.

        Raises:
            RunError: It is no such record, or was measured under other conditions.
        """
        try:
            held = json.loads(path.read_text())
            conditions, runs = dict(held["conditions"]), {key: Numbers(**numbers) for key, numbers in held["runs"].items()}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise RunError(f"--json {path}: no record of this command ({error}); give another name") from error
        records.require_same(path, conditions, self.conditions)
        self.runs = runs


class Gap(NamedTuple):
    """Of a row to the base, nats.

    Args:
        mean: Over seeds.
        half_width: Of the interval of 95 % by Student's t; infinite for one seed.
        each: By seed.
    """

    mean: float
    half_width: float
    each: tuple[float, ...]

    @property
    def separable(self) -> bool:
        """The interval does not hold 0."""
        return abs(self.mean) > self.half_width


def keys(rows: Sequence[str], seeds: Sequence[int]) -> list[Key]:
    """All runs, seed by seed: what is there after each seed is a smaller study."""
    return [Key(row, seed) for seed in seeds for row in rows]


def run_config(base: RunConfig, key: Key, *, steps: int, valid_tokens: int, folder: Path) -> RunConfig:
    """The job of one run: `base` on one rank, with the row's numbers, and one long validation, at the end.

    Args:
        base: The config under study.
        key: Row and seed.
        steps: Other than the base's: warm-up and decay shrink or grow alike.
        valid_tokens: Of the largest validation set.
        folder: Has the data and the runs.
    """
    given, fp8 = base.precision.fp8, Fp8Config()
    if key.row in RECIPES:
        history = given.amax_history if key.row == "delayed" else fp8.amax_history
        fp8 = Fp8Config(recipe=key.row, emulate=True, keep_high_precision=given.keep_high_precision, amax_history=history)
    dtype = "fp32" if key.row == EXACT else "bf16"
    share = steps / base.train.steps
    schedule = base.schedule
    return replace(
        base,
        model=replace(base.model, init_std=base.model.init_std * (1 + NUDGE)) if key.row == TWIN else base.model,
        train=replace(base.train, steps=steps, seed=key.seed, output_dir=str(run_folder(folder, key)), resume="auto"),
        data=replace(base.data, cache_dir=str(folder / "data")),
        schedule=replace(schedule, warmup_steps=int(schedule.warmup_steps * share), decay_steps=int(schedule.decay_steps * share)),
        parallel=type(base.parallel)(),
        precision=PrecisionConfig(dtype=dtype, grad_dtype=base.precision.grad_dtype, fp8=fp8),
        eval=replace(base.eval, every=0, batches=valid_batches(base, valid_tokens), min_gain_nats=0.0, prompt=""),
        wandb=replace(base.wandb, mode="disabled"),
    )


def valid_batches(base: RunConfig, valid_tokens: int) -> int:
    """The whole split, or `LONGER` than the config's validation."""
    whole = math.ceil(valid_tokens / (base.train.global_batch_size * base.train.seq_len))
    return min(whole, LONGER * base.eval.batches)


def run_folder(folder: Path, key: Key) -> Path:
    """Of one run."""
    return folder / str(key)


def numbers_of(metrics: Path, *, steps: int) -> Numbers:
    """What a finished run's metrics.jsonl says.

    Raises:
        RunError: It does not hold every step and a validation at the end.
    """
    try:
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        complete = [line["step"] for line in lines] == list(range(1, steps + 1)) and "val_loss" in lines[-1]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{metrics}: cannot be read ({error}); remove its folder and start again with --resume") from error
    if not complete:
        raise RunError(f"{metrics}: not the {steps} steps of a finished run; remove its folder and start again with --resume")
    tail = statistics.fmean(line["loss"] for line in lines[-TAIL:])
    return Numbers(lines[-1]["val_loss"], tail, statistics.median(line["step_seconds"] for line in lines))


def gap(runs: Mapping[str, Numbers], row: str, seeds: Sequence[int], of: Callable[[Numbers], float]) -> Gap:
    """Of the seeds that have both; there is at least one."""
    pairs = [(runs[str(Key(row, seed))], runs[str(Key(BASE, seed))]) for seed in common(runs, row, seeds)]
    each = tuple(of(one) - of(base) for one, base in pairs)
    half_width = math.inf
    if len(each) > 1:
        half_width = t_975(len(each) - 1) * statistics.stdev(each) / math.sqrt(len(each))
    return Gap(statistics.fmean(each), half_width, each)


def common(runs: Mapping[str, Numbers], row: str, seeds: Sequence[int]) -> list[int]:
    """The seeds of which both the row and the base are finished."""
    return [seed for seed in seeds if {str(Key(row, seed)), str(Key(BASE, seed))} <= runs.keys()]


def table(record: Record, rows: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Lines of markdown: a row for each row with a finished seed, and what the seeds themselves do."""
    lines = [
        "| row | validation loss, nats | gap to bf16, nats [95 %] | by seed | beyond chance | gap in training loss, nats [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        there = common(record.runs, row, seeds)
        if not there:
            continue
        loss = f"{statistics.fmean(record.runs[str(Key(row, seed))].val_loss for seed in there):.4f}"
        cells = [f"{ROWS[row]} (`{row}`)", loss]
        if row == BASE:
            cells += ["0", "-", "-", "0"]
        else:
            val = gap(record.runs, row, seeds, lambda run: run.val_loss)
            train = gap(record.runs, row, seeds, lambda run: run.train_loss)
            words = "-" if math.isinf(val.half_width) else "yes" if val.separable else "no"
            cells += [_interval(val), ", ".join(f"{one:+.4f}" for one in val.each), words, _interval(train)]
        lines.append(f"| {' | '.join(cells)} |")
    base = [record.runs[str(Key(BASE, seed))].val_loss for seed in common(record.runs, BASE, seeds)]
    if len(base) > 1:
        each = ", ".join(f"{loss:.4f}" for loss in base)
        lines.append(f"\nBetween its seeds bf16 ends {each} nats: a standard deviation of {statistics.stdev(base):.4f}.")
    return lines


def remark(base: RunConfig, rows: Sequence[str], *, steps: int) -> str:
    """What has to be said of delayed scaling's history; nothing where there is nothing."""
    length, micro_steps = base.precision.fp8.amax_history, steps * base.train.global_batch_size // base.micro_batch(1)
    if "delayed" not in rows or length < micro_steps:
        return ""
    return f"\ndelayed: a history of {length} is no shorter than a run's {micro_steps} micro-steps: the largest amax decides to the end."


def _interval(one: Gap) -> str:
    low, high = one.mean - one.half_width, one.mean + one.half_width
    return f"{one.mean:+.4f}" + ("" if math.isinf(one.half_width) else f" [{low:+.4f}, {high:+.4f}]")
