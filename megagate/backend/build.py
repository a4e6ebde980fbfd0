"""The backend that a config names."""

import torch

from megagate.backend import apex
from megagate.backend.base import Backend
from megagate.backend.fp8.backend import EmulatedBackend
from megagate.backend.native import NativeBackend, NormFunction, rms_norm
from megagate.backend.te import TransformerEngineBackend
from megagate.config.precision_rules import kernel_rules
from megagate.config.run import PrecisionConfig
from megagate.errors import ConfigError
from megagate.parallel.init import require_gpu
from megagate.parallel.mesh import ParallelMesh


def build_backend(precision: PrecisionConfig, *, device: torch.device, mesh: ParallelMesh) -> Backend:
    """The only place where a backend is chosen.

    Raises:
        ConfigError: What the config names is not there, or goes together with nothing that is.
    """
    if refused := list(kernel_rules(precision)):
        raise ConfigError("\n".join(refused))
    native, fp8 = NativeBackend(device, norm=build_norm(precision, device=device)), precision.fp8
    if precision.backend == "te":
        require_gpu("precision.backend", precision.backend, device=device)
        return TransformerEngineBackend(precision, device=device, mesh=mesh, norm=native.norm)
    if fp8.recipe == "none":
        return native
    return EmulatedBackend(native, fp8, device=device, mesh=mesh)


def build_norm(precision: PrecisionConfig, *, device: torch.device) -> NormFunction:
    """The kernel of norms, for any backend.

    Raises:
        ConfigError: It is not there.
    """
    if precision.norm == "native":
        return rms_norm
    require_gpu("precision.norm", precision.norm, device=device)
    apex.require("precision.norm", kernels=apex.NORM_KERNELS, otherwise="native")
    return apex.rms_norm
