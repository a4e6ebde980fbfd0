"""The records of a run, as its folder holds them, and whether they say that it has diverged."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagate.analysis.lr.spec import Stop

_NUMBERS = (
    "loss", "val_loss", "step_seconds", "hidden_max", "attention_logit_max", "gate_mean", "first_token_attention", "uniform_attention"
)  # fmt: skip


def diverged_at(losses: Sequence[float | None], stop: Stop, *, warmup: int) -> tuple[int, str] | None:
    """The first step, counted from 1, at which a run has diverged, and why; None where it has not.

    It depends on the losses alone, so that it does not matter when somebody looks.

    Args:
        losses: Of the steps from 1 on, nats; None for one that is not finite.
        stop: The rule.
        warmup: Steps of warm-up: the rule's windows lie behind them.
    """
    total, first = 0.0, math.inf
    for step, loss in enumerate(losses, start=1):
        if loss is None or not math.isfinite(loss):
            return step, "the loss or the gradient is not finite"
        leaving = losses[step - 1 - stop.window] if step > stop.window else 0.0
        total += loss - (leaving or 0.0)
        if step == stop.window:
            first = total / stop.window
        if step >= stop.window + max(stop.window, warmup) and total / stop.window > first + stop.above_initial:
            mean = total / stop.window
            rise = f"{mean - first:.3f} nats above that of the first {stop.window}"
            return step, f"the mean loss over {stop.window} steps, {mean:.3f}, is {rise}"
    return None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a run, from step 1 on without a gap; a last line half written is left out. None where there is no file."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or record.get("step") != len(records) + 1:
            break
        if not all(isinstance(record.get(name, 0.0), int | float | None) for name in _NUMBERS):
            break
        records.append(record)
    return records
