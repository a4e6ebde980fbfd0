"""A block's residual stream: sandwich norms and the clip, against their formula in fp64."""

from dataclasses import replace

import pytest
import torch
from parity.sharded import BACKEND, CPU, assert_close, fill, random
from parity.variants import DENSE, MOE
from torch import Tensor

from megagate.config.model import ModelConfig
from megagate.model.block import Block
from megagate.nn.rope import rope_table
from megagate.parallel.mesh import ParallelMesh

BATCH, SEQUENCE, EPS = 2, 8, 1e-3


def block_of(model: ModelConfig) -> Block:
    return fill(Block(replace(model, norm_eps=EPS), is_moe=model.is_moe, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single()))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.detach().double()


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "mixture"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("sandwich", [False, True])
def test_is_its_formula(model, clip, sandwich):
    """What is added is normed first, then clipped on both sides; norms before each part, the stream itself untouched."""
    block = block_of(replace(model, sandwich_norm=sandwich, residual_clip=clip))
    x, rope = random("x", BATCH, SEQUENCE, model.hidden_size), rope_table(SEQUENCE, model.attention.head_dim, base=100.0, device=CPU)
    seen: dict[str, Tensor] = {}
    parts = {"attention": block.attention, "ffn": block.moe if model.is_moe else block.ffn}
    for name, part in {**parts, **{f"{name}_norm": getattr(block, f"{name}_norm") for name in parts}}.items():
        part.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out))
    out, _ = block(x, rope)

    expected, clipped = x.double(), []
    for name in parts:
        given, made = (seen[part].detach().double() for part in (f"{name}_norm", name))
        assert_close(given, norm(expected, getattr(block, f"{name}_norm").weight), to=1e-5, what=f"input of {name}")
        made = norm(made, getattr(block, f"{name}_out_norm").weight) if sandwich else made
        clipped.append((made.abs() > clip).double().mean().item())
        expected = expected + (made.clip(-clip, clip) if clip else made)
    assert_close(out, expected, to=1e-5)
    assert not clip or all(0.1 < share < 0.95 for share in clipped), f"the clip must be seen: {clipped}"
