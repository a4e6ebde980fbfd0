"""The tensors in a folder of Hugging Face's kind, to be verified: what is there by name, read in parts, mapped and not held."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.hf.table import Row, native_shapes
from megagate.checkpoint.index import DTYPE_NAMES
from megagate.config.model import ModelConfig
from megagate.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What classes of mixtures keep as one stack [E, ...] in memory, and the matrices of each expert in the file that it is made of."""


class FolderTensors:
    """The tensors of a folder by name. Read anew from the files, by another reader than any that wrote or adopted them.

    Args:
        folder: With `model.safetensors`, or the files that `model.safetensors.index.json` names.

    Raises:
        CheckpointError: A file is missing or damaged, or does not hold what the index says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        promised = read_json(index)["weight_map"] if index.exists() else None
        names = sorted(set(promised.values())) if promised is not None else [SINGLE]
        self._files = {name: _opened(folder / name) for name in names}
        self._place = {key: name for name, file in self._files.items() for key in file.keys()}  # noqa: SIM118  it is no dict
        if promised is not None and promised != self._place:
            wrong = sorted({key for key, _ in set(promised.items()) ^ set(self._place.items())})
            raise CheckpointError(f"{index}: {len(wrong)} tensors do not lie where it says, the first {wrong[0]}; write the folder again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def shape(self, name: str) -> Shape:
        """Of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        found = self._slice(name).get_dtype()
        return next(dtype for dtype, known in DTYPE_NAMES.items() if known == found)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Some rows of a tensor."""
        return self._slice(name)[rows]

    def read_fp32(self, name: str) -> Tensor:
        """A tensor, floating-point numbers as fp32."""
        tensor = self.read(name)
        return tensor.float() if tensor.is_floating_point() else tensor

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(torch.Size(self.shape(name)).numel() for name in self._place)

    def _slice(self, name: str) -> Any:
        if name not in self._place:
            raise CheckpointError(f"{self.folder}: {name} is missing; write the folder again")
        return self._files[self._place[name]].get_slice(name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: There is no such file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); write the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object; write the folder again")
    return content


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); write the folder again") from error


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
    count = sum(1 for _ in _experts(tensors, stem, STACKS[last][0]))
    stack = torch.empty(count, rows, columns)
    for expert in range(count):
        torch.cat([tensors.read_fp32(f"{stem}.{expert}.{part}.weight") for part in STACKS[last]], out=stack[expert])
    return stack


def _experts(tensors: FolderTensors, stem: str, part: str) -> Iterator[int]:
    expert = 0
    while f"{stem}.{expert}.{part}.weight" in tensors:
        yield expert
        expert += 1

