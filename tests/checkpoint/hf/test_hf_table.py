"""The mapping: every element in one row, for every model that a target holds; a hole or a double in it would be seen."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hf_exports import CASES, FORCED, GATED_ALL
from parity.variants import VARIANTS

from megagate.checkpoint.box import Box
from megagate.checkpoint.hf.ops import Same
from megagate.checkpoint.hf.table import Region, Row, Target, mapping, mapping_flaws
from megagate.checkpoint.hf.targets import reasons
from megagate.checkpoint.saved_model import native_shapes

MODELS = {**{name: model for name, (model, _) in (CASES | FORCED).items()}, **VARIANTS}


@pytest.mark.parametrize("target", get_args(Target))
def test_every_element_is_in_one_row_and_comes_back(target: Target) -> None:
    held = [model for model in MODELS.values() if not reasons(model, target)]
    assert held
    for model in held:
        for keep_padding in (False, True):
            rows, shapes = mapping(model, target, keep_padding=keep_padding), native_shapes(model)
            assert mapping_flaws(rows, shapes) == []
            for row in rows:
                whole = [torch.randint(1, 100, region.box.shape).float() for region in row.native]
                theirs = row.op.to_hf(whole)
                assert {name: tuple(tensor.shape) for name, tensor in zip(row.theirs, theirs, strict=True)} == row.shapes()
                back = row.op.from_hf(theirs, where="here")
                if row.theirs:
                    assert len(back) == len(whole) and all(torch.equal(a, b) for a, b in zip(back, whole, strict=True))


def without(name: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row for row in rows if not any(name in theirs for theirs in row.theirs)]


def shorter(rows: list[Row]) -> list[Row]:
    (region,) = rows[0].native
    (count, *rest) = region.box.shape
    return [replace(rows[0], native=(Region(region.name, Box(region.box.offset, (count - 1, *rest))),)), *rows[1:]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("experts.3.up"), "master/layers.1.moe.experts.gate_up[3:4, 0:32, 0:32] is in 0 rows"),
        (without("layers.0.post_attention"), "master/layers.0.ffn_norm.weight[0:32] is in 0 rows"),
        (shorter, "master/embedding.weight[199:200, 0:32] is in 0 rows"),
        (lambda rows: [*rows, rows[5]], "master/layers.0.attention.v.weight[0:16, 0:32] is in 2 rows"),
        (lambda rows: [*rows, rows[5]], "model.layers.0.self_attn.v_proj.weight is made by 2 rows"),
        (lambda rows: [*rows, Row((Region("master/x", Box((0,), (1,))),), ("x",), Same())], "master/x is in a row, and not in the model"),
    ],
)
def test_holes_and_doubles_are_flaws(change: Callable[[list[Row]], list[Row]], told: str) -> None:
    rows = mapping(GATED_ALL, "qwen3_next")
    assert told in mapping_flaws(change(rows), native_shapes(GATED_ALL))
