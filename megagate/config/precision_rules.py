"""The rules of FP8 that a config keeps or not, whatever machine it runs on. What the machine must have: `hardware.py`."""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from megagate.config.run import Fp8Config, Fp8Part, PrecisionConfig, RunConfig

SIZE_MULTIPLE, MX_SIZE_MULTIPLE = 16, 32
"""What every dimension of an FP8 product must be a multiple of, rows, columns and tokens alike: backward, each becomes the one that is
summed over, and cuBLAS takes FP8 rows of whole 16 bytes. MXFP8 has blocks of 32 in both directions. Blocks of 128 may be cut short.
Source: Transformer Engine: `utils.assert_dim_for_fp8_exec`, the checks of `lda` in `common/gemm/cublaslt_gemm.cu`, and
`get_align_size_for_quantization` of `pytorch/quantization.py`, 2.20.2."""

_ALWAYS_KEPT: Mapping[Fp8Part, str] = MappingProxyType(
    {
        "embedding": "a look-up is no product",
        "head": "the loss forms its logits, and their gradient, chunk by chunk by itself",
        "router": "its product is in fp32, so that rounding chooses no expert",
    }
)
"""What has no FP8 form, and why."""


def size_multiple(fp8: Fp8Config) -> int:
    """What the sizes of FP8 products are multiples of; 1 where there are none."""
    return {"none": 1, "mxfp8": MX_SIZE_MULTIPLE}.get(fp8.recipe, SIZE_MULTIPLE)


def fp8_layers(config: RunConfig) -> list[int]:
    """The blocks, counted from 0, whose products are in FP8."""
    fp8, layers = config.precision.fp8, config.model.num_layers
    return [] if fp8.recipe == "none" else [index for index in range(layers) if not fp8.keeps_block(index, layers)]


def fp8_heads(config: RunConfig) -> dict[str, int]:
    """The heads on one rank that the product of q, k, v and what rides with them yields in FP8, by projection."""
    attention, tp, gate = config.model.attention, config.parallel.tp, config.model.attention.gate
    heads, kv_heads = attention.num_heads // tp, max(1, attention.num_kv_heads // tp)
    projections = {"q": heads, "k": kv_heads, "v": kv_heads}
    for kind in attention.switch.switched:
        projections[kind] *= attention.switch.num_experts
    if gate.rides and config.precision.fp8.rounds("gate"):
        projections["gate"] = kv_heads if gate.of_kv_heads else heads
    return projections


def precision_rules(config: RunConfig) -> Iterator[str]:
    """The messages of what a config's precision violates."""
    yield from kernel_rules(config.precision)
    yield from _te_dtype_rules(config.precision)
    if config.precision.fp8.recipe == "none":
        return
    yield from _keep_rules(config)
    yield from _run_rules(config)
    yield from _size_rules(config)


def kernel_rules(precision: PrecisionConfig) -> Iterator[str]:
    """The messages about FP8 products that nobody makes, or two."""
    backend, fp8 = precision.backend, precision.fp8
    if fp8.recipe != "none" and backend != "te" and not fp8.emulate:
        yield (
            f"precision.fp8.recipe ({fp8.recipe}) needs FP8 kernels or their emulation, but precision.backend is {backend} and "
            "precision.fp8.emulate false; set precision.backend to te (GPUs that have FP8) or precision.fp8.emulate to true (any device)"
        )
    if fp8.emulate and fp8.recipe == "none":
        yield (
            "precision.fp8.emulate (true) needs a recipe to emulate, but precision.fp8.recipe is none; set precision.fp8.recipe to "
            "delayed, current, blockwise or mxfp8, or precision.fp8.emulate to false"
        )
    if fp8.emulate and backend == "te":
        yield (
            "precision.fp8.emulate (true) is of PyTorch's kernels, but precision.backend is te, which has FP8 of its own; set "
            "precision.backend to native, or precision.fp8.emulate to false"
        )


def _te_dtype_rules(precision: PrecisionConfig) -> Iterator[str]:
    """Transformer Engine's products of fp32 numbers. Source: `common/gemm/cublaslt_gemm.cu`, line 445 (CUBLAS_COMPUTE_32F_FAST_TF32)."""
    # With an emulation too, `kernel_rules` has said what to change, and this one might send the reader back.
    if precision.backend == "te" and precision.dtype == "fp32" and not precision.fp8.emulate:
        emulated = " with precision.fp8.emulate true" if precision.fp8.recipe != "none" else ""
        yield (
            "precision.dtype (fp32) must be bf16 where precision.backend is te: its products of fp32 numbers are in TF32, with 10 bits of "
            "mantissa, whatever PyTorch is told, and its FP8 is made for bf16 activations; set precision.dtype to bf16, or "
            f"precision.backend to native{emulated}"
        )


def _keep_rules(config: RunConfig) -> Iterator[str]:
    """What stays out of FP8."""
    keep, layers = config.precision.fp8.keep_high_precision, config.model.num_layers
    key = f"precision.fp8.keep_high_precision ([{', '.join(keep)}])"
    missing = {part: why for part, why in _ALWAYS_KEPT.items() if part not in keep}
    if missing:
        reasons = "; ".join(f"{part}: {why}" for part, why in missing.items())
        yield f"{key} must hold {', '.join(missing)}, which have no FP8 form ({reasons}); add {', '.join(missing)}"
    if layers > 0 and not fp8_layers(config):
        # Of a single block both must go.
        ends = (" and " if layers == 1 else " or ").join(part for part in ("first_layers", "last_layers") if part in keep)
        yield (
            f"{key} leaves none of model.num_layers ({layers}) blocks in FP8; leave out {ends}, or set "
            "precision.fp8.recipe to none"
        )


def _run_rules(config: RunConfig) -> Iterator[str]:
    """What FP8 asks of the rest of a run."""
    recipe, emulate = config.precision.fp8.recipe, config.precision.fp8.emulate
    where = f"where precision.fp8.recipe is {recipe}"
    if config.parallel.zero_stage == 3:
        why = "an emulation is to tell what Transformer Engine would do, and there stage 3 is refused" if emulate else (
            "Transformer Engine holds what it rounded of a weight from the forward to the backward pass, so that stage 3, which releases "
            "weights in between, would save nothing, and the two have never been shown to work together"
        )
        yield f"parallel.zero_stage (3) must be less {where}: {why}; set parallel.zero_stage to 2, or precision.fp8.recipe to none"


def _size_rules(config: RunConfig) -> Iterator[str]:
    """Dimensions of the products on one rank. An emulation could take any; it is held to them since it stands for kernels that cannot."""
    recipe, unit = config.precision.fp8.recipe, size_multiple(config.precision.fp8)
    why = "its blocks hold 32 numbers along either dimension" if recipe == "mxfp8" else "FP8 products read rows of whole 16 bytes"
    for what, size, remedy in _sizes(config):
        if size > 0 and size % unit:
            yield f"{what} must be a multiple of {unit} where precision.fp8.recipe is {recipe}: {why}; {remedy}"


def _sizes(config: RunConfig) -> Iterator[tuple[str, int, str]]:
    """What each size is, with its value, the value, and the remedy. What tp does not divide is reported by that rule."""
    model, tp, layers, unit = config.model, config.parallel.tp, fp8_layers(config), size_multiple(config.precision.fp8)
    if tp < 1 or not layers:
        return
    mixtures = [model.is_moe_layer(layer) for layer in layers]
    whole = {"model.hidden_size": model.hidden_size, "model.moe.ffn_size": model.moe.ffn_size if any(mixtures) else 0}
    # One sequence alone, not the micro-batch: that is what a sample's text is drawn from.
    whole["train.seq_len"] = config.train.seq_len
    for key, size in whole.items():
        yield f"{key} ({size})", size, f"set {key} to a multiple of {unit}"
    yield from _attention_sizes(config)
    cut = {"model.ffn_size": 0 if all(mixtures) else model.ffn_size}
    cut["model.moe.shared_ffn_size"] = model.moe.shared_ffn_size if any(mixtures) else 0
    for key, size in cut.items():
        if size % tp == 0:
            of_rank = f" / parallel.tp ({tp}) = {size // tp}" if tp > 1 else ""
            yield f"{key} ({size}){of_rank}", size // tp, f"set {key} to a multiple of {unit * tp}{_or_lower(tp)}"


def _attention_sizes(config: RunConfig) -> Iterator[tuple[str, int, str]]:
    """The columns of the output projection, and the rows of the one product of q, k, v and what rides with them."""
    attention, tp, unit = config.model.attention, config.parallel.tp, size_multiple(config.precision.fp8)
    if attention.num_heads % tp or attention.head_dim < 1:
        return
    width, projections = attention.head_dim, fp8_heads(config)
    heads = projections["q"]
    *others, last = projections
    of_rank = f" on each of parallel.tp ({tp}) ranks" if tp > 1 else ""
    products = {f"query head{'s' * (heads > 1)}": heads, f"heads of {', '.join(others)} and {last}": sum(projections.values())}
    for names, count in products.items():
        remedy = f"make model.attention.head_dim a multiple of {unit // math.gcd(unit, count)}{_or_lower(tp)}"
        yield f"model.attention.head_dim ({width}) x {count} {names}{of_rank} = {count * width}", count * width, remedy


def _or_lower(tp: int) -> str:
    return " or lower parallel.tp" if tp > 1 else ""
