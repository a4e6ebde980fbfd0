"""A backend whose products are rounded to FP8 as Transformer Engine's recipes do it, with another backend's kernels, on any device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from megagate.backend.base import AttentionCore, Backend, Chosen, ColumnLinears, GroupedLinear, Part, Permuted, RowLinear
from megagate.backend.fp8.operand import Delayed, Operand, operands
from megagate.backend.fp8.product import Fp8Product
from megagate.backend.fp8.sites import Fp8Columns, Fp8Grouped, Fp8Row
from megagate.config.model import MoEConfig
from megagate.config.precision_rules import size_multiple
from megagate.config.run import Fp8Config
from megagate.parallel.comm import maximum
from megagate.parallel.mesh import Axis, ParallelMesh


class EmulatedBackend:
    """See `Backend`. Projections and experts are in FP8, all else is the base's.

    Parallel: amaxes of delayed scaling, after each micro-step: one maximum over the world for all dense products, and one over edp for
        all experts. Backward passes carry dp times the gradient (`engine/zero.py`); amaxes and scales are of the gradient itself, so that
        they do not depend on the layout, where micro-steps have the same samples; not so the gradients of k and v where tp ranks are more
        than kv heads, since each rank rounds its own part of the sum. Scales of the other recipes are of what each rank has.

    Args:
        base: Whose kernels do all else.
        config: A recipe other than `none`.
        device: Where scales live.
        mesh: The layout.
    """

    def __init__(self, base: Backend, config: Fp8Config, *, device: torch.device, mesh: ParallelMesh):
        self.base, self.config, self.device, self.mesh = base, config, device, mesh
        self.row_multiple = max(base.row_multiple, size_multiple(config))

    def of_layer(self, index: int, num_layers: int) -> Backend:
        """The base itself for a first or last block that stays in high precision."""
        return self.base.of_layer(index, num_layers) if self.config.keeps_block(index, num_layers) else self

    def column_linears(
        self, width: int, parts: Sequence[Part], *, tp: Axis, eps: float | None = None, gives_normed: bool = True
    ) -> ColumnLinears:
        """Two GEMMs, where some parts stay in high precision."""
        rounded = [self.config.rounds(part.role) for part in parts]
        if not any(rounded):
            return self.base.column_linears(width, parts, tp=tp, eps=eps, gives_normed=gives_normed)
        return Fp8Columns(self._operands(), rounded, tp=tp, world=self.mesh.world)

    def row_linear(self, width: int, rows: int, *, tp: Axis) -> RowLinear:
        """One GEMM."""
        return Fp8Row(self._operands(), tp=tp, world=self.mesh.world)

    def grouped_linear(self, width: int, rows: int, *, num_experts: int, mesh: ParallelMesh) -> GroupedLinear:
        """One grouped GEMM."""
        local = self._operands(num_experts // mesh.ep.size)
        return Fp8Grouped(local, num_experts=num_experts, mesh=mesh, granule=self.row_multiple)

    def attention_core(self, heads: int, kv_heads: int, width: int) -> AttentionCore:
        """The base's."""
        return self.base.attention_core(heads, kv_heads, width)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The base's."""
        return self.base.norm(x, weight, eps)

    def choose(self, logits: Tensor, config: MoEConfig, *, bias: Tensor | None) -> Chosen:
        """The base's."""
        return self.base.choose(logits, config, bias=bias)

    def permute(self, x: Tensor, probs: Tensor, ids: Tensor, *, num_experts: int) -> Permuted:
        """The base's."""
        return self.base.permute(x, probs, ids, num_experts=num_experts)

    def unpermute(self, rows: Tensor, restore: Any) -> Tensor:
        """The base's."""
        return self.base.unpermute(rows, restore)

    def running(self) -> AbstractContextManager[None]:
        """The base's."""
        return self.base.running()

    def recompute(self, function: Callable[..., Any], *args: Any) -> Any:
        """The base's. Scales move in `after_backward` alone, so that the second time gives the numbers of the first."""
        return self.base.recompute(function, *args)

    def after_backward(self, model: nn.Module) -> None:
        """Close the micro-step of delayed scaling: what was recorded, over all ranks, decides the scales of the next."""
        self.base.after_backward(model)
        sites = _delayed(model)
        for axis, of_axis in groupby(sorted(sites, key=_reduced_over), key=_reduced_over):
            states = [state for site in of_axis for state in site.delayed().values()]
            # A NaN is no size: a step with one leaves what the other ranks saw. An infinity goes on, and keeps the scale as it is.
            amax = torch.cat([state.amax for state in states]).nan_to_num(nan=0.0, posinf=torch.inf)
            _close(states, maximum(amax, self.mesh.edp if axis == self.mesh.edp.name else self.mesh.world))

    @contextmanager
    def unrecorded(self, model: nn.Module) -> Iterator[None]:
        """Amaxes that are recorded meanwhile are dropped."""
        states = [state for site in _delayed(model) for state in site.delayed().values()]
        before = [state.amax for state in states]
        try:
            with self.base.unrecorded(model):
                yield
        finally:
            for state, amax in zip(states, before, strict=True):
                state.amax = amax

    def _operands(self, count: int = 1) -> dict[str, Operand]:
        length, unit = self.config.amax_history, self.mesh.dp.size
        return operands(self.config.recipe, count=count, length=length, device=self.device, unit=unit)


def _delayed(model: nn.Module) -> list[Fp8Product]:
    """Products that remember amaxes."""
    return [site for site in model.modules() if isinstance(site, Fp8Product) and site.delayed()]


def _reduced_over(site: Fp8Product) -> str:
    return site.reduced.name


def _close(states: list[Delayed], amax: Tensor) -> None:
    for state, own in zip(states, amax.split([len(state.scale) for state in states]), strict=True):
        state.update(own)
