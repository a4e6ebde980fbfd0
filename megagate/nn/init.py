"""Initial values, the same for every layout and for gated and ungated models.

Each full parameter is drawn on the CPU from a generator seeded by (seed, name), each expert of a stack by (seed, name, expert), and then
cut: one matrix at a time, so that no rank ever holds more than its part and one full matrix.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from megagate.nn.base import named_labels

CONSTANTS = {"ones": 1.0, "zeros": 0.0}


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
    stds = {"normal": std, "output": std / math.sqrt(2 * num_layers)}
    labels = named_labels(model)
    for name, parameter in model.named_parameters():
        label = labels[name]
        if label.init in CONSTANTS:
            parameter.fill_(CONSTANTS[label.init])
        elif label.stacked:
            for local in range(parameter.shape[0]):
                expert = label.shard.offset[0] + local
                parameter[local].copy_(_draw(label.shard.full_shape[1:], f"{seed}/{name}/{expert}", stds[label.init]))
        else:
            parameter.copy_(label.shard.take(_draw(label.shard.full_shape, f"{seed}/{name}", stds[label.init])))


def _draw(shape: tuple[int, ...], key: str, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
