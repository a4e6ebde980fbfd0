"""The tensors of a Hugging Face directory: safetensors files, memory-mapped, after a check that they are whole and fit together.

Nothing is unpickled and no code of the directory is run.
"""

import json
import mmap
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.index import DTYPE_NAMES
from megagate.checkpoint.safefile import LENGTH_BYTES
from megagate.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_AGAIN = "download or export it again"
_OPEN_FILES = 16


class Held(NamedTuple):
    """One tensor of the directory.

    Args:
        file: The name of its file.
        key: Its name there; of a fused stack of experts, each is one tensor here, and the stack's is the key.
        dtype: Of its elements.
        shape: Its shape.
        begin: Its first byte in the file.
    """

    file: str
    key: str
    dtype: torch.dtype
    shape: Shape
    begin: int


class Weights:
    """The tensors of a directory, open for reading. Build it with `open`.

    Args:
        directory: The directory.
        held: Its tensors by name.
    """

    def __init__(self, directory: Path, held: Mapping[str, Held]) -> None:
        self.directory = directory
        self.held = MappingProxyType(dict(held))
        self._files: OrderedDict[str, mmap.mmap] = OrderedDict()

    @classmethod
    def open(cls, directory: Path) -> "Weights":
        """Read the headers of all files, and check them and the index.

        Raises:
            CheckpointError: There are no safetensors files, one is missing, truncated or damaged, or holds what another holds too.
        """
        named = _named_files(directory)
        held: dict[str, Held] = {}
        for file in sorted({*named.values()}) if named is not None else [SINGLE]:
            for tensor in _read_header(directory / file):
                if tensor.key in held:
                    raise CheckpointError(
                        f"{directory}: {tensor.key} is in {held[tensor.key].file} and in {file}, and each may be there once; {_AGAIN}"
                    )
                held[tensor.key] = tensor
        if named is not None:
            _require_index(directory, named, held)
        return cls(directory, {name: part for key, tensor in held.items() for name, part in _unfused(key, tensor)})

    def renamed(self, other_names: Mapping[str, str]) -> "Weights":
        """The same with parts of names replaced, where no tensor has the new name already."""
        held = {}
        for name, tensor in self.held.items():
            new = name
            for part, ours in other_names.items():
                new = new.replace(part, ours)
            held[name if new in self.held else new] = tensor
        return Weights(self.directory, held)

    def tensor(self, name: str) -> Tensor:
        """One tensor as a view of its file, to read; it takes no memory of the process's own."""
        held = self.held[name]
        if not prod(held.shape):
            return torch.empty(held.shape, dtype=held.dtype)
        return torch.frombuffer(self._file(held.file), dtype=held.dtype, count=prod(held.shape), offset=held.begin).view(held.shape)

    def where(self, name: str) -> str:
        """The file and the tensor's name in it, for a message."""
        return f"{self.directory / self.held[name].file}: {self.held[name].key}"

    def _file(self, name: str) -> mmap.mmap:
        """The mapped file; the one unused for longest is let go when too many are (tensors on it keep it)."""
        if name not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)
            with (self.directory / name).open("rb") as file:
                # A private writable mapping: torch warns about read-only ones, and nothing is ever written to it.
                self._files[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._files.move_to_end(name)
        return self._files[name]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: It is missing, unreadable, not JSON, or no object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); give the directory of a Hugging Face model") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must be a JSON object, and is a {type(content).__name__}; {_AGAIN}")
    return content


def _named_files(directory: Path) -> Mapping[str, str] | None:
    """The file of each tensor by the index; None where one file holds all."""
    single, index = (directory / SINGLE).is_file(), directory / INDEX
    if single and index.is_file():
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}, so which weights are meant is not clear; remove one")
    if single:
        return None
    if not index.is_file():
        raise CheckpointError(_without_weights(directory))
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise CheckpointError(f"{index}: weight_map must map names of tensors to names of files; {_AGAIN}")
    for name, file in named.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: the file of {name}, {file!r}, must be the name of a file beside the index; {_AGAIN}")
        if not (directory / file).is_file():
            count = sum(other == file for other in named.values())
            raise CheckpointError(f"{directory / file} is missing, and {INDEX} names it for {count} tensors, {name} among them; {_AGAIN}")
    return named


def _without_weights(directory: Path) -> str:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        return (
            f"{directory} holds weights as pickles (*.bin, *.pt), which run code when they are loaded, and megagate loads none; convert "
            "them where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) writes safetensors"
        )
    if shards := sorted(path.name for path in directory.glob("*.safetensors")):
        return f"{directory} holds {len(shards)} files such as {shards[0]}, and neither {SINGLE} nor {INDEX}; {_AGAIN}"
    return f"{directory} holds no weights: neither {SINGLE} nor {INDEX}; give the directory of a Hugging Face model"


def _read_header(path: Path) -> Iterator[Held]:
    """The tensors of one file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise CheckpointError(f"{path}: it is of {size} bytes, and its header alone takes {length}: damaged or truncated; {_AGAIN}")
        try:
            header = json.loads(file.read(length))
            items = [(key, _DTYPES.get(item["dtype"]), item) for key, item in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: its header is damaged ({error!r}); {_AGAIN}") from error
    start, filled = LENGTH_BYTES + length, 0
    for key, dtype, item in items:
        if dtype is None or not dtype.is_floating_point and not _is_state(key) or dtype.itemsize not in (2, 4):
            raise CheckpointError(
                f"{path}: {key} is of the type {item['dtype']}, and weights must be F32, BF16 or F16: quantised checkpoints are not "
                "trained on; give the unquantised one"
            )
        shape, (begin, end) = _place(path, key, item)
        if end - begin != prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{path}: {key} of the shape {list(shape)} has {end - begin} bytes: its header is damaged; {_AGAIN}")
        if start + end > size:
            raise CheckpointError(f"{path}: {key} ends at byte {start + end}, and the file has {size}: it is truncated; {_AGAIN}")
        filled += end - begin
        yield Held(path.name, key, dtype, shape, start + begin)
    if filled != size - start:
        raise CheckpointError(f"{path}: its tensors take {filled} bytes of {size - start}: it is damaged; {_AGAIN}")


def _place(path: Path, key: str, item: dict[str, Any]) -> tuple[Shape, tuple[int, int]]:
    """The shape and the range of bytes, after a check that they are numbers."""
    shape, offsets = item.get("shape"), item.get("data_offsets")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 else [None]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: the header's entry of {key} is damaged ({str(item)[:80]}); {_AGAIN}")
    return tuple(shape), (offsets[0], offsets[1])


def _is_state(key: str) -> bool:
    """Whether a tensor counts, so that it is whole numbers."""
    return key.endswith("bias_steps")


def _require_index(directory: Path, named: Mapping[str, str], held: Mapping[str, Held]) -> None:
    """The index and the files name the same tensors."""
    flaws = [f"{name} is not in {file}, which {INDEX} names for it" for name, file in named.items() if name not in held]
    flaws += [f"{name} is in {held[name].file}, {INDEX} names {named.get(name)}" for name in held if named.get(name) != held[name].file]
    if flaws:
        raise CheckpointError(f"{directory}: {len(flaws)} tensors are not where its index says: {'; '.join(sorted(flaws)[:3])}; {_AGAIN}")


def _unfused(key: str, tensor: Held) -> Iterator[tuple[str, Held]]:
    """Each expert's matrices of a fused stack: gate and up [E, 2 f, h], down [E, h, f]; anything else is itself."""
    place, _, part = key.rpartition(".experts.")
    if not place or part not in ("gate_up_proj", "down_proj") or len(tensor.shape) != 3:
        yield key, tensor
        return
    experts, rows, columns = tensor.shape
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    shape = (rows // len(names), columns)
    size = prod(shape) * tensor.dtype.itemsize
    for index in range(experts * len(names)):
        expert, name = index // len(names), names[index % len(names)]
        yield f"{place}.experts.{expert}.{name}.weight", tensor._replace(shape=shape, begin=tensor.begin + index * size)
