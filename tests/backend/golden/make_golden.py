"""Makes the golden vectors of FP8 quantisation by running Transformer Engine's own references, which are read from the paths given.

    python tests/backend/golden/make_golden.py --checkout CHECKOUT --package PACKAGE --version 2.20.2 [--cuda /usr/local/cuda]

CHECKOUT is a checkout of Transformer Engine (its tests hold the references of blocks and of current scaling), PACKAGE the unpacked wheel
of the version named (the rule of delayed scaling; its own reference of current scaling must give the same scales). Its
extension is not needed: what is run is Python on CPU tensors, and of MXFP8, which has no reference in Python, functions cut out of the C++
tests and compiled with g++ and CUDA's headers.

Writes fp8.safetensors (inputs, bytes, scales) and fp8.json (where they come from) beside itself.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
BLOCK, MX_BLOCK = 128, 32
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
REFERENCES = "tests/pytorch/references"
CPP_HEADER, CPP_TEST = "tests/cpp/test_common.h", "tests/cpp/operator/test_cast_mxfp8.cu"
UPDATE = "transformer_engine/pytorch/quantization.py"
CURRENT = "transformer_engine/pytorch/custom_recipes/reference_current_scaling.py"
DELAYED = ("_update_amax_history", "_default_get_amax_and_update_history", "_default_sf_compute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of Transformer Engine, for its tests")
    parser.add_argument("--package", type=Path, required=True, help="its wheel, unpacked")
    parser.add_argument("--version", required=True, help="of the wheel")
    parser.add_argument("--cuda", type=Path, default=Path("/usr/local/cuda"), help="for cuda_fp8.h")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tensors = {**blocks(args.checkout), **current(args.checkout, args.package), **delayed(args.package), **mxfp8(args.checkout, args.cuda)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "fp8.safetensors")
    sources = [
        (args.checkout, f"{REFERENCES}/blockwise_quantizer_reference.py"),
        (args.checkout, f"{REFERENCES}/quantize_scale_calc.py"),
        (args.checkout, f"{REFERENCES}/ref_per_tensor_cs.py"),
        (args.checkout, CPP_HEADER),
        (args.checkout, CPP_TEST),
        (args.package, UPDATE),
        (args.package, CURRENT),
    ]
    commit = subprocess.run(["git", "-C", args.checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    provenance = {
        "made_by": "tests/backend/golden/make_golden.py",
        "checkout": {"project": "NVIDIA/TransformerEngine", "commit": commit or "unknown"},
        "package": {"name": "transformer-engine", "version": args.version},
        "torch": torch.__version__,
        "files_sha256": {
            f"{'package' if root == args.package else 'checkout'}:{path}": hashlib.sha256((root / path).read_bytes()).hexdigest()
            for root, path in sources
        },
    }
    (HERE / "fp8.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def block_kinds(width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[kinds, width]: blocks that quantisers differ on: zero, tiny, huge, with inf or nan, on the borders between two scales, ordinary."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max

    def normal(scale: float) -> torch.Tensor:
        return torch.randn(width, generator=generator).clamp_(-4, 4).mul_(scale)

    def with_one(value: float, scale: float = 1.0) -> torch.Tensor:
        block = normal(scale)
        block[width // 3] = value
        return block

    # Halves of steps of e4m3 between 256 and 448, by a scale of exactly 1: ties go to even.
    ties = torch.arange(width).remainder(13).mul(16.0).add(256.0)
    ties[0] = 448.0
    kinds = [
        normal(1.0), normal(1e-3), normal(1e3), normal(1e-30), normal(1e36), ties,
        torch.zeros(width), -torch.zeros(width),
        normal(1e-38), normal(1e-40), torch.full((width,), 1e-44), with_one(1e-37, 1e-45),
        with_one(largest, 1e30), torch.full((width,), -largest), with_one(largest, 1.0),
        with_one(float("inf")), with_one(float("-inf"), 1e-20), torch.full((width,), float("inf")),
        with_one(float("nan")), torch.full((width,), float("nan")), with_one(float("nan"), 1e-42),
        torch.cat([with_one(float("inf"))[: width // 2], with_one(float("nan"))[width // 4 : width - width // 4]])[:width],
        with_one(448.0), with_one(448.5), with_one(447.0), with_one(2.0**-9), with_one(0.4375), with_one(57344.0, 100.0),
    ]  # fmt: skip
    return torch.stack(kinds).to(dtype)


def wide(dtype: torch.dtype, block: int, tail: int, seed: int) -> torch.Tensor:
    """[kinds, 2 * block + tail]: each row three different kinds of blocks, the last cut short."""
    kinds = block_kinds(block, dtype, seed)
    return torch.cat([kinds, kinds.roll(5, 0), kinds.roll(11, 0)[:, block - tail :]], dim=1)


def squares(seed: int) -> list[torch.Tensor]:
    """bf16 matrices of four blocks of 128 x 128, three of them cut short, of different kinds."""
    kinds = block_kinds(BLOCK, torch.bfloat16, seed)
    matrices = []
    for first, right, below, corner in ((0, 6, 15, 18), (2, 9, 13, 5)):
        matrix = torch.randn(BLOCK + 4, BLOCK + 8, generator=torch.Generator().manual_seed(seed + first)).mul_(0.02).to(torch.bfloat16)
        matrix[:BLOCK, :BLOCK] += kinds[first]
        matrix[:BLOCK, BLOCK:] = kinds[right][:8]
        matrix[BLOCK:, :BLOCK] = kinds[below]
        matrix[BLOCK:, BLOCK:] = kinds[corner][BLOCK // 3 - 4 : BLOCK // 3 + 4]
        matrices.append(matrix)
    return matrices


def blocks(checkout: Path) -> dict[str, torch.Tensor]:
    """Bytes and inverse scales (not padded for cuBLAS) of 1x128 in both directions, and of 128x128."""
    reference = load(checkout, "blockwise_quantizer_reference").BlockwiseQuantizerReference()
    tensors = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = wide(dtype, BLOCK, tail=32, seed=1)
        tensors[f"rows.{kind}.x"] = x
        for name, fp8 in FORMATS.items():
            made = reference.quantize(x, fp8, pow_2_scales=True, quant_tile_shape=(1, BLOCK), munge_scale_shapes=False)
            tensors[f"rows.{kind}.{name}.bytes"], tensors[f"rows.{kind}.{name}.scale_inv"] = made.data.view(torch.uint8), made.scale
    x = wide(torch.bfloat16, BLOCK, tail=8, seed=2).T.contiguous()  # [264, kinds]: blocks run down the columns
    made = reference.quantize(
        x, FORMATS["e4m3"], return_transpose=True, pow_2_scales=True, quant_tile_shape=(1, BLOCK), munge_scale_shapes=False
    )
    tensors |= {"columns.x": x, "columns.e4m3.bytes": made.data_t.view(torch.uint8), "columns.e4m3.scale_inv": made.scale_t}
    for i, x in enumerate(squares(seed=3)):
        made = reference.quantize(x, FORMATS["e4m3"], pow_2_scales=True, quant_tile_shape=(BLOCK, BLOCK), munge_scale_shapes=False)
        tensors |= {f"squares.{i}.x": x, f"squares.{i}.bytes": made.data.view(torch.uint8), f"squares.{i}.scale_inv": made.scale}
    return tensors


def current(checkout: Path, package: Path) -> dict[str, torch.Tensor]:
    """One scale for each tensor: every kind of block is a tensor of its own here.

    The package's own reference takes the largest number of the tensor's dtype for a scale that overflows, the tests' that of fp32, as the
    kernel does: they are held to each other in fp32.
    """
    reference = load(checkout, "ref_per_tensor_cs").ref_per_tensor_cs_cast
    packaged = cut_functions(package / CURRENT, ("_scale_from_amax_tensor",))["_scale_from_amax_tensor"]
    tensors = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = block_kinds(64, dtype, seed=4)
        tensors[f"current.{kind}.x"] = x
        for name, fp8 in FORMATS.items():
            made = [reference(row.unsqueeze(0), fp8_dtype=fp8) for row in x]
            tensors[f"current.{kind}.{name}.bytes"] = torch.cat([data.view(torch.uint8) for data, *_ in made])
            scales = torch.cat([scale for _, scale, *_ in made])
            amax = x.float().abs().amax(1)
            _, other, _ = packaged(x_dtype=torch.float32, amax=amax, quant_dtype=fp8, eps=0.0, pow_2_scales=False)
            torch.testing.assert_close(other, scales, rtol=0, atol=0, equal_nan=True)
            tensors[f"current.{kind}.{name}.scale_inv"] = scales
    return tensors


def delayed(package: Path) -> dict[str, torch.Tensor]:
    """Scales after each of a row of amaxes, with a history of four, for both formats; columns are tensors."""
    rule = cut_functions(package / UPDATE, DELAYED)
    inf, nan = float("inf"), float("nan")
    steps = torch.tensor(
        [[1.0, 448.0, 1e-40, 3e38, 2.0], [3.0, 1.0, 1e-44, inf, nan], [0.5, 7.0, 1e-42, 1.0, 1.0], [0.25, 0.1, 1e-39, 2.0, 3.0],
         [0.125, 0.3, 1e-38, 0.7, 4.0], [8.0, 1e5, 1.0, 0.6, 5.0], [1e-3, 2.5, 2.0, 0.5, 6.0], [2e-3, 3.5, 3.0, 0.4, 7.0]]
    )  # fmt: skip
    tensors = {"delayed.amax": steps}
    for name, fp8 in FORMATS.items():
        history, scale, scales, histories = torch.zeros(4, steps.shape[1]), torch.ones(steps.shape[1]), [], []
        for amax in steps:
            history[0] = amax
            history, largest = rule["_default_get_amax_and_update_history"](history, "max")
            scale = rule["_default_sf_compute"](largest, scale, torch.finfo(fp8).max, 0)
            scales.append(scale.clone())
            histories.append(history.clone())
        tensors[f"delayed.{name}.scale"], tensors[f"delayed.{name}.history"] = torch.stack(scales), torch.stack(histories)
    return tensors


def mxfp8(checkout: Path, cuda: Path) -> dict[str, torch.Tensor]:
    """Bytes and E8M0 exponents of blocks of 32 along rows and along columns, by the reference of the C++ tests."""
    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        program = compile_reference(checkout, cuda, Path(folder))
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x = wide(dtype, MX_BLOCK, tail=16, seed=5)
            tensors[f"mx.{kind}.x"] = x
            raw = x.contiguous().view(torch.uint8).numpy().tobytes()
            for way in ("rows", "columns"):
                command = [str(program), kind, way, *map(str, x.shape)]
                out = subprocess.run(command, input=raw, capture_output=True, check=True).stdout
                rows, columns = x.shape
                shape = (rows, -(-columns // MX_BLOCK)) if way == "rows" else (-(-rows // MX_BLOCK), columns)
                data = torch.tensor(struct.unpack(f"{len(out)}B", out), dtype=torch.uint8)
                tensors[f"mx.{kind}.{way}.bytes"] = data[: x.numel()].view(x.shape)
                tensors[f"mx.{kind}.{way}.exponent"] = data[x.numel() :].view(shape)
    return tensors


def load(checkout: Path, name: str) -> types.ModuleType:
    """A module of the references; of the package it needs no more than the names of two formats."""
    sys.path.insert(0, str(checkout / "tests/pytorch"))
    for stub, values in {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"DType": types.SimpleNamespace(kFloat8E4M3=FORMATS["e4m3"])},
        "transformer_engine.pytorch.constants": {"TE_DType_To_Torch": {fp8: fp8 for fp8 in FORMATS.values()}},
    }.items():
        module = sys.modules.setdefault(stub, types.ModuleType(stub))
        vars(module).update(values)
    spec = importlib.util.spec_from_file_location(name, checkout / REFERENCES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cut_functions(path: Path, names: tuple[str, ...]) -> dict:
    """Functions of a module that cannot be imported without its extension, without their decorators (which compile)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    if len(kept) != len(names):
        raise SystemExit(f"{path} lacks one of {', '.join(names)}")
    for node in kept:
        node.decorator_list = []
    space = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module(kept, []), str(path), "exec"), space)
    return space


def compile_reference(checkout: Path, cuda: Path, folder: Path) -> Path:
    """A program that reads a matrix and writes what the reference of the C++ tests makes of it: bytes, then exponents."""
    header, test = ((checkout / path).read_text(encoding="utf-8") for path in (CPP_HEADER, CPP_TEST))
    pieces = [
        cut(header, r"constexpr uint32_t FP32_EXPONENT_BIAS = .*?;"),
        cut(header, r"constexpr uint32_t FP32_MANTISSA_BITS = .*?;"),
        *re.findall(r"^template <(?:typename T)?>\nstruct Numeric_Traits.*?^};", header, re.M | re.S),
        cut(header, r"^template <typename T>\nstruct Quantized_Limits.*?^};"),
        cut(header, r"^inline fp8e8m0 float_to_e8m0\(.*?^}"),
        cut(header, r"^inline float exp2f_rcp\(.*?^}"),
        cut(test, r"^enum ProcessingMethod \{.*?^};"),
        cut(test, r"^template <typename InputType, typename OutputType>\nvoid compute_ref\(.*?^}"),
    ]
    source = PRELUDE + "\n\n".join(pieces) + PROGRAM
    (folder / "reference.cpp").write_text(source, encoding="utf-8")
    command = ["g++", "-O1", "-std=c++17", "-w", f"-I{cuda / 'include'}", "reference.cpp", "-o", "reference"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "reference"


def cut(text: str, pattern: str) -> str:
    found = re.search(pattern, text, re.M | re.S)
    if found is None:
        raise SystemExit(f"the checkout's C++ tests have nothing like {pattern!r}")
    return found.group(0)


PRELUDE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
using std::isinf;
using std::isnan;
using fp32 = float;
using bf16 = __nv_bfloat16;
using fp8e4m3 = __nv_fp8_e4m3;
using fp8e5m2 = __nv_fp8_e5m2;
using fp8e8m0 = uint8_t;

"""
PROGRAM = """

template <typename InputType>
void run(bool along_rows, size_t rows, size_t columns) {
  std::string raw((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
  std::vector<InputType> x(rows * columns), bias(columns);
  std::memcpy(x.data(), raw.data(), raw.size());
  const size_t across = (columns + 31) / 32, down = (rows + 31) / 32;
  std::vector<fp8e4m3> out(rows * columns);
  std::vector<uint8_t> exponents(along_rows ? rows * across : down * columns);
  compute_ref<InputType, fp8e4m3>(CAST_ONLY, nullptr, along_rows, !along_rows, x.data(), x.data(), out.data(), out.data(), exponents.data(),
                                  exponents.data(), bias.data(), rows, columns, across, columns);
  std::cout.write(reinterpret_cast<char*>(out.data()), out.size());
  std::cout.write(reinterpret_cast<char*>(exponents.data()), exponents.size());
}

int main(int, char** argv) {
  const bool along_rows = std::string(argv[2]) == "rows";
  const size_t rows = std::stoul(argv[3]), columns = std::stoul(argv[4]);
  if (std::string(argv[1]) == "fp32") run<float>(along_rows, rows, columns); else run<bf16>(along_rows, rows, columns);
}
"""


if __name__ == "__main__":
    main()
