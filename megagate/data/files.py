"""Files that appear whole or not at all, and errors of the operating system told as one clean message."""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from megagate.errors import DataError

_READ_BLOCK = 1 << 22  # bytes
_ENDS = 1 << 16  # bytes hashed at both ends of a file
_WITHIN, _BLOCKS = 1 << 12, 16  # bytes of each block hashed between them, and their number
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of file systems without hard links
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def clean_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an `OSError` of the body into a `DataError` that says what could not be done, where, why and what to do.

    Args:
        action: A verb, as in "write".
        path: What the body works on.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            remedy = "free some space, or choose a folder on another disk"
        elif error.errno in _NO_PERMISSION:
            remedy = "change its permissions, or choose another folder"
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            remedy = "check the path"
        else:
            remedy = "check the disk and the path"
        raise DataError(f"cannot {action} {path}: {error.strerror or error}; {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: a rename alone may be lost when the machine stops."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, with durable names; does nothing where it is there."""
    missing = [one for one in (folder, *folder.parents) if not one.is_dir()]
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        sync_folder(one.parent)


def sweep(folder: Path) -> None:
    """Removes what writers of `AtomicFile` that were killed have left in a folder, and what others are still writing there."""
    with clean_errors("clean", folder):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def file_sha256(path: Path, *, report: Callable[[int], None] | None = None) -> str:
    """sha256 (hex) of a file's bytes, in constant memory; `report` is told how many were read since it was last called."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_READ_BLOCK):
            digest.update(block)
            if report is not None:
                report(len(block))
    return digest.hexdigest()


def sampled_sha256(path: Path) -> tuple[int, str]:
    """(size in bytes, sha256 (hex) of the size, of 64 KiB at both ends and of 16 blocks of 4 KiB at even places between).

    Tells files apart without reading them whole, at the cost of 18 reads. It sees any change of size, all of a file of up to 128 KiB, and a
    change that moves what lies between (a line made longer and another shorter); a few bytes replaced by as many between two blocks it
    does not see.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(f"{size}:".encode() + stream.read(_ENDS))
        room = max(0, size - 2 * _ENDS)
        for index in range(_BLOCKS if room else 0):
            stream.seek(_ENDS + max(0, room - _WITHIN) * index // (_BLOCKS - 1))
            digest.update(stream.read(_WITHIN))
        stream.seek(max(0, size - _ENDS))
        digest.update(stream.read(_ENDS))
    return size, digest.hexdigest()


class AtomicFile:
    """A new file that is written under a temporary name, hashed on the way, and gets its own name only when it is complete.

    As a context manager it publishes at a clean end and leaves nothing behind after an exception. `OSError` is not translated here:
    the caller knows which file to name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        # A random name, because writers on other machines may share the folder; not tempfile, whose files only the owner can read.
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        self._stream = open(self._temporary, "xb")  # noqa: SIM115  closed by publish and discard

    @property
    def sha256(self) -> str:
        """Of what was written so far (hex)."""
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        self._stream.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def sync(self) -> None:
        """Closes the file with its content on the disk, still under the temporary name; may be called twice."""
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()

    def publish(self) -> None:
        """Gives the file its name."""
        self.sync()
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)

    def publish_first(self) -> None:
        """Gives the file its name unless there is one of that name: of several writers at once exactly one has its way."""
        self.sync()
        try:
            os.link(self._temporary, self.path)
        except OSError as error:
            if not self.path.exists():  # else another one has its name, and may even have swept our temporary file away
                if error.errno not in _NO_LINKS:
                    raise
                self.publish()  # nothing tells first and second apart on such a file system
        self.discard()
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Removes what was written; does nothing after `publish`."""
        with suppress(OSError):  # a full disk fails again when the last buffer is flushed; the file goes away all the same
            self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.publish()
        except BaseException:
            self.discard()
            raise
