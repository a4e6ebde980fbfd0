"""Each thing that the engine tells DeepSpeed is needed: left out, DeepSpeed fails, or trains another model without a word.

Layouts that show it. On 4 ranks tp 2 ep 2 shows nothing about ZeRO-3's placement of experts, since there a parameter's data-parallel group
is its expert-data group; nor does tp 4 ep 2 show ZeRO-3's use of `allreduce`.
"""

from dataclasses import replace
from unittest.mock import patch

import pytest
import ranks
from parity.matrix import Case, assert_same, pieces_of, reference, run_case, worst
from parity.omissions import OMISSIONS

from megagate.parallel.spawn import RankContext, RankError
from megagate.verify.trial import Outcome

CASE = Case(4, tp=2, ep=4, routing="pinned", expert_gain=2.0)  # so that experts make a good part of the gradient's norm
WIDE = replace(CASE, tp=4, ep=2)
EXACT = 3e-6
"""Experts this large leave their layer's other gradients with a little more rounding."""


def run_without(context: RankContext, case: Case, omission: str) -> Outcome:
    with OMISSIONS[omission]():
        return run_case(context, case)


@pytest.mark.parametrize(
    ("omission", "case", "norm"),
    [
        ("tensor_model_parallel of experts", replace(CASE, stage=1), True),
        ("tensor_model_parallel of experts", replace(WIDE, stage=2), True),
        ("tensor_model_parallel of cut parameters", replace(CASE, stage=1), True),
        ("tensor_model_parallel of cut parameters", replace(WIDE, stage=3), True),
        ("allreduce", replace(CASE, stage=3), False),
        ("placement", replace(CASE, stage=3), False),
        ("placement", replace(WIDE, stage=3), False),
        ("placement family", replace(CASE, stage=3), False),
        ("partition process group", replace(WIDE, stage=3), False),
    ],
    ids=str,
)
def test_an_omission_trains_another_model(omission, case, norm):
    """`norm`: the gradients are right and their norm is not, so that they are clipped to another length."""
    outcomes, expected = ranks.run_ranks(run_without, case.world, case, omission), reference(case)
    gradients = worst((piece for one in outcomes for piece in one.gradients[0]), expected.gradients[0])
    if norm:
        assert gradients.worst < 1e-5
        assert abs(outcomes[0].steps[0].grad_norm / expected.steps[0].grad_norm - 1) > 0.015
        assert worst(pieces_of(outcomes, "masters"), expected.masters).worst > 3e-5, "thirty times the tolerance"
    else:
        assert gradients.worst > 0.1
    with pytest.raises(AssertionError):
        assert_same(outcomes, expected, to=EXACT)


PAIR = replace(CASE, world=2, ep=2)


@pytest.mark.parametrize(
    ("omission", "case", "message"),
    [
        ("allreduce", replace(PAIR, stage=1), "All params in MoE group must be MoE params"),
        ("group_name", replace(PAIR, stage=2), "has no attribute 'group_name'"),
        ("partition group name", replace(PAIR, stage=3), "missing an expert-parallel group name"),
        ("expert group", replace(PAIR, stage=3), "expert parallel group is not initialized"),
        ("expert group", replace(PAIR, stage=1, dtype="bf16"), "expert parallel group is not initialized"),
        ("expert-data group", replace(PAIR, stage=1), "expert data parallel group is not initialized"),
        ("expert marker", replace(PAIR, stage=2), "'NoneType' object is not subscriptable"),
        ("optimizer groups", replace(PAIR, stage=1), "None of the param groups are marked as MoE"),
        ("mpu", replace(PAIR, stage=3), "Check batch related parameters"),
    ],
    ids=str,
)
def test_an_omission_is_an_error(omission, case, message):
    """On two ranks: each of these cases costs a new set of ranks."""
    with pytest.raises(RankError, match=message):
        ranks.run_ranks(run_without, case.world, case, omission)


@pytest.mark.parametrize("case", [replace(CASE, stage=1), replace(WIDE, stage=2), replace(CASE, stage=3), replace(WIDE, stage=3)], ids=str)
def test_nothing_left_out(case):
    """The control of the tests above."""
    assert_same(ranks.run_ranks(run_without, case.world, case, "nothing"), reference(case), to=EXACT)


@pytest.mark.parametrize(("omission", "case"), [("placement", replace(CASE, ep=2)), ("allreduce", WIDE)], ids=str)
def test_some_layouts_hide_an_omission(omission, case):
    case = replace(case, stage=3)
    assert_same(ranks.run_ranks(run_without, case.world, case, omission), reference(case), to=EXACT)


# ---- who reads a weight, in stage 3


def discovered(context: RankContext, case: Case, omission: str) -> int:
    """How many weights DeepSpeed found partitioned where they were read, and gathered one by one."""
    import deepspeed.runtime.zero.parameter_offload as offload

    with OMISSIONS[omission](), patch.object(offload, "register_external_parameter", wraps=offload.register_external_parameter) as found:
        run_case(context, case)
    return found.call_count


@pytest.mark.parametrize("model", ["moe", "tied", "dense"])
def test_deepspeed_has_no_weight_to_discover(model):
    """It finds out who reads a `Weight` in the first eager forward pass, so that without our word too the numbers are right."""
    case = Case(2, tp=2, ep=1, stage=3, model=model)
    assert ranks.run_ranks(discovered, 2, case, "nothing") == [0, 0]
    assert min(ranks.run_ranks(discovered, 2, case, "leaf modules")) >= 5 * case.config.model.num_layers


def test_deepspeed_would_discover_the_output_weight():
    assert min(ranks.run_ranks(discovered, 2, Case(2, tp=2, stage=3), "external parameter")) == 1
