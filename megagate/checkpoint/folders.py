"""The folder of a run's checkpoints: names, the pointers `latest` and `best`, and which folders may go.

    ROOT/step-00000100/        complete: it got this name only after its last byte was on the disk
    ROOT/step-00000100.tmp/    being written, or left by a run that died
    ROOT/step-00000100.old/    complete; its step was saved anew, and it stands in until the new one has the name
    ROOT/step-00000100.trash/  being deleted
    ROOT/latest, ROOT/best     text files, each naming one step folder

ROOT is the folder `checkpoints` of a run's own folder.

One process (rank 0) calls what changes a folder here; any may call what reads.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Literal

from megagate.checkpoint.durable import explaining, write_file
from megagate.data.files import sync_folder
from megagate.errors import CheckpointError

INDEX_NAME = "index.json"
ROOT_NAME = "checkpoints"
PointerName = Literal["latest", "best"]
POINTERS: tuple[PointerName, ...] = ("latest", "best")
_STEP = re.compile(r"step-(\d{8,})")


def is_step_name(name: str) -> bool:
    """Whether a folder of this name is one step's checkpoint."""
    return _STEP.fullmatch(name) is not None


def step_path(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is published; it need not exist."""
    return root / f"step-{step:08d}"


def staging_path(root: Path, step: int) -> Path:
    """Where the ranks write the checkpoint of `step` before it is published; it need not exist."""
    return _beside(step_path(root, step), "tmp")


def begin(root: Path, step: int) -> Path:
    """Make the empty folder into which all ranks then write; what a dead run left under that name is removed.

    Raises:
        RunError: no space or no permission.
    """
    staging = staging_path(root, step)
    with explaining(staging, 0):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    return staging


def discard(root: Path, step: int) -> None:
    """Give up the save of `step` that `begin` started; complete checkpoints stay. Call it when no rank writes any more."""
    shutil.rmtree(staging_path(root, step), ignore_errors=True)


def install(root: Path, step: int) -> Path:
    """Give the finished staging folder of `step` its final name and let `latest` name it.

    A complete folder of the same step (saved anew after a resume) steps aside as `.old` and counts as complete until the new one
    stands, so that at no moment a reader finds less than before.
    """
    staging, final = staging_path(root, step), step_path(root, step)
    aside = _beside(final, "old")
    if _is_complete(final):
        _delete(aside)
        os.rename(final, aside)
    else:
        _delete(final)
    os.rename(staging, final)
    sync_folder(root)
    set_pointer(root, "latest", step)
    _delete(aside)
    return final


def complete_steps(root: Path) -> list[int]:
    """The steps of all complete checkpoints in `root`, ascending; empty when there is no such folder."""
    names = (path.name.removesuffix(".old") for path in root.glob("step-*"))
    steps = {int(match[1]) for name in names if (match := _STEP.fullmatch(name))}
    return sorted(step for step in steps if _folder(root, step))


def set_pointer(root: Path, name: PointerName, step: int) -> None:
    """Let the pointer file `name` name the checkpoint of `step`, at once and durably.

    Raises:
        CheckpointError: that checkpoint is not complete.
        RunError: no space or no permission.
    """
    if _folder(root, step) is None:
        raise CheckpointError(
            f"{root / name}: cannot point to step {step}, which has no complete checkpoint there; complete are {complete_steps(root)}"
        )
    write_file(root / name, f"{step_path(root, step).name}\n".encode())


def read_pointer(root: Path, name: PointerName) -> int | None:
    """The step that the pointer file `name` names; None when it is missing, unreadable, or names no complete checkpoint."""
    try:
        match = _STEP.fullmatch((root / name).read_text().strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) if match and _folder(root, int(match[1])) else None


def newest_step(root: Path) -> int | None:
    """The step from which a run goes on: the one that `latest` names, else the newest complete one; None where there is none."""
    latest = read_pointer(root, "latest")
    return latest if latest is not None else max(complete_steps(root), default=None)


def resolve(path: Path) -> Path:
    """The step folder that `path` means: itself, or, of a root or a run around it, the one `latest` names, else the newest.

    Raises:
        CheckpointError: there is no complete checkpoint, or no way to look.
    """
    path = Path(path)
    try:
        folder = _meant(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be reached ({error.strerror}); check the path and the permissions of its folders") from error
    if folder is None:
        state = "holds no complete checkpoint" if path.is_dir() else "is no folder" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {state}; name a step-* folder that has an {INDEX_NAME}, or the folder around it; a name ending in .tmp is an "
            "unfinished save and cannot be loaded"
        )
    return folder


def _meant(path: Path) -> Path | None:
    if match := _STEP.fullmatch(path.name):
        return _folder(path.parent, int(match[1]))
    if _is_complete(path) and path.suffix not in (".tmp", ".trash"):
        return path
    root = path / ROOT_NAME if (path / ROOT_NAME).is_dir() else path
    step = newest_step(root)
    return None if step is None else _folder(root, step)


def run_around(step: Path) -> Path:
    """The run, or the folder of checkpoints where that is no run's, that a step folder lies in."""
    places = step.absolute(), step.resolve()  # a link may be named like a folder of checkpoints, or lead to one
    return next((place.parent.parent for place in places if place.parent.name == ROOT_NAME), places[-1].parent)


def prune(root: Path, *, keep: int) -> list[int]:
    """Delete the complete checkpoints older than the newest `keep` (0 keeps all), never one that `latest` or `best` names.

    Those after `latest` are no part of the run that saves now, which went on from before them: they neither count nor go, until it has
    reached their steps.

    Returns:
        The steps deleted, ascending.
    """
    latest, best = (read_pointer(root, name) for name in POINTERS)
    reached = [step for step in complete_steps(root) if latest is None or step <= latest]
    spare = [step for step in reached[:-keep] if step not in (latest, best)] if keep else []
    for step in spare:
        _delete(_beside(step_path(root, step), "old"))
        _delete(step_path(root, step))
    return spare


def clean_leftovers(root: Path) -> list[str]:
    """Remove what a killed run left (`.tmp`, `.trash`), and settle a re-save that it interrupted. Call it before any save begins.

    Returns:
        The names that are gone, sorted.
    """
    gone = sorted(path for path in root.glob("*.*") if path.name in {f"{name}.tmp" for name in POINTERS} or _leftover(path))
    for path in root.glob("step-*/*.tmp"):  # of a file that was to join a complete checkpoint
        if is_step_name(path.parent.name):
            path.unlink(missing_ok=True)
    for path in gone:
        final = path.with_suffix("")
        if path.suffix == ".old" and not _is_complete(final):
            _delete(final)
            os.rename(path, final)
            sync_folder(root)
        elif path.suffix == ".old":
            _delete(path)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in gone]


def _leftover(path: Path) -> bool:
    return path.suffix in (".tmp", ".trash", ".old") and _STEP.fullmatch(path.stem) is not None


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _is_complete(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file()


def _folder(root: Path, step: int) -> Path | None:
    """The complete folder of `step`: the published one, or the one that stands in while it is replaced."""
    final = step_path(root, step)
    return next((folder for folder in (final, _beside(final, "old")) if _is_complete(folder)), None)


def _delete(folder: Path) -> None:
    """Delete a folder that may look complete: first its name, durably, then its files, so that a crash leaves no half of it.

    Files that cannot be removed now (held open on a network disk) stay under `.trash` for `clean_leftovers`.
    """
    if not folder.exists():
        return
    trash = folder.with_suffix(".trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    sync_folder(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)
