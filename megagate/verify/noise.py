"""PyTorch's kernels with noise of the size that a recipe's rounding has: what rounding comes to in whole parts of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megagate.backend.base import AttentionCore, ColumnLinears, GroupedLinear, Norm, Part, RowLinear
from megagate.backend.documents import Documents
from megagate.backend.native import NativeBackend
from megagate.config.run import Fp8Config
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.verify.bands import DTYPES, E4M3, OF_GRADIENTS


@dataclass(frozen=True)
class Rule:
    """What of a model is in FP8.

    Args:
        fp8: The recipe, and what is kept out of it.
        index: The block; -1 outside of all.
        blocks: Their number.
    """

    fp8: Fp8Config
    index: int = -1
    blocks: int = 0

    @property
    def block(self) -> bool:
        """Whether this block has products in FP8."""
        return self.fp8.recipe != "none" and not self.fp8.keeps_block(self.index, self.blocks)

    def quantised(self, part: Part) -> bool:
        """Whether this product is in FP8."""
        return self.block and self.fp8.rounds(part.role)


class NoisyBackend(NativeBackend):
    """Every operand is off by independent relative noise, in the forward pass and in gradients.

    Args:
        device: The model's.
        rule: What is in FP8.
        generator: Of the noise.
    """

    def __init__(self, device: torch.device, rule: Rule, generator: torch.Generator):
        super().__init__(device)
        self.device, self.rule, self.generator = device, rule, generator

    def of_layer(self, index: int, num_layers: int) -> "NoisyBackend":
        """Some blocks may stay in high precision."""
        return NoisyBackend(self.device, replace(self.rule, index=index, blocks=num_layers), self.generator)

    def column_linears(self, width: int, parts: Sequence[Part], **how: Any) -> ColumnLinears:
        """The products in FP8 together, and the others."""
        site = super().column_linears(width, parts, **how)
        low = [i for i, part in enumerate(parts) if self.rule.quantised(part)]
        high = [i for i in range(len(parts)) if i not in low]

        def products(x: Tensor, weights: Sequence[Tensor], norm: Norm | None = None) -> tuple[list[Tensor], Tensor]:
            normed, outputs = x if norm is None else norm(x), [None] * len(weights)
            for group, quantised in ((low, True), (high, False)):
                if group:
                    made = site(self._off(normed, quantised), [self._off(weights[i], quantised) for i in group])[0]
                    for i, output in zip(group, made, strict=True):
                        outputs[i] = self._back(output, quantised)
            return outputs, normed

        return products

    def row_linear(self, width: int, rows: int, *, tp: Axis) -> RowLinear:
        """See `Backend`."""
        return self._noisy(super().row_linear(width, rows, tp=tp))

    def grouped_linear(self, width: int, rows: int, *, num_experts: int, mesh: ParallelMesh) -> GroupedLinear:
        """See `Backend`."""
        return self._noisy(super().grouped_linear(width, rows, num_experts=num_experts, mesh=mesh))

    def attention_core(self, heads: int, kv_heads: int, width: int) -> AttentionCore:
        """Never in FP8."""
        site = super().attention_core(heads, kv_heads, width)

        def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
            return self._back(site(*(self._off(t, False) for t in (q, k, v)), documents), False)

        return attend

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Never in FP8."""
        return self._back(self._off(super().norm(x, weight, eps), False), False)

    def _noisy(self, site: Any) -> Any:
        quantised = self.rule.block

        def product(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
            return self._back(site(self._off(x, quantised), self._off(weight, quantised), *others), quantised)

        return product

    def _off(self, x: Tensor, quantised: bool) -> Tensor:
        """x with noise that has no gradient; what multiplies x backwards has it too."""
        own = DTYPES[x.dtype].usual
        return x + (x * self._noise(x, E4M3.usual if quantised else own)).detach()

    def _back(self, output: Tensor, quantised: bool) -> Tensor:
        """The output, whose gradient gets noise on its way back."""
        size = OF_GRADIENTS[self.rule.fp8.recipe].usual if quantised else DTYPES[output.dtype].usual
        if output.requires_grad:
            output.register_hook(lambda grad: grad + grad * self._noise(grad, size))
        return output

    def _noise(self, x: Tensor, size: float) -> Tensor:
        # Drawn in fp32: numbers of one product differ in all bits.
        return (torch.randn(x.shape, generator=self.generator, device=x.device) * size).to(x.dtype)
