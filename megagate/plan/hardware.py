"""GPUs by name, with what matters for planning: their memory."""

from collections.abc import Mapping
from types import MappingProxyType

from megagate.errors import ConfigError

USABLE = 0.9
"""Share of a GPU's memory that a plan may fill. The rest is for what no formula here knows: the CUDA context, NCCL's channels, what the
caching allocator loses to fragments, and experts that get more rows than others."""

GPU_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "v100-32gb": 32_000_000_000,
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
"""Nominal memory: the number of the product's name, in units of 10^9 bytes. Drivers report a few percent more or less than this."""


def gpu_bytes(name: str) -> int:
    """The nominal memory of a GPU.

    Raises:
        ConfigError: No GPU of that name is listed.
    """
    if name not in GPU_BYTES:
        raise ConfigError(f"--gpu {name} is unknown; give one of {', '.join(GPU_BYTES)}")
    return GPU_BYTES[name]
