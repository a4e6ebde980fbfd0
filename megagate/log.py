"""The log of a run: one logger, on standard output, told once."""

import logging
import sys

logger = logging.getLogger("megagate")


def set_up_logging(rank: int) -> None:
    """Rank 0 tells what happens, the others only what goes wrong."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[megagate] %(message)s" if rank == 0 else f"[megagate rank {rank}] %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
