"""The last step of preprocessing, and what makes it safe: where shards lie, what is damaged, what is on the disk before what."""

import gzip
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from preprocess_helpers import BYTES, TEXTS, lines_of, prepare

from megagate.data import transfer
from megagate.data.files import AtomicFile, make_folder
from megagate.data.manifest import Manifest, open_shards, verify
from megagate.data.merge.plan import make_merge, publish_merge
from megagate.data.merge.run import run_merge
from megagate.data.preprocess import publish
from megagate.data.preprocess.plan import Plan, make_plan, publish_plan
from megagate.data.preprocess.publish import FULL_SHARD, finalize, ranges
from megagate.data.preprocess.team import Job, run_units
from megagate.data.preprocess.units import missing_units
from megagate.data.shards import ShardWriter
from megagate.errors import DataError

SIZES = [10, 20, 100, 30, 40, 50]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Six units of these sizes, in tokens, of two documents each."""
    for number, size in enumerate(SIZES):
        letter = "abcdef"[number]
        with gzip.open(tmp_path / f"{number}.jsonl.gz", "wb") as stream:  # which cannot be cut
            stream.write(lines_of([letter * 3, letter * (size - 5)]))
    return make_plan([str(tmp_path / f"{number}.jsonl.gz") for number in range(len(SIZES))], replace(BYTES, unit_bytes=1))


@pytest.fixture
def out(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All units of the plan, of which the third is a full shard."""
    monkeypatch.setattr(publish, "FULL_SHARD", 100)
    prepare(tmp_path / "out", plan, order=[5, 0, 3, 1, 2, 4])
    return tmp_path / "out"


def check(folder: Path, manifest: Manifest) -> None:
    assert [(entry.prefix, entry.tokens) for entry in manifest.shards] == [("train-00000", 30), ("train-00001", 100), ("train-00002", 120)]
    assert verify(folder) == manifest
    stream = np.concatenate([shard.stream for shard in open_shards(folder, manifest, split="train")])
    assert np.array_equal(stream, np.concatenate([[*[97 + n] * 3, 256, *[97 + n] * (size - 5), 256] for n, size in enumerate(SIZES)]))


def test_small_parts_are_merged_full_ones_linked_and_the_units_may_go(out: Path, plan: Plan) -> None:
    assert FULL_SHARD == 1 << 22
    manifest = finalize(out, plan)
    check(out, manifest)
    for suffix in ("bin", "idx"):
        assert (out / f"train-00001.{suffix}").samefile(out / f"units/part-00002-train.{suffix}")
    shutil.rmtree(out / "units")
    check(out, manifest)
    assert missing_units(out, plan) == [] and finalize(out, plan) == manifest


@pytest.mark.parametrize("units", [1, 3])
def test_a_small_set_has_no_shard_among_its_units(tmp_path: Path, units: int) -> None:
    raw = lines_of(["one", "two", "three"])
    (tmp_path / "a.jsonl").write_bytes(raw)
    plan = make_plan([str(tmp_path / "a.jsonl")], replace(BYTES, unit_bytes=-(-len(raw) // units)))
    assert len(plan.units) == units
    prepare(tmp_path / "out", plan)
    part = tmp_path / "out/units/part-00000-train.bin"
    raw = part.read_bytes()
    damage(part)
    with pytest.raises(DataError, match=f"{part} is damaged: its sha256 is"):
        finalize(tmp_path / "out", plan)
    part.write_bytes(raw)
    manifest = finalize(tmp_path / "out", plan)
    shutil.rmtree(tmp_path / "out/units")
    assert [entry.prefix for entry in verify(tmp_path / "out").shards] == ["train-00000"] and verify(tmp_path / "out") == manifest


@pytest.fixture
def linkless(out: Path) -> Iterator[Path]:
    """The same output, whose units lie on another disk, so that there can be no links."""
    place = Path("/dev/shm")
    if not place.is_dir() or place.stat().st_dev == out.stat().st_dev:
        pytest.fail("the tests need a second file system; /dev/shm is one on any Linux")
    folder = place / f"megagate-units-{os.getpid()}"
    shutil.copytree(out / "units", folder)
    linkless = out.with_name("linkless")
    shutil.copytree(out, linkless, ignore=shutil.ignore_patterns("units"))
    (linkless / "units").symlink_to(folder)
    yield linkless
    shutil.rmtree(folder)


def test_without_links_the_bytes_are_the_same(out: Path, linkless: Path, plan: Plan) -> None:
    manifest = finalize(linkless, plan)
    check(linkless, manifest)
    assert finalize(out, plan) == manifest
    for name in sorted(path.name for path in out.iterdir() if path.is_file()):
        assert (linkless / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("unit", [0, 5])
def test_a_damaged_small_part_is_not_published(out: Path, plan: Plan, unit: int, suffix: str) -> None:
    good = {path: path.read_bytes() for path in out.glob(f"units/part-{unit:05d}-train.*")}
    damage(out / f"units/part-{unit:05d}-train.{suffix}")
    record = out / f"units/part-{unit:05d}.json"
    message = f"train.{suffix} is damaged: its sha256 is .* {record.name} says .*; remove {record}, and run again"
    with pytest.raises(DataError, match=message):
        finalize(out, plan)
    assert not (out / "dataset.json").exists() and not list(out.rglob("*.tmp"))
    record.unlink()
    prepare(out, plan, order=missing_units(out, plan))
    assert {path: path.read_bytes() for path in good} == good
    check(out, finalize(out, plan))


def damage(path: Path) -> None:
    """Changes a file so that only its sha256 tells: an id of the `.bin`, or the lengths of the documents of the `.idx`."""
    if path.suffix == ".bin":
        raw = path.read_bytes()
        path.write_bytes(raw[:4] + b"\x07\x00" + raw[6:])
        return
    ids = np.fromfile(path.with_suffix(".bin"), dtype="<u2")
    with ShardWriter(path.with_suffix(""), dtype=ids.dtype) as writer:
        writer.add_many(ids, lengths=[5, ids.size - 5])


def test_of_a_full_part_sizes_are_compared_and_verify_reads_it(out: Path, linkless: Path, plan: Plan) -> None:
    for folder in (out, linkless):
        damage(folder / "units/part-00002-train.bin")
    with pytest.raises(DataError, match="part-00002-train.bin is damaged: its sha256 is"):
        finalize(linkless, plan)  # a copy reads it anyway
    finalize(out, plan)
    with pytest.raises(DataError, match="train-00001.bin is damaged: its sha256 is .*, and dataset.json says"):
        verify(out)
    (out / "dataset.json").unlink()
    with ShardWriter(out / "units/part-00002-train", dtype=np.dtype("<u2")) as writer:
        writer.add_many(np.zeros(100), lengths=[100])
    with pytest.raises(DataError, match="part-00002-train: documents is 1, and part-00002.json says 2; remove .*part-00002.json, and run"):
        finalize(out, plan)
    with ShardWriter(out / "units/part-00002-train", dtype=np.dtype("<u2")) as writer:
        writer.add(np.zeros(101))
    with pytest.raises(DataError, match="part-00002-train: tokens is 101, and part-00002.json says 100"):
        finalize(out, plan)


def test_what_is_missing_or_damaged_at_the_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS * 2))
    plan = make_plan([str(tmp_path / "a.jsonl")], replace(BYTES, unit_bytes=200))
    out = tmp_path / "out"
    prepare(out, plan, order=[0, 2])
    with pytest.raises(DataError, match=f"{len(plan.units) - 2} of {len(plan.units)} units are missing: 1, 3-{len(plan.units) - 1}; run"):
        finalize(out, plan)
    prepare(out, plan)
    record = out / "units/part-00000.json"
    good = record.read_bytes()
    for raw, message in [(good[:50], "part-00000.json is damaged"), (good.replace(plan.sha256[:8].encode(), b"0" * 8), "of another plan")]:
        record.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            finalize(out, plan)
    record.write_bytes(good)
    part = out / "units/part-00000-train.bin"
    os.truncate(part, part.stat().st_size - 2)
    with pytest.raises(DataError, match="part-00000-train.bin is truncated"):
        finalize(out, plan)
    assert not (out / "dataset.json").exists()
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


def test_publishing_again_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    plan = make_plan([str(tmp_path / "a.jsonl")], BYTES)
    prepare(tmp_path / "out", plan)
    manifest = finalize(tmp_path / "out", plan)
    for name in (".train-00000.bin.0123456789ab.tmp", "units/.part-00000-train.idx.0123456789ab.tmp"):
        (tmp_path / "out" / name).touch()
    assert finalize(tmp_path / "out", plan) == manifest
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_killed_at_any_step_of_publishing_it_leaves_the_same_bytes(tmp_path: Path, out: Path, plan: Plan) -> None:
    shutil.copytree(out, tmp_path / "reference")
    manifest = finalize(tmp_path / "reference", plan)
    reference = {path.name: path.read_bytes() for path in (tmp_path / "reference").iterdir() if path.is_file()}
    codes = []
    while not codes or codes[-1]:
        again = tmp_path / f"out{len(codes)}"
        shutil.copytree(out, again)
        child = os.fork()
        if not child:
            try:
                die_at_step(len(codes))
                finalize(again, plan)
                os._exit(0)
            finally:
                os._exit(1)  # this process must not go on with the tests
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert (again / "dataset.json").exists() == (codes[-1] == 0)
        assert finalize(again, plan) == manifest
        assert {path.name: path.read_bytes() for path in again.iterdir() if path.is_file()} == reference
    assert codes == [9] * 9 + [0]  # two links, seven names


def die_at_step(step: int) -> None:
    """Ends this process when it is about to give a file a name for the time `step`, from 0."""
    left = iter(range(step))
    for kind in ("link", "replace"):
        do = getattr(os, kind)
        setattr(os, kind, lambda *names, do=do: do(*names) if next(left, None) is not None else os._exit(9))


def test_what_stands_is_judged_again(tmp_path: Path, out: Path, plan: Plan) -> None:
    finalize(out, plan)
    other = make_plan([str(tmp_path / "0.jsonl.gz")], BYTES)
    with pytest.raises(DataError, match=f"{out} holds a data set that was not made by this plan"):
        finalize(out, other)
    os.truncate(out / "train-00002.bin", 20)
    with pytest.raises(DataError, match="train-00002.bin is truncated"):
        finalize(out, plan)


def test_who_is_overtaken_while_it_claims_the_folder_finds_its_plan_there(tmp_path: Path) -> None:
    late = AtomicFile(tmp_path / "plan.json")
    late.write(b"mine")
    with AtomicFile(tmp_path / "plan.json") as first:
        first.write(b"first")
    for path in tmp_path.glob(".*.tmp"):
        path.unlink()  # as the other one does when it has finished everything
    late.publish_first()
    assert (tmp_path / "plan.json").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1
    lost = AtomicFile(tmp_path / "other.json")
    for path in tmp_path.glob(".*.tmp"):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        lost.publish_first()


Log = list[str]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """What is synced, named and made below `tmp_path`, in order; temporary names without their random part."""
    log: Log = []
    fsync, replace_, link, mkdir = os.fsync, os.replace, os.link, os.mkdir

    def name(path: object) -> str:
        found = str(path).replace(str(tmp_path), "ROOT")
        folder, _, last = found.rpartition("/")
        return f"{folder}/{last.rsplit('.', 2)[0]}.tmp" if last.endswith(".tmp") else found

    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(f"sync {name(os.readlink(f'/proc/self/fd/{fd}'))}"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(f"name {name(b)}"), replace_(a, b))[1])
    monkeypatch.setattr(os, "link", lambda a, b: (log.append(f"link {name(b)}"), link(a, b))[1])
    monkeypatch.setattr(os, "mkdir", lambda path, *rest: (log.append(f"make {name(path)}"), mkdir(path, *rest))[1])
    return log


def published(name: str, folder: str = "ROOT/out") -> Log:
    return [f"sync {folder}/.{name}.tmp", f"name {folder}/{name}", f"sync {folder}"]


def shard(name: str, folder: str = "ROOT/out") -> Log:
    """Both files are on the disk before either has its name."""
    index, tokens = published(f"{name}.idx", folder), published(f"{name}.bin", folder)
    return [index[0], *tokens, *index[1:]]


def test_folders_are_durable_once_they_are_made(tmp_path: Path, log: Log) -> None:
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    assert log == ["make ROOT/a", "sync ROOT", "make ROOT/a/b", "sync ROOT/a"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


def test_bytes_are_durable_before_the_names_that_promise_them(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(publish, "FULL_SHARD", 100)
    prepare(tmp_path / "out", plan, order=[2])
    plan_file = ["sync ROOT/out/.plan.json.tmp", "link ROOT/out/plan.json", "sync ROOT/out"]
    units = "ROOT/out/units"
    assert [line for line in log if line != f"make {units}"] == [
        "make ROOT/out", "sync ROOT", *plan_file, *shard("part-00002-train", units), *published("part-00002.json", units)
    ]  # fmt: skip
    prepare(tmp_path / "out", plan)
    log.clear()
    finalize(tmp_path / "out", plan)
    links = [f"link ROOT/out/.train-00001.{suffix}.tmp" for suffix in ("bin", "idx")]
    names = [f"name ROOT/out/train-00001.{suffix}" for suffix in ("bin", "idx")]
    assert log == [*shard("train-00000"), *links, *names, "sync ROOT/out", *shard("train-00002"), *published("dataset.json")]
    log.clear()
    transfer.copy_shard(tmp_path / "out/train-00000", tmp_path / "copy", vocab_size=258, promise=None)
    assert log == shard("copy", "ROOT")


def test_folders_of_units_and_of_merges_are_durable_before_what_is_in_them(tmp_path: Path, plan: Plan, log: Log) -> None:
    out = tmp_path / "out"
    publish_plan(out, plan)
    log.clear()
    run_units(Job(plan=plan, folder=out, backend="tokenizers", on_error="stop"), range(len(SIZES)), workers=1, report=lambda _: None)
    assert log == ["make ROOT/out/units", "sync ROOT/out"]  # the rest is done by others
    finalize(out, plan)
    merge = make_merge([(str(out), None)], maker=None)
    log.clear()
    publish_merge(tmp_path / "merged", merge)
    run_merge(tmp_path / "merged", merge)
    assert log[:2] == ["make ROOT/merged", "sync ROOT"] and log[5:7] == ["make ROOT/merged/merged", "sync ROOT/merged"]
    assert log[-6:] == [*published("train-00000.json", "ROOT/merged/merged"), *published("dataset.json", "ROOT/merged")]
