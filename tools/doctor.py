"""Is my layout the same model as one process? `python tools/doctor.py --help`."""

import argparse
import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import device

    from megagate.config.run import RunConfig

PRELOAD = ["deepspeed", "torch._dynamo", "torch._inductor.compile_fx"]  # by ZeRO's first step: seconds in each rank, once in their server
NEAR_S = 10.0  # ranks start one after the other, and so do their limits


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 the same model, 1 not, or the ranks failed, 2 bad input."""
    options, settings = _parser().parse_known_args(arguments)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    from megagate.config.cli import parse
    from megagate.errors import MegagateError

    # The ranks of one machine read the same files, so its first one speaks for them.
    speaks = int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        config = parse(settings, prog="doctor.py")
        _check(options)
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
        usage="%(prog)s [--world N] [--backend te|emulated [--recipe NAME,...]] [--json FILE] [--timeout SECONDS] [--fault NAME] "
        "[--preset NAME] [--config F] [--KEY VALUE] ...",
        description="Shrinks your run to a minute's work, keeps its layout, precision and options, and compares it with one process on "
        "plain PyTorch: losses, clip norm, every gradient and weight, bytes sent, all without FP8; with --backend instead compares the "
        "products of Transformer Engine, or of emulated FP8, with plain PyTorch's in the same layout. Start it as "
        "`deepspeed --num_gpus 4 tools/doctor.py --config F`, or, on CPUs, plainly with --world.",
    )
    parser.add_argument("--backend", choices=["te", "emulated"], default="", help="compare these kernels, layer by layer")
    parser.add_argument("--recipe", metavar="NAME,...", help="of bf16 (te without FP8), delayed, current, blockwise, mxfp8")
    parser.add_argument("--world", type=int, default=0, metavar="N", help="start N ranks on this machine's CPU (without a launcher)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here too")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="end with an error after this time (default 300)")
    parser.add_argument("--fault", default="", metavar="NAME", help="put a fault in, to see that it is found (an unknown name lists them)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """What would else be found out after a minute's work."""
    from megagate.errors import ConfigError

    if not (0 < options.timeout < math.inf):
        raise ConfigError(f"--timeout ({options.timeout:g}) must be a number of seconds above 0; leave it out for 300")
    if options.recipe is not None and not options.backend:
        raise ConfigError(f"--recipe ({options.recipe}) is of kernels to compare; add --backend te or emulated, or leave it out")
    if options.recipe is not None and not _recipes(options):
        raise ConfigError(f"--recipe ({options.recipe}) names no recipe; name some, or leave it out for all")
    writes = int(os.environ.get("RANK", 0)) == 0
    if writes and options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise ConfigError(f"--json {options.json} cannot be written: its folder must exist, and it be no folder; give the path of a file")


def _recipes(options: argparse.Namespace) -> tuple[str, ...]:
    """Each once, as they were asked for; none asks for all."""
    names = (name.strip() for name in (options.recipe or "").split(","))
    return tuple(dict.fromkeys(filter(None, names)))


class Examination(NamedTuple):
    """One of the doctor's two examinations.

    Args:
        what: What the ranks are told.
        local: Examines in a rank that was started here.
        launched: Examines in a rank that a launcher started; also given the device.
        render: What was found as text, given `what` too.
        record: As data.
    """

    what: Any
    local: Callable[..., Any]
    launched: Callable[..., Any]
    render: Callable[[Any, Any], str]
    record: Callable[[Any, Any], dict[str, Any]]


def _examination(config: "RunConfig", options: argparse.Namespace, *, world_size: int, device: "device") -> Examination:
    """Of the layout, or of kernels."""
    from megagate.parallel.init import read_hardware

    asked = {"world_size": world_size, "gpu": device.type == "cuda", "fault": options.fault, "hardware": read_hardware(device)}
    if options.backend:
        from megagate.verify.precision import examine_precision, examine_precision_local, precision_order
        from megagate.verify.precision_report import record_precision, render_precision

        what = precision_order(config, examined=options.backend, recipes=_recipes(options), **asked)
        return Examination(what, examine_precision_local, examine_precision, render_precision, record_precision)
    from megagate.verify.doctor import examine, examine_local, order
    from megagate.verify.report import record, render

    return Examination(order(config, **asked), examine_local, examine, render, record)


def _in_own_ranks(config: "RunConfig", options: argparse.Namespace) -> int:
    """Start the ranks here."""
    from megagate.errors import ConfigError, MegagateError

    if options.world < 1:
        raise ConfigError(f"--world ({options.world}) must be at least 1 without a launcher; add --world 4, or start with deepspeed")
    from megagate.parallel.spawn import RankError, RankTimeoutError, run_ranks, start_server

    cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update(cpu)  # the ranks inherit it
    start_server(preload=["torch"] if options.backend else PRELOAD, environment=cpu)  # kernels are compared without an engine
    import torch

    how = _examination(config, options, world_size=options.world, device=torch.device("cpu"))
    try:
        found = run_ranks(how.local, options.world, how.what, timeout=options.timeout)[0]
    except RankTimeoutError as error:
        return _failed(str(error), f"ranks {', '.join(map(str, error.ranks))} {_late(options)}")
    except RankError as error:
        if isinstance(error.__cause__, MegagateError):
            raise error.__cause__ from None
        return _failed(str(error), f"rank {error.ranks[0]}: {_reason(error)}")
    return _tell(how, found, options)


def _reason(error: Exception) -> str:
    """In one line: the rank's exception, or how it died, which is the story's second paragraph."""
    if error.__cause__ is not None:
        return _in_a_line(error.__cause__)
    lines = str(error).partition("\n\nits last output:")[0].split("\n\n", 1)[1].splitlines()
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]  # an exception that could not be sent, or a death


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _failed(story: str, reason: str) -> int:
    """A rank raised, died or stood still; the reason is the last line."""
    print(f"{story}\n\nFAIL: {reason}", file=sys.stderr, flush=True)
    return 1


def _late(options: argparse.Namespace) -> str:
    return f"did not finish within --timeout {options.timeout:g} s"


def _in_launched_rank(config: "RunConfig", options: argparse.Namespace) -> int:
    """One of the ranks that a launcher started."""
    from megagate.errors import ConfigError, MegagateError

    if options.world:
        raise ConfigError(f"--world ({options.world}) is for a start without a launcher; leave it out under deepspeed")
    import torch.distributed as dist

    from megagate.parallel.init import LaunchEnv, init_process_group, pick_device

    env = LaunchEnv.read()
    deadline = _end_after(env.rank, options)
    device = pick_device(env.local_rank, local_size=env.local_size)
    how = _examination(config, options, world_size=env.world_size, device=device)
    init_process_group(env, device=device, timeout=timedelta(seconds=options.timeout + 60))
    try:
        found = how.launched(how.what, device=device)
    except Exception as error:
        if isinstance(error, MegagateError):
            raise
        if deadline - time.monotonic() < NEAR_S:
            threading.Event().wait()  # another rank's time was over before ours, and its end is the error: say what it says
        return _failed(traceback.format_exc(), f"rank {env.rank}: {_in_a_line(error)}")
    code = _tell(how, found, options) if found is not None else 0
    dist.barrier()
    dist.destroy_process_group()
    return code


def _end_after(rank: int, options: argparse.Namespace) -> float:
    """End this process when the time is over, whatever it waits for; the launcher then ends the others. Returns that time."""

    def end() -> None:
        faulthandler.dump_traceback()  # every rank's time ends at once: where each of them stands tells which one held the others up
        print(f"FAIL: rank {rank} {_late(options)}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(options.timeout, end)
    timer.daemon = True
    timer.start()
    return time.monotonic() + options.timeout


def _tell(how: Examination, found: Any, options: argparse.Namespace) -> int:
    print(how.render(how.what, found), flush=True)
    if options.json:
        options.json.write_text(json.dumps(how.record(how.what, found), indent=1) + "\n")
    return 1 if found.causes else 0


if __name__ == "__main__":
    sys.exit(main())
