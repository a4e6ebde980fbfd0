"""The command that merges: linked, copied, cut, joined; killed at any moment, run twice at once, on a full disk, across disks."""

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from commands import TOOLS, call

from megagate.data.manifest import MANIFEST_NAME, open_shards, read_manifest, verify
from megagate.data.merge.plan import cuts, make_merge, named_maker, publish_merge
from megagate.data.merge.run import run_merge
from megagate.data.shards import Shard, ShardWriter
from megagate.data.tokenizer import Tokenizer
from megagate.errors import DataError

Tree = dict[str, bytes]
EOD = 999
OF_IDS = ("--vocab-size", EOD + 1, "--eod-id", EOD)


def documents(seed: int, count: int = 500) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[*draw.integers(0, EOD, draw.integers(0, 40)).tolist(), EOD] for _ in range(count)]


def write(prefix: Path, found: list[list[int]], dtype: str = "<u2") -> Path:
    with ShardWriter(prefix, dtype=np.dtype(dtype)) as writer:
        writer.add_many(np.concatenate(found), lengths=[len(one) for one in found])
    return prefix


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bare shards of 500 documents each."""
    place = tmp_path_factory.mktemp("bare")
    return [write(place / f"part-{number}_text_document", documents(number)) for number in range(8)]


def start(*arguments: object, tool: str = "merge_data.py", limit: int | None = None) -> "subprocess.Popen[str]":
    limits = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(
        [str(word) for word in (sys.executable, TOOLS / tool, *arguments)],
        env={**os.environ, "PYTHONPATH": str(TOOLS.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limits,  # noqa: PLW1509  one thread here
    )


def run(*arguments: object, tool: str = "merge_data.py", limit: int | None = None, expect: int = 0) -> str:
    """What it says: in this process where nothing speaks against it."""
    if tool == "merge_data.py" and limit is None:
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complained:
            code = call("merge_data", *arguments)
        out, err = said.getvalue(), complained.getvalue()
    else:
        process = start(*arguments, tool=tool, limit=limit)
        out, err = process.communicate(timeout=120)
        code = process.returncode
    assert code == expect and "Traceback" not in err, err
    return out if expect == 0 else err[err.index("DataError: ") :]


def tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def view(folder: Path, split: str) -> list[list[int]]:
    shards = open_shards(folder, read_manifest(folder), split=split)  # type: ignore[arg-type]
    return [shard.document(i).tolist() for shard in shards for i in range(shard.documents)]


def joined(numbers: range, span: slice = slice(None)) -> list[list[int]]:
    return [document for number in numbers for document in documents(number)[span]]


def test_shards_are_linked_by_default_and_copied_when_asked(tmp_path: Path, bare: list[Path]) -> None:
    before = tree(bare[0].parent)
    inputs = ("--input", bare[0], f"{bare[1]}.bin", f"{bare[2]}.idx", "--valid", bare[3], "--test", bare[4], *OF_IDS)
    out = run(*inputs, "--output", tmp_path / "linked")
    assert "5 are linked" in out and "have to be read once, for sha256 and the largest id" in out
    run(*inputs, "--output", tmp_path / "copied", "--copy")
    assert tree(tmp_path / "linked") == tree(tmp_path / "copied"), "how the bytes come there is no part of the data set"
    for name, linked in (("linked", True), ("copied", False)):
        manifest = verify(tmp_path / name)
        assert (tmp_path / name / "train-00001.bin").samefile(f"{bare[1]}.bin") == linked
        assert [view(tmp_path / name, split) for split in ("train", "valid", "test")] == [joined(range(3)), documents(3), documents(4)]
        assert (manifest.tokenizer.kind, manifest.tokenizer.vocab_size, manifest.tokenizer.eod_id) == ("none", EOD + 1, EOD)
        assert {entry.max_id for entry in manifest.shards} == {EOD}
    assert tree(bare[0].parent) == before


def test_data_sets_keep_their_splits_and_are_not_read_again(tmp_path: Path, bare: list[Path]) -> None:
    run("--input", bare[0], "--valid", bare[1], *OF_IDS, "--output", tmp_path / "a")
    run("--input", bare[2], bare[3], *OF_IDS, "--split", "3,1", "--output", tmp_path / "b")
    out = run("--input", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both")
    assert "read once" not in out and "4 are linked" not in out and "6 are linked" in out
    verify(tmp_path / "both")
    first, second, _ = (slice(*span) for span in cuts((3, 1, 0), 500))
    assert view(tmp_path / "both", "train") == documents(0) + joined(range(2, 4), first)
    assert view(tmp_path / "both", "valid") == documents(1) + joined(range(2, 4), second)
    out = run("--input", tmp_path / "both", bare[4], "--tokenizer", tmp_path / "a", "--output", tmp_path / "more", "--shard-tokens", 30_000)
    verify(tmp_path / "more")
    assert view(tmp_path / "more", "train") == view(tmp_path / "both", "train") + documents(4)
    shards = read_manifest(tmp_path / "more").of_split("train")
    assert [shard.tokens >= 30_000 for shard in shards] == [True] * (len(shards) - 1) + [shards[-1].tokens >= 30_000]


def test_shards_of_another_type_are_written_anew(tmp_path: Path, bare: list[Path]) -> None:
    wide = write(tmp_path / "wide", documents(20), "<i8")
    out = run("--input", bare[0], wide, *OF_IDS, "--output", tmp_path / "out")
    assert "1 are linked" in out and "1 are written anew" in out
    assert view(tmp_path / "out", "train") == documents(0) + documents(20) and verify(tmp_path / "out").dtype == "uint16"
    narrow = write(tmp_path / "narrow", documents(21), "<i4")
    run("--input", narrow, *OF_IDS, "--output", tmp_path / "kept")
    assert verify(tmp_path / "kept").dtype == "int32" and (tmp_path / "kept/train-00000.bin").samefile(tmp_path / "narrow.bin")


def test_a_tokenizer_goes_along_to_the_byte(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["gate sink head expert " * 20], vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer.json")
    ids = [document.tolist() for document in tokenizer.encode_documents(["gate sink", "head"])]
    prefix = write(tmp_path / "a", ids)
    run("--input", prefix, "--tokenizer", tmp_path / "tokenizer.json", "--output", tmp_path / "one")
    other = write(tmp_path / "b", ids)
    run("--input", tmp_path / "one", other, "--tokenizer", tmp_path / "one", "--output", tmp_path / "two")
    verify(tmp_path / "two")
    assert (tmp_path / "two/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    told = json.loads(run(tmp_path / "two", "--json", tool="inspect_data.py"))[0]
    assert [sample["text"] for sample in told["samples"]] == ["gate sink", "head"]
    plan = make_merge([(str(tmp_path / "one"), None)], maker=None)
    publish_merge(tmp_path / "three", plan)
    (tmp_path / "one/tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=f"{tmp_path}/one/tokenizer.json changed while it was read; begin again"):
        run_merge(tmp_path / "three", plan)
    assert sorted(tree(tmp_path / "three")) == ["plan.json"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, bare: list[Path]) -> Tree:
    output = tmp_path_factory.mktemp("reference") / "out"
    run("--input", *bare, *OF_IDS, "--split", "9,1", "--output", output)
    return tree(output)


@pytest.mark.parametrize("way", [("--split", "9,1"), ("--copy",), ()], ids=["written", "copied", "linked"])
def test_killed_in_a_loop_it_leaves_the_same_bytes(tmp_path: Path, bare: list[Path], way: tuple[str, ...]) -> None:
    command = ("--input", *bare, *OF_IDS, *way)
    run(*command, "--output", tmp_path / "reference")
    draw, output, killed, within = random.Random(len(way)), tmp_path / "out", 0, 0
    before = tree(bare[0].parent)
    while True:
        process = start(*command, "--output", output, "--workers", 1)
        done = len(list(output.glob("merged/*.json")))
        while process.poll() is None and len(list(output.glob("merged/*.json"))) == done:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.003))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        killed, within = killed + 1, within + (not (output / MANIFEST_NAME).exists())
        assert killed < 60
        for path in output.glob("train-*.idx"):
            Shard(path.with_suffix("")).check_index()
    assert within >= 1, "it was never killed within its work"
    run(*command, "--output", output)
    assert tree(output) == tree(tmp_path / "reference") and tree(bare[0].parent) == before


def test_finished_shards_are_not_made_again(tmp_path: Path, bare: list[Path]) -> None:
    command = ("--input", *bare, *OF_IDS, "--output", tmp_path / "out", "--copy")
    assert "8 shards of uint16; 0 of them done" in run(*command)
    before = tree(tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*")}
    for name in (".train-00000.bin.0123456789ab.tmp", "merged/.train-00000.json.0123456789ab.tmp"):
        (tmp_path / "out" / name).write_text("left by one that was killed between the manifest and the sweeping")
    run(*command)
    assert tree(tmp_path / "out") == before
    for name in (MANIFEST_NAME, "merged/train-00003.json"):
        (tmp_path / "out" / name).unlink()
    assert "8 shards of uint16; 7 of them done" in run(*command)
    assert tree(tmp_path / "out") == before
    again = {path.name for path in (tmp_path / "out").glob("train-*") if path.stat().st_mtime_ns != times[path.name]}
    assert again == {"train-00003.bin", "train-00003.idx"}


def test_two_at_once_do_no_harm(tmp_path: Path, bare: list[Path], reference: Tree) -> None:
    command = ("--input", *bare, *OF_IDS, "--split", "9,1", "--output", tmp_path / "out")
    writers = [start(*command) for _ in range(3)]
    said = [process.communicate(timeout=120)[1] for process in writers]
    codes = [process.returncode for process in writers]
    assert codes == [0, 0, 0], said  # who is overtaken takes what stands there
    assert tree(tmp_path / "out") == reference


@pytest.mark.parametrize("copy", [True, False])
def test_one_that_is_overtaken_takes_the_other_ones_data_set(tmp_path: Path, bare: list[Path], copy: bool) -> None:
    plan = make_merge([(str(prefix), None) for prefix in bare[:3]], maker=named_maker(None, vocab_size=EOD + 1, eod_id=EOD))
    output = tmp_path / "out"
    publish_merge(output, plan)
    overtaken: list[int] = []

    def overtake(count: int) -> None:
        if not overtaken:
            overtaken.append(count)
            run_merge(output, plan, copy=copy)  # which removes the other one's temporary files

    manifest = run_merge(output, plan, copy=copy, report=overtake)
    assert overtaken and verify(output) == manifest and view(output, "train") == joined(range(3))
    names = {f"train-0000{number}" for number in range(3)}
    expected = {f"{name}{suffix}" for name in names for suffix in (".bin", ".idx")} | {f"merged/{name}.json" for name in names}
    assert set(tree(output)) == expected | {"plan.json", MANIFEST_NAME}


def test_an_input_that_is_replaced_meanwhile_is_noticed(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", documents(1))
    plan = make_merge([(str(prefix), None)], maker=named_maker(None, vocab_size=EOD + 1))
    publish_merge(tmp_path / "out", plan)

    def replace(count: int) -> None:
        write(prefix, documents(2))

    with pytest.raises(DataError, match=f"{prefix}.bin was replaced while it was read; run the same command again"):
        run_merge(tmp_path / "out", plan, report=replace)
    assert sorted(tree(tmp_path / "out")) == ["plan.json"]


def test_of_two_merges_into_one_folder_one_has_its_way(tmp_path: Path, bare: list[Path]) -> None:
    for attempt in range(3):
        output = tmp_path / f"out{attempt}"
        writers = [start("--input", prefix, *OF_IDS, "--output", output) for prefix in bare[:3]]
        said = [process.communicate(timeout=120)[1] for process in writers]
        assert sorted(process.returncode for process in writers) == [0, 2, 2], said
        assert sum("holds the work of another plan: its inputs differ" in err for err in said) == 2, said
        winner = [process.returncode for process in writers].index(0)
        verify(output)
        assert view(output, "train") == documents(winner)


def test_what_is_published_is_not_changed(tmp_path: Path, bare: list[Path]) -> None:
    """By another merge, or by preprocessing."""
    output = tmp_path / "out"
    run("--input", bare[0], *OF_IDS, "--output", output)
    before = tree(output)
    (tmp_path / "a.txt").write_text("some text")
    text = ("--input", tmp_path / "a.txt", "--tokenizer", "bytes")
    assert "its inputs differ" in run("--input", bare[1], *OF_IDS, "--output", output, expect=2)
    other = ("--vocab-size", 2000, "--shard-tokens", 9)
    assert "its tokenizer and shard_tokens differ" in run("--input", bare[0], *other, "--output", output, expect=2)
    assert "plan.json is not one of preprocessing" in run(*text, "--output", output, tool="preprocess_data.py", expect=2)
    assert tree(output) == before
    (output / "plan.json").unlink()
    assert "is not empty, and holds no merge" in run("--input", bare[1], *OF_IDS, "--output", output, expect=2)
    assert "not made by this plan" in run(*text, "--output", output, tool="preprocess_data.py", expect=2)
    assert tree(output) == {name: content for name, content in before.items() if name != "plan.json"}
    run(*text, "--output", tmp_path / "text", tool="preprocess_data.py")
    before = tree(tmp_path / "text")
    assert "plan.json is not one of a merge" in run("--input", bare[0], *OF_IDS, "--output", tmp_path / "text", expect=2)
    assert tree(tmp_path / "text") == before


def test_a_full_disk_is_told_and_the_next_run_goes_on(tmp_path: Path, bare: list[Path], reference: Tree) -> None:
    command = ("--input", *bare, *OF_IDS, "--split", "9,1", "--output", tmp_path / "out")
    message = run(*command, limit=10_000, expect=2)
    assert f"cannot write {tmp_path}/out/train-0000" in message and "File too large; free some space" in message
    left = tree(tmp_path / "out")  # shards of the small split may be done by then, and stay
    assert not [name for name in left if name.startswith("train-") or name.endswith((".tmp", MANIFEST_NAME))]
    assert all(reference[name] == content for name, content in left.items() if name.startswith("valid-"))
    run(*command)
    assert tree(tmp_path / "out") == reference


def test_what_does_not_fit_is_told_before_anything_is_written(tmp_path: Path) -> None:
    """16 TB of tokens in a file with holes."""
    longest = 2**31 - 1
    count = 4_000
    with open(tmp_path / "huge.bin", "wb") as stream:
        stream.truncate(2 * longest * count)
    starts = np.arange(count, dtype="<i8") * 2 * longest
    arrays = [np.full(count, longest, "<i4"), starts, np.arange(count + 1, dtype="<i8")]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1)
    (tmp_path / "huge.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    for way in (("--copy",), ("--split", "1,1")):
        message = run("--input", tmp_path / "huge", *OF_IDS, *way, "--output", tmp_path / "out", expect=2)
        assert "bytes free, and 17,179,869,176,000 have to be written; choose another disk" in message
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["merged", "plan.json"]
        shutil.rmtree(tmp_path / "out")


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """Another file system of 200 kB."""
    place = Path("/dev/shm")
    if not place.is_dir() or place.stat().st_dev == tmp_path.stat().st_dev:
        pytest.fail("the tests need a second file system; /dev/shm is one on any Linux")
    folder = place / f"megagate-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_after_a_failure_other_options_need_another_folder_or_none(tmp_path: Path, bare: list[Path]) -> None:
    output = tmp_path / "out"
    assert "ids must be in [0, 500)" in run("--input", bare[0], "--vocab-size", 500, "--output", output, expect=2)
    message = run("--input", bare[0], *OF_IDS, "--output", output, expect=2)
    assert "its tokenizer differ" in message and "or remove the folder, in which nothing is published yet, and begin anew" in message
    shutil.rmtree(output)
    run("--input", bare[0], *OF_IDS, "--output", output)
    assert "remove" not in run("--input", bare[0], "--vocab-size", 500, "--output", output, expect=2)


def test_across_disks_it_names_the_remedy(tmp_path: Path, bare: list[Path], other_disk: Path) -> None:
    command = ("--input", bare[0], *OF_IDS, "--output", other_disk / "out")
    message = run(*command, expect=2)
    assert f"cannot link {bare[0]}.bin to {other_disk}/out/train-00000.bin: " in message and "or --copy" in message
    assert not [name for name in tree(other_disk / "out") if name.endswith((".tmp", ".bin", ".idx"))]
    run(*command, "--copy")
    assert view(other_disk / "out", "train") == documents(0)


def test_interrupted_it_leaves_no_temporary_file(tmp_path: Path, bare: list[Path]) -> None:
    big = tmp_path / "big"
    with ShardWriter(big, dtype=np.dtype("<u2")) as writer:
        writer.add(np.ones(40_000_000, dtype=np.uint16))
    process = start("--input", big, *OF_IDS, "--output", tmp_path / "out", "--copy")
    while process.poll() is None and not list(tmp_path.glob("out/.train-*.tmp")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; finished shards are kept" in err and "Traceback" not in err
    assert sorted(tree(tmp_path / "out")) == ["plan.json"]


def test_bad_inputs_are_named(tmp_path: Path, bare: list[Path]) -> None:
    write(tmp_path / "a", documents(30))
    write(tmp_path / "neg", [[1, 2, 3]], "<i8")
    raw = bytearray((tmp_path / "neg.bin").read_bytes())
    raw[8:16] = b"\xff" * 8
    (tmp_path / "neg.bin").write_bytes(bytes(raw))
    shutil.copy(tmp_path / "a.bin", tmp_path / "alone.bin")
    run("--input", bare[0], *OF_IDS, "--output", tmp_path / "set")
    run("--input", bare[1], "--vocab-size", 1001, "--output", tmp_path / "other")
    for words, message in [
        (("--input", tmp_path / "none", *OF_IDS), "neither a folder nor a shard"),
        (("--input", "x" * 3000, *OF_IDS), "neither a folder nor a shard"),
        (("--input", tmp_path / "alone", *OF_IDS), f"cannot read {tmp_path}/alone.idx: No such file"),
        (("--input", tmp_path), "it has no dataset.json"),
        (("--input", bare[0]), "bare prefixes do not say which tokenizer made them"),
        (("--input", tmp_path / "set", bare[1]), "bare prefixes do not say which tokenizer made them"),
        (("--input", bare[0], f"{bare[0]}.bin", *OF_IDS), "names the same data twice"),
        (("--input", tmp_path / "set", bare[0], *OF_IDS), "names the same data twice, as"),
        (("--input", tmp_path / "set", tmp_path / "other"), "are different tokenizers (vocab_size '1000' and '1001', eod_id"),
        (("--input", tmp_path / "set", bare[2], "--tokenizer", "bytes"), "are different tokenizers (kind 'bytes' and 'none'"),
        (("--input", tmp_path / "set", "--split", "1,1,1"), "--split cuts bare prefixes, and there are none"),
        (("--input", bare[0], *OF_IDS, "--split", "1,x"), "--split is '1,x'; it must be three weights"),
        (("--input", bare[0], *OF_IDS, "--split", "0,0,0"), "it must be three weights"),
        (("--input", bare[0], *OF_IDS, "--shard-tokens", -1), "--shard-tokens is -1"),
        (("--input", bare[0], *OF_IDS, "--workers", 0), "--workers is 0"),
        (("--input", bare[0], "--vocab-size", 10, "--eod-id", 10), "ids must be in [0, vocab size)"),
        (("--input", bare[0], "--tokenizer", "bytes", "--eod-id", 1), "leave out --vocab-size and --eod-id"),
        (("--input", tmp_path / "neg", *OF_IDS), f"{tmp_path}/neg.bin holds id -1 at token 1 (byte 8); ids must be in [0, 1000)"),
        ((*OF_IDS,), "there is nothing to merge"),
    ]:
        err = run(*words, "--output", tmp_path / "out", expect=2)
        assert message in err and err.count("\n") == 1, err
        assert not (tmp_path / "out" / MANIFEST_NAME).exists() and not list(tmp_path.glob("out/train*"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("way", [(), ("--copy",), ("--split", "1,1")], ids=["linked", "copied", "written"])
def test_ids_above_the_vocabulary_are_named_by_their_place(tmp_path: Path, bare: list[Path], way: tuple[str, ...]) -> None:
    found = documents(31)
    found[300][0] = 1234
    prefix = write(tmp_path / "a", found)
    token = sum(len(one) for one in found[:300])
    for words in (("--input", prefix, *OF_IDS), ("--input", bare[0], prefix, *OF_IDS, "--workers", 1)):
        message = run(*words, *way, "--output", tmp_path / f"out{len(words)}", expect=2)
        assert f"{prefix}.bin holds id 1234 at token {token} (byte {2 * token}); ids must be in [0, 1000)" in message
        left = tree(tmp_path / f"out{len(words)}")
        assert MANIFEST_NAME not in left and not [name for name in left if name.endswith(".tmp")]


def test_a_damaged_data_set_is_not_copied(tmp_path: Path, bare: list[Path]) -> None:
    run("--input", *bare[:2], *OF_IDS, "--output", tmp_path / "set", "--copy")
    path = tmp_path / "set/train-00000.bin"
    raw = path.read_bytes()
    path.write_bytes(b"\x07" + raw[1:])
    for number, way in enumerate((("--copy",), ("--shard-tokens", 10**9))):
        output = tmp_path / f"out{number}"
        assert f"{path} is damaged: its sha256 is" in run("--input", tmp_path / "set", "--output", output, *way, expect=2)
        assert not list(output.glob("train-00000*")) and not list(output.rglob("*.tmp"))
    path.write_bytes(raw[:-2])
    assert f"{path} is truncated" in run("--input", tmp_path / "set", "--output", tmp_path / "out", expect=2)
    path.write_bytes(raw)
    lengths = [len(one) for one in documents(0)]
    lengths[:2] = lengths[1::-1]  # an index that contradicts nothing but its sha256
    with ShardWriter(path.with_suffix(""), dtype=np.dtype("<u2")) as writer:
        writer.add_many(np.frombuffer(raw, "<u2"), lengths=lengths)
    for number, way in enumerate((("--copy",), ("--shard-tokens", 10**9))):
        message = run("--input", tmp_path / "set", "--output", tmp_path / f"out{number}", *way, expect=2)
        assert "train-00000.idx is damaged: its sha256 is" in message and "its manifest says" in message and "leave it out" in message
    os.truncate(path.with_suffix(".idx"), 50)
    assert "train-00000.idx is truncated" in run("--input", tmp_path / "set", "--output", tmp_path / "out", expect=2)
