"""How near a tie each token's choice is, by the numbers that routers and switch heads choose by."""

from dataclasses import replace

import pytest
import torch
from parity.sharded import BACKEND, fill, random
from parity.variants import MOE, with_moe, with_switch

from megagate.config.model import ModelConfig
from megagate.model.lm import LanguageModel
from megagate.nn.moe.router import Router
from megagate.nn.routes import route_gaps, watched_gaps
from megagate.parallel.mesh import ParallelMesh


def filled(model: ModelConfig) -> LanguageModel:
    return fill(LanguageModel(model, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single()))


@pytest.mark.parametrize("bias", [0.0, 0.02])
def test_of_a_router(bias):
    config = replace(MOE.moe, bias_update_rate=bias)
    router = fill(Router(config, MOE.hidden_size, dtype=torch.float32, backend=BACKEND, tp=ParallelMesh.single().tp))
    x = random("x", 2, 5, MOE.hidden_size)
    ranked = (x @ router.weight.t()).double()
    if bias:
        ranked = ranked.softmax(-1) + bias * router.bias_steps
    largest = ranked.detach().topk(config.top_k + 1).values
    torch.testing.assert_close(route_gaps(router, x), largest[..., -2] - largest[..., -1], rtol=1e-5, atol=1e-6)


def test_the_choices_of_a_model_are_watched_one_by_one():
    tokens = torch.arange(12).view(2, 6)
    for model, choices in ((with_moe(first_dense_layers=1), 1), (MOE, 2), (with_switch("kv", 3, 2), 4)):
        lm = filled(replace(model, ffn_size=48))
        with watched_gaps(lm) as gaps:
            lm.logits(tokens)
        assert len(gaps) == choices and all(gap.shape == (2, 6) and 0 < gap.min() < gap.max() < torch.inf for gap in gaps)
        lm.logits(tokens)
        assert len(gaps) == choices, "nothing is watched any more"


def test_where_all_are_chosen_nothing_can_flip():
    lm = filled(with_switch("v", 2, 2))
    with watched_gaps(lm) as gaps:
        lm.logits(torch.arange(6).view(1, 6))
    assert len(gaps) == 2 and all(torch.isinf(gap).all() for gap in gaps)
