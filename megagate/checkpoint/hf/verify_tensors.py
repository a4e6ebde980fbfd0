"""Tensor by tensor: what a folder of Hugging Face's kind holds, against what the mapping makes of the masters of a checkpoint, bit by bit.

Streamed: a few rows, or one expert, are in memory at a time.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from blake3 import blake3
from torch import Tensor

from megagate.checkpoint.hf.table import Region, Row
from megagate.checkpoint.hf.verify_files import FolderTensors
from megagate.checkpoint.store import Checkpoint
from megagate.errors import CheckpointError

CHUNK_ELEMENTS = 1 << 20
"""Of large tensors, whose op works element by element, so many are compared at a time."""
_NAMED = 6
"""Differing tensors that are named one by one, and examined for what became of them."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Compared:
    """What came of it.

    Args:
        tensors: How many were compared.
        flaws: What is wrong, each a sentence.
        loadable: Names and shapes are right, so that a model can be loaded.
    """

    tensors: int
    flaws: tuple[str, ...]
    loadable: bool


class _Pair:
    """Two sources of the same tensors: what is found, and what is expected.

    Args:
        found: Of a row, the found tensors by name.
        expected: As they should be.
    """

    def __init__(self, found: Callable[[Row, slice], dict[str, Tensor]], expected: Callable[[Row, slice], dict[str, Tensor]]):
        self.found, self.expected = found, expected


def compare_names(rows: list[Row], tensors: FolderTensors, *, left_out: Collection[str] = ()) -> list[str]:
    """What is missing in the folder, what is there beside the mapping and is not left out on purpose, and what has another shape."""
    shapes = {name: shape for row in rows for name, shape in row.shapes().items()}
    missing = sorted(shapes.keys() - set(tensors))
    extra = sorted(set(tensors) - shapes.keys() - set(left_out))
    flaws = [_listed(missing, "missing, and the model has {}")] if missing else []
    flaws += [_listed(extra, "in the folder, and no part of the model is in {}")] if extra else []
    wrong = {name: tensors.shape(name) for name, shape in shapes.items() if name in tensors and tensors.shape(name) != shape}
    return flaws + [f"{name} has the shape {list(found)}, the model gives {list(shapes[name])}" for name, found in sorted(wrong.items())]


def compare_export(rows: list[Row], checkpoint: Checkpoint, tensors: FolderTensors, *, dtype: torch.dtype) -> Compared:
    """Each tensor of an export is what the op makes of the masters, in the dtype that it has in the file.

    Args:
        rows: The mapping.
        checkpoint: That was exported.
        tensors: Of the export.
        dtype: Of the weights that were exported, in which a run uses them; a tensor may be kept in fp32 all the same.
    """
    if flaws := compare_names(rows, tensors):
        return Compared(0, tuple(flaws), loadable=False)

    def expected(row: Row, part: slice) -> dict[str, Tensor]:
        native = [_in_use(_read(checkpoint, region), dtype) for region in row.native]
        made = zip(row.theirs, row.op.to_hf(native), strict=True)
        return {name: (_kept_as(tensors.dtype(name), value, dtype)) for name, value in made}

    def found(row: Row, part: slice) -> dict[str, Tensor]:
        return {name: tensors.read(name, part) for name in row.theirs}

    return _compare([row for row in rows if row.theirs], _Pair(found, expected))


def compare_adopted(rows: list[Row], checkpoint: Checkpoint, tensors: FolderTensors, *, left_out: Collection[str]) -> Compared:
    """Each master of a checkpoint is what the op gives back of the tensors of the folder that was adopted.

    Args:
        rows: The mapping.
        checkpoint: That was made.
        tensors: Of the folder.
        left_out: Those that say nothing more.

    Returns:
        What was found; its count is of the folder's tensors.

    Raises:
        CheckpointError: A piece of the checkpoint does not have the digest that was recorded.
    """
    if flaws := compare_names(rows, tensors, left_out=left_out):
        return Compared(0, tuple(flaws), loadable=False)

    def expected(row: Row, part: slice) -> dict[str, Tensor]:
        theirs = [_wide(tensors.read(name, part)) for name in row.theirs]
        made = row.op.from_hf(theirs, where=", ".join(row.theirs))
        return {_named(region, row): value for region, value in zip(row.native, made, strict=True)}

    def found(row: Row, part: slice) -> dict[str, Tensor]:
        return {_named(region, row): _read(checkpoint, region) for region in row.native}

    checkpoint.verify()
    return replace(_compare(rows, _Pair(found, expected)), tensors=len({name for row in rows for name in row.theirs}))


def _named(region: Region, row: Row) -> str:
    return f"{region.name}{region.box}" if row.theirs and any(region.box.offset) else region.name


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _in_use(master: Tensor, dtype: torch.dtype) -> Tensor:
    """A master as the forward pass uses it, in fp32."""
    return master.to(dtype).float() if master.is_floating_point() else master


def _kept_as(found: torch.dtype, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in the dtype of the file, where that is one that it may have."""
    allowed = (dtype, torch.float32) if value.is_floating_point() else (value.dtype,)
    return value.to(found) if found in allowed else value


def _read(checkpoint: Checkpoint, region: Region) -> Tensor:
    out = torch.empty(region.box.shape, dtype=checkpoint.stored(region.name).dtype)
    checkpoint.read(region.name, region.box.offset, out)
    return out


def _compare(rows: list[Row], pair: _Pair) -> Compared:
    count, flaws, wrong = 0, [], {}
    for row in rows:
        try:
            differing, names = _differing(row, pair)
        except CheckpointError as error:  # an op that cannot take theirs back
            flaws.append(str(error))
            continue
        count += names
        wrong |= dict.fromkeys(differing, row)
    flaws += _explained(wrong, pair)
    return Compared(count, tuple(flaws), loadable=True)


def _differing(row: Row, pair: _Pair) -> tuple[Iterable[str], int]:
    """The tensors of a row that are not equal, and how many tensors there are."""
    differing, names = dict[str, None](), set()
    for part_of_row, part in row.parts(CHUNK_ELEMENTS):
        found, expected = pair.found(part_of_row, part), pair.expected(part_of_row, part)
        labels = {name: name if part == slice(None) else _whole_name(name, row) for name in expected}
        names |= set(labels.values())
        differing |= {labels[name]: None for name in expected if not _same_bits(found[name], expected[name])}
    return differing, len(names)


def _whole_name(name: str, row: Row) -> str:
    """Of a part of a row's tensor: the name without the place."""
    return name if name in row.theirs else _named(row.native[0], row)


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(_bits(found), _bits(expected))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


@dataclass(frozen=True)
class _Report:
    """A tensor that differs.

    Args:
        found: Digest of what is there.
        expected: Digest of what should be.
        difference: How they differ, in words.
    """

    found: str
    expected: str
    difference: str


def _explained(wrong: dict[str, Row], pair: _Pair) -> list[str]:
    """A sentence for each of the first tensors that differ: by how much, and what may have become of it."""
    reports = {name: _examined(name, row, pair) for name, row in list(wrong.items())[:_NAMED]}
    place = {report.expected: name for name, report in reports.items()}
    sentences = []
    for name, report in reports.items():
        known = place.get(report.found) if report.found else None
        why = f"it holds what belongs in {known}" if known else report.difference
        sentences.append(f"{name} is not what it should be: {why}")
    rest = [f"and {len(wrong) - _NAMED} tensors more are not what the masters make of them"] if len(wrong) > _NAMED else []
    return sentences + rest


def _examined(name: str, row: Row, pair: _Pair) -> _Report:
    """Read a tensor again, in parts."""
    digests, differing, elements, first = (blake3(), blake3()), 0, 0, ""
    for part_of_row, part in row.parts(CHUNK_ELEMENTS):
        is_, should = (
            next(tensor for key, tensor in source(part_of_row, part).items() if name in (key, _whole_name(key, row)))
            for source in (pair.found, pair.expected)
        )
        for digest, tensor in zip(digests, (is_, should), strict=True):
            digest.update(memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy()))
        if is_.dtype != should.dtype:
            return _Report("", "", f"it is {is_.dtype}, and {should.dtype} is expected")
        differs = _bits(is_) != _bits(should)
        if differs.any() and not first:
            index = tuple(int(one) for one in differs.nonzero()[0])
            place = [index[0] + (part.start or 0), *index[1:]]
            first = f"the first at {place}: {is_[index]:.6g}, not {should[index]:.6g}{_hint(is_.double(), should.double(), is_.dtype)}"
        differing, elements = differing + int(differs.sum()), elements + differs.numel()
    found, expected = (digest.hexdigest() for digest in digests)
    return _Report(found, expected, f"{differing} of {elements} elements differ, {first}")


def _hint(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """What one might have done wrong, after a semicolon; nothing where it is none of the usual."""
    off = found - expected
    scale = expected.abs()
    ulp = torch.finfo(dtype).eps * scale if dtype.is_floating_point else torch.zeros_like(scale)
    if torch.equal(found, expected.bfloat16().double()):
        return "; they were rounded to bfloat16"
    if off.count_nonzero() > 1 and (off.abs() <= ulp).all():
        return "; all by no more than a rounding: the numbers are right, and were rounded otherwise"
    if ((off - 1).abs() <= 1e-2).all():
        return "; all are 1 too large: this class multiplies by 1 + w, and w - 1 belongs here"
    if ((off + 1).abs() <= 1e-2).all():
        return "; all are 1 too small: this class multiplies by w, and not by 1 + w"
    if not found.count_nonzero():
        return "; all are 0"
    if found.dim() == 2 and torch.equal(_sorted_rows(found), _sorted_rows(expected)):
        return "; the rows are the expected ones in another order"
    ratio = (found * expected).sum() / expected.square().sum()
    if (off - (ratio - 1) * expected).abs().max() <= 1e-6 * scale.max():
        return f"; all are {ratio:.6g} times what they should be"
    return ""


def _sorted_rows(matrix: Tensor) -> Tensor:
    """By their first columns."""
    order = sorted(range(len(matrix)), key=lambda row: matrix[row, :4].tolist())
    return matrix[order]


def _listed(names: list[str], what: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    verb = "is" if len(names) == 1 else "are"
    return f"{', '.join(names[:3])}{more} {verb} {what.format('it' if len(names) == 1 else 'them')}"
