"""THE mapping between a model's tensors and those of a Hugging Face class, one row per change, read in both directions.

A row names regions of tensors as they lie in a checkpoint (`master/...`, `state/...`; logical, so that sharding is undone before the table
sees anything), tensors of the Hugging Face class, and the invertible op between them. Every element of every tensor of the model is in
exactly one row.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch

from megagate.checkpoint.box import Box, Shape, find_flaw
from megagate.checkpoint.hf.ops import ELEMENTWISE, Expert, GroupedQueryAndGate, LeftOut, LessOne, Op, QueryAndGate, Same, Scaled, Zeros
from megagate.checkpoint.saved_model import native_shapes
from megagate.config.model import ModelConfig

Target = Literal["qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "lfm3", "afmoe", "remote-code"]
"""The classes that an export is for, by their `model_type`; `remote-code` comes with its own."""

Layout = Literal[Target, "gated_attention"]
"""What is read: what is written, and the gated models released with arXiv 2505.06708, whose `model_type` is also `qwen3`."""

NO_SHARED_EXPERT = 128
"""Width of the shared expert of zeros where their class always has one: divisible by what serving cuts it by, and of no effect."""


class Region(NamedTuple):
    """A box of a tensor of a checkpoint."""

    name: str
    box: Box


@dataclass(frozen=True)
class Row:
    """One line of the mapping.

    Args:
        native: What the op takes of our tensors, in its order.
        theirs: What it makes of them.
        op: The change.
    """

    native: tuple[Region, ...]
    theirs: tuple[str, ...]
    op: Op

    def shapes(self) -> dict[str, Shape]:
        """The shape of each of their tensors."""
        made = self.op.to_hf([torch.empty(region.box.shape, device="meta") for region in self.native])
        return {name: tuple(tensor.shape) for name, tensor in zip(self.theirs, made, strict=True)}

    def parts(self, elements: int) -> Iterator[tuple["Row", slice]]:
        """The row cut along the first dim of its one tensor into parts of about `elements` elements, where its op allows that.

        Yields:
            A part, and the rows of their tensor that it is; all of them for a row that is left whole.
        """
        if not isinstance(self.op, ELEMENTWISE) or self.native[0].box.volume <= elements:
            yield self, slice(None)
            return
        ((name, (offset, shape)),) = self.native
        step = max(1, elements * shape[0] // self.native[0].box.volume)
        for begin in range(0, shape[0], step):
            end = min(begin + step, shape[0])
            part = Box((offset[0] + begin, *offset[1:]), (end - begin, *shape[1:]))
            yield replace(self, native=(Region(name, part),)), slice(begin, end)


@dataclass(frozen=True)
class Names:
    """What a class calls its parts, and what it does otherwise.

    Args:
        fused_gate: The gate's rows lie in `q_proj`.
        grouped_gate: They do so by key/value head, and only where there is a gate.
        norms: The op on the weights of norms.
        own_gate: Name of a gate's own projection, within the attention; None where it has none.
    """

    final_norm: str = "norm"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    attention_out_norm: str = "attention_out_norm"
    ffn_out_norm: str = "ffn_out_norm"
    ffn: str = "mlp"
    ffn_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    attention_out: str = "o_proj"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    own_gate: str | None = None
    fused_gate: bool = False
    grouped_gate: bool = False
    norms: Op = field(default_factory=Same)


NAMES: Mapping[Layout, Names] = MappingProxyType(
    {
        "qwen3": Names(),
        "qwen3_moe": Names(),
        "qwen3_next": Names(fused_gate=True, norms=LessOne()),
        "qwen3_5_text": Names(fused_gate=True, norms=LessOne()),
        "lfm3": Names(
            final_norm="embedding_norm",
            attention_norm="operator_norm",
            ffn_norm="ffn_norm",
            attention_out_norm="post_operator_norm",
            ffn_out_norm="post_ffn_norm",
            ffn="feed_forward",
            ffn_parts=("w1", "w3", "w2"),
            own_gate="g_proj",
        ),
        "afmoe": Names(
            attention_out_norm="post_attention_layernorm",
            ffn_norm="pre_mlp_layernorm",
            ffn_out_norm="post_mlp_layernorm",
            own_gate="gate_proj",
        ),
        "remote-code": Names(own_gate="gate"),
        "gated_attention": Names(grouped_gate=True),
    }
)


def mapping(model: ModelConfig, target: Layout, *, keep_padding: bool = False) -> list[Row]:
    """Every row for a model that `target` can hold (`targets.py`), in the order of the file.

    Args:
        model: The model.
        target: The class.
        keep_padding: Export the rows that pad the vocabulary too.
    """
    return list(_Mapper(model, target, keep_padding=keep_padding).rows())


def mapping_flaws(rows: list[Row], shapes: dict[str, Shape]) -> list[str]:
    """Elements of tensors of these shapes that are in no row or in several, and names of theirs in several; empty for a sound mapping."""
    held: dict[str, list[Box]] = {name: [] for name in shapes}
    flaws = []
    for region in (region for row in rows for region in row.native):
        if region.name in held:
            held[region.name].append(region.box)
        else:
            flaws.append(f"{region.name} is in a row, and not in the model")
    for name, boxes in held.items():
        if flaw := find_flaw(shapes[name], boxes):
            flaws.append(f"{name}{flaw.region} is in {len(flaw.holders)} rows")
    made = Counter(name for row in rows for name in row.theirs)
    return flaws + [f"{name} is made by {count} rows" for name, count in made.items() if count > 1]


class _Mapper:
    def __init__(self, model: ModelConfig, target: Layout, *, keep_padding: bool):
        self.model, self.names, self.keep_padding = model, NAMES[target], keep_padding
        self.remote = target == "remote-code"
        # Their class always gates: by a gate of zeros, whose scores are 1/2, and an output projection that is doubled.
        self.halved = self.names.fused_gate and model.attention.gate.position == "none"
        self.always_shared = target == "qwen3_next"
        self.shapes = native_shapes(model)

    def rows(self) -> Iterator[Row]:
        yield from self._vocabulary("embedding.weight", "model.embed_tokens.weight")
        for layer in range(self.model.num_layers):
            yield from self._layer(layer)
        yield self._row("final_norm.weight", f"model.{self.names.final_norm}.weight", self.names.norms)
        if not self.model.tie_embeddings:
            yield from self._vocabulary("head.weight", "lm_head.weight")

    def _vocabulary(self, native: str, theirs: str) -> Iterator[Row]:
        name = f"master/{native}"
        rows, hidden = self.shapes[name]
        kept = rows if self.keep_padding else self.model.vocab_size
        yield Row((Region(name, Box((0, 0), (kept, hidden))),), (theirs,), Same())
        if kept < rows:
            padding = Box((kept, 0), (rows - kept, hidden))
            yield Row((Region(name, padding),), (), LeftOut(padding.shape))

    def _layer(self, layer: int) -> Iterator[Row]:
        ours, theirs, names = f"layers.{layer}", f"model.layers.{layer}", self.names
        yield self._row(f"{ours}.attention_norm.weight", f"{theirs}.{names.attention_norm}.weight", names.norms)
        yield from self._attention(f"{ours}.attention", f"{theirs}.self_attn")
        if self.model.sandwich_norm:
            yield self._row(f"{ours}.attention_out_norm.weight", f"{theirs}.{names.attention_out_norm}.weight", names.norms)
        yield self._row(f"{ours}.ffn_norm.weight", f"{theirs}.{names.ffn_norm}.weight", names.norms)
        if self.model.is_moe_layer(layer):
            yield from self._mixture(f"{ours}.moe", f"{theirs}.{names.ffn}")
        else:
            yield from self._ffn(f"{ours}.ffn", f"{theirs}.{names.ffn}")
        if self.model.sandwich_norm:
            yield self._row(f"{ours}.ffn_out_norm.weight", f"{theirs}.{names.ffn_out_norm}.weight", names.norms)

    def _attention(self, ours: str, theirs: str) -> Iterator[Row]:
        attention, names, gate = self.model.attention, self.names, f"{ours}.gate.weight"
        has_gate = self.model.gate_shape is not None
        if names.grouped_gate:
            grouped = GroupedQueryAndGate(attention.num_kv_heads, attention.num_heads, self.model.gate_scores[1])
            yield Row((self._whole(f"{ours}.q.weight"), self._whole(gate)), (f"{theirs}.q_proj.weight",), grouped)
        elif names.fused_gate:
            op = QueryAndGate(attention.num_heads, self.model.gate_scores[1])
            sources = [f"{ours}.q.weight", *([gate] if has_gate else [])]
            yield Row(tuple(map(self._whole, sources)), (f"{theirs}.q_proj.weight",), op)
        else:
            yield self._row(f"{ours}.q.weight", f"{theirs}.q_proj.weight")
        for kind in ("k", "v"):
            yield self._row(f"{ours}.{kind}.weight", f"{theirs}.{kind}_proj.weight")
        if has_gate and names.own_gate:
            yield self._row(gate, f"{theirs}.{names.own_gate}.weight")
        for kind in attention.switch.switched:
            parts = ["router", *(f"experts.{index}" for index in range(attention.switch.num_experts - 1))]
            for part in parts:
                yield self._row(f"{ours}.{kind}_switch.{part}.weight", f"{theirs}.{kind}_switch.{part}.weight")
        yield self._row(f"{ours}.o.weight", f"{theirs}.{names.attention_out}.weight", Scaled(2.0) if self.halved else Same())
        if attention.qk_norm:
            yield self._row(f"{ours}.q_norm.weight", f"{theirs}.{names.q_norm}.weight", names.norms)
            yield self._row(f"{ours}.k_norm.weight", f"{theirs}.{names.k_norm}.weight", names.norms)

    def _ffn(self, ours: str, theirs: str, *, down: Op | None = None) -> Iterator[Row]:
        for part, name in zip(("gate", "up", "down"), self.names.ffn_parts, strict=True):
            yield self._row(f"{ours}.{part}.weight", f"{theirs}.{name}.weight", down if down and part == "down" else Same())

    def _mixture(self, ours: str, theirs: str) -> Iterator[Row]:
        moe, hidden = self.model.moe, self.model.hidden_size
        yield self._row(f"{ours}.router.weight", f"{theirs}.gate.weight")
        bias = f"state/{ours}.router.bias_steps"
        if bias in self.shapes:
            yield Row((Region(bias, Box((0,), self.shapes[bias])),), (f"{theirs}.gate.bias_steps",), Same())
        for expert in range(moe.num_experts):
            place = f"{theirs}.experts.{expert}"
            yield self._expert(f"{ours}.experts.gate_up", expert, f"{place}.gate_proj.weight", f"{place}.up_proj.weight")
            yield self._expert(f"{ours}.experts.down", expert, f"{place}.down_proj.weight")
        gate = f"{theirs}.shared_expert_gate.weight"
        if moe.shared_ffn_size:
            # Their shared expert always has a gate of its own: of zeros, whose scores are 1/2, and an output that is doubled.
            halved = self.always_shared and not moe.shared_gate
            yield from self._ffn(f"{ours}.shared_expert", f"{theirs}.shared_expert", down=Scaled(2.0) if halved else None)
            if moe.shared_gate:
                yield self._row(f"{ours}.shared_gate.weight", gate)
            elif halved:
                yield Row((), (gate,), Zeros(((1, hidden),)))
        elif self.always_shared:
            width = NO_SHARED_EXPERT
            shapes = ((width, hidden), (width, hidden), (hidden, width), (1, hidden))
            yield Row((), (*(f"{theirs}.shared_expert.{part}.weight" for part in self.names.ffn_parts), gate), Zeros(shapes))

    def _expert(self, ours: str, expert: int, *theirs: str) -> Row:
        name = f"master/{ours}"
        return Row((Region(name, Box((expert, 0, 0), (1, *self.shapes[name][1:]))),), theirs, Expert(len(theirs)))

    def _row(self, ours: str, theirs: str, op: Op | None = None) -> Row:
        return Row((self._whole(ours),), (theirs,), op or Same())

    def _whole(self, ours: str) -> Region:
        name = f"master/{ours}"
        shape = self.shapes[name]
        return Region(name, Box((0,) * len(shape), shape))
