"""Start-up of one rank: the launcher's environment, the device, and the process group. The only place that reads the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class LaunchEnv:
    """What the launcher (deepspeed, torchrun, or none) says about this process."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "LaunchEnv":
        """From RANK, LOCAL_RANK and WORLD_SIZE; a process without them is a world of one."""
        return cls(*(int(environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))))


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def init_process_group(env: LaunchEnv, *, device: torch.device, init_method: str | None = None, timeout: timedelta | None = None) -> None:
    """Join the default process group: NCCL beside gloo on GPUs, gloo on CPUs.

    Args:
        env: Rank and world size.
        device: Of this rank.
        init_method: Rendezvous; None takes MASTER_ADDR and MASTER_PORT, or, for a lone process, no network at all.
        timeout: Of collectives; None is the backend's default.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if init_method is None and env.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    dist.init_process_group(
        backend, init_method=init_method or "env://", rank=env.rank, world_size=env.world_size, timeout=timeout
    )
