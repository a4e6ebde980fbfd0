"""What every layer shares: parameters with a label that says how they are cut and how they begin."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megagate.parallel.mesh import Axis
from megagate.parallel.shard import Shard

Init = Literal["normal", "output", "ones", "zeros"]
"""`output` is the projection that writes to the residual stream, drawn narrower; see `nn/init.py`."""


@dataclass(frozen=True)
class Label:
    """What is known of a parameter beside its values.

    Args:
        shard: This rank's part of the logical tensor.
        init: How its values begin.
        stacked: The first dimension counts experts, each of them a matrix of its own.
    """

    shard: Shard
    init: Init
    stacked: bool = False


class Layer(nn.Module):
    """A module whose parameters carry labels. They are made on the meta device; `nn/init.py` gives them values."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.labels: dict[str, Label] = {}

    def add_weight(
        self, name: str, shape: tuple[int, ...], *, init: Init, axis: Axis | None = None, dim: int = 0, stacked: bool = False
    ) -> None:
        """Add a parameter.

        Args:
            name: Attribute of this module.
            shape: Full shape, the same under every layout.
            init: How its values begin.
            axis: The axis that cuts it; None replicates it.
            dim: Dimension that is cut.
            stacked: The first dimension counts experts.
        """
        shard = Shard.of(shape, axis, dim)
        self.labels[name] = Label(shard, init, stacked)
        self.register_parameter(name, nn.Parameter(torch.empty(shard.shape, dtype=self.dtype, device="meta")))


class Weight(Layer):
    """A named matrix without a forward of its own: several of them ride in one GEMM."""

    weight: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, init: Init = "normal", axis: Axis | None = None, dim: int = 0):
        super().__init__(dtype)
        self.add_weight("weight", shape, init=init, axis=axis, dim=dim)


def named_labels(model: nn.Module) -> dict[str, Label]:
    """The label of every parameter, by the parameter's full name, in the order of `named_parameters`."""
    labels = {
        f"{prefix}.{name}" if prefix else name: label
        for prefix, module in model.named_modules()
        if isinstance(module, Layer)
        for name, label in module.labels.items()
    }
    return {name: labels[name] for name, _ in model.named_parameters()}
