"""The fingerprint of a tensor: what its formula says, in whole numbers of Python; the same however cut; another one after any change."""

import random
from itertools import combinations, product
from math import prod
from unittest.mock import patch

import pytest
import torch
from checkpoint_helpers import Layouts
from torch import Tensor

from megagate.checkpoint import fingerprint, reshard
from megagate.checkpoint.fingerprint import differing, digits, piece_sum, recorded, sums
from megagate.checkpoint.store import Piece
from megagate.errors import CheckpointError

WORD = 1 << 64
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = {"one": (), "line": (11,), "wide": (3, 50), "tall": (40, 3), "experts": (4, 6, 5), "deep": (2, 3, 2, 3), "none": (3, 0)}


def weight(dim: int, index: int) -> int:
    """splitmix64 as it is published, of whole numbers without a limit."""
    x = (index * 0x9E3779B97F4A7C15 + (dim + 1) * 0xD1342543DE82EF95) % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return (x ^ x >> 31) | 1


def by_hand(tensor: Tensor, offset: tuple[int, ...] | None = None) -> str:
    """Element by element."""
    offset = offset or (0,) * tensor.dim()
    found = 0
    for index in product(*map(range, tensor.shape)):
        bits = int(tensor[index].reshape(1).view(BITS[tensor.element_size()]))
        found += bits * prod(weight(dim, a + b) for dim, (a, b) in enumerate(zip(index, offset, strict=True)))
    return f"{found % WORD:016x}"


def taken(tensor: Tensor, offset: tuple[int, ...] | None = None) -> str:
    return digits(int(piece_sum(tensor, offset or (0,) * tensor.dim())))


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("chunk", [1, 7, 16, 1 << 18])
def test_it_is_its_formula(chunk: int) -> None:
    with patch.object(fingerprint, "CHUNK_ELEMENTS", chunk):
        for name, tensor in state().items():
            assert taken(tensor) == by_hand(tensor), name
            offset = tuple(10 + 1000 * dim for dim in range(tensor.dim()))
            assert taken(tensor, offset) == by_hand(tensor, offset), name
        for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn):
            tensor = (100 * torch.randn(5, 9, generator=torch.Generator().manual_seed(1))).to(dtype)
            assert taken(tensor) == by_hand(tensor), dtype
        strided = torch.arange(60.0).view(6, 10)
        assert taken(strided.t()) == by_hand(strided.t()) != taken(strided) and taken(strided[1:, ::3]) == by_hand(strided[1:, ::3])


def test_checkpoints_keep_their_meaning() -> None:
    assert taken(torch.arange(24.0).view(2, 3, 4)) == by_hand(torch.arange(24.0).view(2, 3, 4)) == "d4583c70a4600000"


@pytest.mark.parametrize("seed", range(10))
def test_pieces_of_any_cut_add_up(seed: int) -> None:
    whole, rng = state(), random.Random(seed)
    layout = Layouts.draw({name: tuple(tensor.shape) for name, tensor in whole.items()}, rng.randint(1, 5), rng)
    names = list(whole)
    total = torch.zeros(len(names), dtype=torch.int64)
    for fragments in layout:
        pieces: list[Piece] = []
        for one in fragments:
            where = {"full_shape": one.full_shape, "shard_offset": one.shard.offset, "shard_shape": one.shard.shape, "start": one.start}
            pieces += reshard.flat_pieces(one.name, **where, flat=Layouts.local(one, whole[one.name]))
        total += sums(pieces, names)
    assert dict(zip(names, map(digits, total.tolist()), strict=True)) == {name: by_hand(tensor) for name, tensor in whole.items()}


def test_any_bit_shows() -> None:
    for tensor in (torch.zeros(2, 3), torch.randn(2, 3), torch.randn(5).bfloat16(), torch.zeros(2, dtype=torch.float64)):
        before, bits = taken(tensor), tensor.view(BITS[tensor.element_size()]).view(-1)
        for place, bit in product(range(len(bits)), range(8 * tensor.element_size())):
            kept = bits[place].clone()
            bits[place] ^= torch.tensor(1, dtype=bits.dtype) << bit
            assert taken(tensor) != before
            bits[place] = kept
        assert taken(tensor) == before


def test_what_stays_in_the_tensor_shows_too() -> None:
    tensor = torch.randn(6, 6, generator=torch.Generator().manual_seed(5)).bfloat16().float()  # with half of their bits 0
    changed = {"transposed": tensor.t(), "turned": tensor.flip(0, 1), "rolled": tensor.roll(1), "negated": -tensor}
    flat = tensor.view(-1)
    for a, b in combinations(range(36), 2):
        other = flat.clone()
        other[[a, b]] = other[[b, a]]
        changed[f"elements {a}, {b}"] = other.view(6, 6)
    for dim, (a, b) in product((0, 1), combinations(range(6), 2)):
        order = list(range(6))
        order[a], order[b] = b, a
        changed[f"slices {a}, {b} of dim {dim}"] = tensor.index_select(dim, torch.tensor(order))
    found = {taken(other) for other in changed.values()}
    assert len(found) == len(changed) and taken(tensor) not in found, "each is another tensor"
    assert taken(tensor, (0, 1)) != taken(tensor, (1, 0)) != taken(tensor)


def test_what_is_recorded() -> None:
    assert recorded({}) is None and recorded({"fingerprint": {"a": "1f"}}) == {"a": "1f"}
    assert differing({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "3", "d": "4"}) == ["b", "c", "d"]
    for wrong in ("1f", {"a": 3}, ["a"]):
        with pytest.raises(CheckpointError, match="must give 16 hexadecimal digits by tensor"):
            recorded({"fingerprint": wrong})
    with pytest.raises(CheckpointError, match="b is a piece of the state that the engine does not name"):
        sums([Piece("b", (1,), (0,), torch.ones(1))], ["a"])
