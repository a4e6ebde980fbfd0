"""GPUs by name, with what matters for planning: their memory, and what FP8 they have."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from megagate.config.hardware import RECIPE_NEEDS, Hardware
from megagate.errors import ConfigError

USABLE = 0.9
"""Share of a GPU's memory that a plan may fill. The rest is for what no formula here knows: the CUDA context, NCCL's channels, and what the
caching allocator loses to fragments. Experts with more rows than others must fit there too, and may not: without recomputation a rank that
gets twice its share in every layer can need more than a tenth on top (`Memory.kept_if_twice`)."""

GPU_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "a10-24gb": 24_000_000_000,
        "l40s-48gb": 48_000_000_000,
        "a100-40gb": 40_000_000_000,
        "a100-80gb": 80_000_000_000,
        "h100-80gb": 80_000_000_000,
        "h100-96gb": 96_000_000_000,
        "h200-141gb": 141_000_000_000,
        "b200-180gb": 180_000_000_000,
        "mi300x-192gb": 192_000_000_000,
    }
)
"""Nominal memory: the number of the product's name, in units of 10^9 bytes. Drivers report a few percent more or less than this. Only GPUs
that compute in bf16."""

GPU_CAPABILITY: Mapping[str, tuple[int, int] | None] = MappingProxyType(
    {
        "a10-24gb": (8, 6),
        "l40s-48gb": (8, 9),
        "a100-40gb": (8, 0),
        "a100-80gb": (8, 0),
        "h100-80gb": (9, 0),
        "h100-96gb": (9, 0),
        "h200-141gb": (9, 0),
        "b200-180gb": (10, 0),
        "mi300x-192gb": None,
    }
)
"""Compute capability, by NVIDIA's list (developer.nvidia.com/cuda-gpus); None for what is not NVIDIA's."""


def gpu_hardware(gpu: str) -> Hardware | None:
    """What kernels find on a GPU that is given by its name, every package and a recent CUDA provided; None where only its size is given."""
    if gpu not in GPU_CAPABILITY:
        return None
    capability = GPU_CAPABILITY[gpu]
    recent = max(needs.cuda for needs in RECIPE_NEEDS.values())
    # A GPU of others computes, too, but not what is written in CUDA.
    return Hardware(".".join(map(str, recent)) if capability else None, capability or (0, 0))


def gpu_bytes(gpu: str, *, key: str = "--gpu") -> int:
    """The memory of a GPU that is given by its name, nominal, or by its size in units of 10^9 bytes, such as `85.5`.

    Args:
        gpu: It.
        key: Where it was given, for messages.

    Raises:
        ConfigError: No GPU of that name is listed, or the size is no positive number.
    """
    if gpu in GPU_BYTES:
        return GPU_BYTES[gpu]
    try:
        size = float(gpu)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise ConfigError(f"{key} {gpu} is unknown; give its memory in GB, such as 80, or one of {', '.join(GPU_BYTES)}")
    return int(size * 1e9)
