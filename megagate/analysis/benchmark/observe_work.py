"""Training steps under DeepSpeed ZeRO on one process, with a look at the model and without one."""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megagate.analysis.benchmark.interleave import Work
from megagate.analysis.benchmark.observe import OBSERVED
from megagate.analysis.benchmark.step import SHAPES, gated
from megagate.analysis.benchmark.step_plain import OPTIM, SEED, turns
from megagate.backend.build import build_backend
from megagate.config.cli import parse
from megagate.config.run import PrecisionConfig, RunConfig, TrainConfig
from megagate.engine.zero import ZeroEngine
from megagate.model.lm import LanguageModel
from megagate.nn.loss import IGNORE_INDEX
from megagate.parallel.init import LaunchEnv, init_process_group, pick_device
from megagate.parallel.mesh import ParallelMesh
from megagate.probe.look import look


def alternating(shape: str, gates: Mapping[str, str | None], first: int = 0) -> Work:
    """Steps of one engine by turns, those of `OBSERVED` with a look; all that a run does but for writing the record.

    Args:
        shape: Of `SHAPES`, with an elementwise gate and in bf16, or the file of a config.
        gates: The names of the steps, see `step_plain.alternating`.
        first: Which of them begins.

    Returns:
        Work: Its numbers are `NAME.seconds`, `NAME.cpu_seconds` and `NAME.loss` of each.
    """
    device = pick_device(0)
    config = run_config(shape, device)
    init_process_group(LaunchEnv(), device=device)
    mesh = ParallelMesh.build(tp=1, ep=1)
    backend = build_backend(config.precision, device=device, mesh=mesh)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.dtype]
    model = LanguageModel(config.model, dtype=dtype, backend=backend, mesh=mesh, recompute=config.train.recompute)
    engine = ZeroEngine(model.initialize(seed=SEED, device=device), config, mesh)
    data, orders = batches(config, device), itertools.cycle(turns(list(gates)))
    for _ in range(first):
        next(orders)

    def step(tokens: Tensor, labels: Tensor, *, observed: bool) -> float:
        if observed:
            look(model, lambda: engine.evaluate([(tokens[0], labels[0])]), queries=config.observe.queries)
        return engine.train_step(tokens, labels, lr=OPTIM.lr, detailed=observed).loss

    def work() -> dict[str, float]:
        numbers = {}
        for name in next(orders):
            tokens, labels = next(data)
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = step(tokens, labels, observed=name == OBSERVED)
            numbers[f"{name}.cpu_seconds"] = time.process_time() - cpu_start
            numbers[f"{name}.seconds"] = time.perf_counter() - start
            numbers[f"{name}.loss"] = loss
        return numbers

    return work


def run_config(shape: str, device: torch.device) -> RunConfig:
    """The run of a shape, or of a config's file on one process."""
    if shape not in SHAPES:
        config = parse(["--config", shape], prog="benchmark.py")
        dtype = config.precision.dtype.replace("auto", "bf16" if device.type == "cuda" else "fp32")
        return replace(config, precision=replace(config.precision, dtype=dtype))
    sizes = SHAPES[shape]
    return RunConfig(
        model=gated(sizes.model, "elementwise"),
        train=TrainConfig(global_batch_size=sizes.micro_batch, micro_batch_size=sizes.micro_batch, seq_len=sizes.seq_len),
        optim=OPTIM,
        precision=PrecisionConfig("bf16"),
    )


def batches(config: RunConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens and their next ones, [accumulation, b, s], new ones each step."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (-1, config.micro_batch(1), config.train.seq_len)
    while True:
        tokens = torch.randint(config.model.vocab_size, (config.train.global_batch_size, config.train.seq_len), generator=generator)
        labels = tokens.roll(-1, dims=1)
        labels[:, -1] = IGNORE_INDEX
        yield tokens.view(shape).to(device), labels.view(shape).to(device)
