"""Emulated FP8 on a GPU gives the CPU's bytes and its products. Skipped without a GPU; the README says so."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megagate.backend.fp8 import quantize
from megagate.backend.fp8.backend import EmulatedBackend
from megagate.backend.native import NativeBackend
from megagate.config.run import Fp8Config
from megagate.parallel.mesh import ParallelMesh

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
GOLDEN = Path(__file__).parents[1] / "backend/golden/fp8.safetensors"
RECIPES = ("delayed", "current", "blockwise", "mxfp8")


def quantized(x: Tensor) -> list[Tensor]:
    """By every rule, on the device of x: bytes as numbers, and scales."""
    tiles = [((1, 128), False), ((128, 1), False), ((128, 128), False), ((1, 32), True), ((32, 1), True)]
    made = [quantize.by_tiles(x, tile, mx=mx) for tile, mx in tiles]
    for fp8 in (quantize.E4M3, quantize.E5M2):
        made.append(quantize.with_scale(x, quantize.scale_of(quantize.amax(x), fp8), fp8))
    return [t.cpu() for one in made for t in (one.data.view(torch.uint8), one.inverse, one.dequantize())]


@pytest.mark.parametrize("name", ["rows.fp32.x", "rows.bf16.x", "squares.0.x", "squares.1.x", "mx.bf16.x"])
def test_bytes_and_scales_are_those_of_a_cpu(name: str) -> None:
    """Zero, tiny and huge blocks among them; infinities and NaN are not, whose scales a device may find in its own way."""
    x = load_file(GOLDEN)[name]
    x = x[x.isfinite().all(1)]
    assert len(x) > 8
    for mine, wanted in zip(quantized(x.to(GPU)), quantized(x), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_a_cpu(recipe: str) -> None:
    """Of experts, of which one has no rows; fp32 sums in another order."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((288, 96), (4, 80, 96), (288, 80)))
    results = []
    for device in (GPU, torch.device("cpu")):
        backend = EmulatedBackend(NativeBackend(device), Fp8Config(recipe, emulate=True), device=device, mesh=ParallelMesh.single())
        site = backend.grouped_linear(96, 80, num_experts=4, mesh=ParallelMesh.single())
        leaves = [t.to(device).requires_grad_() for t in (x, weight)]
        y = site(*leaves, torch.tensor([64, 64, 256, 288], dtype=torch.int32, device=device))
        results.append([t.detach().cpu() for t in (y, *torch.autograd.grad(y, leaves, grad.to(device)))])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
