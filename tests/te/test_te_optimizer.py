"""Transformer Engine's own FusedAdam, its kernel by PyTorch: its books are those that the stand-in keeps, and its runs are PyTorch's."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.fused import EmptyToo, books, multi_tensor_adam, replaced
from parity.engines import Layout
from parity.test_parity_state import RUN, assert_same_state, load_and_train, train_and_save
from te import stub_extension
from te.te_ranks import needs_te, run

from megagate.parallel.spawn import RankContext

pytestmark = needs_te


def with_kernel(context: RankContext, function: Callable[..., Any], *args: Any) -> Any:
    with replaced(vars(sys.modules[stub_extension.NAME]), "multi_tensor_adam", torch.no_grad()(multi_tensor_adam)):
        return function(context, *args)


def both_books(_context: RankContext) -> tuple[list[Any], list[Any]]:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return books(FusedAdam), books(EmptyToo)


def test_the_stand_in_keeps_the_books_of_the_real_one():
    ((found, stand_in),) = run(with_kernel, 1, both_books)
    assert [counts for counts, _, _ in found] == [counts for counts, _, _ in stand_in] == [[n, n] for n in range(1, 6)]
    torch.testing.assert_close([rest for _, *rest in found], [rest for _, *rest in stand_in], rtol=0, atol=0)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_real_one_steps_and_resumes_as_torch_does(zero_stage: int, tmp_path: Path):
    """Stage 3 calls it once for every group, and each call counts in all of them, had it not been told."""
    layout, ours = Layout(2, ep=2, zero_stage=zero_stage), replace(RUN, implementation="te")
    expected = run(with_kernel, 2, train_and_save, RUN, layout, tmp_path / "torch")
    assert_same_state(run(with_kernel, 2, train_and_save, ours, layout, tmp_path / "te"), expected)
    assert_same_state(run(with_kernel, 2, load_and_train, ours, layout, tmp_path / "torch"), expected)
    assert_same_state(run(with_kernel, 2, load_and_train, RUN, layout, tmp_path / "te"), expected)
