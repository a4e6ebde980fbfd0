"""Which part of a logical parameter a rank holds."""

from dataclasses import dataclass

from torch import Tensor

from megagate.parallel.mesh import Axis


@dataclass(frozen=True)
class Shard:
    """The label of a parameter: this rank's box of the full tensor.

    Args:
        full_shape: Shape of the logical tensor; the same under every layout.
        dim: Dimension that is cut.
        axis: Name of the mesh axis that cuts it; empty where every rank holds the whole tensor.
        parts: Size of that axis.
        index: This rank's place on it.
    """

    full_shape: tuple[int, ...]
    dim: int = 0
    axis: str = ""
    parts: int = 1
    index: int = 0

    @classmethod
    def of(cls, full_shape: tuple[int, ...], axis: Axis | None = None, dim: int = 0) -> "Shard":
        """The shard of this rank; `axis` None replicates.

        Raises:
            ValueError: The axis does not divide the dimension.
        """
        if axis is None:
            return cls(full_shape)
        if full_shape[dim] % axis.size:
            raise ValueError(f"dimension {dim} of {full_shape} is not a multiple of {axis.name} ({axis.size})")
        return cls(full_shape, dim, axis.name, axis.size, axis.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the local part."""
        return tuple(n // self.parts if i == self.dim else n for i, n in enumerate(self.full_shape))

    @property
    def offset(self) -> tuple[int, ...]:
        """Where the local part begins in the full tensor."""
        return tuple(n // self.parts * self.index if i == self.dim else 0 for i, n in enumerate(self.full_shape))

    def take(self, full: Tensor) -> Tensor:
        """The local part of a full tensor, as a view."""
        return full.narrow(self.dim, self.offset[self.dim], self.shape[self.dim])
