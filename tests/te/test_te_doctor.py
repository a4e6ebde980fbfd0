"""The doctor of kernels examines Transformer Engine's real Python layer, over kernels of our own: all is inside the bands, faults are not.

It shows that the doctor runs through every product of that backend, and nothing of real kernels.
"""

from typing import Any

import pytest
import torch
from te.te_ranks import needs_te, run
from verify.verify_runs import config

from megagate.backend.base import Backend
from megagate.backend.native import NativeBackend
from megagate.parallel.spawn import RankContext
from megagate.verify.cells import PrecisionFindings
from megagate.verify.precision import PrecisionOrder, examine_precision, precision_order
from megagate.verify.precision_report import render_precision

pytestmark = needs_te
CPU = torch.device("cpu")


def prepare(words: str, world: int, recipes: tuple[str, ...], fault: str = "") -> PrecisionOrder:
    run_ = config(f"nano --precision.dtype bf16 {words}")
    return precision_order(run_, world_size=world, gpu=True, examined="te", recipes=recipes, fault=fault)


def examine(context: RankContext, order: PrecisionOrder) -> PrecisionFindings | None:
    return examine_precision(order, device=CPU, build=_quick)


def _quick(precision: Any, *, device: torch.device, mesh: Any) -> Backend:
    """TE's permutation kernels run in an interpreter here, for minutes at these sizes; `test_te_backend.py` runs them at smaller ones."""
    from megagate.backend.te import TransformerEngineBackend

    native = NativeBackend(device)
    backend = TransformerEngineBackend(precision, device=device, mesh=mesh, norm=native.norm)  # `build_backend` asks for a GPU
    backend.permute, backend.unpermute = native.permute, native.unpermute
    return backend


@pytest.mark.parametrize(
    ("world", "words", "recipes"),
    [(1, "", ("bf16", "delayed", "current")), (2, "--parallel.tp 2 --parallel.ep 2 --train.recompute true", ("bf16", "delayed"))],
    ids=["one rank", "tp2 ep2, recomputed"],
)
def test_transformer_engine_s_python_is_inside_the_bands(world: int, words: str, recipes: tuple[str, ...]) -> None:
    order = prepare(words, world, recipes)
    found = run(examine, world, order)[0]
    assert found.causes == [], render_precision(order, found)
    rows = [row for one in found.recipes for row in one.rows if row.level == "product"]
    assert {row.fp8 for row in rows} == {True, False}
    assert all(any(cell.error > 0 for cell in row.cells.values()) for row in rows if row.fp8)


@pytest.mark.parametrize("fault", ["gate-in-fp8", "wgrad-of-stale-input"])
def test_a_fault_falls_out_of_the_bands(fault: str) -> None:
    found = run(examine, 1, prepare("", 1, ("bf16",), fault))[0]
    assert found.causes and all(cause.startswith("bf16: layers.1.attention.") for cause in found.causes)
