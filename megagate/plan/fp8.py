"""What FP8 adds to the activations of `activations.py`, which are those of bf16: an upper bound, from the config alone.

An FP8 product keeps bytes instead of what it was given: of its input those that the weight's gradient is made of, of its weight up to two
copies, one of them transposed (kernels of Hopper sum along rows alone, and the product and the input's gradient sum over different sides of
the weight), with their scales. Counted is all of that on top, although an input that nobody else keeps is then no longer there in bf16.
Transformer Engine's allocations were compared with nothing, for want of a GPU; its temporaries, and those of an emulation, which multiplies
in fp32, are not counted.
"""

from collections.abc import Iterator

from megagate.config.precision_rules import fp8_heads, fp8_layers
from megagate.config.run import RunConfig
from megagate.plan.activations import Micro

WEIGHT_COPIES, INPUT_COPIES = 2, 1
SCALES = 33 / 32
"""One byte of scale for 32 numbers, or four for 128; the scales of tensors and of 128 x 128 blocks are less."""

Product = tuple[int, int]
"""Elements of a product's weights, and of its input."""


def fp8_copies(config: RunConfig, micro: Micro, *, recompute: bool) -> int:
    """Bytes that FP8 products keep at most: those of all blocks, or, where blocks are recomputed, of the largest one."""
    of_blocks = [sum(map(_bytes, _products(config, layer, micro))) for layer in fp8_layers(config)]
    return int(max(of_blocks, default=0) if recompute else sum(of_blocks))


def memory_notes(config: RunConfig) -> tuple[str, ...]:
    """What a reader of the estimate has to know about the precision."""
    precision, recipe = config.precision, config.precision.fp8.recipe
    notes = []
    if recipe != "none":
        notes.append(
            f"Activations under precision.fp8.recipe {recipe} are an upper bound: those of bf16, and FP8 copies of weights and inputs of "
            "products on top. No FP8 kernel has been measured."
        )
    if precision.fp8.emulate:
        notes.append("The emulation's fp32 temporaries are not counted: copies of the weights and rows of one product at a time.")
    if precision.backend == "te":
        notes.append("What Transformer Engine's own kernels keep, and their workspaces, was not measured: the formulas are PyTorch's.")
    return tuple(notes)


def _bytes(product: Product) -> float:
    weights, inputs = product
    return SCALES * (WEIGHT_COPIES * weights + INPUT_COPIES * inputs)


def _products(config: RunConfig, layer: int, micro: Micro) -> Iterator[Product]:
    model = config.model
    hidden, tokens = model.hidden_size, micro.whole
    heads, head_dim = fp8_heads(config), model.attention.head_dim
    yield sum(heads.values()) * head_dim * hidden, tokens * hidden
    yield heads["q"] * head_dim * hidden, tokens * heads["q"] * head_dim
    width = (model.moe.shared_ffn_size if model.is_moe_layer(layer) else model.ffn_size) // micro.tp
    if width:
        yield 2 * width * hidden, tokens * hidden
        yield width * hidden, tokens * width
    if model.is_moe_layer(layer):
        experts, ffn = model.moe.num_experts // micro.ep, model.moe.ffn_size
        rows = micro.rows(model, layer - model.moe.first_dense_layers)[1]
        yield experts * 2 * ffn * hidden, rows * hidden
        yield experts * ffn * hidden, rows * ffn
