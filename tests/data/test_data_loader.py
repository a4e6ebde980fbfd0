"""Loaders: a step does not depend on the layout, a counter is the whole state, every window comes once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megagate.data.dataset import DataSet, open_dataset
from megagate.data.hashing import stable_key
from megagate.data.loader import IGNORE_INDEX, Batch, TrainLoader, ValidLoader, unigram_entropy
from megagate.data.manifest import open_shards, read_manifest
from megagate.data.sources import open_sources
from megagate.data.split import ShardSplit
from megagate.errors import ConfigError, DataError

S = 16
SEED = 11


@pytest.fixture
def data(counted: Path) -> DataSet:
    return open_dataset(str(counted), vocab_size=5_000, directory=counted)


def train_loader(data: DataSet, *, gbs: int = 24, mbs: int = 2, rank: int = 0, dp: int = 1, seed: int = SEED) -> TrainLoader:
    return TrainLoader(data.train, seq_len=S, global_batch_size=gbs, micro_batch_size=mbs, dp_rank=rank, dp_size=dp, seed=seed)


def valid_loader(data: DataSet, *, mbs: int = 2, rank: int = 0, dp: int = 1, batches: int = 3, seq_len: int = S) -> ValidLoader:
    return ValidLoader(data.valid, seq_len=seq_len, micro_batch_size=mbs, dp_rank=rank, dp_size=dp, batches=batches)


def test_labels_are_the_next_tokens(data: DataSet) -> None:
    batch = train_loader(data, gbs=24, mbs=2, dp=3).step(0)
    assert batch.tokens.shape == batch.labels.shape == (4, 2, S)
    assert batch.tokens.dtype == batch.labels.dtype == np.int64
    # The tokens of the fixture count up inside a shard, and no window leaves its shard.
    assert np.array_equal(batch.labels, batch.tokens + 1)
    assert batch.tokens.flags.writeable and batch.tokens.flags.c_contiguous


@pytest.mark.parametrize(("dp", "mbs"), [(2, 1), (2, 3), (3, 4), (4, 2), (8, 3), (24, 1)])
def test_ranks_together_hold_the_step_in_sample_order(data: DataSet, dp: int, mbs: int) -> None:
    for step in (0, 3, 4, 40):  # an epoch has 92 samples: step 3 crosses its end
        whole = train_loader(data, gbs=24, mbs=24).step(step)
        parts = [train_loader(data, mbs=mbs, rank=rank, dp=dp).step(step) for rank in range(dp)]
        for name in ("tokens", "labels"):
            joined = np.stack([getattr(part, name) for part in parts], axis=1)  # [a, dp, mbs, s]
            assert np.array_equal(joined.reshape(24, S), getattr(whole, name)[0])
        one = train_loader(data, mbs=mbs * dp).step(step)
        for micro_step in range(24 // (mbs * dp)):
            rows = np.concatenate([part.tokens[micro_step] for part in parts])
            assert np.array_equal(rows, one.tokens[micro_step])


def test_samples_do_not_depend_on_the_batch_size(data: DataSet) -> None:
    large = train_loader(data, gbs=24, mbs=24).step(2).tokens.reshape(-1, S)
    small = [train_loader(data, gbs=8, mbs=4).step(step).tokens.reshape(-1, S) for step in (6, 7, 8)]
    assert np.array_equal(np.concatenate(small), large)


def test_any_step_can_be_had_without_the_ones_before(data: DataSet) -> None:
    running = train_loader(data)
    steps = [running.step(index) for index in range(60)]  # 15 epochs: more orders than are kept
    for index in (59, 0, 31, 3, 4, 58):
        fresh = train_loader(data).step(index)
        assert np.array_equal(fresh.tokens, steps[index].tokens)
        assert np.array_equal(running.step(index).labels, steps[index].labels)


def test_every_window_comes_once_an_epoch_in_another_order_with_moved_borders(data: DataSet) -> None:
    n = (1003 - S) // S + (517 - S) // S
    loader = train_loader(data, gbs=n, mbs=n)
    assert loader.windows_per_epoch == n == 92
    shifts, orders = set(), set()
    for epoch in range(6):
        starts = loader.step(epoch).tokens[0, :, 0]
        shift = stable_key("border", SEED, epoch) % S
        expected = [0 + shift + S * i for i in range(61)] + [2000 + shift + S * i for i in range(31)]
        assert sorted(starts.tolist()) == expected
        assert starts.tolist() != expected
        shifts.add(shift)
        orders.add(tuple(starts - shift))
    assert len(shifts) > 2
    assert len(orders) == 6


def test_the_order_depends_on_the_seed_and_on_the_data(data: DataSet, counted: Path) -> None:
    first = train_loader(data).step(0).tokens

    def order(seed: int) -> list[int]:
        return (train_loader(data, seed=seed).step(0).tokens[..., 0] - stable_key("border", seed, 0) % S).reshape(-1).tolist()

    assert order(SEED) != order(SEED + 1)
    manifest = read_manifest(counted)
    other = ShardSplit("train", shards=open_shards(counted, manifest, split="train"), vocab_size=5_000, fingerprint="another")
    loader = TrainLoader(other, seq_len=S, global_batch_size=24, micro_batch_size=2, dp_rank=0, dp_size=1, seed=SEED)
    assert not np.array_equal(first, loader.step(0).tokens)


def test_the_fingerprint_knows_all_that_decides_the_samples_and_nothing_else(data: DataSet) -> None:
    def fingerprint(seq_len: int = S, seed: int = 1, split: object = data.train, gbs: int = 4, dp: int = 1) -> str:
        return TrainLoader(
            split, seq_len=seq_len, global_batch_size=gbs, micro_batch_size=2, dp_rank=0, dp_size=dp, seed=seed  # type: ignore[arg-type]
        ).fingerprint

    other = ShardSplit("train", shards=data.train.shards, vocab_size=5_000, fingerprint="another")  # type: ignore[attr-defined]
    assert len({fingerprint(), fingerprint(seq_len=8), fingerprint(seed=2), fingerprint(split=other)}) == 4
    assert fingerprint(gbs=8, dp=2) == fingerprint()


def test_a_shard_of_one_window_keeps_it_in_every_epoch(make_dataset) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset(train=[[list(range(S + 3))], [list(range(100, 100 + S + 1))], [list(range(200, 200 + S))]])
    data = open_dataset(str(folder), vocab_size=60_000, directory=folder)
    loader = train_loader(data, gbs=2, mbs=2)
    assert loader.windows_per_epoch == 2
    starts = [sorted(loader.step(epoch).tokens[0, :, 0].tolist()) for epoch in range(20)]
    assert {first for first, _ in starts} == {0, 1, 2}
    assert {second for _, second in starts} == {100}


def test_too_little_data_is_refused(make_dataset) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset(train=[[list(range(S))], [list(range(S))]])
    data = open_dataset(str(folder), vocab_size=60_000, directory=folder)
    with pytest.raises(DataError, match=r"the train split has 32 tokens, .* one window of 17 \(train.seq_len \+ 1\); lower train.seq_len"):
        train_loader(data)
    with pytest.raises(DataError, match="the valid split has 0 tokens"):
        valid_loader(data)


def test_a_batch_that_ranks_cannot_share_is_refused(data: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size \(24\) must be a multiple of .* \(2\) .* \(5\)"):
        train_loader(data, gbs=24, mbs=2, dp=5)


def test_an_id_beyond_the_vocabulary_is_refused_by_file(counted: Path) -> None:
    data = open_dataset(str(counted), vocab_size=5_000, directory=counted)
    file = counted / "train-00001.bin"
    raw = bytearray(file.read_bytes())
    raw[300 * 2 : 300 * 2 + 2] = (5_000).to_bytes(2, "little")
    file.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=rf"{file} holds ids \d+ to 5000 near token (28\d|29\d|300); ids must be in \[0, 5000\)"):
        train_loader(data, gbs=92, mbs=92).step(0)


def rows_of(loader: ValidLoader) -> np.ndarray:
    return np.stack([np.stack([batch.tokens, batch.labels]) for batch in loader])  # [batches, 2, mbs, s]


@pytest.mark.parametrize(("dp", "mbs"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_validation_is_the_first_windows_whoever_reads_them(data: DataSet, dp: int, mbs: int) -> None:
    parts = np.stack([rows_of(valid_loader(data, mbs=mbs, rank=rank, dp=dp, batches=2)) for rank in range(dp)], axis=2)
    rows = parts.reshape(2, 2, 8, S).swapaxes(1, 2).reshape(16, 2, S)
    expected = 3000 + np.arange(16)[:, None] * S + np.arange(S)
    assert np.array_equal(rows[:, 0], expected)
    assert np.array_equal(rows[:, 1], expected + 1)


def test_rows_beyond_the_end_have_no_targets(data: DataSet) -> None:
    loader = valid_loader(data, mbs=5, batches=5)  # 299 // 16 = 18 windows of 25 rows
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    assert all(batch.tokens.shape == (5, S) for batch in batches)
    tokens, labels = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels"))
    assert (labels[18:] == IGNORE_INDEX).all()
    assert (labels[:18] != IGNORE_INDEX).all()
    assert tokens.min() >= 0
    assert tokens[17, -1] == 3000 + 18 * S - 1
    again = list(loader)
    assert all(np.array_equal(one.labels, two.labels) for one, two in zip(batches, again, strict=True))


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_target_counts_are_those_of_all_ranks(data: DataSet, batches: int) -> None:
    expected = np.zeros(5_000, dtype=np.int64)
    for rank in range(2):
        for batch in valid_loader(data, mbs=3, rank=rank, dp=2, batches=batches):
            np.add.at(expected, batch.labels[batch.labels != IGNORE_INDEX], 1)
    for rank in range(2):
        assert np.array_equal(valid_loader(data, mbs=3, rank=rank, dp=2, batches=batches).target_counts(5_000), expected)


EOD = 7


@pytest.fixture
def ended(make_dataset: Callable[..., Path]) -> DataSet:
    """Documents of 1 to 40 tokens, each ending in EOD."""
    lengths = np.random.default_rng(1).integers(1, 41, size=60).tolist()
    documents = [[*range(100, 100 + length - 1), EOD] for length in lengths]
    folder = make_dataset([documents[:40]], [documents[40:]], eod_id=EOD)
    return open_dataset(str(folder), vocab_size=60_000, directory=folder)


@pytest.mark.parametrize("kind", ["train", "valid"])
def test_the_token_after_an_end_is_no_target_of_it(ended: DataSet, kind: str) -> None:
    shape = {"seq_len": S, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}

    def batches(eod_id: int | None) -> list[Batch]:
        if kind == "valid":
            return list(ValidLoader(ended.valid, **shape, batches=4, eod_id=eod_id))
        loader = TrainLoader(ended.train, **shape, global_batch_size=8, seed=SEED, eod_id=eod_id)
        return [loader.step(step) for step in range(4)]

    cut, joined = batches(EOD), batches(None)
    tokens, labels = (np.concatenate([getattr(batch, name).reshape(-1, S) for batch in cut]) for name in ("tokens", "labels"))
    following = np.concatenate([batch.labels.reshape(-1, S) for batch in joined])
    assert np.array_equal(tokens, np.concatenate([batch.tokens.reshape(-1, S) for batch in joined]))
    assert np.array_equal(labels, np.where(tokens == EOD, IGNORE_INDEX, following))
    assert (tokens == EOD).sum() > 5 and (labels == EOD).sum() > 5, "ends are targets"
    assert (tokens[:, -1] == EOD).any() or kind == "valid", "also at the end of a window"


def test_target_counts_leave_out_what_follows_an_end(ended: DataSet) -> None:
    loader = ValidLoader(ended.valid, seq_len=S, micro_batch_size=2, dp_rank=0, dp_size=1, batches=4, eod_id=EOD)
    labels = np.concatenate([batch.labels.reshape(-1) for batch in loader])
    assert np.array_equal(loader.target_counts(60_000), np.bincount(labels[labels != IGNORE_INDEX], minlength=60_000))
    assert loader.targets == (labels != IGNORE_INDEX).sum() < labels.size


@pytest.mark.parametrize("split", ["train", "valid"])
def test_documents_that_were_written_without_ends_cannot_be_cut(make_dataset: Callable[..., Path], split: str) -> None:
    """As by --no-append-eod: the tokenizer has an end of document, the tokens have not."""
    ended, open_ended = [[*range(50), EOD]], [range(50)]
    folder = make_dataset([open_ended if split == "train" else ended], [open_ended if split == "valid" else ended], eod_id=EOD)
    sources = open_sources(str(folder), "", vocab_size=60_000, directory=folder)
    with pytest.raises(DataError, match=rf"the {split} split of .* does not end with the end of a document \(eod_id 7\): .*; set "):
        sources.document_end("document")


@pytest.mark.parametrize("eod_id", [EOD, -1])
def test_documents_are_cut_at_their_end_if_they_have_one(make_dataset: Callable[..., Path], eod_id: int) -> None:
    folder = make_dataset([[[*range(50), EOD]]], eod_id=eod_id)
    sources = open_sources(str(folder), "", vocab_size=60_000, directory=folder)
    assert sources.document_end("causal") is None
    if eod_id == EOD:
        assert sources.document_end("document") == EOD
        return
    with pytest.raises(DataError, match=r"data.attention is document, but data.path \(.*\) has no token that ends a document .*; set "):
        sources.document_end("document")


def test_tokens_that_no_window_holds_are_known(make_dataset: Callable[..., Path]) -> None:
    """Shards of 5 windows and of less than one."""
    folder = make_dataset([[range(5 * S + 1)], [range(S)]])
    loader = train_loader(open_dataset(str(folder), vocab_size=60_000, directory=folder))
    assert loader.unread() == [pytest.approx(1 - loader.windows_per_epoch * S / (6 * S + 1))]
    assert loader.windows_per_epoch == 4, "one of five is room for borders to move"


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([3, 3, 0, 3, 3])) == pytest.approx(np.log(4))
    assert unigram_entropy(np.array([7, 0])) == pytest.approx(0.0)
    assert unigram_entropy(np.array([1, 3])) == pytest.approx(0.25 * np.log(4) + 0.75 * np.log(4 / 3))
    with pytest.raises(ValueError, match="no tokens"):
        unigram_entropy(np.zeros(3, dtype=np.int64))


def test_a_step_costs_nothing(data: DataSet) -> None:
    from time import thread_time

    loader = train_loader(data, gbs=8, mbs=2)
    loader.step(0)
    begin = thread_time()
    for index in range(200):
        loader.step(index % 8)
    assert (thread_time() - begin) / 200 < 1e-3  # seconds of CPU


def test_batches_are_frozen(data: DataSet) -> None:
    batch = train_loader(data).step(0)
    assert isinstance(batch, Batch)
    with pytest.raises(AttributeError):
        batch.tokens = batch.labels  # type: ignore[misc]
