"""Writing that survives a crash: bytes reach the disk before the name that promises them does."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagate.data.files import sync_folder
from megagate.errors import RunError

_STRETCH = 16 << 20
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write every byte of `data` (one write may take only a part of them)."""
    while len(data):
        data = data[os.write(descriptor, data) :]


def start_writing_back(descriptor: int, begin: int) -> None:
    """Let the disk begin on what was written since position `begin`, by whole stretches of a few MB; the bytes are not waited for.

    Else the kernel keeps all in memory until the fsync at the end, and disk and processor work one after the other.
    """
    low, high = (position // _STRETCH * _STRETCH for position in (begin, os.lseek(descriptor, 0, os.SEEK_CUR)))
    if low < high:
        # The one call for it that Python has: what is on the disk already may leave the file cache, the rest is sent there.
        os.posix_fadvise(descriptor, low, high - low, os.POSIX_FADV_DONTNEED)


@contextmanager
def create(path: Path) -> Iterator[int]:
    """A descriptor to write the new file `path`, flushed to the disk at the end; a file there before is replaced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Replace the small file `path` at once: a reader, or a crash, meets the old content or the new, never a part.

    Raises:
        RunError: no space or no permission; the old content stays.
    """
    unfinished = path.with_name(path.name + ".tmp")
    with explaining(path, len(content)):
        try:
            with create(unfinished) as descriptor:
                write_all(descriptor, memoryview(content))
            os.replace(unfinished, path)
            sync_folder(path.parent)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise


@contextmanager
def explaining(path: Path, size: int) -> Iterator[None]:
    """Turn "no space", "over quota" and "no permission" while writing `size` bytes to `path` into a message that helps.

    Raises:
        RunError: the disk or the quota is full, or the folder may not be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_PERMISSION:
            raise RunError(
                f"{path}: cannot be written ({error.strerror}); checkpoints written before are untouched; change the folder's permissions, "
                "or move the run's folder to where this user may write, then start the same command again"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        raise RunError(
            f"{path}: no space for its {size / 1e6:,.1f} MB ({error.strerror}; {shutil.disk_usage(existing).free / 1e6:,.1f} MB are free "
            "there); a checkpoint is written whole or not at all, and those written before are untouched; free space or quota, lower "
            "checkpoint.keep, or move the run's folder to a larger disk, then start the same command again"
        ) from error
