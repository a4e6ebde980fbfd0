"""A product whose three GEMMs take FP8."""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from megagate.backend.base import Kept
from megagate.backend.fp8.extent import Extent, Grouped, Stacked, Whole
from megagate.backend.fp8.operand import Delayed, Operand
from megagate.backend.fp8.quantize import Quantized
from megagate.parallel.mesh import Axis
from megagate.parallel.shard import Shard


class Fp8Product(nn.Module):
    """x w^T with x, w and the gradient rounded to FP8; weights stay the layers', and the gradients that come out are not rounded.

    Formula: with Q for rounding along the dimension that a GEMM sums over (for per-tensor scales there is but one), y = Q(x) Q(w)^T,
        dx = Q(dy) Q(w), dw = Q(dy)^T Q(x). GEMMs are of the numbers that the bytes stand for, in fp32, and rounded once: y and dx to the
        dtype of x, dw to that of w.

    Kept for the backward pass: the bytes of x and w, and their scales.

    Args:
        operands: By name: input, weight, grad.
        reduced: The axis over which amaxes of delayed scaling are the same tensor's.
        experts: Of all ranks and cut over which axis, where there is a product for each.
    """

    def __init__(self, operands: dict[str, Operand], *, reduced: Axis, experts: tuple[int, Axis] | None = None):
        super().__init__()
        self.operands, self.reduced, self.experts = operands, reduced, experts

    def multiply(self, x: Tensor, weight: Tensor, grouped: Grouped | None = None) -> Tensor:
        """Shapes: x [..., k], weight [n, k] -> [..., n]; with experts x [rows, k], weight [e, n, k] -> [rows, n]."""
        records = torch.is_grad_enabled()
        out = _Product.apply(x.flatten(0, -2), weight, self.operands, grouped, records)
        return out.view(*x.shape[:-1], out.shape[-1])

    def delayed(self) -> dict[str, Delayed]:
        """Operands that remember, by name."""
        return {name: operand for name, operand in self.operands.items() if isinstance(operand, Delayed)}

    def kept_state(self) -> list[Kept]:
        """History and scale of each operand: [length] and [1], or [experts, length] and [experts] cut over ep."""
        kept = []
        for name, operand in self.delayed().items():
            for what, tensor in (("history", operand.history), ("scale", operand.scale)):
                if self.experts is not None:
                    shard = Shard.of((self.experts[0], *tensor.shape[1:]), self.experts[1])
                else:
                    tensor = tensor.view(-1)
                    shard = Shard.of(tuple(tensor.shape))
                kept.append(Kept(f"{name}.{what}", tensor, shard))
        return kept


class _Product(Function):
    @staticmethod
    def forward(ctx, x, weight, operands, grouped, records):
        rows, stack = (Whole(), Whole()) if grouped is None else (grouped, Stacked())
        x_along, x_down = operands["input"](x, rows, columns=records, record=records)
        w_along, w_down = operands["weight"](weight, stack, columns=records, record=records)
        if records:
            # What stands still in the backward pass: dw sums over rows of x, dx over rows of w.
            ctx.save_for_backward(x_down.data, x_down.inverse, w_down.data, w_down.inverse)
            ctx.tiles, ctx.dtypes = (x_down.tile, w_down.tile), (x.dtype, weight.dtype)
            ctx.operand, ctx.rows, ctx.ends = operands["grad"], rows, None if grouped is None else grouped.ends
        ends = None if grouped is None else grouped.ends
        return _gemm(x_along.dequantize(), w_along.dequantize().mT, ends).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x_data, x_inverse, w_data, w_inverse = ctx.saved_tensors
        along, down = _gradient(ctx.operand, grad, ctx.rows)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight = Quantized(w_data, w_inverse, ctx.tiles[1])
            grad_x = _gemm(along.dequantize(), weight.dequantize(), ctx.ends).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            x = Quantized(x_data, x_inverse, ctx.tiles[0])
            grad_weight = _gemm(down.dequantize().mT, x.dequantize(), ctx.ends).to(ctx.dtypes[1])
        return grad_x, grad_weight, None, None, None


def _gradient(operand: Operand, grad: Tensor, rows: Extent) -> tuple[Quantized, Quantized]:
    along, down = operand(grad.contiguous(), rows, columns=True, record=True)
    assert down is not None, "both ways were asked for"
    return along, down


def _gemm(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """a b, of each expert where there are `ends`: of rows of a, or, where both are matrices, of the dimension summed over."""
    return a @ b if ends is None else F.grouped_mm(a, b, offs=ends)
