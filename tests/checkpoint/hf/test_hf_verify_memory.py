"""A model that does not fit is verified one block at a time."""

from dataclasses import replace
from pathlib import Path

import torch
from exports import exported
from hf_exports import DENSE, ELEMENTWISE, gated
from own_memory import growth, in_fresh_process
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
"""100 M parameters: 0.4 GB in fp32, 101 MB of it in each block."""
SMALL = replace(LARGE, num_layers=1, hidden_size=32)
BLOCK = 101 << 20
WHOLE = 4 * BLOCK


def test_streamed_verification_holds_a_few_blocks(tmp_path: Path) -> None:
    streamed, whole = in_fresh_process(growth_of_both, tmp_path)
    # Of theirs, what is not stacked stays mapped.
    assert whole > 1.5 * WHOLE, f"{whole >> 20} MB: the measure does not see both models"
    # 1.1 blocks; 2.9 where a processor rounds so that a router's near-tie flips and blocks come in fp64, too.
    assert streamed < 4 * BLOCK, f"{streamed >> 20} MB"


def growth_of_both(folder: str) -> tuple[int, int]:
    """Of a verification one block at a time, and of one with both models in memory; that they find the same is checked here, too."""
    verify_export(*exported(Path(folder) / "small", SMALL), memory=1)  # imports take memory, too
    made = exported(Path(folder), LARGE)
    found = []
    streamed = growth(lambda: found.append(verify_export(*made, memory=1)))
    whole = growth(lambda: found.append(verify_export(*made)))
    assert [(one.how, one.flaws) for one in found] == [("streamed", ()), ("whole", ())]
    assert found[0].logits.max_error <= 1e-4 and found[0].logits == found[1].logits
    return streamed, whole


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
