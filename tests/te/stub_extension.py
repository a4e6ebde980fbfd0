"""A stand-in for `transformer_engine_torch`, the compiled half of Transformer Engine 2.20.2: names, and the few kernels that layers reach.

TE's Python layer is real where it is installed (`shim.py`); what stands here is ours. Results made with it say how that layer and our
backend plug together, nothing of TE's kernels. A kernel that is not here raises when it is called, and says its name.

Products of bf16 are PyTorch's; operands in FP8 are dequantised to fp32, multiplied there and cast once. FP8 is of per-tensor scaling alone
(delayed, current), with the transpose as columnwise data, as on Hopper.
"""

import enum
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAME = "transformer_engine_torch"

# Values are those of the C++ headers where the Python layer looks at them (DType); elsewhere the order is all that matters.
ENUMS: dict[str, dict[str, int] | str] = {
    "DType": {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10},
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    "NVTEScalingMode": "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D "
    "NVTE_NVFP4_1D_SCALING",
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK NVTE_CAUSAL_BOTTOM_RIGHT_MASK "
    "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8",
    "NVTE_QKV_Format": "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD NVTE_THD_2SBHD NVTE_BHSD "
    "NVTE_QKV_Format_NOT_SET",
    "NVTE_QKV_Layout": "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD NVTE_BSH3D NVTE_BSHD_BS2HD "
    "NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD "
    "NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD "
    "NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD "
    "NVTE_QKV_Layout_NOT_SET",
    "NVTERoutingMapFormat": "BYTEMAP BITMAP_U8",
    "NVTEQBHistogramMode": "TWO_KERNEL FUSED_ATOMIC",
    "CommOverlapType": "RS AG",
}
FP8_DTYPES = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}
TORCH_DTYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}
CUBLASLT_VERSION = 130600
"""Recent enough for every path that TE may choose on Hopper, so that what must not be chosen shows."""


def build() -> ModuleType:
    """The module, ready for `sys.modules`."""
    module = ModuleType(NAME, __doc__)
    for name, members in ENUMS.items():
        pairs = members if isinstance(members, dict) else {member: value for value, member in enumerate(members.split())}
        setattr(module, name, enum.IntEnum(name, pairs))
    for function in KERNELS:
        setattr(module, function.__name__, function)
    module.__getattr__ = _absent  # modules look names up that they do not have by this function
    # TE imports all names, by a star; two of them are looked up in what that brought, and never called.
    module.__all__ = [*ENUMS, *(function.__name__ for function in KERNELS), "layernorm_fwd", "layernorm_bwd"]
    return module


def _absent(name: str) -> Any:
    """A name of the real extension that no test needs: a class to name in annotations, or a kernel that refuses to be called."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (), {})

    def kernel(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"{NAME}.{name} is not in the stand-in of tests/te/stub_extension.py; add what it computes there")

    return kernel


# ---- products


def generic_gemm(a, trans_a, b, trans_b, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, *rest, **kwargs):
    """op(B) @ op(A): cuBLAS is column-major, so that the second operand of TE's call is the left one.

    Shapes: `TN`: A weight [n, k], B x [.., k] -> [.., n]. `NN`: A weight [n, k], B dy [.., n] -> [.., k]. `NT`: A x [.., k],
        B dy [.., n] -> [n, k].

    Returns:
        tuple: The product, the bias's gradient, GeLU's input and the extra output, of which the stand-in has the first alone.
    """
    _workspace, _size, accumulates, _split_accumulator = rest
    refused = {"an output quantizer": quantizer, "a bias": bias, "gelu": gelu, "overlap": kwargs["comm_overlap"], "adding": accumulates}
    for what, value in refused.items():
        if value:
            raise NotImplementedError(f"{NAME}.generic_gemm stands in for products without {what}")
    dtype = _torch_dtype(out_dtype) or (b.dtype if isinstance(b, Tensor) else None) or b._dtype
    result = _product(a, trans_a, b, trans_b, dtype)
    return (result if out is None else out.copy_(result)), None, None, kwargs["extra_output"]


def te_general_grouped_gemm(a, trans_a, b, trans_b, out, out_dtype, m_splits, bias, bias_dtype, single_output, gelu_in, grad, *_):
    """A `generic_gemm` for each expert, into `out`: a list, or with `single_output` the rows of one tensor. No rows give zeros."""
    outputs = list(out[0].split(m_splits)) if single_output else out
    for left, right, target in zip(a, b, outputs, strict=True):
        target.copy_(_product(left, trans_a, right, trans_b, target.dtype))
    return bias


def _product(a: Any, trans_a: bool, b: Any, trans_b: bool, dtype: torch.dtype) -> Tensor:
    if _is_quantized(a) or _is_quantized(b):
        a, b = (t.dequantize(dtype=torch.float32) if _is_quantized(t) else t.float() for t in (a, b))
    a = a.flatten(0, -2)
    if trans_b:
        return (b.flatten(0, -2).t() @ a).to(dtype)
    return torch.nn.functional.linear(b, a if trans_a else a.t()).to(dtype)


def _is_quantized(tensor: Any) -> bool:
    return type(tensor) not in (Tensor, torch.nn.Parameter)


# ---- norms


def rmsnorm_fwd(x, weight, eps, ln_out, quantizer, out_dtype, sm_margin, zero_centered_gamma):
    """(normed, None, 1 / rms [rows] fp32): statistics and product in fp32, one cast.

    Delayed scaling casts the product itself to FP8, all others what is left of it in `out_dtype`.
    Source: csrc/extensions/normalization.cpp, rmsnorm_fwd (`FULLY_FUSED`); common/normalization/rmsnorm/rmsnorm_fwd_kernels.cuh.
    """
    wide = x.float()
    scale = (wide.square().mean(-1) + eps).rsqrt()
    product = wide * scale[:, None] * _gain(weight, zero_centered_gamma)
    out = product.to(_torch_dtype(out_dtype))
    if type(quantizer).__name__ == "Float8Quantizer":
        return _quantize(product, quantizer, out.dtype), None, scale
    if quantizer is not None and type(quantizer).__name__ != "IdentityQuantizer":
        return quantizer(out), None, scale
    return (out if ln_out is None else ln_out.copy_(out)), None, scale


def rmsnorm_bwd(grad, x, scale, weight, sm_margin, zero_centered_gamma):
    """(grad of x, grad of weight [h])."""
    normed, grad = x.float() * scale[:, None], grad.float()
    product, gain = grad * normed, _gain(weight, zero_centered_gamma)
    along = (product @ gain)[:, None] / x.shape[-1]
    grad_x = ((grad * gain) - normed * along) * scale[:, None]
    return grad_x.to(x.dtype), product.sum(0).to(weight.dtype)


def _gain(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


# ---- FP8 of one scale per tensor


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """The tensor in FP8, with a transposed copy where the quantizer has columnwise usage.

    Delayed: times the quantizer's scale; its amax becomes the larger of what it was and that of the tensor. Current: times 448 (or 57344)
    over the tensor's amax.
    """
    if output is not None or noop is not None:
        raise NotImplementedError(f"{NAME}.quantize stands in for quantisation into new tensors")
    return _quantize(tensor, quantizer, tensor.dtype)


def _quantize(tensor: Tensor, quantizer: Any, dtype_before: torch.dtype) -> Any:
    """`dtype_before` is what the tensor passes for."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    dtype = FP8_DTYPES[int(quantizer.dtype)]
    amax = tensor.float().abs().amax() if tensor.numel() else torch.zeros(())
    if type(quantizer).__name__ == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale.reshape(1)
    elif type(quantizer).__name__ == "Float8CurrentScalingQuantizer":
        scale = _current_scale(amax, dtype, quantizer)
    else:
        raise NotImplementedError(f"{NAME}.quantize stands in for scaling per tensor, not for {type(quantizer).__name__}")
    largest = torch.finfo(dtype).max
    data = (tensor.float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    parts = {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None,
        "fp8_scale_inv": scale.reciprocal().clone(),
        "fp8_dtype": quantizer.dtype,
        "fake_dtype": dtype_before,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**parts)
    parts["dtype"] = parts.pop("fake_dtype")
    return Float8Tensor(shape=tensor.shape, device=tensor.device, **parts)


def split_quantize(tensor: Tensor, splits: Sequence[int], quantizers: Sequence[Any], *, disable_bulk_allocation: bool = False) -> list[Any]:
    """`quantize` of each group of rows by its own quantizer."""
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(splits), quantizers, strict=True)]


def fused_amax_and_scale_update_after_reduction(amaxes, histories, scales, algorithm, dtype, margin):
    """The end of a micro-step of delayed scaling, in place; `amaxes` are those of all histories, one after the other.

    Where an amax is 0 its history's first place stands for it, and where that is 0 too, history and scale stay as they are. Else the
    history is rolled and its largest value, NaN looked past, gives the scale unless it is infinite: a quotient, fp32's largest at most.
    Source: common/recipe/delayed_scaling.cu, kernel_bulk.
    """
    if algorithm != "max":
        raise NotImplementedError(f"{NAME}.fused_amax_and_scale_update_after_reduction stands in for the algorithm max")
    largest = torch.tensor(torch.finfo(FP8_DTYPES[int(dtype)]).max * 2.0**-margin)
    for history, scale, reduced in zip(histories, scales, amaxes.split([len(scale) for scale in scales]), strict=True):
        last = torch.where(reduced != 0, reduced, history[0])
        rolled = torch.cat([history[1:], last[None]])
        high, moves = rolled.nan_to_num(nan=0.0, posinf=torch.inf).amax(0), last != 0
        new = torch.div(largest, high).clamp(max=torch.finfo(torch.float32).max)
        scale.copy_(torch.where(moves & high.isfinite() & (high > 0), new, scale))
        rolled[0] = 0.0
        history.copy_(torch.where(moves, rolled, history))


def fp8_transpose(data: Tensor, _dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """[.., k] -> [k, ..]."""
    return data.movedim(-1, 0).contiguous()


def _current_scale(amax: Tensor, dtype: torch.dtype, quantizer: Any) -> Tensor:
    if quantizer.with_amax_reduction or quantizer.force_pow_2_scales or quantizer.amax_epsilon:
        raise NotImplementedError(f"{NAME}.quantize stands in for current scaling by TE's defaults")
    scale = torch.div(torch.tensor(torch.finfo(dtype).max), amax)  # `/` of a number by a tensor multiplies by a reciprocal
    usable = torch.isfinite(amax) & (amax > 0)
    return torch.where(usable, scale.clamp(max=torch.finfo(torch.float32).max), torch.ones(())).reshape(1)


def _torch_dtype(dtype: Any) -> torch.dtype | None:
    return None if dtype is None else TORCH_DTYPES[int(dtype)]


# ---- the router


def fused_topk_with_score_function_fwd(logits, topk, pre, groups, group_topk, factor, score, bias, map_format, indices):
    """(weights of the chosen experts, else 0 [T, E]; who is chosen [T, E] bool; what the backward pass needs, here the logits).

    Where `indices` [T, k] are given, the chosen experts are written there.
    """
    if groups or group_topk or map_format:
        raise NotImplementedError(f"{NAME}.fused_topk_with_score_function_fwd stands in for plain top-k with a map of bytes")
    wide = logits.float()
    ranked = wide if score == "softmax" else wide.sigmoid() + (0 if bias is None else bias)
    ids = ranked.topk(topk, dim=-1).indices
    if indices is not None:
        indices.copy_(ids)
    chosen = _map(ids, wide)
    return _weights(wide, chosen, pre, score, factor).to(logits.dtype), chosen, logits


def fused_topk_with_score_function_bwd(chosen, logits, grad, grad_logits, topk, pre, factor, score, dense, map_format):
    """Writes the gradient of the logits; `chosen` is the map, or with `dense` the indices."""
    with torch.enable_grad():
        wide = logits.detach().float().requires_grad_()
        weights = _weights(wide, _map(chosen, wide) if dense else chosen, pre, score, factor)
    grad_logits.copy_(torch.autograd.grad(weights, wide, grad.float())[0])


def fused_score_for_moe_aux_loss_fwd(*, logits, topk, score_function, routing_map_format):
    """(scores of all experts as shares of 1 [T, E] fp32; who is chosen; what the backward pass needs, here the logits)."""
    wide = logits.float()
    return _shares(wide, score_function), _map(wide.topk(topk, dim=-1).indices, wide), logits


def fused_score_for_moe_aux_loss_bwd(*, intermediate_output, grad_scores, grad_logits, topk, score_function):
    """Writes the gradient of the logits."""
    with torch.enable_grad():
        wide = intermediate_output.detach().float().requires_grad_()
        shares = _shares(wide, score_function)
    grad_logits.copy_(torch.autograd.grad(shares, wide, grad_scores)[0])


def _map(ids: Tensor, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, ids.long(), True)


def _weights(logits: Tensor, chosen: Tensor, pre: bool, score: str, scaling_factor: float | None) -> Tensor:
    if score == "softmax":
        weights = logits.softmax(-1) * chosen if pre else logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    else:
        scores = logits.sigmoid() * chosen
        weights = scores / (scores.sum(-1, keepdim=True) + 1e-20) if int(chosen[0].sum()) > 1 else scores
    return weights * (scaling_factor or 1.0)


def _shares(logits: Tensor, score: str) -> Tensor:
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid() / (logits.sigmoid().sum(-1, keepdim=True) + 1e-20)


# ---- the rest that the layers reach


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    """Documents one after the other [t, heads, d] -> each a row [batch, longest, heads, d], zeros behind."""
    out = tensor.new_zeros(batch, int(longest), *tensor.shape[1:])
    borders = cu_seqlens.tolist()
    for row, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        out[row, : end - start] = tensor[start:end]
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The inverse."""
    borders = cu_seqlens.tolist()
    return torch.cat([tensor[row, : end - start] for row, (start, end) in enumerate(zip(borders, borders[1:], strict=False))])


def get_fused_attn_backend(*_args: Any, **_kwargs: Any) -> Any:
    """None of cuDNN's, and why: TE falls back to its own attention in PyTorch."""
    return 0, "a stand-in"


def get_cublasLt_version() -> int:  # noqa: N802 - its name
    """As cublasLtGetVersion."""
    return CUBLASLT_VERSION


def get_cudnn_version() -> int:
    """As cudnnGetVersion: 9.10.2."""
    return 91002


def get_num_cublas_streams() -> int:
    """Of grouped products."""
    return 4


KERNELS: tuple[Callable[..., Any], ...] = (
    generic_gemm,
    te_general_grouped_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    quantize,
    split_quantize,
    fused_amax_and_scale_update_after_reduction,
    fp8_transpose,
    fused_topk_with_score_function_fwd,
    fused_topk_with_score_function_bwd,
    fused_score_for_moe_aux_loss_fwd,
    fused_score_for_moe_aux_loss_bwd,
    convert_thd_to_bshd,
    convert_bshd_to_thd,
    get_fused_attn_backend,
    get_cublasLt_version,
    get_cudnn_version,
    get_num_cublas_streams,
)
