"""The pretraining job: `python -m megagate.train.main --config FILE`, one process per rank; `examples/pretrain_moe.sh` starts it."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from megagate.config.cli import parse
from megagate.config.rules import check
from megagate.errors import MegagateError
from megagate.log import logger, set_up_logging

PROG = "pretrain_moe.sh"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job of this rank.

    Returns:
        int: 0 finished (or was finished already), 1 the model has not learnt what `eval.min_gain_nats` asks for, 2 bad input,
        3 a loss or a gradient is not finite, 128 + signal when asked to stop, after saving.
    """
    rank, local_rank = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))
    set_up_logging(rank)
    # The ranks of one machine read the same files, so its first one speaks for them; once all ranks are joined, rank 0 speaks for all.
    speaks = local_rank == 0
    try:
        with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
            config = parse(sys.argv[1:] if argv is None else argv, prog=PROG)
        check(config, world_size=int(os.environ.get("WORLD_SIZE", 1)))
        # Heavy imports only now: a mistake in the arguments is told at once.
        from megagate.train.job import Job  # noqa: PLC0415

        job = Job(config)
        speaks = rank == 0
        return job.run()
    except MegagateError as error:
        if speaks:
            logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
