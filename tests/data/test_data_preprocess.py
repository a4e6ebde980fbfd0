"""Preprocessing as a library: what is read out of each kind of file, cutting into units, bad input."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preprocess_helpers import BYTES, TEXTS, lines_of, prepare

from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.manifest import open_shards, read_manifest, verify
from megagate.data.preprocess.plan import Plan, make_plan, parse_range, publish_plan, unit_size
from megagate.data.preprocess.publish import finalize
from megagate.data.preprocess.readers import BadDocument, Document, Kind, Part, read_part
from megagate.data.preprocess.tokenizer_source import find_tokenizer
from megagate.data.preprocess.units import Progress, UnitWriter, missing_units, write_unit
from megagate.data.tokenizer import Tokenizer, load_tokenizer
from megagate.errors import DataError


def read(path: Path, kind: Kind, begin: int = 0, end: int | None = None, *, longest: int = 1 << 20) -> list[Document | BadDocument]:
    part = Part(str(path), kind, begin, path.stat().st_size if end is None else end)
    return list(read_part(part, text_key="text", longest=longest))


def texts_of(found: Sequence[Document | BadDocument]) -> list[str]:
    assert all(isinstance(item, Document) for item in found), found
    return [item.text for item in found if isinstance(item, Document)]


def pieces_of(plan: Plan) -> list[list[tuple[int, int, int]]]:
    """(source, begin, end) of all pieces, by unit."""
    return [[(piece.source, piece.begin, piece.end) for piece in unit.pieces] for unit in plan.units]


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet
    import zstandard

    raw = lines_of(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(raw)
    half = raw.index(b"\n", len(raw) // 2) + 7  # two frames, cut within a line
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw[:half]) + gzip.compress(raw[half:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(raw[:half]) + pack(raw[half:]))
    parquet.write_table(arrow.table({"id": range(len(TEXTS)), "text": TEXTS}), tmp_path / "a.parquet", row_group_size=3)
    for name in ("jsonl", "jsonl.gz", "jsonl.zst"):
        assert texts_of(read(tmp_path / f"a.{name}", name)) == TEXTS, name  # type: ignore[arg-type]
    assert texts_of(read(tmp_path / "a.parquet", "parquet", 0, 3)) == TEXTS
    assert texts_of(read(tmp_path / "a.parquet", "parquet", 1, 2)) == TEXTS[3:6]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \ntwo\nthree")
    assert texts_of(read(tmp_path / "a.txt", "txt")) == ["one\r\n\r\n  \ntwo\nthree"]
    assert texts_of(read(tmp_path / "a.txt", "lines")) == ["one", "two", "three"]


@pytest.mark.filterwarnings("ignore")
def test_data_sets_of_the_datasets_package_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    assert texts_of(read(tmp_path / "saved", "saved", 2, 5)) == TEXTS[2:5]
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jsonl").write_bytes(lines_of([f"{number} {text}" for text in TEXTS]))
    plan = make_plan([f"datasets:{folder}"], BYTES)
    assert pieces_of(plan) == [[(0, 0, 1)], [(0, 1, 2)], [(0, 2, 3)]]
    found = [texts_of(list(read_part(plan.part(unit.pieces[0]), text_key="text", longest=1000))) for unit in plan.units]
    assert found == [[f"{number} {text}" for text in TEXTS] for number in range(3)]
    plan = make_plan([str(tmp_path / "saved")], BYTES)
    assert pieces_of(plan) == [[(0, 0, len(TEXTS))]]
    with pytest.raises(DataError, match="no column 'body', only 'text'; choose another --text-key"):
        list(read_part(plan.part(plan.units[0].pieces[0]), text_key="body", longest=1000))


OBJECT = st.text(max_size=12).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode())
LINE = st.one_of(st.just(b""), st.just(b"  "), OBJECT)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINE, max_size=8),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_any_cutting_gives_every_line_once(tmp_path: Path, lines: list[bytes], end: bytes, last: bool, cuts: list[int]) -> None:
    raw = end.join(lines) + (end if last else b"")
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    borders = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    expected = [json.loads(line)["text"] for line in lines if line.strip()]
    found = [read(path, "jsonl", begin, stop) for begin, stop in zip(borders, borders[1:], strict=False)]
    assert [text for part in found for text in texts_of(part)] == expected


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": "cut', "malformed JSON", "a.jsonl, byte 17: malformed JSON (Unterminated string"),
        (b'["text"]', "malformed JSON", "byte 17: a JSON list instead of an object"),
        (b"[" * 100_000, "malformed JSON", "byte 17: malformed JSON ("),
        (b'{"body": "x", "n": 1}', "missing key", "byte 17: no key 'text', only 'body', 'n'; choose another --text-key"),
        (b"{}", "missing key", "byte 17: no key 'text', only none"),
        (b'{"text": null}', "missing key", "'text' is of type NoneType, not a string"),
        (b'{"text": "\xff"}', "invalid UTF-8", "byte 17: invalid UTF-8 (invalid start byte at its byte 10)"),
        (b'{"text": "a\\ud800"}', "invalid UTF-8", "byte 17: invalid text (surrogates not allowed at character 1)"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "too long", "byte 17: 200013 bytes; at most 150000 are allowed; split it, or raise --max"),
    ],
)
def test_a_bad_line_is_named_and_the_next_is_read(tmp_path: Path, line: bytes, reason: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "after"}\n')
    first, bad, after = read(path, "jsonl", longest=150_000)
    assert isinstance(bad, BadDocument) and bad.reason == reason and message in bad.message, bad
    assert texts_of([first, after]) == ["good", "after"] and bad.consumed == len(line) + 1
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    packed = read(tmp_path / "a.jsonl.gz", "jsonl.gz", longest=150_000)
    assert isinstance(packed[1], BadDocument) and f"{tmp_path}/a.jsonl.gz, line 2: " in packed[1].message
    assert texts_of([packed[0], packed[2]]) == ["good", "after"]


def test_a_bad_row_of_parquet_is_named(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["a", None, "b" * 50, "c"]}), path, row_group_size=2)
    found = read(path, "parquet", 0, 2, longest=40)
    assert [type(item).__name__ for item in found] == ["Document", "BadDocument", "BadDocument", "Document"]
    assert "a.parquet, row group 0, row 1: the text is None, not a string" in found[1].message  # type: ignore[union-attr]
    assert "a.parquet, row group 1, row 0: 50 bytes; at most 40" in found[2].message  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no column 'body', only 'text'"):
        list(read_part(Part(str(path), "parquet", 0, 1), text_key="body", longest=9))


@pytest.mark.filterwarnings("ignore")
def test_a_row_that_is_not_utf8_is_named_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    raw = [b"one", "zwei ü".encode(), b"caf\xe9", b"four", b"\xff", b"six"]
    offsets = np.cumsum([0, *map(len, raw)], dtype=np.int32)
    column = arrow.Array.from_buffers(arrow.string(), len(raw), [None, arrow.py_buffer(offsets), arrow.py_buffer(b"".join(raw))])
    for name, found in (("plain", column), ("dictionary", column.dictionary_encode())):
        (tmp_path / name).mkdir()
        parquet.write_table(arrow.table({"text": found}), tmp_path / name / "a.parquet", row_group_size=4)
    datasets.Dataset(arrow.table({"text": column})).save_to_disk(str(tmp_path / "saved"))
    places = [(0, 2), (1, 0)]
    for part, where in [
        (Part(str(tmp_path / "plain/a.parquet"), "parquet", 0, 2), [f"row group {group}, row {row}" for group, row in places]),
        (Part(str(tmp_path / "dictionary/a.parquet"), "parquet", 0, 2), [f"row group {group}, row {row}" for group, row in places]),
        (Part(str(tmp_path / "saved"), "saved", 0, 6), ["row 2", "row 4"]),
        (Part(str(tmp_path / "saved"), "saved", 1, 6), ["row 2", "row 4"]),
        (Part(str(tmp_path / "plain"), "datasets", 0, 1), ["shard 0, row 2", "shard 0, row 4"]),
    ]:
        items = list(read_part(part, text_key="text", longest=100))
        bad = [item for item in items if isinstance(item, BadDocument)]
        assert {item.reason for item in bad} == {"invalid UTF-8"}
        assert [item.message for item in bad] == [
            f"{part.path}, {where[0]}: invalid UTF-8 (unexpected end of data at its byte 3)",
            f"{part.path}, {where[1]}: invalid UTF-8 (invalid start byte at its byte 0)",
        ]
        good = ["one", "zwei ü", "four", "six"][part.begin if part.kind == "saved" else 0 :]
        assert texts_of([item for item in items if isinstance(item, Document)]) == good


@pytest.mark.filterwarnings("ignore")
def test_what_the_datasets_package_cannot_read_is_told_with_shard_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "0.jsonl.gz").write_bytes(gzip.compress(lines_of(["whole"])))
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines_of([os.urandom(40).hex() for _ in range(100)]))[:-900])
    plan = make_plan([f"datasets:{folder}"], BYTES)
    first, second = (plan.part(unit.pieces[0]) for unit in plan.units)
    assert texts_of(list(read_part(first, text_key="text", longest=1000))) == ["whole"]
    with pytest.raises(DataError, match=rf"{folder}, shard 1, row 0 and following: the datasets .* \(EOFError: Compressed .*copy a"):
        list(read_part(second, text_key="text", longest=1000))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_truncated_or_damaged_compressed_file_is_told_at_every_length(tmp_path: Path, suffix: Kind) -> None:
    import zstandard

    raw = lines_of([os.urandom(40).hex() for _ in range(20)])
    whole = gzip.compress(raw) if suffix == "jsonl.gz" else zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    expected = [json.loads(line)["text"] for line in raw.splitlines()]
    path = tmp_path / f"a.{suffix}"
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        *good, bad = read(path, suffix)
        assert isinstance(bad, BadDocument) and bad.reason == "damaged", size
        assert f"{path}, after line {len(good)}: the compressed file is truncated or damaged" in bad.message
        assert texts_of(good) == expected[: len(good)]
    path.write_bytes(whole[: len(whole) // 2] + b"\x00\x01" + whole[len(whole) // 2 + 2 :])
    assert isinstance(read(path, suffix)[-1], BadDocument)
    path.write_bytes(b"plain text")
    assert isinstance(read(path, suffix)[-1], BadDocument)


def test_zstandard_with_the_longest_window_is_read(tmp_path: Path) -> None:
    line = b'{"text": "long"}\n'
    # A frame by hand (RFC 8878, 3.1.1): its header asks for a window of 2^(10 + 21) bytes; then one raw block, the last.
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3]) + (len(line) << 3 | 1).to_bytes(3, "little") + line
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    assert texts_of(read(tmp_path / "a.jsonl.zst", "jsonl.zst")) == ["long"]


def test_memory_does_not_grow_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (32 << 20) + b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    try:
        long, after = read(path, "jsonl", longest=1 << 16)
        second = read(path, "jsonl", 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(long, BadDocument) and texts_of([after]) == texts_of(second) == ["after"]
    assert peak < 2 << 20


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    texts = [os.urandom(5_000).hex() for _ in range(4_000)]  # 40 MB
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=len(texts))
    before, peak, found = arrow.total_allocated_bytes(), 0, 0
    for item in read_part(Part(str(tmp_path / "a.parquet"), "parquet", 0, 1), text_key="text", longest=1 << 20):
        assert isinstance(item, Document) and item.text == texts[found]
        peak, found = max(peak, arrow.total_allocated_bytes() - before), found + 1
    assert found == len(texts) and peak < 30 << 20  # two pages of 10 MB; 61 MB with the default reader


def test_a_plan_is_the_same_wherever_the_inputs_lie_and_however_they_are_named(tmp_path: Path) -> None:
    plans = []
    for place in ("here", "there/deep"):
        folder = tmp_path / place
        (folder / "b").mkdir(parents=True)
        (folder / "a.jsonl").write_bytes(lines_of(TEXTS))
        (folder / "b/a.txt").write_bytes(b"text")
        (folder / "b/.hidden.txt").write_bytes(b"no")
        (folder / "b/readme.md").write_bytes(b"no")
        plans.append(make_plan([str(folder)], replace(BYTES, unit_bytes=300)))
        plans.append(make_plan([str(folder / "b/a.txt"), str(folder / "a.jsonl")], replace(BYTES, unit_bytes=300)))
    assert len({plan.sha256 for plan in plans}) == 1
    assert [source.name for source in plans[0].sources] == ["a.jsonl", "b/a.txt"]
    size = len(lines_of(TEXTS))
    *whole, last = [[(0, begin, min(begin + 300, size))] for begin in range(0, size, 300)]
    assert size % 300 + 4 <= 300 and pieces_of(plans[0]) == [*whole, [*last, (1, 0, 4)]]
    assert make_plan([str(tmp_path / "here")], replace(BYTES, unit_bytes=301)).sha256 != plans[0].sha256


def test_units_grow_with_the_inputs_so_that_they_stay_few() -> None:
    sizes = [unit_size(total) for total in (1, 1 << 30, 10 << 30, 64 << 30, 1 << 40, 4 << 40, 40 * 10**12, 10**15)]
    assert sizes == [4 << 20, 4 << 20, 40 << 20, 256 << 20, 256 << 20, 1 << 30, 40 * 10**12 // 4096, 10**15 // 4096]


def test_progress_moves_within_a_compressed_file_and_a_row_group(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet
    import zstandard

    texts = [os.urandom(500).hex() for _ in range(1_000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines_of(texts)))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines_of(texts)))
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("jsonl.gz", "jsonl.zst", "parquet"):
        found = read(tmp_path / f"a.{name}", name, 0, 1)  # type: ignore[arg-type]
        whole = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size
        whole = whole if name == "parquet" else (tmp_path / f"a.{name}").stat().st_size
        half = sum(item.consumed for item in found[:500])
        assert 0.3 * whole < half < 0.7 * whole and half < sum(item.consumed for item in found) <= whole


def test_inputs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.md").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    a = str(tmp_path / "a.jsonl")
    for inputs, message in [
        ([f"{tmp_path}/no.jsonl"], "no.jsonl: no such file; check the path"),
        (["no.jsonl"], "no.jsonl: no such file"),
        ([f"{tmp_path}/a.md"], "unknown kind of file; names must end in .jsonl, .jsonl.gz"),
        ([f"{tmp_path}/none"], "the folder holds nothing that can be read"),
        ([a, a], "names a.jsonl twice"),
        ([a, f"{tmp_path}/empty.txt"], "empty.txt is empty .0 bytes.; 1 inputs are; leave them out, or choose --on-error skip"),
        ([f"{tmp_path}/cut.parquet"], "cut.parquet: not a whole Parquet file"),
    ]:
        with pytest.raises(DataError, match=message):
            make_plan(inputs, BYTES)
    plan = make_plan([a, f"{tmp_path}/empty.txt"], BYTES, skip_empty=True)
    assert [source.name for source in plan.sources] == ["a.jsonl"] and plan.empty == ("empty.txt",)
    with pytest.raises(DataError, match="no text to read"):
        make_plan([f"{tmp_path}/empty.txt"], BYTES, skip_empty=True)
    nan, inf = float("nan"), float("inf")
    for split in [(0.5, 0.4, 0.0), (1.5, -0.5, 0.0), (nan, 0.0, 1.0), (0.0, nan, 1.0), (inf, 0.0, 0.0)]:
        with pytest.raises(DataError, match="--split is .*three shares .train, valid, test. that sum to 1"):
            replace(BYTES, split=split)


def test_one_folder_is_for_one_plan(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(lines_of(TEXTS))
    plan = make_plan([str(path)], BYTES)
    publish_plan(out, plan)
    publish_plan(out, make_plan([str(path)], BYTES))
    before = (out / "plan.json").read_bytes()
    for other, message in [
        (replace(BYTES, text_key="body"), "text_key was 'text', and is 'body' now"),
        (replace(BYTES, append_eod=False), "append_eod was True, and is False now"),
    ]:
        with pytest.raises(DataError, match=message):
            publish_plan(out, make_plan([str(path)], other))
    path.write_bytes(path.read_bytes().replace(b"first", b"First"))
    with pytest.raises(DataError, match="1 inputs were added, removed or changed, the first is a.jsonl"):
        publish_plan(out, make_plan([str(path)], BYTES))
    assert (out / "plan.json").read_bytes() == before
    (out / "plan.json").write_bytes(before[:-5])
    with pytest.raises(DataError, match="plan.json is damaged: not JSON"):
        publish_plan(out, plan)


def test_a_share_of_the_units(tmp_path: Path) -> None:
    assert parse_range(None, {}) == (1, 1) and parse_range("3/8", {"SLURM_ARRAY_TASK_ID": "1"}) == (3, 8)
    for number, first, step, expected in [(0, 0, 1, 1), (4, 1, 1, 4), (9, 1, 4, 3)]:
        slurm = {"ID": number, "MIN": first, "STEP": step, "COUNT": 4}
        assert parse_range(None, {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in slurm.items()}) == (expected, 4)
    for text in ("0/3", "4/3", "3", "a/b", "-1/3", "1/0", ""):
        with pytest.raises(DataError, match="it must be k/K with 1 <= k <= K"):
            parse_range(text, {})
    whole = {"ID": "3", "MIN": "0", "MAX": "15", "COUNT": "16"}
    assert parse_range(None, {f"SLURM_ARRAY_TASK_{key}": value for key, value in whole.items()}) == (4, 16)
    for slurm in (
        {"ID": "7", "MIN": "3", "COUNT": "2"},
        {"ID": "x", "COUNT": "2"},
        {"ID": "1"},
        {"ID": "3", "MIN": "3", "MAX": "3", "COUNT": "1"},  # a failed task, submitted alone
        {"ID": "0", "MIN": "0", "MAX": "3", "COUNT": "2"},  # --array=0,3
        {"ID": "3", "MIN": "0", "MAX": "6", "STEP": "2", "COUNT": "4"},
        {"ID": "1", "MIN": "1", "MAX": "1", "COUNT": "0"},
    ):
        with pytest.raises(DataError, match="give --unit-range k/K"):
            parse_range(None, {f"SLURM_ARRAY_TASK_{key}": value for key, value in slurm.items()})
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS * 3))
    plan = make_plan([str(tmp_path / "a.jsonl")], replace(BYTES, unit_bytes=200))
    shares = [missing_units(tmp_path, plan, part=part, parts=4) for part in (1, 2, 3, 4)]
    assert sorted(sum(shares, [])) == list(range(len(plan.units))) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_documents_are_divided_by_their_own_hash() -> None:
    documents = [f"document {number}".encode() for number in range(20_000)]
    splits = replace(BYTES, split=(0.9, 0.07, 0.03))
    found = [splits.split_of(document) for document in documents]
    for split, share in zip(("train", "valid", "test"), (0.9, 0.07, 0.03), strict=True):
        assert abs(found.count(split) - share * 20_000) < 5 * (20_000 * share * (1 - share)) ** 0.5  # type: ignore[arg-type]
    assert {replace(BYTES, split=(1, 0, 0)).split_of(document) for document in documents} == {"train"}
    assert {replace(BYTES, split=(0.5, 0.5, 0)).split_of(document) for document in documents} == {"train", "valid"}
    assert {replace(BYTES, split=(0, 0, 1)).split_of(document) for document in documents} == {"test"}


@pytest.mark.parametrize("unit_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("append_eod", [True, False])
def test_the_tokens_do_not_depend_on_the_cutting(tmp_path: Path, unit_bytes: int, append_eod: bool) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))  # a document of 700 bytes is longer than the smaller units
    plan = make_plan([str(tmp_path / "a.jsonl")], replace(BYTES, unit_bytes=unit_bytes, append_eod=append_eod))
    prepare(tmp_path / "out", plan)
    manifest = finalize(tmp_path / "out", plan)
    (shard,) = open_shards(tmp_path / "out", manifest, split="train")
    end = [256] if append_eod else []
    assert [shard.document(i).tolist() for i in range(shard.documents)] == [[*text.encode(), *end] for text in TEXTS if text]
    assert manifest.source["empty_documents"] == 1 and manifest.source["skipped"] == 0
    assert verify(tmp_path / "out") == manifest == finalize(tmp_path / "out", plan)
    assert load_tokenizer(tmp_path / "out", manifest.tokenizer).decode(shard.document(1)) == TEXTS[1]  # type: ignore[union-attr]


def test_skipped_documents_are_counted_and_told_without_their_place_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS) + b'nonsense\n{"body": 1}\n' + b"[1]\n" * 9 + lines_of(["end"]))
    plan = make_plan([str(tmp_path / "a.jsonl")], BYTES)
    place = f"{tmp_path}/a.jsonl, byte {len(lines_of(TEXTS))}"
    with pytest.raises(DataError, match=f"{place}: malformed JSON .*repair it, or choose --on-error"):
        prepare(tmp_path / "out", plan)
    assert os.listdir(tmp_path / "out/units") == []
    prepare(tmp_path / "out", plan, on_error="skip")
    source = finalize(tmp_path / "out", plan).source
    assert {key: value for key, value in source.items() if key.startswith("skipped")} == {
        "skipped": 11, "skipped, malformed JSON": 10, "skipped, missing key": 1
    }  # fmt: skip
    record = json.loads((tmp_path / "out/units/part-00000.json").read_text())
    assert len(record["messages"]) == 5 and str(tmp_path) not in str(record)
    assert record["messages"][1].startswith("a.jsonl, byte ")


def test_empty_files_that_are_skipped_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    (tmp_path / "none.jsonl").touch()
    plans = [make_plan([str(tmp_path)], BYTES, skip_empty=True), make_plan([str(tmp_path / "a.jsonl")], BYTES)]
    assert plans[0].sha256 != plans[1].sha256
    prepare(tmp_path / "out", plans[0], on_error="skip")
    source = finalize(tmp_path / "out", plans[0]).source
    assert (source["skipped"], source["skipped, empty file"], source["inputs"]) == (1, 1, 1)


def test_a_set_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": 1}\n')
    plan = make_plan([str(tmp_path / "a.jsonl")], BYTES)
    prepare(tmp_path / "out", plan, on_error="skip")
    with pytest.raises(DataError, match=r"the inputs have no documents \(1 were skipped\)"):
        finalize(tmp_path / "out", plan)


def test_ids_above_the_vocabulary_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    plan = make_plan([str(tmp_path / "a.txt")], replace(BYTES, tokenizer=replace(BYTES.tokenizer, vocab_size=200)))
    with pytest.raises(DataError, match=r"a.txt: the tokenizer made ids 101 to 256 .* of unit 0; ids must be in \[0, 200\)"):
        prepare(tmp_path / "out", plan)
    assert os.listdir(tmp_path / "out/units") == []


def test_reports_sum_to_the_unit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["word " * 20] * 3_000))
    plan = make_plan([str(tmp_path / "a.jsonl")], replace(BYTES, unit_bytes=200_000))
    (tmp_path / "units").mkdir()
    reports: list[Progress] = []
    records = [
        UnitWriter(plan, unit, folder=tmp_path, encoder=ByteTokenizer(), on_error="stop", report=reports.append).run()
        for unit in range(len(plan.units))
    ]
    assert len(reports) > 2 * len(plan.units)
    total = Progress(*(sum(column) for column in zip(*reports, strict=True)))
    assert total == Progress(3_000, 300_000, 303_000, (tmp_path / "a.jsonl").stat().st_size)
    assert sum(record.shards["train"]["tokens"] for record in records) == 303_000


def test_only_bad_or_empty_documents_are_reported_on_the_way_too(tmp_path: Path) -> None:
    for name, line in (("bad", b"nonsense\n"), ("empty", b'{"text": ""}\n')):
        (tmp_path / f"{name}.jsonl").write_bytes(line * 3_000)
        plan = make_plan([str(tmp_path / f"{name}.jsonl")], BYTES)
        (tmp_path / name / "units").mkdir(parents=True)
        reports: list[Progress] = []
        UnitWriter(plan, 0, folder=tmp_path / name, encoder=ByteTokenizer(), on_error="skip", report=reports.append).run()
        assert len(reports) > 5 and sum(report.input_bytes for report in reports) == len(line) * 3_000


def test_an_input_that_is_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(lines_of(["word"] * 1_500))
    plan = make_plan([str(path)], BYTES)
    publish_plan(out, plan)
    (out / "units").mkdir()
    assert plan.newer_inputs(out) == []

    def change(_: Progress) -> None:
        with open(path, "r+b") as stream:
            stream.write(lines_of(["Word"]))
        os.utime(path, ns=(plan.times[0] + 10**12, plan.times[0] + 10**12))

    with pytest.raises(DataError, match=f"{path} was changed while it was read; inputs must not change; begin again with an empty"):
        write_unit(plan, 0, folder=out, encoder=ByteTokenizer(), on_error="stop", report=change)
    assert os.listdir(out / "units") == []
    assert make_plan([str(path)], BYTES).newer_inputs(out) == ["a.jsonl"]


def test_a_writer_that_is_overtaken_takes_the_other_ones_unit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["word"] * 1_500))
    plan = make_plan([str(tmp_path / "a.jsonl")], BYTES)
    overtaken: list[Progress] = []

    def overtake(progress: Progress) -> None:
        if not overtaken:
            overtaken.append(progress)
            prepare(tmp_path / "out", plan)
            finalize(tmp_path / "out", plan)  # which removes the other one's temporary files

    publish_plan(tmp_path / "out", plan)
    (tmp_path / "out/units").mkdir()
    record = write_unit(plan, 0, folder=tmp_path / "out", encoder=ByteTokenizer(), on_error="stop", report=overtake)
    assert overtaken and record.shards["train"]["documents"] == 1_500
    assert verify(tmp_path / "out") == finalize(tmp_path / "out", plan)
    assert sorted(os.listdir(tmp_path / "out/units")) == ["part-00000-train.bin", "part-00000-train.idx", "part-00000.json"]


def test_tokenizers_are_found_with_their_own_ends(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Model

    Tokenizer.train(["some text to learn from, some text"], vocab_size=270).save(tmp_path / "tokenizer.json")
    model = Model.from_file(str(tmp_path / "tokenizer.json"))
    model.add_special_tokens(["<end>", "<fill>"])
    model.save(str(tmp_path / "tokenizer.json"))
    by_default = find_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (by_default.eod_id, by_default.pad_id) == (0, 1)
    end, fill = model.token_to_id("<end>"), model.token_to_id("<fill>")
    for config, eod, expected in [
        ({"eos_token": "<end>", "pad_token": {"content": "<fill>"}}, None, (end, fill)),
        ({"eos_token": {"content": "<end>"}, "pad_token": "<end>"}, None, (end, -1)),
        ({"eos_token": "<end>"}, "<fill>", (fill, -1)),
    ]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        found = find_tokenizer(str(tmp_path), eod=eod)
        assert (found.eod_id, found.pad_id) == expected
        identity = found.save(tmp_path / "out.json")
        assert identity == found.identity("out.json")
        again = load_tokenizer(tmp_path, identity)
        assert again is not None and (again.eod_id, again.pad_id) == expected
        assert again.encode_documents(["text"])[0].tolist() == [*found.encode("text"), expected[0]]
    with pytest.raises(DataError, match="has no <none>"):
        find_tokenizer(str(tmp_path), eod="<none>")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json is not JSON"):
        find_tokenizer(str(tmp_path))
    for name, message in [("./none.json", "no such file"), (str(tmp_path / "none"), "no such file")]:
        with pytest.raises(DataError, match=message):
            find_tokenizer(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder has no tokenizer.json"):
        find_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="has its own end of document"):
        find_tokenizer("bytes", eod="<end>")


def test_bytes_go_there_and_back() -> None:
    tokenizer = ByteTokenizer()
    for text in TEXTS:
        (ids,) = tokenizer.encode_documents([text])
        assert ids.tolist() == [*tokenizer.encode(text), 256] and ids.dtype == np.int64
        assert tokenizer.decode(ids) == text


def test_a_manifest_tells_the_three_splits(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of([f"document {number}" for number in range(100)]))
    plan = make_plan([str(tmp_path / "a.jsonl")], replace(BYTES, split=(0.5, 0.3, 0.2)))
    prepare(tmp_path / "out", plan)
    finalize(tmp_path / "out", plan)
    totals = read_manifest(tmp_path / "out").body()["totals"]
    assert list(totals) == ["train", "valid", "test"] and sum(split["documents"] for split in totals.values()) == 100
    assert all(split["shards"] == 1 for split in totals.values())
