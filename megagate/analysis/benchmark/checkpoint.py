"""The rows of `tools/benchmark.py checkpoint`: saving beside `cp`, loading beside reading, and what a save in the background waits for.

Light: ranks and torch are in processes of their own (`checkpoint_ranks.py`).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megagate.analysis.benchmark.interleave import Entrant, Series
from megagate.analysis.benchmark.paired import paired_ratio
from megagate.analysis.benchmark.rows import Bench, Limits, Row, entrant, reaches

SAVE_TARGET = 0.5
"""Of cp's speed."""


@dataclass(frozen=True)
class Options(Limits):
    """What is measured.

    Args:
        megabytes: Of the state, MB of 10^6: masters and both moments.
        ranks: That save and load.
    """

    megabytes: float
    ranks: int


ROWS: dict[str, Row[Options]] = {
    "save": Row("saving", "checkpoint:save", 5, lambda o: 2.2e6 * o.megabytes),
    "save1": Row("saving by one rank", "checkpoint:save_alone", 5, lambda o: 2.2e6 * o.megabytes),
    "load": Row("loading at another layout", "checkpoint:load", 5, lambda o: 1.1e6 * o.megabytes),
    "stall": Row("what training waits for when saving in the background", "checkpoint:stall", 5, lambda o: 1.1e6 * o.megabytes),
}
"""In the order of the table."""


def save(bench: Bench[Options]) -> None:
    """Ranks that save beside `cp` of the same bytes."""
    _beside_cp(bench, bench.options.ranks)


def save_alone(bench: Bench[Options]) -> None:
    """One rank that saves all of it beside `cp`."""
    _beside_cp(bench, 1)


def load(bench: Bench[Options]) -> None:
    """Ranks of another layout that load, and that compare all digests, beside reading as many bytes."""
    _save_once(bench)
    layout = _layout(bench.options.ranks, other=True)
    entrants = [_ranks(bench, job, layout, warmup=1) for job in ("load", "verify", "read")]
    if series := bench.run(entrants):
        ratio = paired_ratio(_seconds(series["read"]), _seconds(series["load"]))
        where = f"saved at {_named(_layout(bench.options.ranks))}, loaded at {_named(layout)}"
        bench.line(f"{where}; peer: reading files", _speed(series["load"]), _speed(series["read"]), ratio, target="-", met=None)
        ratio = paired_ratio(_seconds(series["read"]), _seconds(series["verify"]))
        bench.line("every digest again; peer: reading files", _speed(series["verify"]), _speed(series["read"]), ratio, target="-", met=None)
        bench.remark("files are in the file cache, and memory is there already on both sides.")


def stall(bench: Bench[Options]) -> None:
    """A copy of the state to host memory beside a whole save."""
    entrants = [_ranks(bench, job, _layout(bench.options.ranks), warmup=1) for job in ("stage", "save")]
    if series := bench.run(entrants):
        ratio = paired_ratio(_seconds(series["save"]), _seconds(series["stage"]))
        bench.line("copy to host memory; peer: a whole save", _speed(series["stage"]), _speed(series["save"]), ratio, target="-", met=None)


def _beside_cp(bench: Bench[Options], ranks: int) -> None:
    folder = bench.options.folder / bench.key
    ours = _ranks(bench, "save", _layout(ranks), warmup=1)
    peer = entrant("cp", "copying:copy", warmup=1, source=f"{folder}/step-00000001", output=f"{folder}-copy")
    if series := bench.run([ours, peer]):
        ratio = paired_ratio(_seconds(series["cp"]), _seconds(series["save"]))
        title = f"{_named(_layout(ranks))}, blake3 and fsync; peer: cp and fsync of the same files"
        met = reaches(ratio, SAVE_TARGET)
        bench.line(title, _speed(series["save"]), _speed(series["cp"]), ratio, target=f">= {SAVE_TARGET:g}", met=met)


def _save_once(bench: Bench[Options]) -> None:
    """The checkpoint that others read."""
    bench.run([_ranks(bench, "save", _layout(bench.options.ranks), warmup=1)])


def _ranks(bench: Bench[Options], job: str, layout: dict[str, int], *, warmup: int) -> Entrant:
    shared = {"folder": str(bench.options.folder / bench.key), "layout": layout, "megabytes": bench.options.megabytes}
    return entrant(job, "checkpoint_ranks:ranks", warmup=warmup, job=job, **shared)


def _layout(ranks: int, *, other: bool = False) -> dict[str, int]:
    return {"world_size": ranks, "tp": ranks if other else min(2, ranks), "ep": min(2, ranks) if other else ranks, "zero_stage": 1}


def _named(layout: dict[str, int]) -> str:
    size, tp, ep = (layout[name] for name in ("world_size", "tp", "ep"))
    return f"{size} rank{'s' * (size > 1)}" + (f" (tp{tp} ep{ep})" if size > 1 else "")


def _seconds(series: Series) -> Sequence[float]:
    return [note["seconds"] for note in series.notes]


def _speed(series: Series) -> str:
    seconds, cpu = (statistics.median(note[name] for note in series.notes) for name in ("seconds", "cpu"))
    return f"{series.notes[0]['bytes'] / seconds / 1e9:.2f} GB/s ({seconds:.3f} s, CPU {cpu:.3f} s)"
