"""Names, pointers, pruning and re-saving: which checkpoint a path means, and which may go."""

import os
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import save_pieces

from megagate.checkpoint import durable, store
from megagate.checkpoint.folders import run_around
from megagate.errors import CheckpointError


def value(path: Path) -> float:
    """The one value that all elements of `w` have."""
    with store.Checkpoint.open(path) as checkpoint:
        assert checkpoint.verify()
        (found,) = checkpoint.read_whole("w").unique().tolist()
    return found


def save_value(root: Path, step: int, number: float) -> Path:
    return save_pieces(root, step, [[store.Piece("w", (2, 3), (0, 0), torch.full((2, 3), number))]])


def test_paths_resolve_to_step_folders(saved: Path) -> None:
    assert store.complete_steps(saved) == [10, 20, 30]
    assert store.resolve(saved).name == "step-00000030"
    assert store.resolve(saved / "step-00000020") == saved / "step-00000020"
    assert (saved / "latest").read_text() == "step-00000030\n"
    store.set_pointer(saved, "latest", 20)
    assert store.resolve(saved).name == "step-00000020" and value(saved) == 20
    (saved / "run").mkdir()
    for path in list(saved.glob("step-*")) + [saved / "latest"]:
        (saved / "run" / "checkpoints").mkdir(exist_ok=True)
        path.rename(saved / "run" / "checkpoints" / path.name)
    assert store.resolve(saved / "run") == saved / "run" / "checkpoints" / "step-00000020"


def test_the_run_around_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    elsewhere = tmp_path / "disk" / "step-00000001"
    for folder in (step, elsewhere, tmp_path / "moved"):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(step)
    (tmp_path / "moved" / "checkpoints").symlink_to(elsewhere.parent)
    monkeypatch.chdir(step)
    for name in (step, Path(), Path("../step-00000001"), tmp_path / "link", Path("../../../link")):
        assert run_around(name).samefile(tmp_path / "run")
    assert run_around(tmp_path / "moved" / "checkpoints" / "step-00000001").samefile(tmp_path / "moved")
    assert run_around(elsewhere).samefile(tmp_path / "disk")


@pytest.mark.parametrize("content", [None, b"", b"step-00000099\n", b"../elsewhere", b"\xff\xfe", b"step-00000010.tmp"])
def test_without_a_good_pointer_the_newest_complete_one_counts(saved: Path, content: bytes | None) -> None:
    (saved / "latest").unlink()
    if content is not None:
        (saved / "latest").write_bytes(content)
    (saved / "step-00000040").mkdir()  # by hand: no index
    store.begin(saved, 50)
    assert store.read_pointer(saved, "latest") is None
    assert store.resolve(saved).name == "step-00000030"
    assert store.complete_steps(saved) == [10, 20, 30]


def test_a_copy_under_another_name_can_be_opened(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "my-base-model"
    os.rename(saved / "step-00000010", copy)
    assert store.resolve(copy) == copy and value(copy) == 10


@pytest.mark.parametrize("name", ["missing", "step-00000099", "empty", "step-00000050.tmp", "file", "step-00000040"])
def test_no_complete_checkpoint_is_an_error_with_a_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "step-00000040").mkdir()
    (tmp_path / "file").write_text("x")
    store.begin(tmp_path, 50).joinpath("index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name} (does not exist|holds no complete|is no folder).*name a step-\* folder"):
        store.resolve(tmp_path / name)
    with pytest.raises(CheckpointError):
        store.Checkpoint.open(tmp_path)


def test_a_pointer_names_only_what_is_complete(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best: cannot point to step 99, .*complete are \[10, 20, 30\]"):
        store.set_pointer(saved, "best", 99)
    assert store.read_pointer(saved, "best") is None


def test_prune_keeps_the_newest_and_what_pointers_name(saved: Path) -> None:
    for step in (40, 50, 60):
        save_value(saved, step, step)
    store.set_pointer(saved, "best", 20)
    store.set_pointer(saved, "latest", 50)
    assert store.prune(saved, keep=2) == [10, 30]
    assert store.complete_steps(saved) == [20, 40, 50, 60]
    assert store.prune(saved, keep=0) == [] and store.prune(saved, keep=9) == []
    store.set_pointer(saved, "latest", 60)
    assert store.prune(saved, keep=1) == [40, 50]
    assert sorted(path.name for path in saved.iterdir()) == ["best", "latest", "step-00000020", "step-00000060"]


def test_steps_that_a_run_has_not_reached_do_not_count(saved: Path) -> None:
    """Killed between the name of step 30 and `latest`, it goes on from step 20, saves other steps, and reaches 30 again."""
    store.set_pointer(saved, "latest", 20)
    save_value(saved, 23, 23)
    assert store.prune(saved, keep=2) == [10] and store.complete_steps(saved) == [20, 23, 30], "two of the run's own"
    save_value(saved, 26, 26)
    assert store.prune(saved, keep=1) == [20, 23]
    save_value(saved, 32, 32)
    assert store.prune(saved, keep=1) == [26, 30] and store.complete_steps(saved) == [32]


def test_prune_with_no_pointer_keeps_the_newest(saved: Path) -> None:
    (saved / "latest").unlink()
    assert store.prune(saved, keep=1) == [10, 20] and value(saved) == 30


def test_a_half_deleted_checkpoint_has_lost_its_name_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    unlink = os.unlink
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(os, "unlink", stop)
        store.prune(saved, keep=1)
    assert os.unlink is unlink
    assert store.complete_steps(saved) == [20, 30] and (saved / "step-00000010.trash" / "index.json").exists()
    assert store.clean_leftovers(saved) == ["step-00000010.trash"]
    assert store.complete_steps(saved) == [20, 30]


def test_clean_leftovers_removes_only_what_dead_runs_left(saved: Path) -> None:
    store.begin(saved, 40)
    for name in ("latest.tmp", "best.tmp", "notes.tmp", "user.txt"):
        (saved / name).write_text("x")
    (saved / "mine.tmp").mkdir()
    assert store.clean_leftovers(saved) == ["best.tmp", "latest.tmp", "step-00000040.tmp"]
    names = {path.name for path in saved.iterdir()}
    assert names == {"latest", "mine.tmp", "notes.tmp", "step-00000010", "step-00000020", "step-00000030", "user.txt"}
    assert store.clean_leftovers(saved / "nowhere") == [] and store.complete_steps(saved / "nowhere") == []


def test_begin_empties_what_a_dead_run_left(saved: Path) -> None:
    staging = store.begin(saved, 40)
    (staging / "rank-00007.safetensors").write_text("stale")
    assert store.begin(saved, 40) == staging == store.staging_path(saved, 40)
    assert list(staging.iterdir()) == []


def test_a_step_saved_anew_replaces_the_old_one(saved: Path) -> None:
    store.set_pointer(saved, "best", 30)
    save_value(saved, 20, 21)
    assert value(saved / "step-00000020") == 21 and store.resolve(saved).name == "step-00000020"
    assert sorted(path.name for path in saved.iterdir()) == ["best", "latest", "step-00000010", "step-00000020", "step-00000030"]


def test_between_the_two_renames_of_a_resave_the_old_one_counts(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def die_before_the_second(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(os, "rename", die_before_the_second)
        save_value(saved, 30, 31)
    assert not (saved / "step-00000030").exists()
    assert store.complete_steps(saved) == [10, 20, 30] and value(saved) == 30 and value(saved / "step-00000030") == 30
    assert store.prune(saved, keep=1) == [10, 20] and value(saved) == 30
    assert store.clean_leftovers(saved) == ["step-00000030.old", "step-00000030.tmp"]
    assert store.resolve(saved) == saved / "step-00000030" and value(saved) == 30
    save_value(saved, 30, 32)
    assert value(saved) == 32 and store.clean_leftovers(saved) == []


def test_an_old_one_whose_successor_stands_is_removed(saved: Path) -> None:
    os.rename(saved / "step-00000020", saved / "step-00000020.old")
    os.rename(saved / "step-00000030", saved / "step-00000020")
    assert store.clean_leftovers(saved) == ["step-00000020.old"]
    assert value(saved / "step-00000020") == 30 and store.complete_steps(saved) == [10, 20]


def test_prune_leaves_no_stand_in_behind(saved: Path) -> None:
    os.rename(saved / "step-00000010", saved / "step-00000010.old")
    os.rename(saved / "step-00000020", saved / "step-00000020.old")
    save_value(saved, 20, 22)
    assert store.prune(saved, keep=1) == [10] and store.resolve(saved).name == "step-00000020"
    assert store.complete_steps(saved) == [20, 30]


def test_bytes_are_durable_before_the_names_that_promise_them(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name(path: object) -> str:
        return str(path).replace(str(saved), "ROOT")

    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(f"sync {name(os.readlink(f'/proc/self/fd/{fd}'))}"), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(f"name {name(b)}"), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(f"name {name(b)}"), replace(a, b))[1])
    save_value(saved, 40, 40)
    staging = "ROOT/step-00000040.tmp"
    assert log == [
        f"sync {staging}/rank-00000.safetensors",
        f"sync {staging}/rank-00000.json.tmp",
        f"name {staging}/rank-00000.json",
        f"sync {staging}",
        f"sync {staging}/index.json.tmp",
        f"name {staging}/index.json",
        f"sync {staging}",
        f"sync {staging}",
        "name ROOT/step-00000040",
        "sync ROOT",
        "sync ROOT/latest.tmp",
        "name ROOT/latest",
        "sync ROOT",
    ]
    log.clear()
    store.prune(saved, keep=3)
    assert log == ["name ROOT/step-00000010.trash", "sync ROOT"]


def test_the_disk_begins_while_writing_and_is_told_each_stretch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, advise = [], os.posix_fadvise

    def record(descriptor: int, begin: int, size: int, advice: int) -> None:
        assert os.lseek(descriptor, 0, os.SEEK_CUR) >= begin + size and advice == os.POSIX_FADV_DONTNEED
        told.append((begin, size))
        advise(descriptor, begin, size, advice)

    monkeypatch.setattr(durable, "_STRETCH", 1 << 12)
    monkeypatch.setattr(os, "posix_fadvise", record)
    cut = torch.arange(9000, dtype=torch.float32).split([1000, 7, 5993, 2000])
    offsets = (0, 1000, 1007, 7000)
    pieces = [store.Piece("w", (9000,), (offset,), part) for offset, part in zip(offsets, cut, strict=True)]
    folder = save_pieces(tmp_path, 1, [pieces])
    position = 0
    for begin, size in told:
        assert begin == position and size
        position += size
    assert position == (folder / "rank-00000.safetensors").stat().st_size // (1 << 12) * (1 << 12) > 32_000 and len(told) > 2
    with store.Checkpoint.open(folder) as checkpoint:
        assert checkpoint.verify() == 4 and torch.equal(checkpoint.read_whole("w"), torch.cat(cut))
