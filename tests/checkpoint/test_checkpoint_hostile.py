"""Hostile files: whatever their bytes, there is a correct object or one CheckpointError that names the file, in little memory."""

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from checkpoint_helpers import numbered, save_pieces
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megagate.checkpoint import store
from megagate.checkpoint.rankfile import PieceFile, manifest_path
from megagate.checkpoint.store import Box, Checkpoint, Piece
from megagate.errors import CheckpointError, RunError

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
FULL = numbered((4, 6))
LITTLE = 4 << 20

NUMBERS = st.integers(-2, 9) | st.sampled_from([2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.0, 4.0, float("nan")])
OUTSIDE = ["", ".", "..", "../x", "/etc/hostname", "a/b"]
NAMES = st.sampled_from([*OUTSIDE, "\0", "\ud800", "x" * 300, "w", "F32", "BF16", "rank-00000.safetensors"])
LEAVES = st.none() | st.booleans() | NUMBERS | NAMES | st.text(max_size=4)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint of three tensors by two ranks."""
    root = tmp_path_factory.mktemp("sound")
    others = [Piece("e", (0, 3), (0, 0), FULL[:0, :3]), Piece("s", (), (), torch.tensor(1.5).to(torch.bfloat16))]
    return save_pieces(root, 7, [[Piece("w", (4, 6), (0, 0), FULL[:3]), *others], [Piece("w", (4, 6), (3, 0), FULL[3:])]], {"a": [1, 2]})


@pytest.fixture(autouse=True)
def memory_is_traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def read_all(folder: Path) -> dict[str, torch.Tensor] | None:
    """All tensors after their digests were compared; None where a CheckpointError that names the folder says why not."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with Checkpoint.open(folder) as checkpoint:
            checkpoint.verify()
            return {name: checkpoint.read_whole(name) for name in checkpoint.tensors}
    except CheckpointError as error:
        assert str(folder) in str(error) and len(str(error)) < 3000
        return None
    finally:
        assert tracemalloc.get_traced_memory()[1] - before < LITTLE


def is_sound(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == {"w", "e", "s"} and torch.equal(found["w"], FULL) and found["s"].item() == 1.5 and found["e"].shape == (0, 3)


def copied(sound: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for path in sound.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def seal(folder: Path, values: Any) -> None:
    """Write an index with a right digest, so that what it says is looked at."""
    rest = json.dumps(values, separators=(",", ":")).encode()
    folder.joinpath("index.json").write_bytes(b'{"digest":"' + blake3(rest).hexdigest().encode() + b'",' + rest[1:])


def index_of(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "index.json").read_bytes())
    return {key: value for key, value in values.items() if key != "digest"}


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *places(node[key])]]


def mutate(value: Any, where: int, new: Any, how: str) -> None:
    """Replace, remove, rename one thing in a JSON value, or put it into many lists."""
    found = places(value)
    node, key = found[where % len(found)]
    if how == "replace":
        node[key] = new
    elif how == "nest":
        for _ in range(400):
            node[key] = [node[key]]
    else:
        taken = node.pop(key)
        if how == "rename" and isinstance(node, dict):
            node[str(new)] = taken


@FUZZ
@given(where=st.integers(0, 10**6), new=JSON, how=st.sampled_from(["replace", "replace", "remove", "rename", "nest"]))
@example(where=8, new=2**62, how="replace")
def test_a_sealed_index_with_one_wrong_value(sound: Path, tmp_path: Path, where: int, new: Any, how: str) -> None:
    values = index_of(sound)
    mutate(values, where, new, how)
    seal(copied(sound, tmp_path / "step"), values)
    result = read_all(tmp_path / "step")
    if result is not None and result.keys() == {"w", "e", "s"}:
        assert is_sound(result), "what was accepted is what was saved, but for a tensor's name, which no digest covers"


@FUZZ
@given(raw=st.binary(max_size=200), sealed=st.booleans())
@example(raw=b"{" * 100_000, sealed=True)
@example(raw=b'{"format":1}', sealed=True)
@example(raw=b"{1" + b"0" * 5000 + b"}", sealed=True)
def test_any_bytes_as_an_index(sound: Path, tmp_path: Path, raw: bytes, sealed: bool) -> None:
    folder = copied(sound, tmp_path / "step")
    rest = b"{" + raw[1:]
    (folder / "index.json").write_bytes(b'{"digest":"' + blake3(rest).hexdigest().encode() + b'",' + rest[1:] if sealed else raw)
    assert read_all(folder) is None


@FUZZ
@given(length=st.integers(0, 400) | st.sampled_from([2**31, 2**40, 2**63, 2**64 - 1]), raw=st.binary(max_size=300))
@example(length=2**64 - 1, raw=b"")
def test_any_bytes_as_a_header(sound: Path, tmp_path: Path, length: int, raw: bytes) -> None:
    """The file keeps its size, or opening would stop there."""
    folder = copied(sound, tmp_path / "step")
    path = folder / "rank-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes((length.to_bytes(8, "little") + raw + content[8 + len(raw) :])[: len(content)])
    found = read_all(folder)
    assert found is None or is_sound(found)


@FUZZ
@given(where=st.integers(0, 10**6), new=JSON, how=st.sampled_from(["replace", "remove", "rename"]))
def test_a_header_with_one_wrong_value(sound: Path, tmp_path: Path, where: int, new: Any, how: str) -> None:
    folder = copied(sound, tmp_path / "step")
    path = folder / "rank-00000.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    values = json.loads(content[8:start])
    mutate(values, where, new, how)
    header = json.dumps(values).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])
    index = index_of(folder)
    index["files"][path.name] = path.stat().st_size
    seal(folder, index)
    found = read_all(folder)
    assert found is None or is_sound(found)


def edited(sound: Path, folder: Path, edit: Callable[[dict[str, Any]], object]) -> str:
    """What is said of an index that was edited and sealed again."""
    values = index_of(sound)
    edit(values)
    seal(copied(sound, folder), values)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "..", "a/b", ""])
def test_a_name_that_leaves_the_folder_is_refused(sound: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    message = edited(sound, tmp_path / "step", lambda values: values["files"].update({name: 6}))
    assert message.startswith(f"{tmp_path / 'step' / 'index.json'} is damaged or was edited: it names the file '{name}'; files of a ")
    assert message.endswith("; load another step")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda v: v["tensors"]["w"]["pieces"][0].update(file="other"), "a piece of w lies in 'other', which is not among the files"),
        (lambda v: v["tensors"]["w"]["pieces"][1].update(offset=[3, 1]), "w is [3:4, 1:7], which does not lie in its shape (4, 6)"),
        (lambda v: v["tensors"]["w"].update(shape=[4, -6]), "w has [4, -6] for a shape or an offset"),
        (lambda v: v["tensors"]["w"].update(shape=[5, 6]), "the pieces of w hold 24 elements, its shape (5, 6) has 30"),
        (lambda v: v["files"].update({"rank-00001.safetensors": 23}), "the pieces in rank-00001.safetensors have 24 bytes, the file 23"),
        (lambda v: v["tensors"]["w"].update(dtype="C64"), "the dtype of w is 'C64'; this megagate knows F64, F32, BF16"),
        (lambda v: v["tensors"]["w"]["pieces"][0].update(digest="ab"), "a piece of w has the digest 'ab'; digests have 64 characters"),
        (lambda v: v.pop("tensors"), "'tensors' is missing"),
        (lambda v: v.update(step=-1), "step is -1, and must be a whole number from 0 on"),
        (lambda v: v.update(metadata=[]), "metadata is [], not an object"),
        (lambda v: v["files"].update({"rank-00000.safetensors": True}), "rank-00000.safetensors is True, and must be a whole number"),
        (lambda v: v.update(format="2"), "format '2', and this megagate reads format 1; load it with the version that wrote it"),
    ],
)
def test_what_an_index_says_is_checked(sound: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], told: str) -> None:
    message = edited(sound, tmp_path / "step", edit)
    assert str(tmp_path / "step" / "index.json") in message and told in message


@pytest.mark.parametrize(
    ("before", "after", "there"),
    [
        (b'"F32","shape":[3,6]', b'"I32","shape":[3,6]', r"I32 and \[3, 6\]"),
        (b'"F32","shape":[3,6]', b'"F32","shape":[6,3]', r"F32 and \[6, 3\]"),
        (b'"w@0,0"', b'"w@1,0"', "no such tensor"),
    ],
)
def test_a_header_that_disagrees_with_the_index(sound: Path, tmp_path: Path, before: bytes, after: bytes, there: str) -> None:
    folder = copied(sound, tmp_path / "step")
    path = folder / "rank-00000.safetensors"
    assert path.read_bytes().count(before) == 1
    path.write_bytes(path.read_bytes().replace(before, after))
    says = rf"w, piece at \[0, 0\] in {path}: the file's header has {there}, the index F32 and \[3, 6\]; the file is damaged, load"
    with Checkpoint.open(folder) as checkpoint:
        for use in (checkpoint.verify, lambda: checkpoint.read_whole("w")):
            with pytest.raises(CheckpointError, match=says):
                use()


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8, b"\x02" + b"\0" * 7 + b"{}"])
def test_a_file_that_is_no_data_file(sound: Path, tmp_path: Path, content: bytes) -> None:
    folder = copied(sound, tmp_path / "step")
    (folder / "rank-00001.safetensors").write_bytes(content)
    index = index_of(folder)
    index["files"]["rank-00001.safetensors"] = len(content)
    seal(folder, index)
    assert read_all(folder) is None


@pytest.mark.parametrize("length", [200 << 20, 2**62, 2**64 - 1])
def test_a_header_that_promises_much_is_not_read(tmp_path: Path, length: int) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(256 << 20)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with pytest.raises(CheckpointError, match=f"its header is damaged .it is said to have {length} bytes, the file has 268435448 and"):
        PieceFile(tmp_path / "file")
    assert tracemalloc.get_traced_memory()[1] - before < LITTLE


def test_a_folder_in_the_place_of_a_file(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "step")
    (folder / "rank-00001.safetensors").unlink()
    (folder / "rank-00001.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors is no file, \d+ bytes are recorded under that name"):
        Checkpoint.open(folder)


def test_a_damaged_manifest_of_a_rank_is_named(tmp_path: Path) -> None:
    staging = store.begin(tmp_path, 1)
    store.write_rank(staging, 0, [Piece("w", (4, 6), (0, 0), FULL)])
    manifest_path(staging, 0).write_bytes(manifest_path(staging, 0).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"rank-00000.json is damaged or was edited: "):
        store.publish(tmp_path, 1, world_size=1, metadata={})
    assert store.complete_steps(tmp_path) == []


@pytest.mark.parametrize("code", [13, 1, 30], ids=["EACCES", "EPERM", "EROFS"])
def test_no_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    save_pieces(tmp_path, 1, [[Piece("w", (4, 6), (0, 0), FULL)]])
    staging = store.begin(tmp_path, 2)

    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    says = r"cannot be written \(.*\); checkpoints written before are untouched; change the folder's permissions"
    with monkeypatch.context() as context:
        context.setattr(os, "open", refuse)
        with pytest.raises(RunError, match=f"rank-00000.safetensors: {says}"):
            store.write_rank(staging, 0, [Piece("w", (4, 6), (0, 0), FULL)])
        with pytest.raises(RunError, match=f"latest: {says}"):
            store.set_pointer(tmp_path, "latest", 1)
    with monkeypatch.context() as context:
        context.setattr(os, "mkdir", refuse)
        with pytest.raises(RunError, match=f"step-00000003.tmp: {says}"):
            store.begin(tmp_path, 3)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.step == 1 and checkpoint.verify() == 1


def test_a_file_larger_than_the_memory_of_the_machine_can_be_read(tmp_path: Path) -> None:
    """Of a hole: nothing is written but its head and its end."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = 3 * memory // (1 << 30)
    size = rows << 30
    header = json.dumps({"w@0,0": {"dtype": "U8", "shape": [rows, 1 << 30], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "file", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(size - 1, os.SEEK_CUR)
        file.write(b"\x07")
    last = PieceFile(tmp_path / "file").tensor("w", Box((0, 0), (rows, 1 << 30)), torch.uint8)[-1, -2:]
    assert last.tolist() == [0, 7]
