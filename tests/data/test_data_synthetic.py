"""Synthetic tokens: the same for everybody, and learnable."""

import numpy as np
import pytest

from megagate.data.loader import TrainLoader, ValidLoader, unigram_entropy
from megagate.data.synthetic import SyntheticSplit
from megagate.errors import DataError


def conditional_entropy(windows: np.ndarray, vocab_size: int) -> float:
    pairs = windows[:, :-1].reshape(-1) * vocab_size + windows[:, 1:].reshape(-1)
    joint = unigram_entropy(np.bincount(pairs))
    return joint - unigram_entropy(np.bincount(windows[:, :-1].reshape(-1)))


def test_windows_do_not_depend_on_who_reads_them() -> None:
    windows = SyntheticSplit("train", vocab_size=1_000).windows(64, movable=True)
    block = windows.read(np.arange(50))
    assert block.shape == (50, 65) and block.dtype == np.int64
    again = SyntheticSplit("train", vocab_size=1_000).windows(64, movable=True)
    assert np.array_equal(again.read(np.array([49, 3, 3]), shift=5), block[[49, 3, 3]])
    assert windows.read(np.array([windows.count - 1])).shape == (1, 65)


def test_values_never_change() -> None:
    split = SyntheticSplit("train", vocab_size=100)
    tokens = split.windows(7, movable=True).read(np.array([0, 1]))
    assert tokens.tolist() == [[85, 67, 1, 40, 64, 9, 73, 35], [61, 37, 68, 75, 0, 32, 87, 49]]
    assert split.fingerprint[:12] == "aaae80498d07"


@pytest.mark.parametrize("vocab_size", [16, 100, 5_000, 151_936])
def test_ids_are_of_the_vocabulary_and_spread_over_it(vocab_size: int) -> None:
    tokens = SyntheticSplit("train", vocab_size=vocab_size).windows(128, movable=True).read(np.arange(100))
    assert 0 <= tokens.min() and tokens.max() < vocab_size
    assert tokens.max() > 0.9 * (vocab_size - 1)
    assert np.unique(tokens).size == min(vocab_size, 1_024)


def test_the_next_token_can_be_learned_from_the_last() -> None:
    train = SyntheticSplit("train", vocab_size=64).windows(256, movable=True).read(np.arange(500))
    valid = SyntheticSplit("valid", vocab_size=64).windows(256, movable=True).read(np.arange(500))
    for windows in (train, valid):
        assert unigram_entropy(np.bincount(windows[:, 1:].reshape(-1))) > np.log(64) - 0.02
        assert 1.4 < conditional_entropy(windows, 64) < 1.7
    # It is the same chain: what was learned on one holds on the other.
    counts = np.full((64, 64), 0.1)
    np.add.at(counts, (train[:, :-1], train[:, 1:]), 1)
    chances = counts / counts.sum(axis=1, keepdims=True)
    assert -np.log(chances[valid[:, :-1], valid[:, 1:]]).mean() < 1.7


def test_train_valid_seeds_and_windows_differ() -> None:
    def first(name: str, seed: int = 0) -> np.ndarray:
        return SyntheticSplit(name, vocab_size=64, seed=seed).windows(64, movable=True).read(np.arange(200))  # type: ignore[arg-type]

    everything = np.concatenate([first("train"), first("valid"), first("train", 1)])
    assert np.unique(everything, axis=0).shape[0] == 600
    fingerprints = {SyntheticSplit("train", vocab_size=v, seed=s).fingerprint for v, s in [(64, 0), (64, 1), (65, 0)]}
    assert len(fingerprints) == 3
    assert SyntheticSplit("valid", vocab_size=64).fingerprint in fingerprints


def test_loaders_read_it() -> None:
    split = SyntheticSplit("train", vocab_size=64)
    loaders = [
        TrainLoader(split, seq_len=32, global_batch_size=8, micro_batch_size=2, dp_rank=rank, dp_size=2, seed=1) for rank in range(2)
    ]
    whole = TrainLoader(split, seq_len=32, global_batch_size=8, micro_batch_size=4, dp_rank=0, dp_size=1, seed=1).step(5)
    assert np.array_equal(np.concatenate([loader.step(5).tokens for loader in loaders], axis=1), whole.tokens)
    valid = ValidLoader(SyntheticSplit("valid", vocab_size=64), seq_len=32, micro_batch_size=4, dp_rank=0, dp_size=1, batches=3)
    assert valid.target_counts(64).sum() == 3 * 4 * 32


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(DataError, match="model.vocab_size of at least 16; it is 15"):
        SyntheticSplit("train", vocab_size=15)
