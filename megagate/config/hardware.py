"""What a machine must have for a config's kernels.

The facts come from `parallel/init.py`, or, of a GPU that is only planned with, from `plan/hardware.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megagate.config.keys import flatten
from megagate.config.run import Fp8Recipe, RunConfig

TE_VERSION = "2.20.2"
"""Of Transformer Engine, whose sources every call was checked against."""
INSTALL: Mapping[str, str] = MappingProxyType(
    {
        "transformer_engine": f"pip install --no-build-isolation 'transformer-engine[pytorch]=={TE_VERSION}'",
        "apex": "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
        "pip install -v --no-build-isolation .",
    }
)
"""The optional packages and what installs them. `apex` is the project of that name on GitHub: the package index has another one."""

Version = tuple[int, int]


@dataclass(frozen=True)
class Hardware:
    """What a rank finds at start-up.

    Args:
        cuda: The CUDA version that PyTorch was built with, such as `12.9`; None without (CPUs, ROCm).
        capability: Compute capability of this rank's GPU, such as (9, 0); None without a GPU.
        packages: Which of the optional packages (`INSTALL`) Python finds, not necessarily sound.
    """

    cuda: str | None
    capability: Version | None
    packages: frozenset[str] = frozenset(INSTALL)

    @property
    def runs_cuda(self) -> bool:
        """Whether there is a GPU of NVIDIA's."""
        return self.capability is not None and self.cuda is not None


@dataclass(frozen=True)
class RecipeNeeds:
    """Where Transformer Engine has a recipe. Source: `transformer_engine/pytorch/quantization.py` of 2.20.2, lines 151-184.

    Args:
        low: The smallest compute capability.
        below: The smallest one above it that lacks the recipe again; None where there is none.
        cuda: The smallest CUDA version. What Ada asks for, 12.1, every PyTorch that runs here has.
        gpus: GPUs that have it, for the message.
    """

    low: Version
    below: Version | None
    cuda: Version
    gpus: str


_PER_TENSOR = RecipeNeeds((8, 9), None, (0, 0), "Ada, Hopper and later")
RECIPE_NEEDS: Mapping[Fp8Recipe, RecipeNeeds] = MappingProxyType(
    {
        "delayed": _PER_TENSOR,
        "current": _PER_TENSOR,
        "blockwise": RecipeNeeds((9, 0), None, (12, 9), "Hopper and later"),
        "mxfp8": RecipeNeeds((10, 0), (12, 0), (0, 0), "Blackwell such as the B200, not that of consumers' cards"),
    }
)


@dataclass(frozen=True)
class Kernels:
    """Where the kernels of a value of a key run.

    Args:
        package: The optional package that has them; empty where they come with what is installed anyway.
        cuda_only: They are for NVIDIA's GPUs, not for any.
    """

    package: str = ""
    cuda_only: bool = True


GPU_VALUES: Mapping[str, Mapping[str, Kernels]] = MappingProxyType(
    {
        "precision.backend": {"te": Kernels("transformer_engine")},
        "precision.norm": {"apex": Kernels("apex")},
        "optim.implementation": {"apex": Kernels("apex"), "te": Kernels("transformer_engine"), "deepspeed": Kernels(cuda_only=False)},
    }
)
"""By key, the values whose kernels are for GPUs alone."""
_ANYWHERE: Mapping[str, str] = MappingProxyType(
    {"precision.backend": "native", "precision.norm": "native", "optim.implementation": "torch"}
)
"""By key, the value that runs anywhere."""


def hardware_rules(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """The messages of what a config's kernels lack on this hardware."""
    values = flatten(config)
    for key, kernels in GPU_VALUES.items():
        if values[key] in kernels:
            yield from _kernel_rules(key, values[key], kernels[values[key]], hardware)
    fp8 = config.precision.fp8
    if config.precision.backend == "te" and fp8.recipe != "none" and hardware.runs_cuda:
        yield from _recipe_rules(fp8.recipe, hardware)


def _kernel_rules(key: str, value: str, kernels: Kernels, hardware: Hardware) -> Iterator[str]:
    if not (hardware.runs_cuda if kernels.cuda_only else hardware.capability):
        yield needs_gpu(key, value, found="none" if hardware.capability is None else "one that is not NVIDIA's")
    elif kernels.package and kernels.package not in hardware.packages:  # whoever has no GPU need not install anything
        other = " (PyPI's package `apex` is another project)" if kernels.package == "apex" else ""
        yield (
            f"{key} ({value}) needs the package {kernels.package}, which is not installed; install it with "
            f"`{INSTALL[kernels.package]}`{other}, or set {key} to {_ANYWHERE[key]}"
        )


def needs_gpu(key: str, value: str, *, found: str = "none") -> str:
    """The message about a value of a key whose kernels are for GPUs (`GPU_VALUES`), where there is none, or another maker's."""
    emulated = "; FP8 is emulated anywhere by precision.fp8.emulate" if key == "precision.backend" else ""
    gpu = "a CUDA GPU" if GPU_VALUES[key][value].cuda_only else "a GPU"
    return f"{key} ({value}) needs {gpu}, and PyTorch finds {found} here; set {key} to {_ANYWHERE[key]}{emulated}"


def _recipe_rules(recipe: Fp8Recipe, hardware: Hardware) -> Iterator[str]:
    key, needs, capability = f"precision.fp8.recipe ({recipe})", RECIPE_NEEDS[recipe], hardware.capability or (0, 0)
    cuda = _version(hardware.cuda or "0")
    possible = [name for name, of in RECIPE_NEEDS.items() if _has(of, capability) and cuda >= of.cuda]
    instead = f"set precision.fp8.recipe to {_either(possible or ['none'])}"
    emulate = "; precision.backend native with precision.fp8.emulate shows this recipe's numbers on any device"
    if not _has(needs, capability):
        below = f" and below {_text(needs.below)}" if needs.below else ""
        yield (
            f"{key} needs a GPU of compute capability {_text(needs.low)} or more{below} ({needs.gpus}), this one has {_text(capability)}; "
            f"{instead}{emulate}"
        )
    elif cuda < needs.cuda:
        yield (
            f"{key} needs CUDA {_text(needs.cuda)} or later, and PyTorch was built with {hardware.cuda}; install a PyTorch of CUDA "
            f"{_text(needs.cuda)}, or {instead}{emulate}"
        )


def _has(needs: RecipeNeeds, capability: Version) -> bool:
    return capability >= needs.low and (needs.below is None or capability < needs.below)


def _version(text: str) -> Version:
    major, minor = (text.split(".") + ["0"])[:2]
    return int(major), int(minor)


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
