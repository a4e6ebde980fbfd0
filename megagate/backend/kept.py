"""What sites keep, as a whole."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from megagate.backend.base import KeepsState


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """What the sites of a model keep has its values again afterwards, whatever passes are done meanwhile."""
    live = [kept.tensor for site in model.modules() if isinstance(site, KeepsState) for kept in site.kept_state()]
    before = [tensor.clone() for tensor in live]
    try:
        yield
    finally:
        for tensor, value in zip(live, before, strict=True):
            tensor.copy_(value)
