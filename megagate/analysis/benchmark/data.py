"""The rows of `tools/benchmark.py data`: start-up, samples, preprocessing and orders, beside Megatron's own code in the same turns.

Light: what loads numpy is imported when rows are measured (`data_reader.py`, `data_text.py`), and what is measured, Megatron's packages
among it, runs in processes of its own (`data_ours.py`, `data_megatron.py`).
"""

from dataclasses import dataclass
from pathlib import Path

from megagate.analysis.benchmark.rows import Limits, Row

SAMPLED_DOCUMENTS = 2_000_000
"""At most so many with tokens that are really there."""


@dataclass(frozen=True)
class Options(Limits):
    """What is measured.

    Args:
        documents: Of the made-up data set of `start`; that of `sample` has at most `SAMPLED_DOCUMENTS`.
        shards: Of the data set of many shards of `start`, of 10^10 tokens each.
        text: A `.jsonl` for `preprocess` and `workers`; None for the files of this Python.
        megabytes: Most of it, MB of 10^6.
        tokenizer: For `tools/preprocess_data.py`; None to train one on the text.
        gigatoken: Why its row is left out; empty to measure it.
    """

    documents: int
    shards: int
    text: Path | None
    megabytes: float
    tokenizer: str | None
    gigatoken: str

    @property
    def sampled_documents(self) -> int:
        """Documents with tokens."""
        return min(self.documents, SAMPLED_DOCUMENTS)


ROWS: dict[str, Row[Options]] = {
    "start": Row("from files to the first sample", "data_reader:start", 5, lambda o: 25.0 * o.documents + 40_000 * o.shards),
    "sample": Row("one sample, warm", "data_reader:sample", 9, lambda o: 500.0 * o.sampled_documents),
    "preprocess": Row("text to shards", "data_text:preprocess", 5, lambda o: 6e6 * o.megabytes),
    "workers": Row("text to shards by two workers, beside one", "data_text:workers", 5, lambda o: 5e6 * o.megabytes),
    "permutation": Row("a place in an epoch's order", "data_reader:permutation", 9, lambda o: 0.0),
}
"""In the order of the table."""
