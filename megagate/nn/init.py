"""Initial values, the same for every layout and for gated and ungated models.

Each full parameter is drawn on the CPU from a generator seeded by (seed, name), each expert of a stack by (seed, name, expert), and then
cut: one matrix at a time, so that no rank ever holds more than its part and one full matrix.

Numbers are drawn along the width inside a block: row by row where a matrix reads the residual stream, column by column (`output`) where it
writes to it. A narrower dense feed-forward, or fewer heads, therefore begin as the leading part of wider ones (not
experts: their gate and up rows lie in one matrix).
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from megagate.nn.base import Label, named_labels

CONSTANTS = {"ones": 1.0, "zeros": 0.0}
DRAWN_TOGETHER = 16


@torch.no_grad()
def initialize(model: nn.Module, *, seed: int, std: float, num_layers: int, device: torch.device) -> None:
    """Move a model from the meta device to `device` and give its parameters their values.

    Args:
        model: Made of `Layer`s.
        seed: Of the run.
        std: Standard deviation of `normal` weights; `output` weights have std / sqrt(2 num_layers) (GPT-2's rule).
        num_layers: Blocks of the model.
        device: Where the parameters live.
    """
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    stds = {"normal": std, "output": std / math.sqrt(2 * num_layers)}
    labels = named_labels(model)
    for name, parameter in model.named_parameters():
        label = labels[name]
        if label.init in CONSTANTS:
            parameter.fill_(CONSTANTS[label.init])
        elif label.stacked:
            for local in range(parameter.shape[0]):
                expert = label.shard.offset[0] + local
                parameter[local].copy_(_draw(label, label.shard.full_shape[1:], f"{seed}/{name}/{expert}", stds[label.init]))
        else:
            parameter.copy_(label.shard.take(_draw(label, label.shard.full_shape, f"{seed}/{name}", stds[label.init])))


def _draw(label: Label, shape: tuple[int, ...], key: str, std: float) -> Tensor:
    """A matrix; the leading part of a wider one with the same key."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    # PyTorch draws by 16 and a rest otherwise; without a rest, fewer numbers are the first of more.
    size = math.prod(shape)
    numbers = torch.empty(-(-size // DRAWN_TOGETHER) * DRAWN_TOGETHER).normal_(0.0, std, generator=generator)[:size]
    return numbers.view(shape[::-1]).t() if label.init == "output" else numbers.view(shape)
