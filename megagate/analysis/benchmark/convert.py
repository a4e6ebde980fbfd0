"""The rows of `tools/benchmark.py convert`: checkpoints to Hugging Face's form and back, beside `cp` of the same bytes.

Light: torch is in processes of their own (`convert_work.py`).
"""

import statistics
from dataclasses import dataclass

from megagate.analysis.benchmark.interleave import Series, run_rounds
from megagate.analysis.benchmark.paired import paired_ratio
from megagate.analysis.benchmark.rows import Bench, Limits, Row, entrant, reaches

TARGET = 0.5
"""Of cp's speed."""


@dataclass(frozen=True)
class Options(Limits):
    """What is measured.

    Args:
        megabytes: Of the model's weights in fp32, MB of 10^6; most of them are experts'.
    """

    megabytes: float


ROWS: dict[str, Row[Options]] = {
    "to-hf": Row("a checkpoint to Hugging Face's form", "convert:to_hf", 5, lambda o: 3.2e6 * o.megabytes),
    "to-hf-bf16": Row("the same, rounded to bf16", "convert:to_hf_bf16", 5, lambda o: 2.7e6 * o.megabytes),
    "from-hf": Row("Hugging Face's form to a checkpoint", "convert:from_hf", 5, lambda o: 4.2e6 * o.megabytes),
}
"""In the order of the table."""


def to_hf(bench: Bench[Options]) -> None:
    """An export in fp32 beside `cp` of the checkpoint; digests are compared on the way."""
    _export(bench, "fp32")


def to_hf_bf16(bench: Bench[Options]) -> None:
    """An export in bf16, which writes half of what it reads, beside `cp` of the checkpoint."""
    _export(bench, "bf16")


def from_hf(bench: Bench[Options]) -> None:
    """An adoption beside `cp` of the folder; digests are made on the way."""
    folder = bench.options.folder / bench.key
    _once(bench, "make", root=f"{folder}-run", megabytes=bench.options.megabytes)
    _once(bench, "to_hf", source=f"{folder}-run", output=f"{folder}-source", dtype="fp32", keep=True)
    _beside_cp(bench, f"{folder}-source", "from_hf", "fp32, blake3 and fsync", source=f"{folder}-source", output=f"{folder}-adopted")


def _export(bench: Bench[Options], dtype: str) -> None:
    folder = bench.options.folder / bench.key
    _once(bench, "make", root=f"{folder}-run", megabytes=bench.options.megabytes)
    source = f"{folder}-run/checkpoints/step-00000001"
    title = f"{dtype}, digests and fsync"
    _beside_cp(bench, source, "to_hf", title, source=f"{folder}-run", output=f"{folder}-export", dtype=dtype)


def _once(bench: Bench[Options], work: str, **arguments: object) -> None:
    """Work that makes what is measured."""
    run_rounds([entrant(work, f"convert_work:{work}", **arguments)], rounds=1, deadline=bench.options.deadline, tell=bench.tell)


def _beside_cp(bench: Bench[Options], copied: str, work: str, title: str, **arguments: object) -> None:
    ours = entrant(work, f"convert_work:{work}", warmup=1, **arguments)
    peer = entrant("cp", "copying:copy", warmup=1, source=copied, output=f"{copied}-copy")
    if series := bench.run([ours, peer]):
        ratio = paired_ratio([note["seconds"] for note in series["cp"].notes], [note["seconds"] for note in series[work].notes])
        met = reaches(ratio, TARGET)
        title = f"{title}; peer: cp and fsync of what is read"
        bench.line(title, _figures(series[work]), _figures(series["cp"]), ratio, target=f">= {TARGET:g}", met=met)
        private, size = (max(note[name] for note in series[work].notes) / 1e6 for name in ("private", "bytes"))
        bench.remark(f"{private:.0f} MB of memory of its own at most, for {size:.0f} MB of files.")


def _figures(series: Series) -> str:
    seconds, cpu = (statistics.median(note[name] for note in series.notes) for name in ("seconds", "cpu"))
    return f"{series.notes[0]['bytes'] / seconds / 1e9:.2f} GB/s ({seconds:.3f} s, CPU {cpu:.3f} s)"
