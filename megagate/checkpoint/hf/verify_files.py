"""The tensors in a folder of Hugging Face's kind, to be verified: as they lie there, as our model has them, as their class keeps them."""

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.hf.adopt_files import STACKS, Weights
from megagate.checkpoint.hf.table import Row
from megagate.checkpoint.saved_model import native_shapes
from megagate.config.model import ModelConfig


class FolderTensors:
    """The tensors of a folder by name, the experts' one by one; views of its files.

    Args:
        folder: With safetensors files.
        weights: Of the folder, where it is open already.

    Raises:
        CheckpointError: A file is missing or damaged, or does not hold what the index says.
    """

    def __init__(self, folder: Path, weights: Weights | None = None):
        self.folder = folder
        self.weights = weights or Weights.open(folder)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.held)

    def __contains__(self, name: str) -> bool:
        return name in self.weights.held

    def shape(self, name: str) -> Shape:
        """Of a tensor."""
        return self.weights.held[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self.weights.held[name].dtype

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Some rows of a tensor."""
        return self.weights.tensor(name)[rows]

    def read_fp32(self, name: str) -> Tensor:
        """A tensor, floating-point numbers as fp32; of its own memory."""
        tensor = self.read(name)
        return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)

    @property
    def files(self) -> set[str]:
        """Names of the files that hold them."""
        return {held.file for held in self.weights.held.values()}

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(prod(held.shape) for held in self.weights.held.values())


class Rebuilt:
    """Our tensors as the tensors of a folder give them back: what a checkpoint made of that folder would hold.

    Args:
        model: The model.
        rows: Its mapping to the folder's class.
        tensors: The folder's.
    """

    def __init__(self, model: ModelConfig, rows: list[Row], tensors: FolderTensors):
        self._tensors, self._shapes, self._rows = tensors, native_shapes(model), rows

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Every parameter (fp32) and buffer whose name in the model begins with `prefix`, by the rest of its name.

        Raises:
            CheckpointError: The folder's tensors cannot be those of this model.
        """
        names = {name: name.partition("/")[2] for name in self._shapes}
        mine = {name: short for name, short in names.items() if short.startswith(prefix)}
        made = {name: torch.empty(self._shapes[name], dtype=_dtype(name)) for name in mine}
        for row in self._rows:
            if row.native and row.native[0].name in made:
                theirs = [self._tensors.read_fp32(name) for name in row.theirs]
                values = row.op.from_hf(theirs, where=", ".join(row.theirs))
                for region, value in zip(row.native, values, strict=True):
                    whole = tuple(slice(first, first + size) for first, size in zip(*region.box, strict=True))
                    made[region.name][whole] = value
        return {short.removeprefix(prefix): made[name] for name, short in mine.items()}


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name.startswith("master/") else torch.int32


def without_place(tensors: FolderTensors, names: Iterable[str]) -> list[str]:
    """Tensors of a folder that a class with a state of these names does not take."""
    known = set(names)
    return sorted(name for name in tensors if not known & {name, *_stacks(name)})


def _stacks(name: str) -> Iterator[str]:
    """Under which names a class may keep an expert's matrix in a stack."""
    stem, _, last = name.rpartition(".experts.")
    part = last.partition(".")[2].removesuffix(".weight")
    yield from (f"{stem}.experts.{stack}" for stack, parts in STACKS.items() if stem and part in parts)


def as_theirs(tensors: FolderTensors, prefix: str, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The state of one of their modules, fp32, as the class in memory wants it, from the names of the file.

    Args:
        tensors: The folder's.
        prefix: The module's name and a dot.
        wanted: Names in the module's state.

    Raises:
        CheckpointError: The file lacks one.
    """
    return {name: _value(tensors, f"{prefix}{name}") for name in wanted}


def _value(tensors: FolderTensors, name: str) -> Tensor:
    stem, _, last = name.rpartition(".")
    if name in tensors or last not in STACKS or not stem.endswith("experts"):
        return tensors.read_fp32(name)
    first = [f"{stem}.0.{part}.weight" for part in STACKS[last]]
    rows, columns = sum(tensors.shape(part)[0] for part in first), tensors.shape(first[0])[1]
    count = sum(1 for name in tensors if name.startswith(f"{stem}.") and name.endswith(f".{STACKS[last][0]}.weight"))
    stack = torch.empty(count, rows, columns)
    for expert in range(count):
        torch.cat([tensors.read_fp32(f"{stem}.{expert}.{part}.weight") for part in STACKS[last]], out=stack[expert])
    return stack

