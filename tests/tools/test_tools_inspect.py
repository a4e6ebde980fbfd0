"""The command that looks at data: what it tells is what was written; damage is named; nothing it shows can steer a terminal."""

import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import TOOLS, call

from megagate.data import inspection, shards
from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.inspection import bars, chosen, lengths_of, octave_range, visible
from megagate.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, write_manifest
from megagate.data.shards import Shard, ShardWriter

TOOL = TOOLS / "inspect_data.py"
TEXTS = {"train": [["one", "two größe"], ["x" * 400, "a\x1b[31mred\u202e\n\tb"]], "valid": [["v"]], "test": [["t" * 5000]]}


def run(*arguments: object, expect: int = 0) -> str:
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complained:
        code = call("inspect_data", *arguments)
    out, err = said.getvalue(), complained.getvalue()
    assert code == expect and "Traceback" not in err, err
    return out if expect == 0 else err[err.index("DataError: ") :]


def told(*arguments: object) -> dict[str, Any]:
    (value,) = json.loads(run(*arguments, "--json"))
    return dict(value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of bytes: two train shards, one of validation, one to test."""
    place = tmp_path / "set"
    place.mkdir()
    entries = []
    for split, parts in TEXTS.items():
        for number, texts in enumerate(parts):
            name = f"{split}-{number:05d}"
            with ShardWriter(place / name, dtype=np.dtype("<u2")) as writer:
                for ids in ByteTokenizer().encode_documents(texts):
                    writer.add(ids)
            entries.append(ShardEntry.of(name, split=split, stats=writer.finish()))  # type: ignore[arg-type]
    source: dict[str, str | int] = {"name": "by hand\x1b[2J", "skipped": 3}
    write_manifest(place, Manifest(ByteTokenizer().identity(), "uint16", tuple(entries), source))
    return place


def test_counts_texts_and_lengths_are_those_that_were_written(folder: Path) -> None:
    value = told(folder, "--samples", 9, "--seq-len", 401, "--characters", 6000)
    assert {split: totals["documents"] for split, totals in value["splits"].items()} == {"train": 4, "valid": 1, "test": 1}
    assert value["splits"]["train"]["shards"] == 2 and value["source"]["skipped"] == 3
    assert value["fingerprint"] == json.loads((folder / MANIFEST_NAME).read_text())["fingerprint"]
    texts = [text for parts in TEXTS.values() for part in parts for text in part]
    assert [sample["text"] for sample in value["samples"]] == texts
    sizes = [len(text.encode()) + 1 for text in texts]
    assert [sample["tokens"] for sample in value["samples"]] == sizes
    lengths = value["lengths"]
    assert (lengths["shortest"], lengths["longest"], lengths["tokens"]) == (min(sizes), max(sizes), sum(sizes))
    assert lengths["longer_than_seq_len"] == 1 and lengths["median"] == sorted(sizes)[2]
    assert lengths["octaves"][:14] == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    out = run(folder, "--seq-len", 401, "--samples", 4)
    for part in ("4 documents", "vocabulary 258, eod 256", "skipped: 3", "16.67% longer than 401", "two größe", "fingerprint", "x" * 300):
        assert part in out, part
    assert "x" * 301 not in out


def test_documents_are_chosen_by_split_number_and_chance(folder: Path) -> None:
    assert [sample["text"] for sample in told(folder, "--split", "valid")["samples"]] == ["v"]
    (sample,) = told(folder, "--split", "train", "--document", 2)["samples"]
    assert (sample["number"], sample["document"], sample["tokens"]) == (2, 0, 401) and sample["shard"].endswith("train-00001")
    drawn = {tuple(one["number"] for one in told(folder, "--samples", 2, "--random", seed)["samples"]) for seed in range(12)}
    assert len(drawn) > 3 and all(len(set(pair)) == 2 for pair in drawn)
    assert chosen(5, 9, seed=1) == [0, 1, 2, 3, 4] and chosen(0, 3, seed=None) == []
    assert "document 6 does not exist" in run(folder, "--document", 6, expect=2)
    assert "has no split other; it has train, valid, test" in run(folder, "--split", "other", expect=2)


def test_nothing_that_is_shown_steers_a_terminal(folder: Path) -> None:
    out = run(folder, "--samples", 9)
    assert "a\\x1b[31mred\\u202e\n  \tb" in out and "by hand\\x1b[2J" in out
    assert "\x1b" not in out and "\u202e" not in out
    assert visible("größe\n\t\x00\x07\ud800") == "größe\n\t\\x00\\x07\\ud800"


def test_a_bare_shard_with_and_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "set/train-00000"
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        value = told(name, "--verify")
        assert value["splits"] == {"all": {"documents": 2, "tokens": 16, "shards": 1}} and "tokenizer" not in value
        assert value["samples"][0]["ids"] == [111, 110, 101, 256] and value["samples"][0]["text"] is None
        assert value["verified"] == {"max_id": 256, "hashes": False}
    for tokenizer in ("bytes", folder):
        assert [one["text"] for one in told(prefix, "--tokenizer", tokenizer)["samples"]] == TEXTS["train"][0]
    out = run(folder, prefix)
    assert "nothing says who made its ids" in out and out.count("documents,") >= 5
    (tmp_path / "wide").mkdir()
    with ShardWriter(tmp_path / "wide/a", dtype=np.dtype("<i4")) as writer:
        writer.add([5, 9_999])
    assert "a.bin holds id 9999 at token 1 (byte 4)" in run(tmp_path / "wide/a", "--verify", "--tokenizer", "bytes", expect=1)
    assert "has no dataset.json, but 1 shards: name their prefixes, as" in run(tmp_path / "wide", expect=2)
    assert "is neither a folder nor a shard" in run(tmp_path / "none", expect=2)


def test_verify_names_the_first_bad_file(folder: Path) -> None:
    assert "every sha256 is the manifest's; largest id 256" in run(folder, "--verify")
    for name, at in (("train-00001.bin", 9), ("valid-00000.bin", 1), ("train-00000.idx", 34)):
        path = folder / name
        raw = path.read_bytes()
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert f"{path} is " in (message := run(folder, "--verify", expect=1)) and message.count("\n") == 1
        path.write_bytes(raw)
        os.truncate(path, len(raw) - 1)
        assert str(path) in run(folder, expect=2)
        path.write_bytes(raw)
    run(folder, "--verify")
    (folder / MANIFEST_NAME).write_text("{")
    assert f"{folder / MANIFEST_NAME} is damaged: not JSON" in run(folder, expect=2)
    (folder / MANIFEST_NAME).unlink()
    shutil.rmtree(folder)
    folder.mkdir()
    assert "has no dataset.json; check the path" in run(folder, expect=2)


def test_the_histogram_is_drawn(folder: Path, tmp_path: Path) -> None:
    run(folder, "--plot", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "cannot write" in run(folder, "--plot", tmp_path / "none/lengths.png", expect=2)
    assert "is one file, and there are 2 inputs" in run(folder, folder, "--plot", tmp_path / "a.png", expect=2)


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} {TOOL} {folder} --samples 9 --characters 5000 --json | head -c 5"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=TOOL.parents[1], check=False)
    assert done.stderr == "" and done.stdout.startswith("[")


def test_blocks_do_not_show_and_memory_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    sizes = np.concatenate([draw.integers(0, 6, 300_000), [200_000, 131_071, 131_072]])
    with ShardWriter(tmp_path / "a", dtype=np.dtype("<u2")) as writer:
        writer.add_many(np.zeros(int(sizes.sum()), dtype=np.uint16), lengths=sizes)
    shard = Shard(tmp_path / "a")
    whole = lengths_of([shard], window=4)
    monkeypatch.setattr(inspection, "_BLOCK", 1_000)
    monkeypatch.setattr(shards, "_INDEX_BLOCK", 1_000)
    tracemalloc.start()
    found = lengths_of([shard], window=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for one in (whole, found):
        assert (one.documents, one.tokens, one.shortest, one.longest) == (sizes.size, sizes.sum(), 0, 200_000)
        assert one.longer == (sizes > 4).sum() and one.octaves.sum() == sizes.size
        expected = [((sizes >= low) & (sizes <= high)).sum() for low, high in map(octave_range, range(4))]
        assert one.octaves[:4].tolist() == expected
        assert one.quantile(0.5) == np.median(sizes) and one.quantile(1) is None
    assert peak < 4 << 20, "two tables of 131,073 lengths and blocks of 1,000; all lengths at once take 8 MB"
    assert len(bars(found)) == 19 and bars(found)[-1].endswith(" 2")
