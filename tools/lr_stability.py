"""The learning-rate stability lab: `python tools/lr_stability.py run|status|report|task SPEC --output OUT`."""

import argparse
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megagate.config.command import exit_code, exit_code_of, positive
from megagate.errors import ConfigError, MegagateError

if TYPE_CHECKING:
    from megagate.analysis.lr.cluster import Require
    from megagate.analysis.lr.spec import RunKey, Spec
    from megagate.analysis.lr.study import Study
    from megagate.config.run import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="lr_stability.py", description="Variants of a model over a ladder of learning rates, by seed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_status(commands)
    _add_report(commands)
    _add_task(commands)
    options = parser.parse_args(arguments)
    said = "stopped; what was running is saved, and the same command goes on from there" if options.command in ("run", "task") else ""
    return exit_code_of(lambda: options.run(options), stopped=lambda stop: (said, exit_code(stop)))


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser(
        "run",
        help="do the runs of a study that are not over yet",
        description="Ctrl-C, SIGTERM and a killed process lose nothing: the same command goes on. With the slurm executor the runs are "
        "submitted, those that are neither over nor in the queue, and the command does not wait for them. Exit codes: 0 all runs are over "
        "(diverged ones too) or submitted, 2 bad input or a run that failed, 128 + signal when stopped.",
    )
    _add_study(run)
    run.add_argument("--dry-run", action="store_true", help="check every config against the cluster, and print the commands")
    run.add_argument("--jobs", type=positive, metavar="K", help="runs at a time, instead of the spec's; not for the hosts executor")
    run.add_argument("--only", nargs="+", default=[], metavar="VARIANT/LR/SEED", help="these alone; * stands for all of a part")
    run.set_defaults(run=_run)


def _add_status(commands: argparse._SubParsersAction) -> None:
    status = commands.add_parser("status", help="how far a study is")
    _add_study(status)
    status.set_defaults(run=_status)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser(
        "report",
        help="statistics, verdicts, pictures and a page, of the runs that are over",
        description="They are written into OUT/report. SPEC may also be the study.json of a study that was done elsewhere: into OUT, then.",
    )
    _add_study(report)
    report.set_defaults(run=_report)


def _add_task(commands: argparse._SubParsersAction) -> None:
    task = commands.add_parser(
        "task",
        help="do one run, as a task of Slurm's array",
        description="What the scripts in examples/slurm call. SIGTERM is handed on to COMMAND, which saves. Exit codes: 0 the run is over "
        "(diverged too), 2 bad input or the run failed, 143 it was stopped, and the same command goes on from there.",
    )
    _add_study(task)
    task.add_argument("--index", type=int, required=True, metavar="N", help="number of the run in OUT/slurm.json, which `run` writes")
    task.add_argument("ranks", nargs="+", metavar="COMMAND", help="behind --: starts the ranks; it gets --config FILE")
    task.set_defaults(run=_task)


def _add_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("spec", type=Path, metavar="SPEC", help="YAML file, as those in examples/lr_stability")
    command.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder of the study")


def _run(options: argparse.Namespace) -> int:
    from megagate.analysis.lr.cluster import check_files  # noqa: PLC0415 - --help at once
    from megagate.analysis.lr.hosts import run_hosts  # noqa: PLC0415
    from megagate.analysis.lr.local import run_local  # noqa: PLC0415
    from megagate.analysis.lr.slurm import array_command, require_slurm, submit  # noqa: PLC0415
    from megagate.analysis.lr.spec_file import read_spec  # noqa: PLC0415
    from megagate.analysis.lr.study import Study, prepare_data  # noqa: PLC0415

    spec = read_spec(options.spec)
    if options.jobs and spec.executor.kind == "hosts":
        raise ConfigError(f"--jobs {options.jobs}: executor.kind is hosts, which does one run after another; leave it out")
    study = Study(spec, options.output)
    configs = study.configs(study.keys, require=_gpu_rule(spec))  # all are checked, also where few are asked for
    check_files(spec.executor)
    chosen = _chosen(spec, options.only)
    jobs = options.jobs or spec.executor.jobs
    decides = spec.decides()
    study.require_same(decides | _kept_data(study))
    if options.dry_run:
        over = sum(study.outcome(key) is not None for key in chosen)
        if spec.executor.kind == "slurm":
            print(shlex.join(array_command(study, chosen, spec=options.spec, jobs=jobs)))
        for key in chosen:
            print(spec.executor.command(study.config_file(key)))
        ranks = spec.executor.world_size
        size = f"{ranks} rank{'s' if ranks > 1 else ''}{' of ' if spec.executor.gpu else ''}{spec.executor.gpu}"
        counted = f"{len(chosen)} of {len(study.keys)} runs{f', {over} of them over' if over else ''}"
        print(f"# {counted}; every config fits {size}; the data were not looked at", file=sys.stderr)
        return 0
    if spec.executor.kind == "slurm":
        require_slurm()
    made = not study.folder.exists()
    with study.locked():
        try:
            decides |= {f"data/{one.name}": prepare_data(configs[_any(study.keys, one.name)]) for one in spec.variants}
            study.require_same(decides)
            study.claim(decides, options.spec.read_text(encoding="utf-8"))
        except MegagateError:
            if made:
                shutil.rmtree(study.folder, ignore_errors=True)
            raise
        study.write_record()
        todo = {key: configs[key] for key in chosen}
        if spec.executor.kind == "hosts":
            run_hosts(study, todo, tell=_tell)
        elif spec.executor.kind == "slurm":
            _tell(submit(study, chosen, spec=options.spec, jobs=jobs))
        else:
            run_local(study, todo, jobs=jobs, threads=spec.executor.threads, tell=_tell)
    return 0


def _gpu_rule(spec: "Spec") -> "Require":
    """That a run fits the GPU which the executor names."""
    from megagate.plan.memory import check_gpu  # noqa: PLC0415 - --help at once

    def require(config: "RunConfig", ranks: int) -> None:
        if spec.executor.gpu:
            check_gpu(config, world_size=ranks, gpu=spec.executor.gpu, key="executor.gpu")

    return require


def _kept_data(study: "Study") -> dict[str, str]:
    """The fingerprints that the folder holds, so that what else differs is told before data are read."""
    from megagate.analysis.lr.study import held  # noqa: PLC0415

    return {key: value for key, value in held(study.folder).items() if key.startswith("data/")}


def _any(keys: Sequence["RunKey"], variant: str) -> "RunKey":
    return next(key for key in keys if key.variant == variant)


def _status(options: argparse.Namespace) -> int:
    from megagate.analysis.lr.slurm import queue_lines  # noqa: PLC0415
    from megagate.analysis.lr.status import status_lines  # noqa: PLC0415

    study = _existing(options)
    study.refresh_record()
    print("\n".join(status_lines(study)))
    if study.spec.executor.kind == "slurm":
        print("\n".join(queue_lines(study)))
    return 0


def _task(options: argparse.Namespace) -> int:
    from megagate.analysis.lr.launched import run_launched  # noqa: PLC0415
    from megagate.analysis.lr.slurm import run_of  # noqa: PLC0415

    study = _existing(options)
    key = run_of(study, options.index)
    _tell(f"the run {key}; its log is {study.log(key)}")
    try:
        over = run_launched(study, key, study.configs([key])[key], options.ranks, tell=_tell)
    except KeyboardInterrupt:
        if study.outcome(key) is None:
            raise
        over = True  # at the moment of the stop
    return 0 if over else 128 + signal.SIGTERM


def _report(options: argparse.Namespace) -> int:
    import json  # noqa: PLC0415

    from megagate.analysis.lr.report import report_study  # noqa: PLC0415

    if options.spec.suffix == ".json":  # all that a report is made of
        record, folder = options.spec, options.output
    else:
        study = _existing(options)
        study.refresh_record()
        record, folder = study.folder / "study.json", study.folder / "report"
    written = report_study(record, folder)
    report = json.loads(written[0].read_text(encoding="utf-8"))
    for verdict in report["verdicts"]:
        print(verdict["line"])
    print("\n".join(f"wrote {path}" for path in written), file=sys.stderr)
    return 0


def _existing(options: argparse.Namespace) -> "Study":
    """The study of the spec in its folder.

    Raises:
        ConfigError: There is none.
        RunError: The folder is another spec's.
    """
    from megagate.analysis.lr.spec_file import read_spec  # noqa: PLC0415
    from megagate.analysis.lr.study import Study  # noqa: PLC0415

    spec = read_spec(options.spec)
    study = Study(spec, options.output)
    study.require_same(spec.decides() | _kept_data(study))
    if not (study.folder / "spec.json").exists():
        raise ConfigError(f"--output {study.folder}: holds no study; `run` makes one, on a disk that all machines share")
    return study


def _chosen(spec: "Spec", only: Sequence[str]) -> list["RunKey"]:
    """The runs that --only names, all without it."""
    keys, chosen = spec.runs(), set()
    for text in only:
        parts = text.split("/")
        if len(parts) != 3:
            raise ConfigError(f"--only {text}: must be VARIANT/LR/SEED; write it as in {keys[0].variant}/{keys[0].lr:g}/{keys[0].seed}")
        found = [key for key in keys if all(_names(part, value) for part, value in zip(parts, key, strict=True))]
        if not found:
            raise ConfigError(f"--only {text}: names no run of {spec.name}; --dry-run lists them")
        chosen.update(found)
    return [key for key in keys if not only or key in chosen]


def _names(part: str, value: str | float) -> bool:
    if part == "*" or part == value:
        return True
    try:
        return not isinstance(value, str) and float(part) == value
    except ValueError:
        return False


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
