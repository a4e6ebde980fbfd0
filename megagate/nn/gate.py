"""The attention gate: one class, every variant a value of `GateConfig`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from megagate.config.model import GateActivation, GateCombine, ModelConfig
from megagate.nn.base import Layer
from megagate.nn.heads import local_heads
from megagate.parallel.comm import enter, leave
from megagate.parallel.mesh import Axis

ACTIVATIONS: Mapping[GateActivation, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "identity": lambda logits: logits,
        "ns_sigmoid": lambda logits: 0.5 + 0.5 * torch.sigmoid(logits),
    }
)
"""Of fp32 logits, or, where the gate's score is `self`, of what is gated, which may be normed too (`rmsnorm`)."""
COMBINES: Mapping[GateCombine, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({"multiply": torch.mul, "add": torch.add})


class AttentionGate(Layer):
    """Y' = Y * act(S) or Y + act(S), see `GateConfig`; S = X W rides in the GEMM of q, k and v, but for G5.

    Shapes: y [b, s, heads/tp, d]; logits [b, s, heads/tp * d] (elementwise) or [b, s, heads/tp] (headwise) -> like y. At G5 y and the
        logits are [b, s/tp, h].
    Parallel: the weight is cut over tp by the heads it belongs to: query heads at G1 and G4, key/value heads at G2 and G3 (with more tp
        ranks than those, replicated like k and v, its gradient summed over tp). At G5 it is replicated, its gradient summed over tp.
        Head-shared scores are averaged over tp: an all-reduce of [b, s, 1, d] forward and backward. No other collective of its own.
    Source: arXiv 2505.06708, equation 5 and section 2.2.
    """

    weight: Tensor

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype, tp: Axis, kv_axis: Axis | None):
        super().__init__(dtype)
        self.config, self.tp, self.norm_eps = model.attention.gate, tp, model.norm_eps
        self.heads, self.width = model.gate_scores
        of_heads = kv_axis if self.config.of_kv_heads else tp
        self.axis = None if self.config.position == "G5" else of_heads
        if model.gate_shape:
            init = "normal" if self.config.score == "input" else "zeros"
            self.add_weight("weight", model.gate_shape, init=init, axis=self.axis)

    @property
    def rides(self) -> bool:
        """Whether the logits come with q, k and v, from `local_weight`."""
        return self.config.score == "input" and self.config.position != "G5"

    def local_weight(self) -> Tensor:
        """The weight of this rank's heads."""
        return local_heads(self.weight, self.heads, cut=self.axis, tp=self.tp)

    def forward(self, y: Tensor, logits: Tensor | None = None) -> Tensor:
        """Gate y. `logits`: what rode with q, k and v; None where the score needs no input."""
        config = self.config
        if config.score == "constant":
            return y * config.constant
        if config.score == "self":
            return self._of_itself(y.float()).to(y.dtype)
        if config.activation == "sigmoid" and config.combine == "multiply" and config.score == "input" and not config.head_shared:
            return sigmoid_gate(y, self._shaped(y, logits))
        return COMBINES[config.combine](y, self.scores(y, logits)).to(y.dtype)

    def scores(self, y: Tensor, logits: Tensor | None = None) -> Tensor:
        """act(S) in fp32, what y is multiplied with or what is added to it; not of a gate that scores nothing (`constant`, `self`).

        Shapes: as forward -> [b, s, heads/tp, d or 1]; heads is 1 where they are shared; a parameter's are [heads/tp, d or 1]; at G5
            [b, s/tp, h].
        """
        scores = ACTIVATIONS[self.config.activation](self._shaped(y, logits).float())
        return self._over_heads(scores) if self.config.head_shared else scores

    def gate_output(self, y: Tensor, x: Tensor) -> Tensor:
        """G5: gate the output projection's result by the block's normed input, both [b, s/tp, h]."""
        return self(y, F.linear(x, self.local_weight()) if self.config.score == "input" else None)

    def _shaped(self, y: Tensor, logits: Tensor | None) -> Tensor:
        """The logits as they meet y."""
        if self.config.score == "parameter":
            return self.local_weight()  # [heads/tp, d or 1]
        return logits if self.config.position == "G5" else logits.view(*y.shape[:-1], -1)

    def _of_itself(self, y: Tensor) -> Tensor:
        if self.config.activation == "rmsnorm":
            return F.rms_norm(y, y.shape[-1:], eps=self.norm_eps)
        return ACTIVATIONS[self.config.activation](y)

    def _over_heads(self, scores: Tensor) -> Tensor:
        """The mean over all heads, [b, s, 1, d]. A key/value head on several ranks counts on each of them, and all heads so alike."""
        mean = scores.mean(-2, keepdim=True) / self.tp.size
        return enter(leave(mean, self.tp), self.tp)


def sigmoid_gate(y: Tensor, logits: Tensor) -> Tensor:
    """y * sigmoid(logits) in fp32, keeping nothing else for the backward pass. Shapes: y [..., d], logits [..., d] or [..., 1]."""
    return _Gate.apply(y, logits)


class _Gate(Function):
    """y * sigmoid(logits), keeping only its two inputs for the backward pass.

    Formula: with the gradient g and the score s, the gradients are g s, and the sum of g s y over a score's channels, times 1 - s: one
        product serves both, and at headwise the factor meets one number per head. All in fp32, rounded once; in place, since a product of
        bf16 and fp32 would first copy the one to fp32 and then make a second such tensor.
    """

    @staticmethod
    def forward(ctx, y, logits):
        ctx.save_for_backward(y, logits)
        return _wide(y).mul_(logits.float().sigmoid()).to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, logits = ctx.saved_tensors
        score = logits.float().sigmoid()
        product = _wide(grad).mul_(score)
        grad_y = product.to(y.dtype, copy=True)
        slope = product.mul_(y)
        if logits.shape[-1] == 1:
            slope = slope.sum(-1, keepdim=True)
        return grad_y, slope.mul_(1 - score).to(logits.dtype)


def _wide(x: Tensor) -> Tensor:
    """An fp32 copy, to be changed in place."""
    return x.to(torch.float32, copy=True)
