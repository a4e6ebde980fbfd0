"""Quantised bytes and scales equal those of Transformer Engine's own references, bit for bit, also of zero, tiny, huge, inf and NaN blocks.

The vectors are made by golden/make_golden.py, which says how, and golden/fp8.json where from.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megagate.backend.fp8 import quantize
from megagate.backend.fp8.quantize import BLOCK, E4M3, E5M2, FP32_MAX, MX_BLOCK, Quantized

FOLDER = Path(__file__).parent / "golden"
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
KINDS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FOLDER / "fp8.safetensors")


def assert_bits(made: Quantized, data: Tensor, inverse: Tensor) -> None:
    got, want = made.data.contiguous().view(torch.uint8), data
    assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()} bytes differ"
    assert made.inverse.dtype == inverse.dtype == torch.float32
    torch.testing.assert_close(made.inverse, inverse, rtol=0, atol=0, equal_nan=True)


def test_the_vectors_hold_what_quantisers_differ_on_and_say_where_they_are_from(golden: dict[str, Tensor]) -> None:
    for name in ("rows.fp32.x", "rows.bf16.x", "current.fp32.x", "mx.fp32.x", "columns.x"):
        x = golden[name].float()
        length = next(length for start, length in (("rows", BLOCK), ("mx", MX_BLOCK), ("", x.shape[1])) if name.startswith(start))
        blocks = (x if name != "columns.x" else x.T)[:, :length].abs()
        most = blocks.nan_to_num(nan=0.0, posinf=torch.inf).amax(1)
        finite = blocks.isfinite().all(1)
        assert (most[finite] == 0).any() and (most == torch.inf).any() and blocks.isnan().all(1).any() and blocks.isnan().any(1).any()
        assert ((most[finite] > 0) & (most[finite] < 1e-38)).any() and (most[finite] > 3e38).any(), name
    source = json.loads((FOLDER / "fp8.json").read_text())
    assert source["package"] == {"name": "transformer-engine", "version": "2.20.2"} and len(source["files_sha256"]) == 7
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.suffix != ".py") < 300_000


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_along_rows(golden: dict[str, Tensor], kind: str, name: str) -> None:
    made = quantize.by_tiles(golden[f"rows.{kind}.x"], (1, BLOCK), FORMATS[name])
    assert_bits(made, golden[f"rows.{kind}.{name}.bytes"], golden[f"rows.{kind}.{name}.scale_inv"])


def test_blocks_along_columns(golden: dict[str, Tensor]) -> None:
    made = quantize.by_tiles(golden["columns.x"], (BLOCK, 1))
    turned = Quantized(made.data.T, made.inverse.T)
    assert_bits(turned, golden["columns.e4m3.bytes"], golden["columns.e4m3.scale_inv"])


@pytest.mark.parametrize("i", [0, 1])
def test_square_blocks(golden: dict[str, Tensor], i: int) -> None:
    made = quantize.by_tiles(golden[f"squares.{i}.x"], (BLOCK, BLOCK))
    assert_bits(made, golden[f"squares.{i}.bytes"], golden[f"squares.{i}.scale_inv"])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_current_scale(golden: dict[str, Tensor], kind: str, name: str) -> None:
    """Row by row, each a tensor of its own."""
    for i, row in enumerate(golden[f"current.{kind}.x"]):
        made = quantize.with_scale(row, quantize.scale_of(quantize.amax(row.reshape(1, -1))[0], FORMATS[name]), FORMATS[name])
        assert_bits(made, golden[f"current.{kind}.{name}.bytes"][i], golden[f"current.{kind}.{name}.scale_inv"][i])


@pytest.mark.parametrize("way", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_mx_blocks(golden: dict[str, Tensor], kind: str, way: str) -> None:
    made = quantize.by_tiles(golden[f"mx.{kind}.x"], (1, MX_BLOCK) if way == "rows" else (MX_BLOCK, 1), mx=True)
    exponent = golden[f"mx.{kind}.{way}.exponent"].to(torch.float64)
    assert_bits(made, golden[f"mx.{kind}.{way}.bytes"], torch.exp2(exponent - 127).float())


@pytest.mark.parametrize("name", FORMATS)
def test_the_rule_of_delayed_scaling(golden: dict[str, Tensor], name: str) -> None:
    """Histories to the bit; scales are quotients, as by the kernel, and the reference's a product with a reciprocal: a last bit apart."""
    steps = golden["delayed.amax"]
    history, scale = torch.zeros(steps.shape[1], golden[f"delayed.{name}.history"].shape[1]), torch.ones(steps.shape[1])
    for step, amax in enumerate(steps):
        history, scale = quantize.delayed_update(history, scale, amax, FORMATS[name])
        reference = golden[f"delayed.{name}.scale"][step]
        assert (scale.view(torch.int32) - reference.view(torch.int32)).abs().max() <= 1
        scale = reference
        want = golden[f"delayed.{name}.history"][step].T
        assert torch.equal(history.nan_to_num(-1.0), want.nan_to_num(-1.0)), "the history, as Transformer Engine keeps it"
    assert (golden[f"delayed.{name}.scale"] == FP32_MAX).any(), "an overflowing scale was among them"


def test_an_amax_of_zero_leaves_history_and_scale() -> None:
    history, scale = torch.tensor([[0.0, 3.0, 0.0, 2.0], [0.0, 1.0, 1.0, 1.0]]), torch.tensor([5.0, 7.0])
    after, new = quantize.delayed_update(history, scale, torch.tensor([0.0, 0.5]), E4M3)
    assert torch.equal(after, torch.tensor([[0.0, 3.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.5]])) and new.tolist() == [5.0, 448.0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_of_delayed_scaling_is_the_nearest_quotient(name: str) -> None:
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    _, scale = quantize.delayed_update(torch.zeros(1000, 2), torch.ones(1000), amax, FORMATS[name])
    assert torch.equal(scale, (quantize.largest(FORMATS[name]) / amax.double()).float())


def test_a_cast_saturates_in_both_formats_and_keeps_nan() -> None:
    x = torch.tensor([1e6, -torch.inf, torch.nan, 464.0, 61440.0])
    assert quantize.saturate(x, E4M3).float().nan_to_num(-1.0).tolist() == [448.0, -448.0, -1.0, 448.0, 448.0]
    assert quantize.saturate(x, E5M2).float().nan_to_num(-1.0).tolist() == [57344.0, -57344.0, -1.0, 448.0, 57344.0]


@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("shape", [(40, 96), (128, 256), (3, 130, 200)])
def test_dequantising_is_the_bytes_times_their_own_scale(tile: tuple[int, int], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[-1])
    made = quantize.by_tiles(x, tile)
    rows, columns = torch.arange(shape[-2]) // tile[0], torch.arange(shape[-1]) // tile[1]
    want = made.data.float() * made.inverse[..., rows, :][..., columns]
    assert torch.equal(made.dequantize(), want)
    assert (made.dequantize() - x).abs().max() <= x.abs().max() / 16, "half a step of three bits of mantissa"
