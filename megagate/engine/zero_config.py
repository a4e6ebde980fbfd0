"""The DeepSpeed configuration of a run: a pure function."""

from typing import Any

from megagate.config.run import RunConfig

LARGEST_BUCKET = 500_000_000


def zero_config(config: RunConfig, *, dtype: str, dp: int, local_parameters: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Args:
        config: The run.
        dtype: `fp32` or `bf16`, resolved.
        dp: Data-parallel ranks.
        local_parameters: Elements that this rank holds; no communication bucket needs to be larger.
    """
    batch, micro = config.train.global_batch_size, config.micro_batch(dp)
    bucket = max(1, min(LARGEST_BUCKET, local_parameters))
    grad_dtype = "fp32" if config.precision.grad_dtype == "fp32" else dtype
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // (micro * dp),
        # Stage 0 is clipped in `zero.py`: DeepSpeed does not tell its norm there.
        "gradient_clipping": config.optim.grad_clip if config.parallel.zero_stage else 0.0,
        # immediate_grad_update: each bf16 gradient is added to its fp32 sum and freed as soon as it is there.
        "bf16": {"enabled": dtype == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": grad_dtype},
        # Without this line gradients would be accumulated in fp32 but summed over ranks in bf16.
        "communication_data_type": grad_dtype,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
            # Stage 3 keeps vectors (norms) whole: gathering a few KB for each use costs more than holding them.
            "stage3_param_persistence_threshold": max(config.model.hidden_size, config.model.attention.head_dim),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
