"""The tensors of a checkpoint region by region, digested before they are used."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from megagate.checkpoint.hf.table import Region
from megagate.checkpoint.store import Checkpoint

FILES = 256
"""Files of a checkpoint that a reader holds open: two readers stay below the usual limit of 1,024, and a header is read once."""


class Source:
    """Regions of a checkpoint's tensors, none given out before the tensor's pieces have the digests that were recorded.

    A tensor is digested by a thread while the one before it is in use, so that its bytes come from the disk once, however little memory
    there is. Use it as a context manager.

    Args:
        checkpoint: Open; read by this thread only.
        order: Names of tensors in the order in which they will first be asked for.
    """

    def __init__(self, checkpoint: Checkpoint, order: Sequence[str]):
        self._checkpoint, self._order = checkpoint, list(dict.fromkeys(order))
        self._own = Checkpoint.open(checkpoint.folder, max_open_files=FILES)  # readers are not shared by threads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digests")
        self._digested: dict[str, Future[int]] = {}
        self._sound: set[str] = set()
        self._go_on()

    def read(self, region: Region) -> Tensor:
        """The elements of a region: a view of the file where one piece holds them, else a copy.

        Raises:
            CheckpointError: A piece of the tensor is damaged.
        """
        self._require_sound(region.name)
        stored = self._checkpoint.stored(region.name)
        for piece in stored.pieces:
            if piece.box.overlap(region.box) == region.box:
                return self._checkpoint.mapped(region.name, piece)[region.box.slices_of(piece.box)]
        out = torch.empty(region.box.shape, dtype=stored.dtype)
        self._checkpoint.read(region.name, region.box.offset, out)
        return out

    def _require_sound(self, name: str) -> None:
        if name in self._sound:
            return
        if name not in self._digested:  # not in the order that was told
            self._digested[name] = self._submit(name)
        self._digested.pop(name).result()
        self._sound.add(name)
        self._go_on()

    def _go_on(self) -> None:
        """Have the next tensor digested."""
        following = next((name for name in self._order if name not in self._sound and name not in self._digested), None)
        if following is not None and len(self._digested) < 2:
            self._digested[following] = self._submit(following)

    def _submit(self, name: str) -> "Future[int]":
        return self._thread.submit(self._own.verify, names=[name])

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._own.close()
