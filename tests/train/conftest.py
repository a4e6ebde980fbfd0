"""Fixtures of the job's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from train_jobs import Jobs


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Starts jobs in a new folder; none outlives the test."""
    started = Jobs(tmp_path)
    yield started
    started.close()
