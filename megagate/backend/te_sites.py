"""The sites of Transformer Engine (TE) 2.20.2: TE's modules over weights that the layers own; see `te.py` for what was read and tested
how."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megagate.backend.base import Kept, Norm, Part
from megagate.backend.documents import Documents
from megagate.backend.native import attend, flash_takes
from megagate.parallel.comm import enter, leave
from megagate.parallel.mesh import Axis
from megagate.parallel.shard import Shard


@dataclass(frozen=True)
class Region:
    """In what precision products of a kind are made.

    Args:
        te: `transformer_engine.pytorch`.
        recipe: TE's recipe object; None is high precision.
        group: Over which amaxes of delayed scaling are reduced.
        is_delayed: Whether the recipe is delayed scaling, and modules have state.
        unit: Backward passes carry so many times the gradient.
        inner: Whether it differs from the region around the whole forward pass, and must be entered around each product.
    """

    te: Any
    recipe: Any = None
    group: Any = None
    is_delayed: bool = False
    unit: int = 1
    inner: bool = False

    def entered(self) -> AbstractContextManager[Any]:
        """The region itself (quantization.py:972)."""
        te = self.te
        if self.recipe is None:
            return te.autocast(enabled=False)
        return te.autocast(enabled=True, recipe=self.recipe, amax_reduction_group=self.group)

    def around_product(self) -> AbstractContextManager[Any]:
        """What a product needs inside the region around the whole forward pass."""
        return self.entered() if self.inner else nullcontext()


@contextmanager
def _lent(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Weights in the place of the module's parameters, which need not be leaves; gone afterwards."""
    module._parameters.update(weights)
    try:
        yield
    finally:
        _bare(module)


def _bare(module: nn.Module) -> None:
    for name in module._parameters:
        module._parameters[name] = None


def _leave(_: Tensor) -> None:
    """TE's initialisation of parameters that are thrown away: nothing, and above all no random numbers."""


class _Linear:
    """`te.Linear`, or `te.LayerNormLinear` where an epsilon is given, of concatenated weights (module/linear.py:1908,
    layernorm_linear.py:1207).

    All are quantised as one tensor, since TE concatenates what `parameters_split` names before anything else (linear.py:2396,
    _common.py:213). On the meta device TE does not split (linear.py:2047), so that one buffer of the weights' size exists for a moment.
    Products are TE's default: fp32 accumulation in the backward pass, fast accumulation forward for per-tensor scales."""

    def __init__(self, region: Region, width: int, split: dict[str, int], *, eps: float | None, gives_normed: bool, device: torch.device):
        te = region.te
        self.region, self.names = region, [f"{name}_weight" for name in split]
        rows = sum(split.values())
        if eps is None:
            self.module = te.Linear(width, rows, bias=False, parameters_split=split, init_method=_leave, device=device)
        else:
            self.module = te.LayerNormLinear(
                width,
                rows,
                eps=eps,
                bias=False,
                normalization="RMSNorm",
                return_layernorm_output=gives_normed,
                parameters_split=split,
                init_method=_leave,
                device=device,
            )
        _bare(self.module)

    def __call__(self, x: Tensor, weights: Sequence[Tensor], gain: Tensor | None = None) -> Any:
        """The product [..., rows]; with `gives_normed` a pair of it and the normed x."""
        lent = dict(zip(self.names, weights, strict=True)) | ({} if gain is None else {"layer_norm_weight": gain})
        with self.region.around_product(), _lent(self.module, lent):
            return self.module(x)

    def meta(self) -> dict[str, Any]:
        """TE's state of delayed scaling, made on the first call: TE makes it in the first forward pass, too late for a checkpoint."""
        if not self.module.fp8_initialized:
            with torch.no_grad(), self.region.entered():  # without gradients the region's end updates nothing
                self.module.init_fp8_metadata(num_gemms=1)
            _begin(self.module.fp8_meta, self.region.unit)
        return self.module.fp8_meta


class _Grouped:
    """`te.GroupedLinear` (module/grouped_linear.py:1538): one weight, and one scale, for each expert; splits are known to the host.

    An expert without rows would get zeros and a gradient of zeros (csrc/extensions/gemm.cpp:535), but there is none: the dispatcher keeps a
    block of padding for it.
    """

    def __init__(self, region: Region, width: int, rows: int, *, experts: int, device: torch.device):
        te = region.te
        self.region, self.experts = region, experts
        self.module = te.GroupedLinear(experts, width, rows, bias=False, init_method=_leave, device="meta", use_grouped_tensor=False)
        _bare(self.module)
        for i in range(experts):
            setattr(self.module, f"bias{i}", torch.empty(0, device=device))  # the kernel gets them even without biases

    def __call__(self, x: Tensor, weight: Tensor, splits: Tensor) -> Tensor:
        """The products; splits [e] int64 on the CPU."""
        lent = {f"weight{i}": one for i, one in enumerate(weight.unbind(0))}
        with self.region.around_product(), _lent(self.module, lent):
            return self.module(x, splits)

    def meta(self) -> dict[str, Any]:
        """As `_Linear.meta`."""
        if not self.module.fp8_initialized:
            with torch.no_grad(), self.region.entered():
                self.module.init_fp8_metadata(num_gemms=self.experts)
            _begin(self.module.fp8_meta, self.region.unit)
        return self.module.fp8_meta


TENSORS = {"scaling_fwd": (3, ("input", "weight")), "scaling_bwd": (2, ("grad",))}
"""Of each product, in TE's order: tensors with a place in the histories, and those of them in use (module/linear.py:2519)."""


def _begin(meta: dict[str, Any], unit: int) -> None:
    """First scales: 1 for the gradient itself, whatever a backward pass carries of it, so that they do not depend on the layout."""
    meta["scaling_bwd"].scale.fill_(1 / unit)


def _kept(meta: dict[str, Any], *, unit: int, ep: Axis | None, num_experts: int = 1) -> list[Kept]:
    """Histories and scales as views of TE's own tensors (quantization.py:1397), [length, products * tensors] and [products * tensors].

    A history begins with the place of the running micro-step, 0 between them, and goes on from the oldest to the newest amax. Backward
    passes carry `unit` times the gradient, and so do its amaxes; checkpoints hold those of the gradient itself.
    """
    kept = []
    for key, (places, names) in TENSORS.items():
        history, scale = meta[key].amax_history, meta[key].scale
        for place, name in enumerate(names):
            of_history = history.view(len(history), -1, places)[:, :, place].t()  # [products, length]
            of_scale = scale.view(-1, places)[:, place]
            if ep is None:
                parts = {"history": (of_history[0], (len(history),)), "scale": (of_scale, (1,))}
            else:
                parts = {"history": (of_history, (num_experts, len(history))), "scale": (of_scale, (num_experts,))}
            times = unit if name == "grad" else 1
            units = {"history": times, "scale": 1 / times}
            kept += [Kept(f"{name}.{kind}", tensor, Shard.of(shape, ep), units[kind]) for kind, (tensor, shape) in parts.items()]
    return kept


class _Site(nn.Module):
    """What has a name in the model, may have state, and registers nothing: neither parameters nor modules of TE's."""

    amaxes: list[Tensor]

    def _keep(self, meta: dict[str, Any] | None, *, unit: int, ep: Axis | None = None, num_experts: int = 1) -> None:
        self._kept = [] if meta is None else _kept(meta, unit=unit, ep=ep, num_experts=num_experts)
        # Where a forward pass leaves its amaxes until they are reduced.
        self.amaxes = [] if meta is None else [meta["scaling_fwd"].amax_history[0]]

    def kept_state(self) -> list[Kept]:
        """See `KeepsState`; nothing but for delayed scaling."""
        return self._kept


class Columns(_Site):
    """See `ColumnLinears`: one product of TE's, and one of PyTorch's for the parts that stay out of FP8."""

    def __init__(
        self,
        region: Region,
        width: int,
        parts: Sequence[Part],
        *,
        stays: Sequence[bool],
        tp: Axis,
        eps: float | None,
        gives_normed: bool,
        device: torch.device,
    ):
        super().__init__()
        self.tp, self.stays, self.fused = tp, tuple(stays), eps is not None
        self.gives_normed = gives_normed or any(stays)
        split = {part.name: part.rows for part, out in zip(parts, stays, strict=True) if not out}
        self.rows = tuple(split.values())
        self.linear = _Linear(region, width, split, eps=eps, gives_normed=self.gives_normed, device=device)
        self._keep(self.linear.meta() if region.is_delayed else None, unit=region.unit)

    def forward(self, x: Tensor, weights: Sequence[Tensor], norm: Norm | None = None) -> tuple[list[Tensor], Tensor]:
        """The products and the normed x; where nobody reads that, it is empty."""
        inside = [weight for weight, out in zip(weights, self.stays, strict=True) if not out]
        outside = [weight for weight, out in zip(weights, self.stays, strict=True) if out]
        if self.fused:
            assert norm is not None, "a site that norms is called without a norm"
            out = self.linear(x, inside, norm.weight)
            out, normed = out if self.gives_normed else (out, x.new_empty(0))
            whole = normed  # tp is 1
        else:
            normed = x if norm is None else norm(x)
            whole = enter(normed, self.tp, dim=1)
            out = self.linear(whole, inside)
        made = iter(out.split(self.rows, dim=-1))
        if outside:
            others = iter(F.linear(whole, torch.cat(outside)).split([len(weight) for weight in outside], dim=-1))
        return [next(others) if out else next(made) for out in self.stays], normed


class Row(_Site):
    """See `RowLinear`."""

    def __init__(self, region: Region, width: int, rows: int, *, tp: Axis, device: torch.device):
        super().__init__()
        self.tp = tp
        self.linear = _Linear(region, width, {"out": rows}, eps=None, gives_normed=False, device=device)
        self._keep(self.linear.meta() if region.is_delayed else None, unit=region.unit)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The partial product, summed over tp."""
        return leave(self.linear(x, [weight]), self.tp, dim=1)


class Splits:
    """Rows of each expert as the host knows them; the two products of a layer wait for the device once.

    The dispatcher has waited shortly before, and brings all but these home: its copy would have to go through every `GroupedLinear`, of
    which TE's alone reads it.
    """

    def __init__(self) -> None:
        self.of: weakref.ref[Tensor] | None = None
        self.rows = torch.empty(0, dtype=torch.int64)

    def __call__(self, ends: Tensor) -> Tensor:
        """[e] int64 on the CPU, from [e] where each expert's rows end."""
        if self.of is None or self.of() is not ends:
            last = ends.to("cpu", torch.int64)
            self.of, self.rows = weakref.ref(ends), last.diff(prepend=last.new_zeros(1))
        return self.rows


class Experts(_Site):
    """See `GroupedLinear`."""

    def __init__(self, region: Region, width: int, rows: int, *, num_experts: int, ep: Axis, splits: Splits, device: torch.device):
        super().__init__()
        self.splits = splits
        self.grouped = _Grouped(region, width, rows, experts=num_experts // ep.size, device=device)
        self._keep(self.grouped.meta() if region.is_delayed else None, unit=region.unit, ep=ep, num_experts=num_experts)

    def forward(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """The products."""
        return self.grouped(x, weight, self.splits(ends))


class Attention:
    """See `AttentionCore`: `te.DotProductAttention` (attention/dot_product_attention/dot_product_attention.py:594), outside of FP8.

    It is left out where flash attention does not take the heads (fp32, odd widths): over documents TE's own, in PyTorch, would pad each of
    them to the length of a row and hold all scores of all of them.
    """

    def __init__(self, te: Any, heads: int, kv_heads: int, width: int):
        self.te = te
        self.width = width
        self.module = te.DotProductAttention(heads, width, num_gqa_groups=kv_heads, qkv_format="bshd", attn_mask_type="causal")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """softmax(q k^T / sqrt(d)) v."""
        if not flash_takes(q.dtype, self.width):
            return attend(q, k, v, documents)
        te = self.te
        with te.autocast(enabled=False):
            if documents is None:
                return self.module(q, k, v).reshape(q.shape)
            flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))  # [b*s, heads, d]
            borders, longest = documents.cu_seqlens, q.shape[1]  # no document is longer than a row: nothing to wait for
            out = self.module(
                flat_q,
                flat_k,
                flat_v,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                cu_seqlens_q=borders,
                cu_seqlens_kv=borders,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
                pad_between_seqs=False,
            )
            return out.reshape(q.shape)
