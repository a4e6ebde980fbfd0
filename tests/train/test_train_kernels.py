"""Kernels that this machine, or another one of the run, lacks: all ranks say so together, before anything is read or written."""

import re
from pathlib import Path

import pytest
import ranks
from train_jobs import Jobs

from megagate.config.hardware import Hardware
from megagate.config.model import AttentionConfig, ModelConfig
from megagate.config.run import Fp8Config, PrecisionConfig, RunConfig, TrainConfig
from megagate.errors import ConfigError
from megagate.parallel.init import LaunchEnv
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.train.job import require_hardware


@pytest.mark.parametrize("world", [1, 2])
def test_kernels_that_a_cpu_lacks(jobs: Jobs, tmp_path: Path, world: int) -> None:
    """All of them at once, before any data is prepared."""
    wishes = ("--precision.backend", "te", "--precision.norm", "apex", "--optim.implementation", "te", "--data.path", "embedded")
    job = jobs.run("--train.output_dir", tmp_path / "run", *wishes, "--precision.dtype", "auto", world=world, expect=2)
    assert job.text.count("ConfigError") == 1 and "Traceback" not in job.text, job.text
    for key, value in zip(wishes[:6:2], wishes[1:6:2], strict=True):
        assert job.text.count(f"{key.removeprefix('--')} ({value}) needs a") == 1, job.text
    assert not (tmp_path / "run").exists()


FP8_RUN = RunConfig(
    model=ModelConfig(256, 64, 2, 64, attention=AttentionConfig(4, 2, 16)),
    train=TrainConfig(seq_len=32),
    precision=PrecisionConfig(dtype="bf16", backend="te", fp8=Fp8Config("blockwise")),
)


def on_mixed_machines(context: RankContext, older: int | None) -> str:
    """What a rank is told where that one has an older GPU."""
    world, here = ParallelMesh.build(tp=1, ep=1).world, context.rank == older
    hardware = Hardware("12.9", (8, 0) if here else (9, 0))
    try:
        env = LaunchEnv(context.rank, 0, context.world_size, 1)
        require_hardware(FP8_RUN, hardware, env=env, world=world)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("older", [0, 1, None])
def test_machines_with_other_gpus(older: int | None) -> None:
    told = ranks.run_ranks(on_mixed_machines, 2, older)
    assert told[0] == told[1]
    if older is None:
        assert told[0] == ""
    else:
        assert "precision.fp8.recipe (blockwise) needs a GPU of compute capability 9.0 or more" in told[0]
        assert re.search(rf"this one has 8\.0; .* \(on \S+, rank {older}\)$", told[0])
