"""The backend that a config names."""

import torch

from megagate.backend.base import Backend
from megagate.backend.native import NativeBackend
from megagate.config.run import PrecisionConfig
from megagate.errors import ConfigError
from megagate.parallel.mesh import ParallelMesh


def build_backend(precision: PrecisionConfig, *, device: torch.device, mesh: ParallelMesh) -> Backend:
    """The only place where a backend is chosen.

    Raises:
        ConfigError: What the config names is not there.
    """
    if precision.backend != "native" or precision.fp8.recipe != "none" or precision.norm != "native":
        raise ConfigError("only precision.backend native without FP8 exists so far; leave precision.backend, .norm and .fp8 out")
    return NativeBackend(device)
