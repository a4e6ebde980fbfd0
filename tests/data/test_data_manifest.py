"""The manifest: what it promises is checked, and each lie has its own message."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagate.data.manifest import MANIFEST_NAME, check_vocabulary, open_shards, read_manifest, verify, write_manifest
from megagate.errors import DataError


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the JSON, and gives it the fingerprint of its new content."""
    path = folder / MANIFEST_NAME
    value = json.loads(path.read_text())
    change(value)
    value.pop("fingerprint", None)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    value["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(value))


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_shards(folder, read_manifest(folder), split="train")
    assert str(folder) in str(caught.value)


def test_what_is_written_is_read(counted: Path) -> None:
    manifest = read_manifest(counted)
    value = json.loads((counted / MANIFEST_NAME).read_text())
    assert value["totals"] == {
        "train": {"shards": 2, "tokens": 1520, "documents": 3},
        "valid": {"shards": 1, "tokens": 300, "documents": 2},
    }
    assert value["fingerprint"] == manifest.fingerprint
    assert [entry.max_id for entry in manifest.shards] == [1002, 2516, 3299]
    for entry in manifest.shards:
        for suffix, size, digest in [(".bin", entry.bin_bytes, entry.bin_sha256), (".idx", entry.idx_bytes, entry.idx_sha256)]:
            raw = (counted / (entry.prefix + suffix)).read_bytes()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (size, digest)
    assert [shard.tokens for shard in open_shards(counted, manifest, split="train")] == [1003, 517]
    assert [shard.tokens for shard in open_shards(counted, manifest, split="valid")] == [300]
    assert verify(counted) == manifest
    write_manifest(counted, manifest)
    assert read_manifest(counted) == manifest


def test_the_fingerprint_is_of_the_whole_content_and_of_nothing_else(counted: Path) -> None:
    manifest = read_manifest(counted)
    others = [
        replace(manifest, dtype="int32"),
        replace(manifest, source={"name": "other"}),
        replace(manifest, shards=manifest.shards[::-1]),
        replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="0")),
        replace(manifest, shards=(replace(manifest.shards[0], bin_sha256="0"), *manifest.shards[1:])),
    ]
    assert len({manifest.fingerprint, *(other.fingerprint for other in others)}) == 6
    moved = counted.with_name("elsewhere")
    shutil.copytree(counted, moved)
    assert read_manifest(moved).fingerprint == manifest.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"format_version": 1', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "a JSON list instead of an object"),
        ("{}", "format_version is missing; it must be of type int"),
        ('{"format_version": true}', "format_version is True"),
        ('{"format_version": 2}', "format_version is 2; this version of megagate reads 1; prepare"),
        ('{"format_version": 1}', "shards is missing"),
    ],
)
def test_a_malformed_manifest_is_refused(counted: Path, text: str, message: str) -> None:
    (counted / MANIFEST_NAME).write_bytes(text.encode(errors="surrogateescape"))
    refuse(counted, message)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "not a prepared data set: it has no dataset.json; check data.path")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["shards"].insert(0, 3), r"shards\[0\] is 3; it must be an object"),
        (lambda v: v["shards"][1].pop("tokens"), r"\(shards\[1\]\) is damaged: tokens is missing"),
        (lambda v: v["shards"][1].update(prefix=7), "prefix is 7; it must be of type str"),
        (lambda v: v["tokenizer"].update(vocab_size="9"), "vocab_size is '9'"),
        (lambda v: v["source"].update(x=[1]), r"x is \[1\]"),
        (lambda v: v["source"].update({"\ud800": [1]}), r"'\\ud800' is \[1\]"),
        (lambda v: [entry.update(tokens=9 * 10**4298) for entry in v["shards"]], "tokens is 9000.*000; it must be of type int .64 bits"),
        (lambda v: v.update(dtype=["x" * 10**6]), r"dtype is \['x+\.\.\.x+'\]; it must be of type str"),
        (lambda v: v["tokenizer"].update(eod_id=5_000), "eod_id is 5000; it must be -1 .none. or an id below 5000"),
        (lambda v: v["tokenizer"].update(pad_id=-2), "pad_id is -2"),
        (lambda v: v["shards"][0].update(prefix="a\0b"), r"'a\\x00b' cannot be the name of a file"),
        (lambda v: v["shards"][0].update(prefix="\ud800"), r"'\\ud800' cannot be the name of a file"),
        (lambda v: v["shards"][0].update(prefix="."), "'.' cannot be the name of a file"),
        (lambda v: v.update(extra=1), "contradicts itself: unknown keys"),
        (lambda v: v["totals"]["train"].update(tokens=1), "contradicts itself"),
        (lambda v: v.update(dtype="float32"), "dtype is 'float32'; it must be uint16 or int32"),
        (lambda v: v["tokenizer"].update(vocab_size=65_537), "vocabulary of 65537 does not fit uint16"),
        (lambda v: v["tokenizer"].update(eod_id=3, pad_id=3), "eod_id and pad_id are both 3; they must differ"),
        (lambda v: v["shards"][0].update(prefix="/etc/x"), "lies outside of the data set"),
        (lambda v: v["shards"][0].update(prefix="../x"), "lies outside of the data set"),
        (lambda v: v["shards"][0].update(split="other"), "is of split 'other'; splits are train, valid, test"),
        (lambda v: v["shards"][0].update(bin_bytes=1), "has 1 bytes for 1003 tokens of uint16"),
        (lambda v: v["shards"][0].update(max_id=5_000), "holds id 5000, and the tokenizer's ids are below 5000"),
        (lambda v: v["shards"][0].update(documents=3, tokens=1003), "contradicts itself"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(counted: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(counted, change)
    refuse(counted, message)


def test_a_change_by_hand_is_refused(counted: Path) -> None:
    path = counted / MANIFEST_NAME
    path.write_text(path.read_text().replace('"name": "set"', '"name": "other"'))
    refuse(counted, "its fingerprint is .* changed by hand")


def test_shards_of_another_size_or_type_are_refused(counted: Path, make_dataset: Callable[..., Path]) -> None:
    # A consistent pair of files of another data set, put in the place of the one that was promised.
    numbers = list(range(1003))
    others = {
        "has 1002 tokens, and dataset.json says 1003; the shard is truncated or of another": ([[numbers[:1002]]], 5_000),
        "has 1 documents, and dataset.json says 2": ([[numbers]], 5_000),
        "stores int32, and dataset.json says uint16": ([[numbers[:400], numbers[400:]]], 70_000),
    }
    for number, (message, (shards, vocab_size)) in enumerate(others.items()):
        other = make_dataset(train=shards, vocab_size=vocab_size, name=f"other{number}")
        for suffix in (".bin", ".idx"):
            shutil.copy(other / f"train-00000{suffix}", counted / f"train-00000{suffix}")
        refuse(counted, message)
    os.truncate(counted / "train-00000.bin", 10)
    refuse(counted, "train-00000.bin is truncated: 10 bytes")


def test_verify_finds_a_changed_byte_that_opening_does_not(counted: Path) -> None:
    for name in ("train-00001.bin", "valid-00000.bin"):
        good = (counted / name).read_bytes()
        (counted / name).write_bytes(good[:50] + b"\x01" + good[51:])
        open_shards(counted, read_manifest(counted), split="train")
        with pytest.raises(DataError, match=f"{counted / name} is damaged: its sha256 is"):
            verify(counted)
        (counted / name).write_bytes(good)
    verify(counted)


def test_a_vocabulary_larger_than_the_models_is_refused(counted: Path) -> None:
    manifest = read_manifest(counted)
    check_vocabulary(manifest, vocab_size=5_000, where=counted)
    message = f"{counted} was made for a vocabulary of 5000; model.vocab_size is 4999; .* set model.vocab_size to 5000"
    with pytest.raises(DataError, match=message):
        check_vocabulary(manifest, vocab_size=4_999, where=counted)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 60), value=JSON)
def test_no_manifest_makes_the_reader_fail_otherwise(counted: Path, where: int, value: object) -> None:
    if not (counted / "good").exists():
        shutil.copy(counted / MANIFEST_NAME, counted / "good")
    shutil.copy(counted / "good", counted / MANIFEST_NAME)

    def places(node: Any) -> list[tuple[Any, Any]]:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        return [place for key in keys for place in [(node, key), *places(node[key])]]

    def change(manifest: dict[str, Any]) -> None:
        found = places(manifest)
        node, key = found[where % len(found)]
        node[key] = value

    edit(counted, change)
    try:
        open_shards(counted, read_manifest(counted), split="train")
    except DataError as error:
        assert str(counted) in str(error)
