"""A model that does not fit is verified one block at a time."""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from exports import exported
from hf_exports import DENSE, ELEMENTWISE, gated
from parity.sharded import BACKEND

from megagate.checkpoint.hf import verify_stream
from megagate.checkpoint.hf.table import mapping
from megagate.checkpoint.hf.verify import verify_export
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt
from megagate.config.model import MoEConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

LARGE = gated(
    replace(DENSE, vocab_size=4000, hidden_size=256, num_layers=4, ffn_size=0, moe=MoEConfig(num_experts=64, top_k=4, ffn_size=512)),
    ELEMENTWISE,
)
"""100 M parameters: 0.4 GB in fp32, 101 MB of it in each block. Stacks of 32 MiB or more are given back by malloc at once, smaller ones
may not be."""
SMALL = replace(LARGE, num_layers=1, hidden_size=32)
BLOCK = 101 << 20
WHOLE = 4 * BLOCK


def own_memory() -> int:
    """Bytes, without mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def peak_of(work: Callable[[], object]) -> int:
    """By how many bytes the process's own memory grows, at most, during some work."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, own_memory())

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again without a trace
    before, watcher = own_memory(), threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return peak - before


def test_streamed_verification_holds_a_few_blocks(tmp_path):
    verify_export(*exported(tmp_path / "small", SMALL), memory=1)  # imports take memory, too
    made = exported(tmp_path, LARGE)
    found = []
    streamed = peak_of(lambda: found.append(verify_export(*made, memory=1)))
    whole = peak_of(lambda: found.append(verify_export(*made)))
    assert [(one.how, one.flaws) for one in found] == [("streamed", ()), ("whole", ())]
    assert found[0].logits.max_error <= 1e-4 and found[0].logits == found[1].logits
    # Of theirs, what is not stacked stays mapped.
    assert whole > 1.5 * WHOLE, f"{whole >> 20} MB: the measure does not see both models"
    assert streamed < 4 * BLOCK, f"{streamed >> 20} MB"


def test_only_the_part_that_runs_has_weights(tmp_path):
    """Of our model: at each block's forward pass no other part is off the meta device, and none is after the last."""
    made = exported(tmp_path, DENSE)
    model = LanguageModel(DENSE, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single())
    weights = Rebuilt(DENSE, mapping(DENSE, "qwen3"), FolderTensors(made.folder))
    seen = []

    def real() -> set[str]:
        return {name.rpartition(".weight")[0] for name, parameter in model.named_parameters() if not parameter.is_meta}

    for name, part in (("layers.0", model.layers[0]), ("layers.1", model.layers[1])):
        part.attention.register_forward_pre_hook(lambda *_, name=name: seen.append({one.startswith(f"{name}.") for one in real()}))
    with verify_stream.streamed_ours(model, weights):
        model.logits(torch.arange(8).view(1, 8))
    assert seen == [{True}, {True}] and real() == set()
