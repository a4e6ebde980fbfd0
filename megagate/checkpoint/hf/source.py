"""The model of a checkpoint: its config, and its tensors region by region, digested before they are used."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from megagate.checkpoint.hf.table import Region, native_shapes
from megagate.checkpoint.store import Checkpoint
from megagate.config.keys import from_dict
from megagate.config.model import ModelConfig
from megagate.config.run import RunConfig
from megagate.errors import CheckpointError, ConfigError

FILES = 256
"""Files of a checkpoint that a reader holds open: two readers stay below the usual limit of 1,024, and a header is read once."""


def run_of(checkpoint: Checkpoint) -> RunConfig:
    """The config of the run that saved a checkpoint.

    Raises:
        CheckpointError: It has none, or one of another version.
    """
    settings = checkpoint.metadata.get("config")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{checkpoint.folder} holds no config, so no run saved it; give a run, its checkpoints, or one of its steps")
    try:
        return from_dict(settings)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.folder}: its config is of another version: {error}") from error


def require_model(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Refuse a checkpoint whose masters and states are not those of `model`, in names, shapes and dtypes.

    Raises:
        CheckpointError: With the first that differ.
    """
    expected = native_shapes(model)
    found = {name: stored for name, stored in checkpoint.tensors.items() if name.partition("/")[0] in ("master", "state")}
    flaws = [f"{name} is missing" for name in expected.keys() - found.keys()]
    flaws += [f"{name} {list(found[name].shape)} is not in that model" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        dtype = torch.float32 if name.startswith("master/") else torch.int32
        if found[name].shape != expected[name]:
            flaws.append(f"{name} has the shape {list(found[name].shape)}, not {list(expected[name])}")
        elif found[name].dtype != dtype:
            flaws.append(f"{name} is stored as {found[name].dtype}, not {dtype}")
    if flaws:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(flaws)} of its tensors are not those of the model in its config: {', '.join(sorted(flaws)[:3])}; "
            "it was changed after it was saved, or saved by another version; give one that a run wrote"
        )


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
