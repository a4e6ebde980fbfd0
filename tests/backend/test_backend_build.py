"""Every combination of a config's kernels is built or refused, by its key, value, rule and remedy."""

import importlib.util
import itertools
import re
from typing import Any, get_args

import pytest
import torch

from megagate.backend.build import build_backend
from megagate.backend.fp8.backend import EmulatedBackend
from megagate.backend.native import NativeBackend
from megagate.config.hardware import Hardware
from megagate.config.keys import flatten
from megagate.config.model import AttentionConfig, ModelConfig
from megagate.config.rules import check
from megagate.config.run import (
    Fp8Config,
    Fp8Recipe,
    KernelBackend,
    NormKernel,
    OptimConfig,
    OptimizerImplementation,
    OptimizerName,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megagate.errors import ConfigError
from megagate.parallel.init import read_hardware
from megagate.parallel.mesh import ParallelMesh

CPU = torch.device("cpu")
MODEL = ModelConfig(256, 64, 2, 64, attention=AttentionConfig(4, 2, 16))
KERNELS = tuple(itertools.product(get_args(KernelBackend), get_args(NormKernel), get_args(Fp8Recipe), (False, True)))
OPTIMIZERS = tuple(itertools.product(get_args(OptimizerName), get_args(OptimizerImplementation)))
MESSAGE = re.compile(r"(?P<key>(precision|optim)\.[a-z0-9_.]+) \((?P<value>\w+)\) (needs|must|is) .*; (set|install) .*")


def refusals(config: RunConfig, hardware: Hardware) -> list[str]:
    try:
        check(config, world_size=1, hardware=hardware)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def assert_told_well(lines: list[str], config: RunConfig) -> None:
    values = {key: str(value).lower() for key, value in flatten(config).items()}
    for line in lines:
        told = MESSAGE.fullmatch(line)
        assert told and values[told["key"]] == told["value"], line


@pytest.mark.parametrize(("backend", "norm", "recipe", "emulate"), KERNELS)
def test_kernels_are_built_or_refused(backend: Any, norm: Any, recipe: Any, emulate: bool) -> None:
    """On a CPU, where emulation is what there is of FP8."""
    config = RunConfig(MODEL, TrainConfig(seq_len=32), precision=PrecisionConfig("bf16", "fp32", backend, norm, Fp8Config(recipe, emulate)))
    lines = refusals(config, read_hardware(CPU))
    allowed = backend == norm == "native" and emulate == (recipe != "none")
    assert bool(lines) is not allowed
    assert_told_well(lines, config)
    if allowed:
        built = build_backend(config.precision, device=CPU, mesh=ParallelMesh.single())
        assert type(built) is (EmulatedBackend if emulate else NativeBackend)
        return
    with pytest.raises(ConfigError, match=r"precision\."):
        build_backend(config.precision, device=CPU, mesh=ParallelMesh.single())


@pytest.mark.parametrize(("name", "implementation"), OPTIMIZERS)
def test_optimizers_are_allowed_or_refused(name: Any, implementation: Any) -> None:
    config = RunConfig(MODEL, TrainConfig(seq_len=32), optim=OptimConfig(name, implementation))
    on_cpu, on_gpu = refusals(config, read_hardware(CPU)), refusals(config, Hardware("13.0", (9, 0)))
    assert_told_well(on_cpu + on_gpu, config)
    assert bool(on_cpu) is (implementation != "torch")
    assert bool(on_gpu) is (implementation != "torch" and name != "adamw")


def test_what_python_finds_of_this_machine() -> None:
    """Packages are looked for by name and not imported."""
    found = read_hardware(CPU)
    assert found.capability is None and found.cuda == torch.version.cuda
    assert found.packages == {name for name in ("transformer_engine", "apex") if importlib.util.find_spec(name)}
