"""A training step of megagate's model in plain PyTorch, bf16 weights under a fused AdamW; and the machine's matmul peak."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megagate.analysis.benchmark.interleave import Work
from megagate.analysis.benchmark.step import SHAPES, Shape, gated
from megagate.backend.native import NativeBackend
from megagate.config.model import ModelConfig
from megagate.config.run import OptimConfig
from megagate.engine.optim import build_optimizer, parameter_groups
from megagate.model.lm import LanguageModel
from megagate.nn.loss import IGNORE_INDEX
from megagate.nn.moe.balance import BalanceLoss
from megagate.parallel.init import pick_device
from megagate.parallel.mesh import ParallelMesh

OPTIM = OptimConfig(lr=1e-4)
SEED = 1234
AUXILIARY_COEF = 1e-3


def plain(shape: str, gate: str | None = None, auxiliary: bool = False) -> Work:
    """Forward, backward and update of the model as it is on one process.

    Args:
        shape: Of `SHAPES`.
        gate: Granularity of an attention gate.
        auxiliary: Balance loss and z-loss are formed and trained.
    """
    sizes, device, mesh = SHAPES[shape], pick_device(0), ParallelMesh.single()
    model = build_model(gated(sizes.model, gate), device, mesh)
    moe = replace(sizes.model.moe, balance_coef=AUXILIARY_COEF, z_loss_coef=AUXILIARY_COEF)
    targets = sizes.tokens - sizes.micro_batch

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        parts = model(tokens, labels)
        loss = parts.ce_sum / targets
        if auxiliary:
            loss = loss + BalanceLoss(moe, step_tokens=sizes.tokens, mesh=mesh).share(parts.stats)
        return loss

    return step_of(model, loss_of, batches(sizes, device))


def alternating(shape: str, gates: Mapping[str, str | None], first: int = 0) -> Work:
    """One step of each model by turns in this one process.

    The order is turned by one place a round, and reversed every other cycle: each model is first as often as any other, and follows each
    of its neighbours as often as it goes before.

    Args:
        shape: Of `SHAPES`.
        gates: The granularity of each model's gate by the model's name, neighbours beside each other.
        first: Place of the model that is built first, and so gets the first memory.

    Returns:
        Work: Its numbers are `NAME.seconds`, `NAME.cpu_seconds` and `NAME.loss` of each model.
    """
    names = list(gates)
    steps = {name: plain(shape, gates[name]) for name in turns(names)[first % len(names)]}
    orders = itertools.cycle(turns(names))

    def work() -> dict[str, float]:
        numbers = {}
        for name in next(orders):
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = steps[name]()["loss"]
            numbers[f"{name}.cpu_seconds"] = time.process_time() - cpu_start
            numbers[f"{name}.seconds"] = time.perf_counter() - start
            numbers[f"{name}.loss"] = loss
        return numbers

    return work


def turns(names: list[str]) -> list[list[str]]:
    """Every rotation of the names, then every rotation backwards."""
    rotations = [names[first:] + names[:first] for first in range(len(names))]
    return rotations + [names[::-1] for names in rotations]


def build_model(config: ModelConfig, device: torch.device, mesh: ParallelMesh) -> LanguageModel:
    """The bf16 model with its initial values."""
    return LanguageModel(config, dtype=torch.bfloat16, backend=NativeBackend(device), mesh=mesh).initialize(seed=SEED, device=device)


def step_of(model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], data: Iterator[tuple[Tensor, Tensor]]) -> Work:
    """A step with a fused AdamW on the model's own weights. Reading the loss ends it, on a GPU too."""
    optimizer = build_optimizer(parameter_groups(list(model.named_parameters()), OPTIM), OPTIM)

    def work() -> dict[str, float]:
        loss = loss_of(*next(data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item()}

    return work


def batches(shape: Shape, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and next-token labels [b, s], new ones each step (a repeated batch would hide what new row counts cost), alike in all rows."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        tokens = torch.randint(shape.model.vocab_size, (shape.micro_batch, shape.seq_len), generator=generator)
        labels = tokens.roll(-1, dims=1)
        labels[:, -1] = IGNORE_INDEX
        yield tokens.to(device), labels.to(device)


def matmul_peak(shape: str, size: int = 2048, repeat: int = 8) -> Work:
    """Large bf16 matrix products; `shape` takes no part. Returns their floating-point operations."""
    device = pick_device(0)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))

    def work() -> dict[str, float]:
        for _ in range(repeat):
            product = left @ right
        product[0, 0].item()
        return {"flops": 2.0 * size**3 * repeat}

    return work
