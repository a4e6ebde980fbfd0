"""Hostile files: whatever the bytes, readers give a correct object or one `DataError` that names the file, in little memory."""

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megagate.data.blend import BlendSchedule
from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.concatenate import document_blocks
from megagate.data.dataset import open_dataset
from megagate.data.hashing import canonical_sha256
from megagate.data.inspection import lengths_of, open_input
from megagate.data.manifest import MANIFEST_NAME, verify
from megagate.data.merge.plan import make_merge, named_maker, publish_merge
from megagate.data.merge.run import run_merge, work_left
from megagate.data.preprocess.plan import Settings, make_plan, publish_plan
from megagate.data.preprocess.publish import finalize
from megagate.data.preprocess.units import read_record, write_unit
from megagate.data.shards import Shard, ShardWriter, bin_path, idx_path
from megagate.data.sources import parse_blend, parse_valid
from megagate.errors import ConfigError, DataError

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
COUNTS = st.integers(0, 6) | st.sampled_from([2**16, 2**31 - 1, 2**31, 2**32, 2**60, 2**61 - 3, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
WORDS = st.integers(-3, 12) | st.sampled_from([2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63), 1 << 32])


@pytest.fixture(autouse=True)
def memory_is_traced() -> Iterator[None]:
    """For `only_data_errors`: no header's promise may be allocated."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def look(prefix: Path) -> None:
    """Reads a shard in every way; of one that is accepted every way must tell the same."""
    if not only_data_errors(lambda: Shard(prefix).check_index(), naming=prefix):
        return
    shard = Shard(prefix)
    documents = [shard.document(i) for i in range(shard.documents)]
    assert sum(document.size for document in documents) == shard.tokens == shard.stream.size
    if documents:
        assert np.array_equal(np.concatenate(documents), shard.stream)
    blocks = list(document_blocks(shard))
    assert [size for _, _, lengths in blocks for size in lengths.tolist()] == [document.size for document in documents]
    assert sum(ids.size for _, ids, _ in blocks) == shard.tokens
    lengths = lengths_of([shard], window=2)
    assert (lengths.documents, lengths.longer) == (len(documents), sum(document.size > 2 for document in documents))


def write_index(prefix: Path, code: int, counts: tuple[int, int], arrays: tuple[list[int], list[int], list[int]]) -> None:
    body = b"".join(np.array(values).astype(kind).tobytes() for values, kind in zip(arrays, ("<i4", "<i8", "<i8"), strict=True))
    idx_path(prefix).write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, *counts) + body)


@FUZZ
@given(raw=st.binary(max_size=120), tokens=st.binary(max_size=40))
def test_any_bytes_as_an_index(tmp_path: Path, raw: bytes, tokens: bytes) -> None:
    idx_path(tmp_path / "a").write_bytes(raw)
    bin_path(tmp_path / "a").write_bytes(tokens)
    look(tmp_path / "a")


@FUZZ
@given(code=st.integers(0, 9), sequences=COUNTS, borders=COUNTS, data=st.data(), size=st.integers(0, 40))
def test_any_counts_and_numbers_in_an_index(
    tmp_path: Path, code: int, sequences: int, borders: int, data: st.DataObject, size: int
) -> None:
    """The arrays have the promised sizes where these are small, so that the numbers in them are looked at."""
    small, few = min(sequences, 6), min(borders, 6)
    arrays = tuple(data.draw(st.lists(WORDS, min_size=count, max_size=count)) for count in (small, small, few))
    bin_path(tmp_path / "a").write_bytes(bytes(size))
    write_index(tmp_path / "a", code, (sequences, borders), arrays)  # type: ignore[arg-type]
    look(tmp_path / "a")


@FUZZ
@given(
    lengths=st.lists(st.integers(0, 5), max_size=6),
    cuts=st.lists(st.integers(0, 6), max_size=6),
    place=st.tuples(st.integers(0, 2), st.integers(0, 6)),
    value=st.none() | WORDS,
)
@example(lengths=[2, 3], cuts=[1], place=(2, 0), value=1)  # tokens before the first document
@example(lengths=[2, 3], cuts=[1], place=(2, 1), value=2**62)
@example(lengths=[2, 3], cuts=[1], place=(0, 0), value=-1)
def test_an_index_with_one_wrong_number(
    tmp_path: Path, lengths: list[int], cuts: list[int], place: tuple[int, int], value: int | None
) -> None:
    """Documents of several or no sequences; without a wrong number it is accepted."""
    starts = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    borders = [0, *sorted(min(cut, len(lengths)) for cut in cuts), len(lengths)]
    arrays = (list(lengths), starts, borders)
    if value is not None and arrays[place[0]]:
        arrays[place[0]][place[1] % len(arrays[place[0]])] = value
    bin_path(tmp_path / "a").write_bytes(np.arange(sum(lengths)).astype("<u2").tobytes())
    write_index(tmp_path / "a", 8, (len(lengths), len(borders)), arrays)
    if value is None:
        Shard(tmp_path / "a").check_index()
    look(tmp_path / "a")


@pytest.mark.parametrize("counts", [(2**62, 1), (2**61, 2**60 + 1), (0, 2**61 + 1), (2**64 - 2, 4)])
def test_counts_whose_bytes_overflow_64_bits(tmp_path: Path, counts: tuple[int, int]) -> None:
    """Their size modulo 2**64 is that of the file."""
    promised = 12 * counts[0] + 8 * counts[1]
    size = promised % 2**64
    assert size < 100 < promised
    idx_path(tmp_path / "a").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, *counts) + bytes(size))
    bin_path(tmp_path / "a").write_bytes(b"")
    with pytest.raises(DataError, match=f"a.idx is truncated: {34 + size} bytes, and its header promises {34 + promised}"):
        Shard(tmp_path / "a")


NAMES = st.text(max_size=6) | st.sampled_from(["\0", "\ud800", "..", ".", "", "/", "x" * 5000, "train-00000", "tokenizer.json"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**4299, 2**63, -(2**63), 2**64])
    | st.floats()
    | NAMES
    | st.sampled_from(["tokenizers", "bytes", "none", "int32", "uint16", "train", "valid"])
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5)
DEEP = st.integers(900, 1010)


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *places(node[key])]]


def mutated(value: Any, where: int, new: Any, how: str) -> bytes:
    """A JSON text in which one value is replaced, removed, or put into many lists."""
    value = json.loads(json.dumps(value))
    node, key = (found := places(value))[where % len(found)]
    if how == "remove":
        del node[key]
    elif how != "nest":
        node[key] = new
    else:
        node[key] = "MARK"
        depth = 900 + where % 100
        return json.dumps(value).replace('"MARK"', "[" * depth + "]" * depth).encode()
    if isinstance(value, dict) and "fingerprint" in value and how == "sign":
        del value["fingerprint"]
        value["fingerprint"] = canonical_sha256(value)
    return json.dumps(value).encode()


MUTATION = {"where": st.integers(0, 10_000), "new": JSON, "how": st.sampled_from(["sign", "sign", "replace", "remove", "nest"])}


def only_data_errors(action: Callable[[], object], *, naming: Path) -> bool:
    """Whether it succeeds; it may fail in one way, and take little memory beside what the tests themselves hold."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        action()
    except DataError as error:
        assert str(naming) in str(error) and len(str(error)) < 12_000
        str(error).encode()  # it can be printed
        return False
    finally:
        assert tracemalloc.get_traced_memory()[1] - before < 16 << 20
    return True


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bare shard, a finished preprocessing, and merges: one finished, one without its manifest."""
    place = tmp_path_factory.mktemp("good")
    with ShardWriter(place / "bare", dtype=np.dtype("<u2")) as writer:
        writer.add([1, 2, 256])
    (place / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    plan = make_plan([str(place / "a.jsonl")], Settings(tokenizer=ByteTokenizer().identity()))
    publish_plan(place / "set", plan)
    (place / "set/units").mkdir()
    write_unit(plan, 0, folder=place / "set", encoder=ByteTokenizer(), on_error="stop", report=lambda _: None)
    finalize(place / "set", plan)
    merge = make_merge([(str(place / "bare"), None), (str(place / "set"), None)], maker=named_maker("bytes"))
    publish_merge(place / "merged", merge)
    run_merge(place / "merged", merge)
    return place


@FUZZ
@given(**MUTATION)
@example(where=2042, new=0, how="sign")  # the size of an .idx, which only one of the two ways to open compared
def test_mutated_manifests(good: Path, where: int, new: object, how: str) -> None:
    folder = good / "fuzzed"
    if not folder.exists():
        shutil.copytree(good / "merged", folder)
    text = json.loads((good / "merged" / MANIFEST_NAME).read_text())
    try:
        raw = mutated(text, where, new, how)
    except (ValueError, RecursionError):
        return  # no JSON that could be written
    (folder / MANIFEST_NAME).write_bytes(raw)
    opened = only_data_errors(lambda: open_dataset(str(folder), vocab_size=10**9, directory=good), naming=folder)
    assert only_data_errors(lambda: open_input(str(folder)), naming=folder) == opened
    only_data_errors(lambda: verify(folder), naming=folder)
    if opened:
        data = open_dataset(str(folder), vocab_size=10**9, directory=good)
        data.train.windows(2, movable=True).read(np.array([0]))


@FUZZ
@given(raw=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), cut=st.integers(0, 2000), flip=st.integers(0, 2000))
def test_any_bytes_as_any_json(good: Path, raw: bytes, cut: int, flip: int) -> None:
    """Manifests, plans and records: any bytes, and good ones cut off or with a byte changed."""
    folder = good / "bytes"
    if not folder.exists():
        shutil.copytree(good / "merged", folder)
    merge = make_merge([(str(good / "bare"), None), (str(good / "set"), None)], maker=named_maker("bytes"))
    ways: dict[str, Callable[[], object]] = {
        MANIFEST_NAME: lambda: open_input(str(folder)),
        "plan.json": lambda: publish_merge(folder, merge),
    }
    for name, read in ways.items():
        text = (good / "merged" / name).read_bytes()
        at = flip % len(text)
        for found in (raw, text[: cut % (len(text) - 1)], text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]):
            (folder / name).write_bytes(found)
            assert not only_data_errors(read, naming=folder)
            assert (folder / name).read_bytes() == found
        (folder / name).write_bytes(text)
        assert only_data_errors(read, naming=folder)


@FUZZ
@given(**MUTATION)
def test_mutated_plans(good: Path, where: int, new: object, how: str) -> None:
    plan = make_plan([str(good / "a.jsonl")], Settings(tokenizer=ByteTokenizer().identity()))
    merge = make_merge([(str(good / "bare"), None), (str(good / "set"), None)], maker=named_maker("bytes"))
    ways = [(plan.body(), lambda folder: publish_plan(folder, plan)), (merge.body(), lambda folder: publish_merge(folder, merge))]
    for body, publish in ways:
        folder = good / "plans"
        folder.mkdir(exist_ok=True)
        try:
            raw = mutated(body, where, new, how)
        except (ValueError, RecursionError):
            return
        (folder / "plan.json").write_bytes(raw)
        if only_data_errors(lambda folder=folder, publish=publish: publish(folder), naming=folder):
            assert json.loads(raw) == body
        assert (folder / "plan.json").read_bytes() == raw


@FUZZ
@given(**MUTATION)
def test_mutated_records(good: Path, where: int, new: object, how: str) -> None:
    plan = make_plan([str(good / "a.jsonl")], Settings(tokenizer=ByteTokenizer().identity()))
    merge = make_merge([(str(good / "bare"), None), (str(good / "set"), None)], maker=named_maker("bytes"))
    for name, record in (("set", "units/part-00000.json"), ("merged", "merged/train-00000.json")):
        folder = good / f"records-{name}"
        if not folder.exists():
            shutil.copytree(good / name, folder)
            (folder / MANIFEST_NAME).unlink()
        try:
            raw = mutated(json.loads((good / name / record).read_text()), where, new, how)
        except (ValueError, RecursionError):
            return
        (folder / record).write_bytes(raw)

        def read(folder: Path = folder, name: str = name) -> None:
            if name == "merged":
                work_left(folder, merge, copy=False)
                return
            found = read_record(folder, plan.sha256, 0)
            assert found is not None
            json.dumps(asdict(found))

        if only_data_errors(read, naming=folder) and name == "set":
            only_data_errors(lambda folder=folder: finalize(folder, plan), naming=folder)
            (folder / MANIFEST_NAME).unlink(missing_ok=True)


NUMBERS = ["1", "0", "0.5", ".5", "1.", "1e-9", "1e99", "9" * 5000, "9" * 40, "-1", "nan", "²"]
BLEND_WORDS = st.sampled_from(["from", "/a", "/b", "'", '"x y"', *NUMBERS])


@FUZZ
@given(text=st.text(max_size=30) | st.lists(BLEND_WORDS | NAMES, max_size=9).map(" ".join))
@example(text="9" * 5000 + " /a 1 /b")
@example(text="1 /a from " + "9" * 5000 + " 1 /b")
@example(text="9" * 400 + " /a 1e-99 /b")
def test_any_text_as_a_blend(text: str) -> None:
    try:
        found = parse_blend(text)
        assert found.paths and len(set(found.paths)) == len(found.paths)
        BlendSchedule(found.weights)
    except ConfigError as error:
        assert str(error).startswith("data.path: ")
    try:
        assert all(name and path for name, path in parse_valid(text).items())
    except ConfigError as error:
        assert str(error).startswith("data.valid: ")
