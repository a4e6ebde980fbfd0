"""Fixtures of the checkpoint tests."""

from pathlib import Path

import pytest
import torch
from checkpoint_helpers import save_pieces

from megagate.checkpoint import store


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A root with the complete checkpoints 10, 20, 30 of the tensor `w` [4, 6] float32, all equal to the step, from 2 ranks."""
    for step in (10, 20, 30):
        full = torch.full((4, 6), float(step))
        save_pieces(tmp_path, step, [[store.Piece("w", (4, 6), (0, 0), full[:3])], [store.Piece("w", (4, 6), (3, 0), full[3:])]])
    return tmp_path
