"""Finished shards taken over as they are: by hard links, which cost nothing, or by copies, which are compared with what was promised."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megagate.data.concatenate import Promise, check_ids, document_blocks
from megagate.data.files import AtomicFile, clean_errors, sync_folder
from megagate.data.shards import Shard, ShardStats, bin_path, idx_path
from megagate.errors import DataError

_LINK_ERRORS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_INDEX_BYTES = 1 << 22  # of an index copied at once


class LinkError(DataError):
    """The file system makes no hard link here; a copy may do."""


@contextmanager
def linked_shard(source: Path, prefix: Path) -> Iterator[None]:
    """Hard links to both files of a shard: made before the body, so that what cannot be linked is told at once, and named after it.

    Raises:
        LinkError: There can be no link.
        DataError: The shard was replaced meanwhile, or the folder cannot be written.
    """
    mark = secrets.token_hex(6)
    pairs = [(path(source), path(prefix), prefix.with_name(f".{path(prefix).name}.{mark}.tmp")) for path in (bin_path, idx_path)]
    try:
        for origin, final, temporary in pairs:
            _hard_link(origin, temporary, final)
        yield
        with clean_errors("write", prefix):
            for origin, final, temporary in pairs:
                if not os.path.samefile(origin, temporary):
                    raise DataError(f"{origin} was replaced while it was read; run the same command again")
                os.replace(temporary, final)
            sync_folder(prefix.parent)
    finally:
        for _, _, temporary in pairs:
            temporary.unlink(missing_ok=True)  # also where the name was another link to the same file: renaming then does nothing


def _hard_link(origin: Path, temporary: Path, final: Path) -> None:
    try:
        os.link(origin.resolve(), temporary)
    except OSError as error:
        if error.errno in _LINK_ERRORS:
            raise LinkError(
                f"cannot link {origin} to {final}: {error.strerror}; links need one file system that has them, and an owner who may"
            ) from error
        with clean_errors("link", origin):
            raise


def copy_shard(
    source: Path, prefix: Path, *, vocab_size: int, promise: Promise | None, report: Callable[[int], None] = lambda _: None
) -> ShardStats:
    """Writes a shard again, byte for byte, and returns what it holds; `report` is told the bytes of tokens read.

    Raises:
        DataError: The shard is damaged, is not the promised one, or holds ids above the vocabulary; the disk is full.
    """
    shard = Shard(source)
    shard.check_index()
    high = -1
    with clean_errors("write", prefix):
        tokens, index = AtomicFile(bin_path(prefix)), None
        try:
            for begin, ids, _ in document_blocks(shard):
                high = max(high, check_ids(shard, ids, begin=begin, vocab_size=vocab_size))
                tokens.write(memoryview(ids).cast("B") if ids.size else b"")
                report(ids.nbytes)
            index = AtomicFile(idx_path(prefix))
            with open(idx_path(source), "rb") as stream:
                while block := stream.read(_INDEX_BYTES):
                    index.write(block)
            if promise is not None:
                promise.check_sha256(source, bin_sha256=tokens.sha256)
            index.sync()
            tokens.publish()
            index.publish()
        except BaseException:
            tokens.discard()
            if index is not None:
                index.discard()
            raise
    return ShardStats(shard.tokens, shard.documents, high, tokens.bytes, index.bytes, tokens.sha256, index.sha256)
