"""Tensors of a mapping as safetensors files, streamed: what is held is one row of the mapping, or a block of it, at a time."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.durable import create, write_all
from megagate.checkpoint.hf.ops import ELEMENTWISE
from megagate.checkpoint.hf.source import Source
from megagate.checkpoint.hf.table import Row
from megagate.checkpoint.safefile import Entry, encode_header, write_tensor
from megagate.errors import ConfigError

PATTERN = "model{suffix}.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SIZE = re.compile(r"[1-9]\d{0,8}[KMGT]B")
_BLOCK = 64 << 20
"""Bytes of a tensor that are read, changed and written at a time where elements do not depend on one another."""


@dataclass(frozen=True, eq=False)
class Planned:
    """One tensor of the export.

    Args:
        name: Theirs.
        shape: Its shape.
        dtype: In the file.
        row: That makes it.
        index: Its place among what the row makes.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    row: Row
    index: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan(rows: list[Row], dtype: torch.dtype) -> list[Planned]:
    """Every tensor that the rows make, all floating-point ones in `dtype`; whole numbers (`state/...`) stay int32."""
    planned = []
    for row in rows:
        kind = torch.int32 if any(region.name.startswith("state/") for region in row.native) else dtype
        planned += [Planned(name, shape, kind, row, index) for index, (name, shape) in enumerate(row.shapes().items())]
    return planned


def by_file(planned: list[Planned], max_shard_size: str) -> dict[str, list[Planned]]:
    """Which file each tensor goes into, in the order of the mapping; within a file larger items come first, as the format has no gaps.

    Args:
        planned: All tensors.
        max_shard_size: Of a file, as in `5GB`; a tensor that is larger has one to itself.

    Raises:
        ConfigError: That is no size.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # noqa: PLC0415  heavy, and only needed here

    if not _SIZE.fullmatch(max_shard_size):
        raise ConfigError(
            f"--max-shard-size ({max_shard_size}) must be a whole number of KB, MB, GB or TB, such as 5GB or 2500MB; write it so"
        )
    wanted = {one.name: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in planned}
    split = split_torch_state_dict_into_shards(wanted, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    by_name = {one.name: one for one in planned}
    files = {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}
    return {file: sorted(tensors, key=lambda one: -one.dtype.itemsize) for file, tensors in files.items()}


def index_file(files: dict[str, list[Planned]]) -> bytes:
    """The content of `model.safetensors.index.json`."""
    total = sum(one.nbytes for tensors in files.values() for one in tensors)
    weight_map = {one.name: file for file, tensors in files.items() for one in tensors}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n").encode()


def write_shard(path: Path, tensors: list[Planned], source: Source, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Write one file, and flush it to the disk; returns its bytes, and how many numbers of a tensor are NaN or infinite, where any are."""
    header = encode_header(Entry(one.name, one.dtype, one.shape) for one in tensors)
    made, broken = _Made(source, dtype), Counter()
    with create(path) as descriptor:
        write_all(descriptor, memoryview(header))
        for one in tensors:
            for block in made.blocks(one):
                write_tensor(descriptor, block)
                if count := _not_finite(block):
                    broken[one.name] += count
    return len(header) + sum(one.nbytes for one in tensors), dict(broken)


def _not_finite(block: Tensor) -> int:
    """How many are NaN or infinite. Extremes, of which NaN is both, tell at a fraction of the cost that there are none."""
    if not block.numel() or all(math.isfinite(extreme) for extreme in torch.aminmax(block)):
        return 0
    return block.numel() - int(torch.isfinite(block).sum())


def forward(row: Row, source: Source, dtype: torch.dtype) -> list[Tensor]:
    """What a row makes: masters rounded to `dtype`, as the forward pass of training used them, then changed; what rounds, in fp32."""
    native = [source.read(region) for region in row.native]
    native = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in native]
    return row.op.to_hf(native if row.op.exact else [tensor.float() for tensor in native])


class _Made:
    """What rows make, in blocks; of a row with several tensors, which follow one another, all are made at once."""

    def __init__(self, source: Source, dtype: torch.dtype):
        self._source, self._dtype = source, dtype
        self._row: Row | None = None
        self._tensors: list[Tensor] = []

    def blocks(self, one: Planned) -> Iterator[Tensor]:
        """The elements of a tensor in row-major order."""
        if isinstance(one.row.op, ELEMENTWISE) and one.shape:
            for part, _ in one.row.parts(_BLOCK // 4):
                yield forward(part, self._source, self._dtype)[0].to(one.dtype)
            return
        if self._row is not one.row:
            self._tensors = []  # before the next are made
            self._row, self._tensors = one.row, forward(one.row, self._source, self._dtype)
        yield self._tensors[one.index].to(one.dtype)
