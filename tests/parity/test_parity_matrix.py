"""Every parallel layout is the same model as one process on plain PyTorch.

The suite runs every layout of 1, 2 and 4 ranks under every ZeRO stage, and of everything else every pair of values. All combinations with
all layouts, about 2,100 cases:

    pytest tests/parity/test_parity_matrix.py --full-product

In every batch samples have unequal numbers of targets, one of them none; tp 4 is more than the model's 2 key/value heads.
"""

from itertools import combinations, product

import pytest
from parity.matrix import Case, check_case, layouts
from parity.pairwise import every_row, pairs_of, pairwise

STAGES = (1, 2, 3)
EVERY_LAYOUT = [Case(*layout, stage=stage) for layout in layouts(1, 2, 4) for stage in STAGES]
DOCUMENTS = [
    Case(*layout, stage=stage, model=model, recompute=recompute, attention="document")
    for layout, stage, recompute, model in [
        ((2, 2, 1), 0, False, "dense"),
        ((4, 4, 1), 1, True, "dense"),
        ((2, 1, 2), 1, False, "moe"),
        ((4, 2, 4), 2, True, "moe"),
        ((4, 4, 2), 3, False, "moe"),
        ((4, 4, 4), 3, True, "moe"),
    ]
]
EIGHT_RANKS = [Case(8, tp=2, ep=4, stage=stage) for stage in STAGES]

MOE = {
    "layout": ((4, 2, 4), (4, 4, 2), (4, 2, 2), (4, 1, 4)),
    "stage": STAGES,
    "model": ("moe", "tied", "padded", "unpadded"),
    "scope": ("global_batch", "micro_batch", "sequence"),
    "accumulation": (1, 2),
    "recompute": (False, True),
}
DENSE = {
    "layout": ((4, 2, 1), (4, 4, 1), (4, 1, 1)),
    "stage": (0, *STAGES),
    "model": ("dense",),
    "accumulation": (1, 2),
    "recompute": (False, True),
}


def case_of(row: dict) -> Case:
    world, tp, ep = row["layout"]
    return Case(world, tp, ep, **{name: value for name, value in row.items() if name != "layout"})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "combination" in metafunc.fixturenames:
        if metafunc.config.getoption("full_product"):
            every_layout = layouts(1, 2, 4)
            rows = every_row(MOE | {"layout": every_layout}) + every_row(DENSE | {"layout": [one for one in every_layout if one[2] == 1]})
        else:
            rows = pairwise(MOE) + pairwise(DENSE)
        cases = [case_of(row) for row in rows]
        metafunc.parametrize("combination", cases, ids=str)


@pytest.mark.parametrize("case", EVERY_LAYOUT, ids=str)
def test_every_layout_and_stage(case):
    check_case(case)


@pytest.mark.parametrize("case", DOCUMENTS, ids=str)
def test_windows_cut_into_documents(case):
    """Attention within documents, positions from 0 in each, no target across their borders."""
    check_case(case)


def test_combinations(combination):
    check_case(combination)


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT_RANKS, ids=str)
def test_eight_ranks(case):
    """Experts over tensor- and data-parallel ranks, and in two replicas."""
    check_case(case, timeout=180)


@pytest.mark.parametrize("values", [MOE, DENSE], ids=["moe", "dense"])
def test_the_chosen_combinations_hold_every_pair(values):
    held = set().union(*map(pairs_of, pairwise(values)))
    for one, other in combinations(values, 2):
        for pair in product(values[one], values[other]):
            assert tuple(zip((one, other), pair, strict=True)) in held
    assert len(pairwise(values)) <= 16 < len(every_row(values))
