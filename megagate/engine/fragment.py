"""What an optimizer holds of a parameter."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """What this rank's optimizer holds of one parameter: a run of elements of the flattened local shard.

    Args:
        name: The parameter.
        start: First element in the flattened shard.
        flat: The optimizer's tensor that holds the fp32 master; its gradient and moments lie at the same place of like tensors.
        offset: First element in the flattened `flat`.
        size: Elements.
        owned: This rank writes the fragment to checkpoints; other ranks hold copies.
    """

    name: str
    start: int
    flat: Tensor
    offset: int
    size: int
    owned: bool

    def of(self, like: Tensor) -> Tensor:
        """The fragment's part of `flat`, or of its gradient or a moment, as a view [size]."""
        return like.detach().view(-1)[self.offset : self.offset + self.size]

    @property
    def grad(self) -> Tensor:
        """Its gradient, while `flat` has one, as a view [size]."""
        assert self.flat.grad is not None, f"{self.name} has no gradient now"
        return self.of(self.flat.grad)
