"""What Megatron does in the rows of `tools/benchmark.py data`: the peer, by the package `megatron-core`, each in a process of its own.

The loop of `preprocess` is that of Megatron-LM's `tools/preprocess_data.py` in our words (it is not in the package): a pool of workers
that take lines 32 at a time, and one process that writes.
"""

import json
import multiprocessing
import resource
from functools import cache, partial
from typing import Any

from megagate.analysis.benchmark.interleave import Work
from megagate.analysis.benchmark.resident import Growth, import_cost

_SEED = 1234
_CHUNK = 32


class _NoTokenizer:
    """What `GPTDatasetConfig` asks of a tokenizer: ids for the ends of documents, and a name for its cache."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eod, self.pad = vocab_size, 0, vocab_size
        self.unique_identifiers = {"class": "none"}


def start(prefix: str, seq_len: int, vocab_size: int) -> Work:
    """From the files to the first sample of a `GPTDataset` of one epoch; its indices stay in memory, no cache is written or read."""
    cost = import_cost("megatron.core.datasets.gpt_dataset")

    def work() -> dict[str, float]:
        growth = Growth()
        data = _dataset(prefix, seq_len, vocab_size)
        assert data[0]["tokens"].shape == (seq_len,)
        return {**growth.notes(), **cost}

    return work


def sample(prefix: str, seq_len: int, vocab_size: int, samples: int) -> Work:
    """The first samples of an open `GPTDataset`, again and again."""
    data = _dataset(prefix, seq_len, vocab_size)

    def work() -> dict[str, float]:
        for index in range(samples):
            data[index]
        return {}

    return work


def _dataset(prefix: str, seq_len: int, vocab_size: int) -> Any:
    import numpy as np  # noqa: PLC0415  imports are measured apart
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: PLC0415
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: PLC0415
    from megatron.core.datasets.utils import Split  # noqa: PLC0415

    config = GPTDatasetConfig(
        random_seed=_SEED,
        sequence_length=seq_len,
        tokenizer=_NoTokenizer(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # the cheapest it can do
    )
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed), dtype=np.int32)
    return GPTDataset(indexed, prefix, documents, None, Split.train, config)


def preprocess(text: str, tokenizer: str, output: str) -> Work:
    """One worker and one writing process; the tokenizer is loaded before."""
    cost = import_cost("megatron.core.datasets.indexed_dataset", "megatron.core.tokenizers.text.libraries.huggingface_tokenizer")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # noqa: PLC0415  imports are measured apart

    vocab_size = _tokenizer(tokenizer).vocab_size  # workers inherit it

    def work() -> dict[str, float]:
        before = _children()
        builder = IndexedDatasetBuilder(output + ".bin", dtype=DType.optimal_dtype(vocab_size))
        with open(text, encoding="utf-8") as lines, multiprocessing.get_context("fork").Pool(1) as pool:
            for ids, lengths in pool.imap(partial(_encode, tokenizer), lines, _CHUNK):
                builder.add_document(ids, lengths)
            pool.close()
            pool.join()
        builder.finalize(output + ".idx")
        after = _children()
        return {"cpu": after[0] - before[0], "peak": after[1], **cost}

    return work


@cache
def _tokenizer(folder: str) -> Any:
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer  # noqa: PLC0415  as above

    return HuggingFaceTokenizer(folder, use_fast=True)


def _encode(tokenizer: str, line: str) -> tuple[list[int], list[int]]:
    own = _tokenizer(tokenizer)
    ids = own.text_to_ids(json.loads(line)["text"])
    if ids:
        ids.append(own.eod)
    return ids, [len(ids)]


def _children() -> tuple[float, int]:
    """(processor seconds, largest resident set in bytes) of processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss
