"""The pretraining job: `python -m megagate.train.main --config FILE`, one process per rank; `examples/pretrain_moe.sh` starts it."""

import contextlib
import os
import sys
from collections.abc import Sequence

from megagate.config.cli import parse
from megagate.config.rules import check
from megagate.config.run import RunConfig
from megagate.errors import MegagateError
from megagate.log import logger, set_up_logging

PROG = "pretrain_moe.sh"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job of this rank.

    Returns:
        int: 0 finished (or was finished already), 1 the model has not learnt what `eval.min_gain_nats` asks for, 2 bad input,
        128 + signal when asked to stop, after saving.
    """
    rank = int(os.environ.get("RANK", 0))
    set_up_logging(rank)
    try:
        # All ranks read the same arguments, so the first one speaks for all.
        with contextlib.redirect_stdout(sys.stdout if rank == 0 else open(os.devnull, "w")):
            config = parse(sys.argv[1:] if argv is None else argv, prog=PROG)
        check(config, world_size=int(os.environ.get("WORLD_SIZE", 1)))
        return _run(config)
    except MegagateError as error:
        if rank == 0:
            logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _run(config: RunConfig) -> int:
    # Heavy imports only now: a mistake in the arguments is told at once.
    from megagate.train.job import Job  # noqa: PLC0415

    return Job(config).run()


if __name__ == "__main__":
    sys.exit(main())
