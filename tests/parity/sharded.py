"""What the tests of sharded == unsharded share: values for a layer under any layout, gradients joined again, comparisons to scale."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megagate.backend.native import NativeBackend
from megagate.nn.base import Label, named_labels
from megagate.nn.routes import SMALLEST_GAP
from megagate.parallel.comm import gather, total
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.shard import Shard
from megagate.verify.routes import watched_routes

CPU = torch.device("cpu")
BACKEND = NativeBackend(CPU)


def random(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on `key` alone: the same in every rank."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def fill(layer: nn.Module, *, key: str = "weights") -> nn.Module:
    """Give a layer values that do not depend on its layout: matrices of about unit gain, norms around 1, small whole numbers."""
    layer.to_empty(device=CPU)
    for (name, parameter), label in zip(layer.named_parameters(), named_labels(layer).values(), strict=True):
        full = random(f"{key}/{name}", *label.shard.full_shape)
        full = full / full.shape[-1] ** 0.5 if full.ndim > 1 else 1 + 0.3 * full
        parameter.data.copy_(label.shard.take(full))
    for name, buffer in layer.named_buffers():
        buffer.copy_((3 * random(f"{key}/{name}", *buffer.shape)).round())
    return layer


def take(full: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of a full tensor, a leaf of its own."""
    return Shard.of(tuple(full.shape), axis, dim).take(full).detach().clone()


def join(local: Tensor, label: Label, mesh: ParallelMesh) -> Tensor:
    """The logical tensor of a parameter."""
    shard = label.shard
    return gather(local.detach(), getattr(mesh, shard.axis), shard.dim) if shard.axis else local.detach().clone()


def full_weights(model: nn.Module, mesh: ParallelMesh) -> dict[str, Tensor]:
    """Every parameter, joined."""
    labels = named_labels(model)
    return {name: join(parameter, labels[name], mesh) for name, parameter in model.named_parameters()}


def full_gradients(model: nn.Module, mesh: ParallelMesh) -> dict[str, Tensor]:
    """Every gradient, joined, and summed over the ranks that saw other tokens with the same parameter, as an engine does."""
    labels = named_labels(model)
    return {
        name: total(join(parameter.grad, labels[name], mesh), mesh.edp if labels[name].shard.axis == "ep" else mesh.dp)
        for name, parameter in model.named_parameters()
    }


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    assert scale > 0, "nothing to compare: all expected values are zero"
    return (actual.double() - expected.double()).abs().max().item() / scale


def assert_close(actual: Tensor, expected: Tensor, *, to: float, what: str = "") -> None:
    """Equal up to `to` times the largest expected value; nan is never equal."""
    worst = difference(actual, expected)
    assert worst <= to, f"{what} differs by {worst:.1e} of its scale, not {to:.0e}"


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, to: float) -> None:
    """`assert_close` for each name; the names are the same."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_close(actual[name], value, to=to, what=name)


@contextmanager
def clear_routes(model: nn.Module) -> Iterator[None]:
    """Asserts that no token that passes through a router of the model inside the context is near a tie."""
    with watched_routes(model) as gaps:
        yield
    assert not gaps or min(gaps) > SMALLEST_GAP, f"near a tie: {min(gaps):.1e}; choose other inputs"
