"""What is measured in the rows of `tools/benchmark.py convert`: one conversion at a time. What makes room for it is not timed."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megagate.analysis.benchmark.copying import touch
from megagate.analysis.benchmark.interleave import Work
from megagate.analysis.benchmark.resident import Growth
from megagate.checkpoint import store
from megagate.checkpoint.folders import ROOT_NAME
from megagate.checkpoint.hf.export import export
from megagate.checkpoint.saved_model import native_shapes
from megagate.config.keys import to_dict
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.config.run import DataConfig, PrecisionConfig, RunConfig, TrainConfig

STEP = 1
_RANKS = 2
_EXPERTS, _LAYERS = 32, 4
_HEAD_DIM = 64
_WATCH_SECONDS = 0.005


def make(root: str, megabytes: float) -> Work:
    """Writes the checkpoint of a made-up run, its masters alone, as two ranks would that have half of every tensor."""

    def work() -> dict[str, float]:
        make_checkpoint(Path(root), megabytes)
        return {}

    return work


def made_up_model(megabytes: float) -> ModelConfig:
    """A gated mixture of experts whose weights take about so many MB of 10^6 bytes in fp32 (5 at least)."""
    hidden = max(1, round((megabytes * 1e6 / 4 / 310) ** 0.5 / _HEAD_DIM)) * _HEAD_DIM
    heads = hidden // _HEAD_DIM
    attention = AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=_HEAD_DIM, gate=GateConfig("G1"))
    moe = MoEConfig(num_experts=_EXPERTS, top_k=4, ffn_size=3 * hidden // 4)
    return ModelConfig(vocab_size=4 * hidden, hidden_size=hidden, num_layers=_LAYERS, attention=attention, moe=moe)


def make_checkpoint(root: Path, megabytes: float) -> RunConfig:
    """The run's folder with one checkpoint; takes the memory of one expert of each stack, since all others are the same."""
    model = made_up_model(megabytes)
    config = RunConfig(
        model=model, train=TrainConfig(seq_len=64), data=DataConfig(path="synthetic"), precision=PrecisionConfig(dtype="fp32")
    )
    generator = torch.Generator().manual_seed(0)
    staging = store.begin(root / ROOT_NAME, STEP)
    for rank in range(_RANKS):
        pieces = []
        for name, (rows, *shape) in native_shapes(model).items():
            first, stop = rows * rank // _RANKS, rows * (rank + 1) // _RANKS
            part = torch.randn(1, *shape, generator=generator).expand(stop - first, *shape)
            pieces.append(store.Piece(name, (rows, *shape), (first, *(0 for _ in shape)), part))
        store.write_rank(staging, rank, pieces)
    store.publish(root / ROOT_NAME, STEP, world_size=_RANKS, metadata={"config": to_dict(config), "applied_steps": STEP})
    return config


def to_hf(source: str, output: str, dtype: str, keep: bool = False) -> Work:
    """Exports, and removes it again unless told to keep it."""

    def work() -> dict[str, float]:
        size = _in_cache(store.resolve(Path(source)))
        notes = measured(lambda: export(Path(source), Path(output), dtype=dtype))
        if not keep:
            shutil.rmtree(output)
        return {**notes, "bytes": size}

    return work


def from_hf(source: str, output: str) -> Work:
    """Adopts, and removes it again."""
    from megagate.checkpoint.hf.adopt import adopt  # noqa: PLC0415  exports do without

    def work() -> dict[str, float]:
        size = _in_cache(Path(source))
        notes = measured(lambda: adopt(Path(source), Path(output)))
        shutil.rmtree(output)
        return {**notes, "bytes": size}

    return work


def _in_cache(folder: Path) -> int:
    """Bring the files of a folder into the file cache, as they are for `cp`; returns their bytes."""
    for path in folder.iterdir():
        touch(path)
    return sum(path.stat().st_size for path in folder.iterdir())


def measured(action: Callable[[], object]) -> dict[str, float]:
    """Seconds, processor time, and by how many bytes the memory of this process's own grew at most (`private`)."""
    growth, done, largest = Growth(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(_WATCH_SECONDS):
            largest[0] = max(largest[0], growth.notes()["private"])

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        action()
        return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu, "private": largest[0]}
    finally:
        done.set()
        watching.join()
