"""From splits to batches. The order is a function of (data sets, seed, step) alone: one counter is the whole state, for any layout."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt

from megagate.data.blend import Blend
from megagate.data.hashing import IntArray, canonical_sha256, stable_key
from megagate.data.permutation import PERMUTATION_VERSION, KeyedPermutation
from megagate.data.split import Split, Windows
from megagate.errors import ConfigError, DataError

IGNORE_INDEX = -100  # a label that is no target
_KEPT_ORDERS = 4  # a step touches one epoch, or two at a border


@dataclass(frozen=True)
class Batch:
    """Inputs and their targets.

    Shapes: both [..., s], int64. labels[..., t] is the token that follows tokens[..., t], or `IGNORE_INDEX`: after the last window, and,
        where windows are cut into documents, after the end of one. The end itself is a target of the token before it.
    """

    tokens: IntArray
    labels: IntArray


@dataclass(frozen=True)
class Origins:
    """Where the whole step, of all ranks, comes from.

    Args:
        samples: Its first and its last sample, counted from the run's first.
        sets: How many of them each data set gave, by its name in a blend.
    """

    samples: tuple[int, int]
    sets: dict[str, int]


class TrainLoader:
    """The training batches of one data-parallel rank, by step.

    The blend's schedule says which data set gives sample g of the run, and that it is the m-th sample of that set (m = g where there is
    one set). Sample m of a set is its window P_e(m mod n) of its epoch e = m // n, where n is the number of its windows and P_e a
    permutation keyed by (seed, e, data set): its order does not depend on the others. In each epoch all borders move by a keyed number
    of tokens. Micro-step k of step b holds the samples b*gbs + k*mbs*dp and the mbs*dp - 1 after it, rank r the r-th part of them: a
    step, and each of its micro-steps, has the same content for every layout with the same mbs * dp.

    Args:
        data: What is read: a split, or a blend of several.
        seq_len: Tokens per sample (s).
        global_batch_size: Samples per step over all ranks (gbs).
        micro_batch_size: Samples per micro-step and rank (mbs).
        dp_rank: This rank's place (r).
        dp_size: Data-parallel ranks (dp).
        seed: Of the order.
        eod_id: The end of a document, whose next token is then no target of it; None to take windows as one text.

    Raises:
        DataError: A split is shorter than one window.
        ConfigError: mbs * dp does not divide gbs.
    """

    def __init__(
        self,
        data: Split | Blend,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        eod_id: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"train.global_batch_size ({global_batch_size}) must be a multiple of train.micro_batch_size ({micro_batch_size}) times the"
                f" data-parallel size ({dp_size}); change one of them"
            )
        self._blend = data if isinstance(data, Blend) else Blend.of(data)
        self._members = [
            _Member(split, name=name, seq_len=seq_len, seed=seed)
            for split, name in zip(self._blend.members, self._blend.names, strict=True)
        ]
        self._seq_len = seq_len
        self._seed = seed
        self._eod_id = eod_id
        self._global_batch_size = global_batch_size
        # [accumulation, micro_batch_size]: this rank's samples, counted from the first of the step
        micro_steps = np.arange(0, global_batch_size, micro_batch_size * dp_size)[:, None]
        self._offsets: IntArray = micro_steps + dp_rank * micro_batch_size + np.arange(micro_batch_size)[None, :]

    @property
    def windows_per_epoch(self) -> int:
        """Windows of all data sets: samples after which a single one has been seen once."""
        return sum(member.count for member in self._members)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides which tokens any sample g has."""
        return self._fingerprint(self._blend.fingerprint)

    def fingerprint_at(self, samples: int) -> str:
        """The same of the first `samples` samples; a run may only go on from a counter whose samples have this fingerprint."""
        return self._fingerprint(self._blend.fingerprint_at(samples))

    def order_at(self, samples: int) -> dict[str, Any]:
        """`fingerprint_at`, and what went into it, as JSON for a checkpoint; `order_differences` tells two of them apart."""
        what = {"seed": self._seed, "seq_len": self._seq_len, "permutation": PERMUTATION_VERSION}
        return {"order": self.fingerprint_at(samples), "samples": samples, **what, "weights": self._blend.weights_at(samples)}

    def epochs(self, samples: int) -> list[float]:
        """How often each data set has been seen after so many samples of the run."""
        counts = self._blend.schedule.counts(samples).tolist()
        return [count / member.count for count, member in zip(counts, self._members, strict=True)]

    def unread(self) -> list[float]:
        """The share of each data set's tokens that no window of an epoch holds: what is left at the ends of its shards."""
        return [1 - member.count * self._seq_len / split.tokens for member, split in zip(self._members, self._blend.members, strict=True)]

    def samples(self, index: int) -> IntArray:
        """[accumulation, micro_batch_size] the numbers, counted from the run's first, of this rank's samples of step `index`."""
        return index * self._global_batch_size + self._offsets

    def origins(self, index: int) -> Origins:
        """Of step `index`, counted from 0."""
        first = index * self._global_batch_size
        owners, _ = self._blend.schedule.lookup(np.arange(first, first + self._global_batch_size))
        counts = np.bincount(owners, minlength=len(self._members)).tolist()
        sets = {name: count for name, count in zip(self._blend.names, counts, strict=True) if count}
        return Origins((first, first + self._global_batch_size - 1), sets)

    def step(self, index: int) -> Batch:
        """The batch of step `index`, counted from 0. Shapes: [accumulation, micro_batch_size, s]."""
        samples = self.samples(index)
        tokens = np.empty((samples.size, self._seq_len), dtype=np.int64)
        labels = np.empty_like(tokens)
        owners, own = self._blend.schedule.lookup(samples.reshape(-1))
        for owner, rows in _groups(owners):
            for row, window in self._members[owner].rows(own[rows], names=_chosen(range(samples.size), rows)):
                # At once to where they belong: fresh memory costs more than all else here, and a copy in between is more of it.
                tokens[row] = window[:-1]
                labels[row] = window[1:]
        if self._eod_id is not None:
            labels[tokens == self._eod_id] = IGNORE_INDEX
        shape = (*samples.shape, self._seq_len)
        return Batch(tokens.reshape(shape), labels.reshape(shape))

    def _fingerprint(self, data: str) -> str:
        return canonical_sha256({"data": data, "seed": self._seed, "seq_len": self._seq_len, "permutation": PERMUTATION_VERSION})


class _Member:
    """One data set of a blend, in its own order."""

    def __init__(self, split: Split, *, name: str, seq_len: int, seed: int) -> None:
        self._windows = _windows_or_refuse(split, name=name, seq_len=seq_len, movable=True)
        self._fingerprint = split.fingerprint
        self._seq_len = seq_len
        self._seed = seed
        self._orders: OrderedDict[int, tuple[KeyedPermutation, int]] = OrderedDict()
        self.count = self._windows.count

    def rows(self, samples: IntArray, *, names: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """[rows] samples of this data set -> (name, [s + 1] tokens) of each, in any order."""
        epochs, positions = np.divmod(samples, self.count)
        for epoch, rows in _groups(epochs):
            order, shift = self._order(epoch)
            windows = self._windows.rows(order.lookup(positions[rows]), shift=shift)
            yield from zip(_chosen(names, rows), windows, strict=True)

    def _order(self, epoch: int) -> tuple[KeyedPermutation, int]:
        """The order of an epoch, and by how many tokens its borders move."""
        if epoch not in self._orders:
            key = stable_key("order", self._seed, epoch, self._fingerprint)
            self._orders[epoch] = KeyedPermutation(self.count, key), stable_key("border", self._seed, epoch) % self._seq_len
            if len(self._orders) > _KEPT_ORDERS:
                self._orders.popitem(last=False)
        return self._orders[epoch]


class ValidLoader:
    """The first windows of a split in file order, each once: the same set for every layout with the same mbs * dp.

    Iterating yields `batches` batches. Rows after the last window are there for the shape and hold no target.

    Args:
        split: What is read.
        seq_len: Tokens per window (s).
        micro_batch_size: Rows per batch and rank (mbs).
        dp_rank: This rank's place.
        dp_size: Data-parallel ranks (dp).
        batches: Batches per rank; all ranks together see batches * mbs * dp rows.
        eod_id: As for `TrainLoader`.

    Raises:
        DataError: The split is shorter than one window.
    """

    def __init__(
        self,
        split: Split,
        *,
        seq_len: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        batches: int,
        eod_id: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        self._windows = _windows_or_refuse(split, seq_len=seq_len, movable=False)
        self._vocab_size = split.vocab_size
        self._seq_len = seq_len
        self._rows_per_batch = micro_batch_size * dp_size
        self._mine: IntArray = dp_rank * micro_batch_size + np.arange(micro_batch_size)
        self._batches = batches
        self._eod_id = eod_id

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        """Shapes: [micro_batch_size, s] each."""
        for number in range(self._batches):
            rows = number * self._rows_per_batch + self._mine
            there = rows < self._windows.count
            windows = np.zeros((rows.size, self._seq_len + 1), dtype=np.int64)
            windows[there] = self._windows.read(rows[there])
            batch = _batch(windows, eod_id=self._eod_id)
            batch.labels[~there] = IGNORE_INDEX
            yield batch

    @cached_property
    def targets(self) -> int:
        """How many targets the batches of all ranks have."""
        if self._eod_id is not None:
            return int(self.target_counts(self._vocab_size).sum())
        return min(self._batches * self._rows_per_batch, self._windows.count) * self._seq_len

    def target_counts(self, vocab_size: int) -> IntArray:
        """[vocab_size] how often each token is a target, over the batches of all ranks."""
        assert vocab_size >= self._vocab_size, f"{vocab_size} counts for a vocabulary of {self._vocab_size}"
        counts = np.zeros(vocab_size, dtype=np.int64)
        rows = min(self._batches * self._rows_per_batch, self._windows.count)
        for first in range(0, rows, self._rows_per_batch):
            index = np.arange(first, min(first + self._rows_per_batch, rows))
            labels = _batch(self._windows.read(index), eod_id=self._eod_id).labels
            counts += np.bincount(labels[labels != IGNORE_INDEX], minlength=vocab_size)
        return counts


def unigram_entropy(counts: IntArray) -> float:
    """Entropy in nats of the distribution of counts: the mean loss of the best model that ignores all context.

    Raises:
        ValueError: All counts are 0.
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("the entropy of no tokens")
    shares = counts[counts > 0] / total
    return log(total) - float((shares * np.log(counts[counts > 0])).sum())


def _groups(values: IntArray) -> Iterator[tuple[int, IntArray | slice]]:
    """(value, [rows] where it stands) of each value there is; mostly there is one, and all rows are a slice, which costs no copies."""
    if values.size == 1 or (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    for value in np.unique(values).tolist():
        yield value, np.flatnonzero(values == value)


def _chosen(names: Sequence[int], rows: IntArray | slice) -> Sequence[int]:
    return names if isinstance(rows, slice) else [names[row] for row in rows.tolist()]


def _batch(windows: IntArray, *, eod_id: int | None) -> Batch:
    """[..., s + 1] -> [..., s] each, as copies that own their memory in order."""
    tokens, labels = windows[..., :-1].copy(), windows[..., 1:].copy()
    if eod_id is not None:
        labels[tokens == eod_id] = IGNORE_INDEX
    return Batch(tokens, labels)


def _windows_or_refuse(split: Split, *, name: str = "", seq_len: int, movable: bool) -> Windows:
    windows = split.windows(seq_len, movable=movable)
    if windows.count < 1:
        raise DataError(
            f"the {split.name} split{name and f' of {name}'} has {split.tokens} tokens, and no shard of it holds one window of"
            f" {seq_len + 1} (train.seq_len + 1); lower train.seq_len, or give more data"
        )
    return windows
