"""Blends: Megatron's order, counts near the weights in any window, members that go on counting, weights that change, names of sets."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from time import thread_time

import numpy as np
import pytest

from megagate.config.blend_text import PERIOD, Weights, quotas_of
from megagate.data.blend import Blend, BlendSchedule, greedy_order
from megagate.data.hashing import IntArray
from megagate.data.loader import TrainLoader
from megagate.data.order import order_differences
from megagate.data.sources import Sources, open_sources, prepare_sources
from megagate.data.synthetic import SyntheticSplit
from megagate.errors import DataError

S = 16
WINDOW = 10_000


def fractions(*weights: float | str) -> tuple[Fraction, ...]:
    return tuple(Fraction(weight) for weight in weights)


def schedule(*weights: float | str) -> BlendSchedule:
    return BlendSchedule([Weights(0, fractions(*weights))])


def megatron(weights: Sequence[float], size: int) -> tuple[IntArray, IntArray]:
    """[size] data sets and [size] their own samples, by the helper that megatron-core's wheel holds compiled.

    It is loaded by its file: the package above it takes half a minute to import.
    """
    place = find_spec("megatron")
    assert place and place.submodule_search_locations, "megatron-core is one of the requirements of the tests"
    (file,) = (file for root in place.submodule_search_locations for file in Path(root).glob("core/datasets/helpers_cpp*.so"))
    spec = spec_from_file_location("helpers_cpp", file)
    assert spec and spec.loader
    helpers = module_from_spec(spec)
    spec.loader.exec_module(helpers)
    members, own = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(members, own, np.array(weights, dtype=np.float64), len(weights), size, False)
    return members.astype(np.int64), own


def random_weights(draw: random.Random) -> list[Fraction]:
    """Of 1 to 300 members: even, skewed, nearly equal, or one large with many small."""
    members = draw.choice([1, 2, 3, 4, 7, 16, 50, 300])
    kind = draw.randrange(4)
    if kind == 0:
        return [Fraction(draw.randint(20, 1000)) for _ in range(members)]
    if kind == 1:
        return [Fraction(draw.randint(10, 40)) ** 2 for _ in range(members)]
    if kind == 2:
        return [Fraction(100_000 + draw.randint(0, 9)) for _ in range(members)]
    return [Fraction(members * draw.randint(1, 20)), *[Fraction(1)] * (members - 1)]


# ---- the schedule


@pytest.mark.parametrize("members", [1, 2, 3, 5, 17, 64, 300, 2_000])
def test_a_period_is_megatrons_order(members: int) -> None:
    draw = random.Random(members)
    cuts = sorted(draw.sample(range(1, PERIOD), members - 1))
    quotas = np.diff([0, *cuts, PERIOD])
    assert quotas_of([Fraction(int(quota), 7) for quota in quotas]) == quotas.tolist(), "multiples of 1/P are kept as they are"
    found = schedule(*quotas.tolist()).lookup(np.arange(PERIOD))
    assert all(np.array_equal(*pair) for pair in zip(found, megatron(quotas / PERIOD, PERIOD), strict=True))


@pytest.mark.parametrize("weights", [("0.5", "0.5"), ("1", "1", "1", "1"), ("0.25", "0.5", "0.25"), ("0.25", "0", "0.75")])
def test_ties_go_to_the_first_as_in_megatron(weights: tuple[str, ...]) -> None:
    total = sum(map(float, weights))
    expected, _ = megatron([float(weight) / total for weight in weights], 100)
    assert np.array_equal(schedule(*weights).lookup(np.arange(100))[0], expected)


def deviation(weights: Sequence[Fraction], length: int) -> float:
    """The largest distance between a member's count and its weight, over every window of `length` samples of an endless run.

    With E(g) = count before g - g * share of slots, which repeats with the period, the count of [g, g + length) is E(g + length) - E(g)
    plus the slots' share of it: all starts in one period are all windows.
    """
    blend = BlendSchedule([Weights(0, tuple(weights))])
    members, _ = blend.lookup(np.arange(PERIOD + length))
    total, worst = sum(weights), 0.0
    for member, weight in enumerate(weights):
        before = np.concatenate([[0], np.cumsum(members == member)])
        counts = before[length:] - before[:-length]
        worst = max(worst, float(np.abs(counts - float(weight / total) * length).max()))
    return worst


HARD = {
    "as many as there may be": [1] * 2_000,
    "one large, many of one slot": [PERIOD - 199, *[1] * 199],
    "half large": [999, *[1] * 999],
    "two kinds": [1] * 500 + [7] * 501,
    "of Zipf's law": [PERIOD // (8 + rank) for rank in range(1_000)],
    "each a little less": [100_000 // (1_000 - rank) + 60 for rank in range(1_000)],
    "without common divisors": [(2, 3, 5, 7, 11, 13, 17)[rank % 7] for rank in range(1_999)],
}


@pytest.mark.parametrize("weights", HARD.values(), ids=HARD)
def test_counts_of_any_window_of_many_are_near_the_weights(weights: list[int]) -> None:
    assert deviation([Fraction(weight) for weight in weights], WINDOW) < 4, "the law allows 10"


def test_counts_of_any_window_are_near_the_weights() -> None:
    draw = random.Random(5)
    found = [deviation(random_weights(draw), WINDOW) for _ in range(60)]
    assert max(found) < 4, "the law allows 10"
    assert max(found) > 0.5, "the measure sees nothing"


def test_counts_of_windows_over_a_change_are_near_both_weights() -> None:
    draw = random.Random(6)
    for _ in range(20):
        members = draw.choice([2, 5, 40, 300])
        one, other = ([Fraction(draw.randint(20, 1000)) for _ in range(members)] for _ in range(2))
        change = draw.randrange(1, 3 * PERIOD)
        blend = BlendSchedule([Weights(0, tuple(one)), Weights(change, tuple(other))])
        shares = [np.array([float(weight / sum(weights)) for weight in weights]) for weights in (one, other)]
        for first in range(max(0, change - WINDOW), change, 997):
            before = min(change - first, WINDOW)
            expected = shares[0] * before + shares[1] * (WINDOW - before)
            assert np.abs(blend.counts(first + WINDOW) - blend.counts(first) - expected).max() < 6, "the law allows 10"


@pytest.mark.parametrize("members", [2, 10, 100, 2_000])
def test_no_member_is_further_off_than_the_proof_says(members: int) -> None:
    draw = random.Random(members)
    for _ in range(3):
        weights = [Fraction(draw.randint(400, 1000)) for _ in range(members)]
        quotas = np.array(quotas_of(weights))
        deficits = np.zeros(members)
        lowest = highest = 0.0
        for chosen in greedy_order(quotas).tolist():
            deficits += quotas / PERIOD
            deficits[chosen] -= 1
            lowest, highest = min(lowest, deficits[chosen]), max(highest, float(deficits.max()))
        assert -1 < lowest
        assert highest < sum(1 / index for index in range(1, members)) + 1e-9
        assert np.abs(deficits).max() < 1e-6, "a period ends where it began"


def runs_of(blend: BlendSchedule, size: int) -> list[list[int]]:
    """Each member's own sample numbers in the order of the run."""
    members, own = blend.lookup(np.arange(size))
    return [own[members == member].tolist() for member in range(blend.members)]


def test_members_count_without_gaps_over_periods_and_changes_of_weights() -> None:
    parts = [
        Weights(0, fractions("0.7", "0.3", 0)),
        Weights(1_000, fractions("0.1", "0.4", "0.5")),
        Weights(2 * PERIOD + 77, fractions(0, 1, 1)),
        Weights(2 * PERIOD + 78, fractions(1, 1, 1)),
    ]
    blend = BlendSchedule(parts)
    size = 4 * PERIOD + 1_000
    found = runs_of(blend, size)
    assert [run == list(range(len(run))) for run in found] == [True] * 3
    members, own = blend.lookup(np.arange(size))
    for sample in (0, 1, 999, 1_000, 1_001, 1_000 + PERIOD, 2 * PERIOD + 77, 2 * PERIOD + 78, size):
        assert blend.counts(sample).tolist() == np.bincount(members[:sample], minlength=3).tolist()
    assert 2 not in members[:1_000] and 2 in members[1_000:1_003]
    assert np.bincount(members[1_000:11_000]) == pytest.approx([1_000, 4_000, 5_000], abs=3)
    shuffled = np.random.default_rng(0).permutation(size)
    assert all(np.array_equal(one[shuffled], other) for one, other in zip((members, own), blend.lookup(shuffled), strict=True))


def test_weights_before_a_change_do_not_know_of_it() -> None:
    now, later = Weights(0, fractions("0.7", "0.3")), Weights(5_000, fractions("0.2", "0.8"))
    samples = np.arange(5_000)
    for one, other in zip(BlendSchedule([now]).lookup(samples), BlendSchedule([now, later]).lookup(samples), strict=True):
        assert np.array_equal(one, other)


def test_any_sample_costs_the_same() -> None:
    begin = thread_time()
    blend = schedule(*range(1, 101))
    assert thread_time() - begin < 0.25  # seconds of CPU; 0.02 on a quiet machine
    far = 10**15 + np.arange(1_024)
    begin = thread_time()
    for _ in range(20):
        members, own = blend.lookup(far)
    assert (thread_time() - begin) / 20 / far.size < 3e-6
    shares = np.arange(1, 101) / 5050
    assert np.abs(own - far * shares[members]).max() / 1e15 < 1 / PERIOD


# ---- loading


@pytest.fixture
def places(make_dataset, tmp_path: Path) -> list[str]:  # type: ignore[no-untyped-def]
    """Three data sets whose tokens tell set and place: 100,000 * set + place; 60, 25 and 10 windows; the first two have validation."""
    for number, (name, windows) in enumerate((("a", 60), ("b", 25), ("c", 10))):
        tokens = [100_000 * number + place for place in range((windows + 1) * S)]
        valid = [[[100_000 * number + 90_000 + place for place in range(5 * S + 1)]]] if number < 2 else []
        make_dataset(train=[[tokens]], valid=valid, vocab_size=300_000, name=name)
    return [str(tmp_path / name) for name in "abc"]


def sources(path: str, valid: str = "") -> Sources:
    return open_sources(path, valid, vocab_size=300_000, directory=Path("unused"))


def loader(path: str, *, gbs: int = 24, mbs: int = 2, rank: int = 0, dp: int = 1, seed: int = 3) -> TrainLoader:
    data = sources(path).train
    return TrainLoader(data, seq_len=S, global_batch_size=gbs, micro_batch_size=mbs, dp_rank=rank, dp_size=dp, seed=seed)


def samples_of(path: str, steps: int) -> IntArray:
    """[steps * gbs, s] tokens of the first samples of a run."""
    one = loader(path, mbs=24)
    return np.concatenate([one.step(index).tokens[0] for index in range(steps)])


def test_each_data_set_comes_in_its_own_order_and_epochs(places: list[str]) -> None:
    a, b, c = places
    blend = samples_of(f"0.5 {a} 0.3 {b} 0.2 {c}", steps=20)
    owners = blend[:, 0] // 100_000
    assert np.bincount(owners) == pytest.approx([240, 144, 96], abs=2)
    for member, place in enumerate(places):
        alone = samples_of(place, steps=20)
        mine = blend[owners == member]
        assert len(mine) > 60, "more than an epoch"
        assert np.array_equal(mine, alone[: len(mine)])
    assert loader(f"0.5 {a} 0.3 {b} 0.2 {c}").epochs(480) == pytest.approx([4.0, 144 / 25, 9.6], abs=0.2)


def test_a_blend_of_one_is_the_data_set(places: list[str]) -> None:
    for text in (f"1 {places[0]}", f"0.3 {places[0]}", f"0 {places[1]} 2 {places[0]}"):
        assert np.array_equal(samples_of(text, steps=6), samples_of(places[0], steps=6))
        assert loader(text).fingerprint == loader(places[0]).fingerprint
    split = sources(places[0]).train.members[0]
    bare = TrainLoader(split, seq_len=S, global_batch_size=24, micro_batch_size=24, dp_rank=0, dp_size=1, seed=3)
    assert np.array_equal(bare.step(2).tokens[0], samples_of(places[0], steps=3)[48:])
    assert bare.fingerprint == loader(places[0]).fingerprint and sources(places[0]).fingerprint == split.fingerprint


@pytest.mark.parametrize(("dp", "mbs"), [(2, 3), (4, 2), (8, 3)])
def test_ranks_together_hold_the_blend(places: list[str], dp: int, mbs: int) -> None:
    text = f"0.6 {places[0]} 0.4 {places[1]} from 30 0.5 {places[1]} 0.5 {places[2]}"
    for step in (0, 1, 9):
        ranks = [loader(text, mbs=mbs, rank=rank, dp=dp) for rank in range(dp)]
        joined = np.stack([one.step(step).tokens for one in ranks], axis=1).reshape(24, S)  # [a, dp, mbs, s]
        assert np.array_equal(joined, loader(text, mbs=24).step(step).tokens[0])
        (first, last), sets = (found := ranks[-1].origins(step)).samples, found.sets
        assert sorted(np.concatenate([one.samples(step).reshape(-1) for one in ranks])) == list(range(first, last + 1))
        counts = np.bincount(joined[:, 0] // 100_000, minlength=3).tolist()
        assert sum(sets.values()) == 24 and sets == {place: count for place, count in zip(places, counts, strict=True) if count}


def test_a_run_may_go_on_under_new_weights(places: list[str]) -> None:
    a, b, c = places
    before, after = f"0.6 {a} 0.4 {b}", f"0.6 {a} 0.4 {b} from 48 0.5 {a} 0.5 {c}"
    assert np.array_equal(samples_of(before, steps=2), samples_of(after, steps=2))
    assert not np.array_equal(samples_of(before, steps=3), samples_of(after, steps=3))
    one, other = loader(before), loader(after)
    assert one.fingerprint != other.fingerprint
    assert [one.fingerprint_at(sample) == other.fingerprint_at(sample) for sample in (0, 1, 48, 49, 96)] == [True] * 3 + [False] * 2
    assert loader(before).fingerprint_at(0) == other.fingerprint_at(0) == one.fingerprint
    assert loader(a).fingerprint_at(48) == loader(f"1 {a} from 48 1 {a} 1 {b}").fingerprint_at(48)
    assert loader(a).fingerprint_at(49) != loader(f"1 {a} from 48 1 {a} 1 {b}").fingerprint_at(49)


def test_the_fingerprint_knows_data_sets_order_and_weights(places: list[str]) -> None:
    a, b, c = places
    texts = [f"1 {a} 1 {b}", f"1 {b} 1 {a}", f"1 {a} 2 {b}", f"1 {a} 1 {c}", f"1 {a} 1 {b} from 9 1 {a}", a]
    assert len({loader(text).fingerprint for text in texts}) == len({sources(text).fingerprint for text in texts}) == len(texts)
    assert loader(f"1 {a} 1 {b}").fingerprint == loader(f"0.5 {a} 0.5 {b}").fingerprint == loader(f"1 {a} 1 {b} 0 {c}").fingerprint
    assert loader(texts[0]).fingerprint != loader(texts[0], seed=4).fingerprint
    assert sources(a).fingerprint != sources(a, f"x={b}").fingerprint


def changes(there: TrainLoader, here: TrainLoader, samples: int = 48) -> list[str]:
    """By way of a checkpoint's JSON."""
    return order_differences(json.loads(json.dumps(there.order_at(samples))), here.order_at(samples))


def test_what_changed_is_told_by_name(places: list[str], tmp_path: Path) -> None:
    a, b, c = places
    both = loader(f"1 {a} 1 {b}")
    assert changes(both, loader(f"0.5 {a} 0.5 {b} from 48 1 {c}")) == []
    assert both.order_at(48)["order"] == both.fingerprint_at(48) and both.order_at(48)["samples"] == 48
    assert changes(both, loader(f"1 {a} 1 {b}", seed=4)) == ["train.seed 3 there, 4 here"]
    assert changes(both, loader(f"1 {a} 3 {b}")) == [f"weights `0.5 {a} 0.5 {b}` there, `0.25 {a} 0.75 {b}` here"]
    assert changes(both, loader(f"1 {a} 1 {b} from 9 1 {a}")) == [f"weights `0.5 {a} 0.5 {b}` there, `0.5 {a} 0.5 {b} from 9 1 {a}` here"]
    assert changes(both, loader(f"1 {b} 1 {a}")) == [f"weights `0.5 {a} 0.5 {b}` there, `0.5 {b} 0.5 {a}` here"]
    assert changes(both, loader(f"1 {a} 1 {c}")) == [f"{b} only there", f"{c} only here"]
    assert changes(loader(a), both) == [f"{b} only here"]
    (tmp_path / "moved").symlink_to(b)
    assert changes(both, loader(f"1 {a} 1 {tmp_path}/moved")) == [], "the same data set elsewhere"


def test_a_data_set_whose_tokens_changed_is_named(places: list[str], make_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    a, b, _ = places
    before, alone = loader(f"1 {a} 1 {b}"), loader(b)
    shutil.rmtree(b)
    make_dataset(train=[[list(range(500, 1_000))]], vocab_size=300_000, name="b")
    (one,) = changes(before, loader(f"1 {a} 1 {b}"))
    assert re.fullmatch(rf"{b} holds other tokens, fingerprint [0-9a-f]{{12}} there, [0-9a-f]{{12}} here", one)
    (one,) = changes(alone, loader(b))
    assert one.startswith("data.path holds other tokens, fingerprint ")
    assert order_differences({"order": "a", "samples": 8}, before.order_at(8)) == [], "a checkpoint that says no more than the hash"


# ---- what is refused


def test_data_sets_of_different_tokenizers_are_refused(places: list[str], make_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make_dataset(train=[[list(range(400))]], valid=[[list(range(400))]], vocab_size=200_000, name="other")
    match = r"a and .*other were made by different tokenizers \(vocab_size '300000' and '200000'\); one model has one vocabulary"
    with pytest.raises(DataError, match=match):
        sources(f"1 {places[0]} 1 {tmp_path / 'other'}")
    with pytest.raises(DataError, match=match):
        sources(places[0], f"other={tmp_path / 'other'}")
    with pytest.raises(DataError, match=r"synthetic were made by different tokenizers \(kind 'none' and 'synthetic'\)"):
        sources(f"1 {places[0]} 1 synthetic")


def test_the_same_tokens_twice_are_refused(places: list[str]) -> None:
    with pytest.raises(DataError, match=r"a and .*/b/\.\./a hold the same tokens .* name one of them, with the sum"):
        sources(f"1 {places[0]} 1 {places[1]}/../a")


def test_a_data_set_of_a_blend_that_is_too_short_is_named(places: list[str], make_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make_dataset(train=[[list(range(S))]], vocab_size=300_000, name="short")
    with pytest.raises(DataError, match=f"the train split of {tmp_path}/short has 16 tokens"):
        loader(f"1 {places[0]} 1 {tmp_path}/short")


# ---- names and places


def test_validation_sets_have_names(places: list[str], make_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    a, b, c = places
    assert list(sources(a).valid) == [""] and list(sources(c).valid) == []
    own = sources(f"1 {a} 1 {b} 1 {c}")
    assert {name: split.tokens for name, split in own.valid.items()} == {"a": 5 * S + 1, "b": 5 * S + 1}
    assert own.describe().startswith(f"1 {a} 1 {b} 1 {c}: 1,568 training and 162 validation tokens (a, b), vocabulary 300,000")
    named = sources(a, f"old={a} new={b}")
    assert {name: int(split.windows(S, movable=False).read(np.array([0]))[0, 0]) for name, split in named.valid.items()} == {
        "old": 90_000,
        "new": 190_000,
    }
    with pytest.raises(DataError, match=r"data.valid: x \(.*/c\) has no validation tokens"):
        sources(a, f"x={c}")
    (tmp_path / "deep").mkdir()
    other = make_dataset(train=[[list(range(400))]], valid=[[list(range(400))]], vocab_size=300_000, name="deep/b")
    with pytest.raises(DataError, match=f"both name their validation set b; name them in data.valid, as in first={b} second={other}"):
        sources(f"1 {a} 1 {b} 1 {other}")
    assert list(sources(f"1 {a} 1 {b} 1 {other}", f"x={other}").valid) == ["x"]


def test_embedded_may_be_in_a_blend(embedded_directory: Path, embedded_vocabulary: int) -> None:
    settings = {"vocab_size": embedded_vocabulary, "directory": embedded_directory}
    prepare_sources("1 embedded", "", **settings)
    data = open_sources("1 embedded", "text=embedded", **settings)
    assert isinstance(data.train, Blend) and data.tokenizer is not None and list(data.valid) == ["text"]


# ---- the promise to checkpoints that are there already


def digest(one: TrainLoader) -> str:
    return hashlib.sha256(b"".join(one.step(step).tokens.tobytes() for step in (0, 1, 1_000, 10**9))).hexdigest()


def test_orders_stay_what_they_are() -> None:
    """Computed by the code before there were blends, and of a blend by the first that had them: a new value is a new version."""
    settings = {"seq_len": 32, "global_batch_size": 8, "micro_batch_size": 2, "dp_rank": 1, "dp_size": 2, "seed": 5}
    one = TrainLoader(SyntheticSplit("train", vocab_size=100), **settings)
    assert one.fingerprint == "ff5a7fadcfebf39535b4fdee859d729c1fd1228f3873bc6c3bf85f1ed786589b"
    assert digest(one) == "15824c8cdf7794377351a110c283e83af9b01555ac0857b0759fcf77efa7f32a"
    members = [SyntheticSplit("train", vocab_size=100, seed=seed) for seed in (0, 1)]
    weights = [Weights(0, fractions("0.7", "0.3")), Weights(9, fractions("0.2", "0.8"))]
    blend = TrainLoader(Blend(members, weights, names="ab"), **settings)
    assert blend.fingerprint == "5a0b77820aa083f503a28623c65389ba787b98cbf4238da701c8dfc16f91560d"
    assert digest(blend) == "b8855bfa55c9d697738f3849fa6a6ec4aec4487ac8fc89dceb6969128effe1cd"
