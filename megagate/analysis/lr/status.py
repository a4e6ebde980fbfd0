"""How far a study is, as lines of text."""

from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.study import Outcome, Study


def status_lines(study: Study) -> list[str]:
    """A table of variants by rungs, each cell the seeds' states, and counts below."""
    outcomes, spec = study.outcomes(), study.spec
    begun = {key: len(study.records(key)) for key in study.keys if key not in outcomes}
    lines = [f"| {spec.name} | {' | '.join(f'{lr:g}' for lr in spec.learning_rates)} |", "|---" * (1 + len(spec.learning_rates)) + "|"]
    for variant in spec.variants:
        cells = []
        for lr in spec.learning_rates:
            keys = [RunKey(variant.name, lr, seed) for seed in spec.seeds]
            cells.append(" ".join(_state(outcomes.get(key), begun.get(key, 0), spec.collapsed_above) for key in keys))
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    diverged = sum(one.status == "diverged" for one in outcomes.values())
    going = sum(steps > 0 for steps in begun.values())
    bar = "" if spec.collapsed_above is None else f"; * above {spec.collapsed_above:g}: collapsed"
    lines += ["", f"held-out loss in nats by seed{bar}; @N at step N of {spec.steps}, - not begun"]
    over, left = len(outcomes), len(begun) - going
    lines.append(f"{over} of {len(study.keys)} runs are over ({diverged} diverged), {going} begun, {left} to begin")
    seconds = [one.seconds for one in outcomes.values() if one.status == "finished"]
    jobs = spec.executor.jobs
    if seconds and begun and jobs:
        mean = sum(seconds) / len(seconds)
        hours = sum(spec.steps - steps for steps in begun.values()) / spec.steps * mean / jobs / 3600
        lines.append(f"a finished run took {mean:.0f} s in steps; the rest takes some {hours:.2f} h, {jobs} at a time")
    return lines


def _state(outcome: Outcome | None, steps: int, bar: float | None) -> str:
    if outcome is None:
        return f"@{steps}" if steps else "-"
    if outcome.status == "diverged" or outcome.val_loss is None:
        return f"diverged@{outcome.step}"
    return f"{outcome.val_loss:.3f}" + ("*" if bar is not None and outcome.val_loss > bar else "")
