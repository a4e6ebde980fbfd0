"""Ends the ranks with Transformer Engine when the tests of this folder are done."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def te_pool() -> Iterator[None]:
    """Close the pool at the end."""
    yield
    from te.te_ranks import POOL

    POOL.close()
