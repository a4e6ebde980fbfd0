"""Looking at checkpoints: what one holds, whether its bytes are those that were saved, and in what two differ, under any layouts."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.certificate import read_next_step
from megagate.checkpoint.fingerprint import FINGERPRINT, differing, digits, piece_sum, recorded
from megagate.checkpoint.reshard import read_flat
from megagate.checkpoint.saved_model import PRECISION_STATE
from megagate.checkpoint.store import Checkpoint, StoredTensor
from megagate.errors import CheckpointError

Report = Callable[[int], None]
"""Is told how many bytes were read since it was last called."""
_BLOCK = 1 << 20  # elements that are compared at a time


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known without reading tensors, as JSON values.

    Raises:
        CheckpointError: The record of the following step is damaged, or the fingerprint is none.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for name, tensor in sorted(checkpoint.tensors.items()):
        kind = kinds.setdefault(kind_of(name), {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
        kind["tensors"] += 1
        kind["elements"] += prod(tensor.shape)
        kind["bytes"] += size_of(tensor)
        kind["dtypes"] = sorted({*kind["dtypes"], name_of(tensor.dtype)})
    return {
        "folder": str(checkpoint.folder),
        "step": checkpoint.step,
        "metadata": _without_fingerprint(checkpoint.metadata),
        "fingerprint": recorded(checkpoint.metadata),
        "kinds": kinds,
        "files": dict(checkpoint.files),
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": name_of(tensor.dtype),
                "pieces": len(tensor.pieces),
                "files": sorted({piece.file for piece in tensor.pieces}),
            }
            for name, tensor in sorted(checkpoint.tensors.items())
        },
        "next_step": certificate(checkpoint),
    }


def certificate(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the step after this one did, as JSON values; None where no run has recorded it.

    Raises:
        CheckpointError: The record is damaged.
    """
    found = read_next_step(checkpoint.folder)
    if found is None:
        return None
    return {**asdict(found), "update_norm": found.update_norm}


def damages(checkpoint: Checkpoint, *, report: Report) -> list[str]:
    """Digests every piece again, and takes the fingerprint of every tensor; a sentence for each that is not what was saved.

    Raises:
        CheckpointError: What the index has for a fingerprint is none.
    """
    pieces = [(piece.file, name, piece) for name, tensor in checkpoint.tensors.items() for piece in tensor.pieces]
    found: list[str] = []
    prints, sums = recorded(checkpoint.metadata), dict.fromkeys(checkpoint.tensors, 0)
    damaged = set()
    for _, name, piece in sorted(pieces, key=lambda item: (item[0], item[1], item[2].box)):
        try:
            checkpoint.verify_piece(name, piece)
            if prints is not None:
                sums[name] += int(piece_sum(checkpoint.mapped(name, piece), piece.box.offset))
        except CheckpointError as error:
            damaged.add(name)
            if str(error) not in found:  # a damaged header is told once, not for each piece behind it
                found.append(str(error))
        report(piece.box.volume * checkpoint.tensors[name].dtype.itemsize)
    if prints is not None:
        actual = {name: digits(number) for name, number in sums.items()}
        found += [_other_print(name, prints.get(name), actual.get(name)) for name in differing(prints, actual) if name not in damaged]
    return found


def _other_print(name: str, there: str | None, here: str | None) -> str:
    return (
        f"{name} is not what was in memory when it was saved: its fingerprint is {here or 'missing'}, {there or 'none'} was recorded, "
        "though its bytes are those that were written; load another step"
    )


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of two checkpoints compares.

    Args:
        name: Of the tensor.
        same_bits: Whether all bits are the same.
        largest: The largest |a - b|; NaN where one of them is none.
        scale: The largest |a|, leaving out what is not finite.
        unequal: Elements whose bits differ.
        elements: All of them.
    """

    name: str
    same_bits: bool
    largest: float
    scale: float
    unequal: int
    elements: int


@dataclass
class Comparison:
    """In what two checkpoints differ.

    Args:
        settings: Keys of the index's metadata, the config's among them as `config.model.num_layers`, with both values; None: not there.
        missing: Tensors only the first holds.
        extra: Tensors only the second holds.
        reshaped: Tensors of another shape or dtype, with both as text.
        tensors: All others, in the order of their names.
    """

    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[str, str]] = field(default_factory=dict)
    tensors: list[TensorDifference] = field(default_factory=list)

    @property
    def same_tensors(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not (self.missing or self.extra or self.reshaped) and all(one.same_bits for one in self.tensors)

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.same_tensors and not self.settings


def compare(a: Checkpoint, b: Checkpoint, *, report: Report) -> Comparison:
    """Reads both, block by block, however they are cut; `report` is told the bytes of one of them.

    Raises:
        CheckpointError: A file does not hold its pieces.
    """
    found = Comparison(settings=_differences(_without_fingerprint(a.metadata), _without_fingerprint(b.metadata)))
    if a.step != b.step:
        found.settings = {"step": (a.step, b.step), **found.settings}
    found.missing = sorted(a.tensors.keys() - b.tensors.keys())
    found.extra = sorted(b.tensors.keys() - a.tensors.keys())
    for name in sorted(a.tensors.keys() & b.tensors.keys()):
        one, other = a.tensors[name], b.tensors[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            found.reshaped[name] = _described(one), _described(other)
        else:
            found.tensors.append(_compare_tensor(a, b, name))
        report(size_of(one))
    return found


def shared_bytes(a: Checkpoint, b: Checkpoint) -> int:
    """Bytes that `compare` reports."""
    return sum(size_of(tensor) for name, tensor in a.tensors.items() if name in b.tensors)


def flattened(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, prefix=f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def finite(value: Any) -> Any:
    """The same values with what JSON does not know, `nan` and `inf`, as text."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def kind_of(name: str) -> str:
    """What a logical tensor is to the optimizer: `master`, `exp_avg`, `exp_avg_sq`, `state`; what FP8 keeps is `state/fp8`."""
    if name.startswith(PRECISION_STATE):
        return PRECISION_STATE.rstrip("/")
    return name.partition("/")[0] if "/" in name else "others"


def size_of(tensor: StoredTensor) -> int:
    """Bytes of the whole tensor."""
    return prod(tensor.shape) * tensor.dtype.itemsize


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _without_fingerprint(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is no setting, but follows from the tensors, is told apart."""
    return {key: value for key, value in metadata.items() if key != FINGERPRINT}


def _described(tensor: StoredTensor) -> str:
    return f"{name_of(tensor.dtype)} {list(tensor.shape)}"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    one, other = flattened(a), flattened(b)
    keys = [*one, *(key for key in other if key not in one)]
    return {key: (one.get(key), other.get(key)) for key in keys if _differ(one.get(key), other.get(key))}


def _differ(a: Any, b: Any) -> bool:
    """NaN is NaN here, and a number no boolean."""
    return repr(a) != repr(b)


def _compare_tensor(a: Checkpoint, b: Checkpoint, name: str) -> TensorDifference:
    stored = a.tensors[name]
    largest, scale, unequal = 0.0, 0.0, 0
    for one, other in zip(_blocks(a, name, stored), _blocks(b, name, stored), strict=True):
        differ = (_bits(one) != _bits(other)).any(dim=1)
        scale = max(scale, _largest(one.double().abs().nan_to_num(nan=0.0, posinf=0.0)))
        if differ.any():
            unequal += int(differ.sum())
            distance = _largest((one[differ].double() - other[differ].double()).abs())
            largest = math.nan if math.isnan(distance) or math.isnan(largest) else max(largest, distance)
    return TensorDifference(name, not unequal, largest, scale, unequal, prod(stored.shape))


def _blocks(checkpoint: Checkpoint, name: str, stored: StoredTensor) -> Iterator[Tensor]:
    """The elements of a tensor in their order, [up to `_BLOCK`] at a time, in one buffer."""
    shape: Shape = stored.shape
    buffer = torch.empty(min(_BLOCK, prod(shape)), dtype=stored.dtype)
    for start in range(0, prod(shape), _BLOCK):
        flat = buffer[: min(_BLOCK, prod(shape) - start)]
        read_flat(checkpoint, name, full_shape=shape, shard_offset=(0,) * len(shape), shard_shape=shape, start=start, flat=flat)
        yield flat


def _bits(flat: Tensor) -> Tensor:
    """The bytes of each element, [elements, bytes]."""
    return flat.view(torch.uint8).view(-1, flat.dtype.itemsize)


def _largest(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0
