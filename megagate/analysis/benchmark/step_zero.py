"""A training step of megagate under DeepSpeed ZeRO, on one process."""

from megagate.analysis.benchmark.interleave import Work
from megagate.analysis.benchmark.step import SHAPES
from megagate.analysis.benchmark.step_plain import OPTIM, batches, build_model
from megagate.config.run import PrecisionConfig, RunConfig, TrainConfig
from megagate.engine.zero import ZeroEngine
from megagate.parallel.init import LaunchEnv, init_process_group, pick_device
from megagate.parallel.mesh import ParallelMesh


def zero(shape: str, grad_dtype: str) -> Work:
    """A step of the engine that runs are trained with: fp32 masters, clipping, a loss read back.

    Args:
        shape: Of `SHAPES`.
        grad_dtype: See `PrecisionConfig`.
    """
    sizes, device = SHAPES[shape], pick_device(0)
    init_process_group(LaunchEnv(), device=device)
    mesh = ParallelMesh.build(tp=1, ep=1)
    config = RunConfig(
        model=sizes.model,
        train=TrainConfig(global_batch_size=sizes.micro_batch, micro_batch_size=sizes.micro_batch, seq_len=sizes.seq_len),
        optim=OPTIM,
        precision=PrecisionConfig("bf16", grad_dtype),
    )
    engine = ZeroEngine(build_model(config.model, device, mesh), config, mesh)
    data = batches(sizes, device)

    def work() -> dict[str, float]:
        tokens, labels = next(data)
        return {"loss": engine.train_step(tokens.unsqueeze(0), labels.unsqueeze(0), lr=OPTIM.lr).loss}

    return work
