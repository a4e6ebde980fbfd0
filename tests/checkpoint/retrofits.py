"""Helpers of the retrofit's tests: trained checkpoints of small models, loaded again; refusals."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from checkpoint_helpers import contents
from parity.engines import MOE, TIED_DENSE, Layout, Run, batch, run_config, train
from parity.sharded import BACKEND, CPU, fill
from torch import Tensor
from torch.nn import functional as F

from megagate.backend.base import ColumnLinears, Norm, Part
from megagate.backend.native import NativeBackend
from megagate.checkpoint import store
from megagate.checkpoint.retrofit import Retrofit
from megagate.checkpoint.store import Checkpoint
from megagate.config.keys import from_dict
from megagate.config.model import GateConfig, GateGranularity, ModelConfig
from megagate.config.run import RunConfig
from megagate.engine.reference import ReferenceEngine
from megagate.errors import CheckpointError, ConfigError
from megagate.model.lm import LanguageModel
from megagate.parallel.comm import enter
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.train.saver import RANDOM_STATE, Saver

ALONE = ParallelMesh.single()
STEPS = 3
KINDS = {"dense": TIED_DENSE, "moe": MOE}
GRANULARITIES = get_args(GateGranularity)
LAYERS = [f"layers.{layer}.attention" for layer in range(MOE.num_layers)]
TOKENS = batch(7, ALONE)[0].flatten(0, 1)


class Separate(NativeBackend):
    """One GEMM per weight, so that a gate's rows change no other product."""

    def column_linears(
        self, width: int, parts: Sequence[Part], *, tp: Axis, eps: float | None = None, gives_normed: bool = True
    ) -> ColumnLinears:
        def products(x: Tensor, weights: Sequence[Tensor], norm: Norm | None = None) -> tuple[list[Tensor], Tensor]:
            normed = x if norm is None else norm(x)
            x = enter(normed, tp, dim=1)
            return [F.linear(x, weight) for weight in weights], normed

        return products


SEPARATE = Separate(CPU)


def gated(model: ModelConfig, gate: GateConfig) -> ModelConfig:
    return replace(model, attention=replace(model.attention, gate=gate))


def engine_of(config: RunConfig, backend: NativeBackend = BACKEND) -> ReferenceEngine:
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    return ReferenceEngine(fill(LanguageModel(config.model, dtype=dtype, backend=backend, mesh=ALONE)), config, ALONE)


def save(engine: ReferenceEngine, root: Path, step: int) -> Path:
    saver = Saver(root, config=engine.config, mesh=ALONE, order=lambda samples: {"order": "the order", "samples": samples})
    saver.save(engine, step=step, best_val_loss=1.5, last=True)
    return root


def trained(root: Path, kind: str = "dense", *, dtype: str = "fp32", gate: GateConfig | None = None, mute: bool = False) -> Path:
    """A checkpoint after some steps, so that no weight has its initial value; `mute` sets an input-dependent gate back to zeros."""
    base = run_config(Run(optimizer="adamw", dtype=dtype), Layout())
    engine = engine_of(replace(base, model=gated(KINDS[kind], gate or GateConfig())))
    train(engine, range(STEPS), lr=1e-2)
    for name, master in engine.masters.items():
        if mute and "attention.gate" in name:
            master.data.zero_()
    return save(engine, root, STEPS)


def loaded(path: Path, backend: NativeBackend = BACKEND) -> ReferenceEngine:
    """The engine of a checkpoint's own config with its state."""
    with Checkpoint.open(path) as checkpoint:
        engine = engine_of(from_dict(checkpoint.metadata["config"]), backend)
        engine.load_state(checkpoint, applied_steps=checkpoint.metadata["applied_steps"])
    return engine


def tensors(path: Path) -> dict[str, Tensor]:
    """All logical tensors of model and optimizer."""
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.verify()
        return {name: checkpoint.read_whole(name) for name in checkpoint.tensors if name != RANDOM_STATE}


def masters(path: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors(path).items() if name.startswith("master/")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def save_whole(root: Path, state: dict[str, Tensor], metadata: dict[str, object]) -> None:
    pieces = [store.Piece(name, tensor.shape, (0,) * tensor.dim(), tensor) for name, tensor in state.items()]
    store.write_rank(store.begin(root, STEPS), 0, pieces)
    store.publish(root, STEPS, world_size=1, metadata=metadata)


def refused(change: Callable[[], Retrofit], folder: Path) -> str:
    """The message; no file in `folder` is made or changed."""
    before = contents(folder)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        change()
    assert contents(folder) == before
    return str(caught.value)
