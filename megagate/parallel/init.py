"""Start-up of one rank: the launcher's environment, the device, and the process group."""

import importlib.util
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megagate.config.hardware import INSTALL, Hardware, needs_gpu
from megagate.errors import ConfigError


@dataclass(frozen=True)
class LaunchEnv:
    """What the launcher (deepspeed, torchrun, or none) says about this process."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_size: int = 1

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "LaunchEnv":
        """From RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_SIZE (LOCAL_WORLD_SIZE); a process without them is a world of one."""

        def number(*keys: str, default: int) -> int:
            return int(next((environ[key] for key in keys if key in environ), default))

        return cls(
            rank=number("RANK", default=0),
            local_rank=number("LOCAL_RANK", default=0),
            world_size=number("WORLD_SIZE", default=1),
            local_size=number("LOCAL_SIZE", "LOCAL_WORLD_SIZE", default=1),
        )


def pick_device(local_rank: int, *, local_size: int = 1) -> torch.device:
    """The GPU of this rank, or the CPU where there is none; ranks that share a CPU share its cores, unless OMP_NUM_THREADS says otherwise.

    Args:
        local_rank: Place of this rank on its machine.
        local_size: Ranks on this machine.
    """
    if not torch.cuda.is_available():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def require_gpu(key: str, value: str, *, device: torch.device) -> None:
    """Refuse a value of a config key whose kernels are for GPUs alone. Whose GPU it is, is a rule of start-up (`hardware_rules`).

    Args:
        key: The config key.
        value: What it is.
        device: Of this rank.

    Raises:
        ConfigError: This rank has none.
    """
    if device.type != "cuda":
        raise ConfigError(needs_gpu(key, value))


def read_hardware(device: torch.device) -> Hardware:
    """What this rank's kernels can build on. Packages are looked for, not imported.

    Args:
        device: Of this rank.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    found = frozenset(package for package in INSTALL if importlib.util.find_spec(package) is not None)
    return Hardware(torch.version.cuda, capability, found)


def allow_open_files() -> None:
    """Raises this process's limit of open files as far as it may: each mapped shard holds one, and the usual 1,024 are soon taken."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def init_process_group(env: LaunchEnv, *, device: torch.device, init_method: str | None = None, timeout: timedelta | None = None) -> None:
    """Join the default process group: NCCL beside gloo on GPUs, gloo on CPUs.

    Args:
        env: Rank and world size.
        device: Of this rank.
        init_method: Rendezvous; None takes MASTER_ADDR and MASTER_PORT, or, for a lone process, no network at all.
        timeout: Of collectives; None is the backend's default.
    """
    # DeepSpeed looks these up, also where no launcher set them.
    for key, value in (("RANK", env.rank), ("LOCAL_RANK", env.local_rank), ("WORLD_SIZE", env.world_size)):
        os.environ.setdefault(key, str(value))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if init_method is None and env.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    dist.init_process_group(
        backend, init_method=init_method or "env://", rank=env.rank, world_size=env.world_size, timeout=timeout
    )
