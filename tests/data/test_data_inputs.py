"""Inputs of preprocessing: folders and links, one file under two names, samples of large files, small files that share a unit."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.files import sampled_sha256
from megagate.data.manifest import open_shards
from megagate.data.preprocess.backends import first_documents
from megagate.data.preprocess.plan import Plan, Settings, make_plan, publish_plan
from megagate.data.preprocess.publish import finalize
from megagate.data.preprocess.team import Job, run_units
from megagate.data.preprocess.units import read_record, write_unit
from megagate.errors import DataError

BYTES = Settings(tokenizer=ByteTokenizer().identity(), split=(1, 0, 0))


def documents_of(folder: Path, plan: Plan, *, skip: bool = False) -> list[str]:
    """The texts of a data set made of a plan in this process."""
    publish_plan(folder, plan)
    (folder / "units").mkdir()
    for unit in range(len(plan.units)):
        on_error = "skip" if skip else "stop"
        write_unit(plan, unit, folder=folder, encoder=ByteTokenizer(), on_error=on_error, report=lambda _: None)  # type: ignore[arg-type]
    manifest = finalize(folder, plan)
    shards = open_shards(folder, manifest, split="train")
    return [bytes(shard.document(i)[:-1].tolist()).decode() for shard in shards for i in range(shard.documents)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts, one of them behind a link to a folder."""
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in/a.txt").write_text("first")
    (tmp_path / "elsewhere/b.txt").write_text("second")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "in"


@pytest.mark.parametrize("loop", ["itself", "linked/loop"])
def test_links_to_folders_are_followed_and_no_loop_is(folder: Path, loop: str) -> None:
    (folder / loop).symlink_to(folder)
    plan = make_plan([str(folder)], BYTES)
    assert [source.name for source in plan.sources] == ["a.txt", "linked/b.txt"]


@pytest.mark.parametrize("how", ["a hard link", "a link", "a second link to the folder"])
def test_one_file_under_two_names_is_refused(folder: Path, how: str) -> None:
    if how == "a hard link":
        os.link(folder / "a.txt", folder / "c.txt")
    elif how == "a link":
        (folder / "c.txt").symlink_to(folder / "a.txt")
    else:
        (folder / "more").symlink_to(folder.parent / "elsewhere")
    names = f"{folder}/linked/b.txt and as {folder}/more/b.txt" if "folder" in how else f"{folder}/a.txt and as {folder}/c.txt"
    with pytest.raises(DataError, match=f"--input names one file twice, as {names}; each document must come once; leave one out"):
        make_plan([str(folder)], BYTES)


def test_what_a_folder_holds_beside_texts_is_counted(folder: Path) -> None:
    for name in ("a.json", "b.json", "c.CSV", "a.txt.gz", ".hidden.txt", "README", "linked/deep.csv"):
        (folder / name).write_text("{}")
    (folder / "broken.txt").symlink_to("none")
    plan = make_plan([str(folder)], BYTES)
    assert dict(plan.left_out) == {".json": 2, ".csv": 2, ".txt.gz": 1, "hidden": 1, "no ending": 1, "broken links": 1}
    assert plan.sha256 == make_plan([str(folder / "a.txt"), str(folder / "linked/b.txt")], BYTES).sha256


def test_samples_see_what_is_moved_within_a_file_of_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    raw = os.urandom(8 << 20)
    path.write_bytes(raw)
    size, before = sampled_sha256(path)
    assert size == len(raw)
    cut = len(raw) // 4  # a line of the first half is made longer by a byte, and one of the second shorter
    path.write_bytes(raw[:cut] + b"+" + raw[cut : 3 * cut] + raw[3 * cut + 1 :])
    assert sampled_sha256(path)[0] == size and sampled_sha256(path)[1] != before
    for small in (1, 4_000, 1 << 17, 190_000):  # nothing of a small file is left out
        raw = os.urandom(small)
        path.write_bytes(raw)
        found = {sampled_sha256(path)[1]}
        places = {0, small // 3, small // 2, 2 * small // 3, small - 1}
        for place in places:
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            found.add(sampled_sha256(path)[1])
        assert len(found) == len(places) + 1


def test_small_files_share_a_unit(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(50):
        (tmp_path / f"in/{number:02d}.txt").write_text(f"document {number:03d}")
    plans = [make_plan([str(tmp_path / "in")], replace(BYTES, unit_bytes=size)) for size in (1, 50, 0)]
    assert [len(plan.units) for plan in plans] == [50, 13, 1]  # each is of 12 bytes
    assert [unit.bytes for unit in plans[1].units] == [48] * 12 + [24]
    expected = [f"document {number:03d}" for number in range(50)]
    assert [documents_of(tmp_path / str(index), plan) for index, plan in enumerate(plans)] == [expected] * 3
    assert list(first_documents(plans[2])) == expected[::7]
    assert plans[2].sha256 is plans[2].sha256, "it is computed at every unit"


def test_a_bad_file_among_those_of_a_unit_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, raw in (("a", b"good"), ("b", b"b\xff"), ("c", b"also good")):
        (tmp_path / f"in/{name}.txt").write_bytes(raw)
    plan = make_plan([str(tmp_path / "in")], BYTES)
    with pytest.raises(DataError, match=f"{tmp_path}/in/b.txt: invalid UTF-8"):
        documents_of(tmp_path / "stop", plan)
    assert documents_of(tmp_path / "skip", plan, skip=True) == ["good", "also good"]
    record = read_record(tmp_path / "skip", plan.sha256, 0)
    assert record is not None and record.messages == ["b.txt: invalid UTF-8 (invalid start byte at its byte 1)"]


def test_an_error_that_nobody_foresaw_reaches_the_parent(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    plan = replace(make_plan([str(tmp_path / "a.txt")], BYTES), places=())
    job = Job(plan=plan, folder=tmp_path / "out", backend="tokenizers", on_error="stop")
    with pytest.raises(DataError, match=r"the worker at unit 0 failed \(IndexError: (?s:.*)Traceback (?s:.*)self\.places\[piece\.source\]"):
        run_units(job, [0], workers=1, report=lambda _: None)
