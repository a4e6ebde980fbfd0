"""Every parallel layout is the same model as one process on plain PyTorch."""


import pytest
from parity.matrix import Case, check_case, layouts

STAGES = (1, 2, 3)
EVERY_LAYOUT = [Case(*layout, stage=stage) for layout in layouts(1, 2, 4) for stage in STAGES]


@pytest.mark.parametrize("case", EVERY_LAYOUT, ids=str)
def test_every_layout_and_stage(case):
    check_case(case)
