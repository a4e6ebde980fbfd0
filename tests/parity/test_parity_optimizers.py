"""Fused optimizers of apex, Transformer Engine and DeepSpeed under every ZeRO stage: PyTorch's steps, and runs that change between them.

Their kernels are for GPUs: PyTorch stands in for these, and for the Python of those that are not installed (`engine/fused.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import ranks
from engine.fused import on_cpu
from parity.engines import Layout, Outcome, Run
from parity.test_parity_nonfinite import spoilt_run
from parity.test_parity_state import DENSE, RUN, assert_same_bits, assert_same_state, load_and_train, train_and_save

from megagate.config.run import OptimizerImplementation
from megagate.parallel.spawn import RankContext

OTHERS = [name for name in get_args(OptimizerImplementation) if name != "torch"]
LAYOUTS = [Layout(2, ep=2, zero_stage=1), Layout(2, ep=2, zero_stage=2), Layout(2, ep=2, zero_stage=3), Layout(2, zero_stage=0)]


def with_kernels(context: RankContext, function: Callable[..., Any], run: Run, *args: Any) -> Any:
    with on_cpu(run.implementation):
        return function(context, run, *args)


def on_ranks(function: Callable[..., Any], run: Run, layout: Layout, *args: Any) -> list[Any]:
    return ranks.run_ranks(with_kernels, layout.world_size, function, run, layout, *args)


def model_of(layout: Layout) -> Run:
    return RUN if layout.zero_stage else DENSE


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def by_torch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, Path, list[Outcome]]:
    """Two steps, a checkpoint, one step."""
    layout, root = request.param, tmp_path_factory.mktemp("torch")
    return layout, root, on_ranks(train_and_save, model_of(layout), layout, root)


@pytest.mark.parametrize("implementation", OTHERS)
def test_steps_and_resumes_as_torch_does(by_torch, implementation, tmp_path):
    """From the first step on, from PyTorch's checkpoint, and PyTorch from its; its own checkpoint to the same bits."""
    layout, root, expected = by_torch
    run = replace(model_of(layout), implementation=implementation)
    own = on_ranks(train_and_save, run, layout, tmp_path)
    assert_same_state(own, expected)
    assert_same_state(on_ranks(load_and_train, run, layout, root), expected)
    assert_same_bits(on_ranks(load_and_train, run, layout, tmp_path, 2, True), own)
    assert_same_state(on_ranks(load_and_train, model_of(layout), layout, tmp_path), expected)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_skipped_step_does_not_count(implementation, zero_stage):
    """Some of them count calls, also those without gradients; bias correction goes by steps that were applied."""
    run = replace(DENSE, implementation=implementation)
    for one in on_ranks(spoilt_run, run, Layout(2, zero_stage=zero_stage), "replicated gradient"):
        assert not one.step.applied and one.kept
        assert one.after[1:3] == one.without[1:3], "other weights, or another number of applied steps"
