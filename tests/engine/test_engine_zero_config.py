"""What DeepSpeed is told: a pure function of the run."""

import json
from dataclasses import replace

import pytest

from megagate.config.run import OptimConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from megagate.engine.zero_config import LARGEST_BUCKET, zero_config

RUN = RunConfig(
    train=TrainConfig(global_batch_size=48, micro_batch_size=3),
    optim=OptimConfig(grad_clip=0.7),
    parallel=ParallelConfig(zero_stage=2),
)


def make(run: RunConfig = RUN, *, dtype: str = "fp32", dp: int = 4, local_parameters: int = 1000) -> dict:
    return zero_config(run, dtype=dtype, dp=dp, local_parameters=local_parameters)


@pytest.mark.parametrize(("dp", "accumulation"), [(1, 16), (2, 8), (4, 4), (16, 1)])
def test_batch_sizes_are_those_that_deepspeed_checks(dp, accumulation):
    made = make(dp=dp)
    assert made["train_batch_size"] == 48 and made["train_micro_batch_size_per_gpu"] == 3
    assert made["gradient_accumulation_steps"] == accumulation
    assert made["train_batch_size"] == made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * dp


@pytest.mark.parametrize("stage", [1, 2])
def test_stage_and_clipping_come_from_the_run(stage):
    made = make(replace(RUN, parallel=ParallelConfig(zero_stage=stage)))
    assert made["zero_optimization"]["stage"] == stage
    assert made["gradient_clipping"] == 0.7


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "expected"),
    [("fp32", "fp32", "fp32"), ("fp32", "model", "fp32"), ("bf16", "fp32", "fp32"), ("bf16", "model", "bf16")],
)
def test_gradients_are_summed_over_ranks_as_they_are_accumulated(dtype, grad_dtype, expected):
    made = make(replace(RUN, precision=PrecisionConfig(grad_dtype=grad_dtype)), dtype=dtype)
    assert made["bf16"]["enabled"] == (dtype == "bf16")
    assert made["data_types"]["grad_accum_dtype"] == expected
    assert made["communication_data_type"] == expected


@pytest.mark.parametrize(("local", "bucket"), [(1000, 1000), (LARGEST_BUCKET * 2, LARGEST_BUCKET), (0, 1)])
def test_no_bucket_is_larger_than_the_model(local, bucket):
    stage = make(local_parameters=local)["zero_optimization"]
    assert stage["reduce_bucket_size"] == stage["allgather_bucket_size"] == bucket


def test_deepspeed_may_not_replace_the_optimizer_or_talk():
    made = make()
    assert made["zero_allow_untested_optimizer"] is True and made["zero_force_ds_cpu_optimizer"] is False
    assert made["steps_per_print"] > 10**12


def test_expert_parallelism_is_not_configured():
    """DeepSpeed's own expert parallelism would correct gradients that need no correction."""
    assert not {"expert_parallel", "tensor_parallel"} & set(make())
    assert json.loads(json.dumps(make())) == make()


def test_nothing_else_of_the_run_matters():
    other = replace(RUN, train=replace(RUN.train, seed=99, steps=7, seq_len=5, recompute=True, output_dir="elsewhere"))
    assert make(other) == make()
