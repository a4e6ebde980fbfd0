"""Is my layout the same model as one process? `python tools/doctor.py --help`."""

import argparse
import json
import os
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagate.config.run import RunConfig
    from megagate.verify.diagnosis import Diagnosis
    from megagate.verify.doctor import Order

PRELOAD = ["deepspeed", "torch._dynamo", "torch._inductor.compile_fx"]  # by ZeRO's first step: seconds in each rank, once in their server


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 the same model, 1 not, or the ranks failed, 2 bad input."""
    options, settings = _parser().parse_known_args(arguments)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    from megagate.config.cli import parse
    from megagate.errors import MegagateError

    speaks = int(os.environ.get("RANK", 0)) == 0
    try:
        config = parse(settings, prog="doctor.py")
        return _in_launched_rank(config, options) if launched else _in_own_ranks(config, options)
    except MegagateError as error:
        if speaks:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        allow_abbrev=False,
        usage="%(prog)s [--world N] [--json FILE] [--timeout SECONDS] [--fault NAME] --config F [--KEY VALUE] ...",
        description="Shrinks your run to a minute's work, keeps its layout, precision and options, and compares it with one process on "
        "plain PyTorch: losses, clip norm, every gradient and weight, bytes sent. Start it as "
        "`deepspeed --num_gpus 4 tools/doctor.py --config F`, or, on CPUs, plainly with --world.",
    )
    parser.add_argument("--world", type=int, default=0, metavar="N", help="start N ranks on this machine's CPU (without a launcher)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here too")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="end with an error after this time (default 300)")
    parser.add_argument("--fault", default="", metavar="NAME", help="put a fault in, to see that it is found (an unknown name lists them)")
    return parser


def _in_own_ranks(config: "RunConfig", options: argparse.Namespace) -> int:
    """Start the ranks here."""
    from megagate.errors import ConfigError

    if options.world < 1:
        raise ConfigError(f"--world ({options.world}) must be at least 1 without a launcher; add --world 4, or start with deepspeed")
    from megagate.parallel.spawn import RankError, run_ranks, start_server

    cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update(cpu)  # the ranks inherit it
    start_server(preload=PRELOAD, environment=cpu)
    from megagate.verify.doctor import examine_local, order

    what = order(config, world_size=options.world, gpu=False, fault=options.fault)
    try:
        diagnosis = run_ranks(examine_local, options.world, what, timeout=options.timeout)[0]
    except RankError as error:
        return _rank_failed(error)
    return _tell(what, diagnosis, options)


def _rank_failed(error: Exception) -> int:
    """A rank raised, died or stood still: the others have been killed."""
    from megagate.errors import MegagateError

    if isinstance(error.__cause__, MegagateError):
        raise error.__cause__
    print(f"{error}\n\nFAIL: {str(error).splitlines()[0]}", file=sys.stderr)
    return 1


def _in_launched_rank(config: "RunConfig", options: argparse.Namespace) -> int:
    """One of the ranks that a launcher started."""
    from megagate.errors import ConfigError

    if options.world:
        raise ConfigError(f"--world ({options.world}) is for a start without a launcher; leave it out under deepspeed")
    import torch.distributed as dist

    from megagate.parallel.init import LaunchEnv, init_process_group, pick_device
    from megagate.verify.doctor import examine, order

    env = LaunchEnv.read()
    _end_after(options.timeout, env.rank)
    device = pick_device(env.local_rank, local_size=env.local_size)
    what = order(config, world_size=env.world_size, gpu=device.type == "cuda", fault=options.fault)
    init_process_group(env, device=device, timeout=timedelta(seconds=options.timeout + 60))
    diagnosis = examine(what, device=device)
    code = _tell(what, diagnosis, options) if diagnosis is not None else 0
    dist.barrier()
    dist.destroy_process_group()
    return code


def _end_after(seconds: float, rank: int) -> None:
    """End this process when the time is over, whatever it waits for; the launcher then ends the others."""

    def end() -> None:
        print(f"FAIL: rank {rank} did not finish within --timeout {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _tell(what: "Order", diagnosis: "Diagnosis", options: argparse.Namespace) -> int:
    from megagate.verify.report import record, render

    print(render(what, diagnosis), flush=True)
    if options.json:
        options.json.write_text(json.dumps(record(what, diagnosis), indent=1) + "\n")
    return 1 if diagnosis.causes else 0


if __name__ == "__main__":
    sys.exit(main())
