"""The tensors of a Hugging Face directory: safetensors files, memory-mapped, after a check that they are whole and fit together.

Nothing is unpickled and no code of the directory is run.
"""

import json
import mmap
import os
import stat
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
from megagate.checkpoint.safefile import decode_header
from megagate.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_AGAIN = "download or export it again"
_OPEN_FILES = 16
_MOST_JSON, _MOST_INDEX = 4 << 20, 100_000_000
"""Bytes of a config, and of the index: a hundred times what the largest models have."""
_MOST_MATRICES = 1 << 20
"""Of experts that are read from stacks; a header and a file with holes in it may name any number, and each takes memory here."""
_DEEPEST = 64
"""Nesting of JSON; more is refused before anything goes down into it."""
STACKS: Mapping[str, tuple[str, ...]] = MappingProxyType({"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
"""What classes of mixtures keep as one stack [E, ...] in memory, and the matrices of each expert that it is made of."""


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
    def open(cls, directory: Path, *, experts: Shape | None = None) -> "Weights":
        """Read the headers of all files, and check them and the index.

        Args:
            directory: The directory.
            experts: Of a mixture, (experts E, width f, hidden size h): its fused stacks [E, 2 f, h] and [E, h, f] are read as the matrices
                of each expert. Without it a stack is one tensor.

        Raises:
            CheckpointError: There are no safetensors files, one is missing, truncated or damaged, or holds what another holds too; a stack
                has another shape.
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
        if experts is not None:
            matrices = experts[0] * sum(len(STACKS[part]) for part in (key.rpartition(".experts.")[2] for key in held) if part in STACKS)
            if matrices > _MOST_MATRICES:
                raise CheckpointError(f"{directory}: its stacks hold {matrices:,} matrices, and {_MOST_MATRICES:,} are the most; {_AGAIN}")
            held = {name: part for key, tensor in held.items() for name, part in _unfused(directory, key, tensor, experts)}
        return cls(directory, held)

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

    def let_go(self) -> None:
        """Let go of the mapped files, whose pages that were read count as the process's memory; they are mapped again when asked for."""
        self._files.clear()

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


def read_json(path: Path, *, most: int = _MOST_JSON) -> dict[str, Any]:
    """The JSON object in `path`, of at most `most` bytes.

    Raises:
        CheckpointError: It is missing, unreadable, no file, too large, not JSON, or no object.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device never ends
            raise CheckpointError(f"{path} must be a file, and is none; give the directory of a Hugging Face model")
        if found.st_size > most:
            raise CheckpointError(f"{path} has {found.st_size:,} bytes, and may have {most:,} at most: it is damaged; {_AGAIN}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); give the directory of a Hugging Face model") from error
    except RecursionError as error:
        raise CheckpointError(_too_deep(path)) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must be a JSON object, and is a {type(content).__name__}; {_AGAIN}")
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        values = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in values if isinstance(value, dict | list)]
    if level:
        raise CheckpointError(_too_deep(path))
    return content


def _too_deep(path: Path) -> str:
    return f"{path} is nested deeper than {_DEEPEST} levels, as no such file is: it is damaged; {_AGAIN}"


def _named_files(directory: Path) -> Mapping[str, str] | None:
    """The file of each tensor by the index; None where one file holds all."""
    # os.path's, unlike Path's own, takes any name, and says no where the system refuses it.
    single, index = os.path.isfile(directory / SINGLE), directory / INDEX
    if single and os.path.isfile(index):
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}, so which weights are meant is not clear; remove one")
    if single:
        return None
    if not os.path.isfile(index):
        raise CheckpointError(_without_weights(directory))
    named = read_json(index, most=_MOST_INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise CheckpointError(f"{index}: weight_map must map names of tensors to names of files; {_AGAIN}")
    first = {file: name for name, file in reversed(named.items())}
    for file, name in first.items():
        if Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{index}: the file of {name}, {file!r:.80}, must be the name of a file beside the index; {_AGAIN}")
        if not os.path.isfile(directory / file):
            count, place = sum(other == file for other in named.values()), f"{directory / file!s:.300}"
            raise CheckpointError(f"{place} is missing, and {INDEX} names it for {count} tensors, {name} among them; {_AGAIN}")
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
    try:
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); mend that, or {_AGAIN}") from error
    start, found = decode_header(content, path, remedy=_AGAIN)
    for key, entry in found.items():
        dtype = _DTYPES.get(entry.dtype)
        if dtype == torch.float64:
            raise CheckpointError(
                f"{path}: {key} is of the type F64, and weights must be F32, BF16 or F16; save them in fp32 first, for masters have no more"
            )
        if dtype is None or not dtype.is_floating_point and not _is_state(key) or dtype.itemsize not in (2, 4):
            raise CheckpointError(
                f"{path}: {key} is of the type {entry.dtype}, and weights must be F32, BF16 or F16: quantised checkpoints are not "
                "trained on; give the unquantised one"
            )
        yield Held(path.name, key, dtype, entry.shape, start + entry.begin)


def _is_state(key: str) -> bool:
    """Whether a tensor counts, so that it is whole numbers."""
    return key.endswith("bias_steps")


def _require_index(directory: Path, named: Mapping[str, str], held: Mapping[str, Held]) -> None:
    """The index and the files name the same tensors."""
    flaws = [f"{name} is not in {file}, which {INDEX} names for it" for name, file in named.items() if name not in held]
    flaws += [f"{name} is in {held[name].file}, {INDEX} names {named.get(name)}" for name in held if named.get(name) != held[name].file]
    if flaws:
        raise CheckpointError(f"{directory}: {len(flaws)} tensors are not where its index says: {'; '.join(sorted(flaws)[:3])}; {_AGAIN}")


def _unfused(directory: Path, key: str, tensor: Held, experts: Shape) -> Iterator[tuple[str, Held]]:
    """Each expert's matrices of a fused stack: gate and up [E, 2 f, h], down [E, h, f]; anything else is itself.

    Raises:
        CheckpointError: The stack has another shape; what it would be cut into is then neither these experts' nor of any certain number.
    """
    place, _, part = key.rpartition(".experts.")
    if not place or part not in STACKS:
        yield key, tensor
        return
    count, width, hidden = experts
    expected = (count, 2 * width, hidden) if part == "gate_up_proj" else (count, hidden, width)
    if tensor.shape != expected:
        raise CheckpointError(
            f"{directory / tensor.file}: {key} has the shape {list(tensor.shape)}, and by config.json the experts are {list(expected)}; "
            "get the directory anew, with its own config.json"
        )
    names = STACKS[part]
    shape = (expected[1] // len(names), expected[2])
    size = prod(shape) * tensor.dtype.itemsize
    for index in range(count * len(names)):
        expert, name = index // len(names), names[index % len(names)]
        yield f"{place}.experts.{expert}.{name}.weight", tensor._replace(shape=shape, begin=tensor.begin + index * size)
