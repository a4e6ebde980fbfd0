"""Measure megagate: `python tools/benchmark.py step --help`, `gate --help`, `fp8 --help`, `data --help` and so on."""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megagate.config.command import above_zero, exit_code, positive, stoppable

if TYPE_CHECKING:
    from megagate.analysis.benchmark.rows import Limits, Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description="Measure megagate against its peers, and what its parts cost.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_step(commands)
    _add_gate(commands)
    _add_observe(commands)
    _add_fp8(commands)
    _add_data(commands)
    _add_checkpoint(commands)
    _add_convert(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt as stop:
        return exit_code(stop)


def _add_step(commands: argparse._SubParsersAction) -> None:
    step = commands.add_parser(
        "step",
        help="full training steps: megagate, transformers, and what gates and ZeRO cost",
        description="One process per row, driven in turns; paired ratios to the first row. Needs 1-6 GB of memory per row.",
    )
    step.add_argument("--rows", metavar="A,B", help="rows beside the base, by key; all without this option (an unknown key lists them)")
    step.add_argument("--shape", default="S", choices=["S", "L", "tiny"], help="sizes of the model and of a step")
    step.add_argument("--rounds", type=positive, default=15, metavar="N", help="steps of each row after its warm-up")
    step.add_argument("--seconds", type=float, default=1800.0, metavar="LIMIT", help="stop after this time with what complete rounds gave")
    step.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="of each process")
    step.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers here too")
    step.set_defaults(run=_step)


def _add_gate(commands: argparse._SubParsersAction) -> None:
    gate = commands.add_parser(
        "gate",
        help="what the attention gate adds to a training step, with an interval narrow enough to say",
        description="Models with and without a gate do the same step by turns until every row's interval is narrow or a limit is reached.",
    )
    gate.add_argument(
        "--rows", default="headwise,elementwise", metavar="A,B", help="gates; 'none' measures the method against itself alone"
    )
    _add_study(gate, half_width=0.7)
    gate.set_defaults(run=_gate)


def _add_observe(commands: argparse._SubParsersAction) -> None:
    observe = commands.add_parser(
        "observe",
        help="what a look at the model (observe.every) adds to a training step",
        description="Steps of one run under ZeRO-1, with and without a look by turns, until the interval is narrow or a limit is reached.",
    )
    observe.add_argument("--config", type=Path, metavar="FILE", help="of the run, on one process and random tokens, instead of --shape")
    _add_study(observe, half_width=2.0)
    observe.set_defaults(run=_observe)


def _add_study(command: argparse.ArgumentParser, *, half_width: float) -> None:
    command.add_argument("--shape", default="S", choices=["S", "L", "tiny"], help="sizes of the model and of a step")
    stop = "stop when no row's 95%% interval is wider than twice this"
    command.add_argument("--half-width", type=above_zero, default=half_width, metavar="PERCENT", help=stop)
    command.add_argument("--pairs", type=positive, default=400, metavar="N", help="stop at this many pairs")
    command.add_argument("--seconds", type=above_zero, default=1800.0, metavar="LIMIT", help="stop after this time with what there is")
    command.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="of the process")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every pair's numbers here, after each pair")
    command.add_argument(
        "--resume", action="store_true", help="go on with FILE where it exists; refused where machine, versions or code differ"
    )


def _add_fp8(commands: argparse._SubParsersAction) -> None:
    fp8 = commands.add_parser(
        "fp8",
        help="the loss that a job ends with under each emulated FP8 recipe, beside bf16",
        description="The job of a config on one rank, once for each row and seed; gaps to bf16 are paired by seed.",
    )
    fp8.add_argument("--rows", metavar="A,B", help="rows beside bf16, by key; all without this option (an unknown key lists them)")
    fp8.add_argument("--config", type=Path, metavar="FILE", help="of the job (default: examples/configs/tiny.yaml)")
    fp8.add_argument("--seeds", type=positive, default=3, metavar="N", help="from the config's on (default: 3)")
    fp8.add_argument("--steps", type=positive, metavar="N", help="of each run (default: the config's)")
    fp8.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    fp8.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="of each run")
    fp8.add_argument("--json", type=Path, metavar="FILE", help="write what finished runs gave here; the runs go to FILE.runs")
    fp8.add_argument("--resume", action="store_true", help="go on with FILE; refused where config, data, machine, versions or code differ")
    fp8.set_defaults(run=_fp8)


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser(
        "data",
        help="start-up, samples, preprocessing and orders, beside Megatron's own code",
        description="Each row beside its peer of megatron-core, in turns, in processes of their own. Files go to a temporary folder: 2 GB "
        "with the defaults, 4 GB with --documents 50000000.",
    )
    data.add_argument("--rows", metavar="A,B", help="some rows, by key; all without this option (an unknown key lists them)")
    data.add_argument("--documents", type=positive, default=5_000_000, metavar="N", help="of the made-up data set (default: 5000000)")
    data.add_argument("--shards", type=positive, default=1000, metavar="N", help="of 10^10 tokens, of the largest one (default: 1000)")
    data.add_argument("--text", type=Path, metavar="FILE", help="a .jsonl to preprocess (default: the text files of this Python)")
    data.add_argument("--megabytes", type=above_zero, default=64.0, metavar="MB", help="most of the text, 10^6 bytes (default: 64)")
    data.add_argument("--tokenizer", metavar="T", help="a tokenizer.json or a folder with one (default: 16,384 tokens, trained here)")
    data.add_argument("--rounds", type=positive, metavar="N", help="of each row (default: 3 of text, 5 or 9 of the others)")
    _add_files(data)
    data.set_defaults(run=_data)


def _add_checkpoint(commands: argparse._SubParsersAction) -> None:
    checkpoint = commands.add_parser(
        "checkpoint",
        help="saving beside cp, loading beside reading the same bytes",
        description="Ranks save and load a made-up state, digests and fsync included, in turns with cp of the same bytes. Files go to a "
        "temporary folder: three times --megabytes.",
    )
    checkpoint.add_argument("--rows", metavar="A,B", help="some rows, by key; all without this option (an unknown key lists them)")
    checkpoint.add_argument("--megabytes", type=above_zero, default=1000.0, metavar="MB", help="of the state, 10^6 bytes (default: 1000)")
    checkpoint.add_argument("--ranks", type=int, default=4, choices=[1, 2, 4, 8], help="that save (default: 4)")
    checkpoint.add_argument("--rounds", type=positive, metavar="N", help="of each row (default: 5)")
    _add_files(checkpoint)
    checkpoint.set_defaults(run=_checkpoint)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        help="checkpoints to Hugging Face's form and back, beside cp",
        description="Conversions of a made-up mixture of experts, digests and fsync included and verification left out, in turns with cp "
        "of what they read. Files go to a temporary folder: 4.2 times --megabytes.",
    )
    convert.add_argument("--rows", metavar="A,B", help="some rows, by key; all without this option (an unknown key lists them)")
    convert.add_argument("--megabytes", type=above_zero, default=5000.0, metavar="MB", help="of weights, 10^6 bytes (default: 5000)")
    convert.add_argument("--rounds", type=positive, metavar="N", help="of each row (default: 5)")
    _add_files(convert)
    convert.set_defaults(run=_convert)


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seconds", type=above_zero, default=3600.0, metavar="LIMIT", help="stop after this time with complete rounds")
    place = Path(tempfile.gettempdir())
    command.add_argument("--folder", type=Path, default=place, metavar="DIR", help="where the temporary folder is made")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers here too")


def _step(options: argparse.Namespace) -> int:
    from megagate.analysis.benchmark.step import ROWS, SHAPES, markdown, measure
    from megagate.errors import MegagateError

    deadline = time.monotonic() + options.seconds
    keys = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [key for key in keys if key not in ROWS]:
        print(f"--rows: no row {', '.join(unknown)}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    try:
        table = measure(keys, shape=options.shape, rounds=options.rounds, deadline=deadline, threads=options.threads, tell=_tell)
    except MegagateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        _tell("")
    if not table.rounds:
        print(f"no round was complete after {options.seconds:g} s; give more --seconds or fewer --rows", file=sys.stderr)
        return 1
    tokens = SHAPES[options.shape].tokens
    print(f"Shape {options.shape}, {tokens} tokens a step, bf16; {table.rounds} rounds; {_machine(options.threads)}.")
    print(f"Peak: {table.peak_flops / 1e9:.0f} GFLOP/s in bf16 matrix products of 2048 x 2048 x 2048, best round.\n")
    print(markdown(table))
    print(_command())
    if options.json:
        conditions = {"shape": options.shape, "threads": options.threads, "machine": _machine(options.threads)}
        options.json.write_text(json.dumps(conditions | table.record(), indent=1) + "\n")
    return 0


def _gate(options: argparse.Namespace) -> int:
    from megagate.analysis.benchmark.gate import GATES, WORK, table

    rows = [] if options.rows == "none" else options.rows.split(",")
    if unknown := [row for row in rows if row not in GATES]:
        return _refuse(f"--rows: no row {', '.join(unknown)}; there are {', '.join(GATES)}, or 'none'")
    return _study(options, options.shape, [gate for gate in GATES if gate in rows], work=WORK, table=table)


def _observe(options: argparse.Namespace) -> int:
    from megagate.analysis.benchmark.observe import OBSERVED, WORK, table
    from megagate.config.cli import parse
    from megagate.errors import ConfigError

    try:
        _ = options.config and parse(["--config", str(options.config)], prog="benchmark.py")
    except ConfigError as error:
        return _refuse(str(error))
    return _study(options, str(options.config or options.shape), [OBSERVED], work=WORK, table=table)


def _study(options: argparse.Namespace, shape: str, models: Sequence[str], *, work: str, table: "Callable[..., list[str]]") -> int:
    """Measure by `gate.study`, and print its table."""
    from megagate.analysis.benchmark.gate import Record, study
    from megagate.analysis.benchmark.record import problem_of
    from megagate.errors import MegagateError

    deadline = time.monotonic() + options.seconds
    if problem := problem_of(options.json, resume=options.resume):
        return _refuse(problem)
    record = Record.empty({"shape": shape, "threads": options.threads, "machine": _machine(options.threads)}, models)
    try:
        if options.resume and options.json.exists():
            record.resume(options.json)
        save = (lambda record: record.write(options.json)) if options.json else (lambda record: None)
        study(record, pairs=options.pairs, half_width=options.half_width, deadline=deadline, save=save, tell=_tell, target=work)
    except MegagateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        _tell("")
    if not record.pairs:
        print(f"no pair was complete after {options.seconds:g} s; give more --seconds", file=sys.stderr)
        return 1
    print("\n".join(table(record, machine=_machine(options.threads))))
    print(_command())
    return 0


def _fp8(options: argparse.Namespace) -> int:
    from megagate.analysis.benchmark.fp8 import BASE, ROWS
    from megagate.analysis.benchmark.record import problem_of
    from megagate.errors import MegagateError

    wanted = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [row for row in wanted if row not in ROWS]:
        return _refuse(f"--rows: no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if problem := problem_of(options.json, resume=options.resume):
        return _refuse(problem)
    try:
        with ExitStack() as stack:
            stack.enter_context(stoppable())
            folder = options.json.with_name(f"{options.json.name}.runs") if options.json else None
            folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megagate-benchmark-")))
            print("\n".join(_fp8_study(options, [row for row in ROWS if row in (BASE, *wanted)], folder)))
    except MegagateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        _tell("")
    print(_command())
    return 0


def _fp8_study(options: argparse.Namespace, rows: Sequence[str], folder: Path) -> list[str]:
    """Lines of markdown."""
    from megagate.analysis.benchmark.fp8 import Record, remark, table, valid_batches
    from megagate.analysis.benchmark.fp8_runs import prepare, study
    from megagate.config.cli import parse

    path = options.config or Path(__file__).parents[1] / "examples" / "configs" / "tiny.yaml"
    base = parse(["--config", str(path)], prog="benchmark.py")
    seeds = range(base.train.seed, base.train.seed + options.seeds)
    folder.mkdir(exist_ok=True)
    fingerprint, valid_tokens = prepare(base, folder)
    machine = _machine(options.threads, ("torch", "deepspeed"))
    record = Record.empty(base, steps=options.steps or base.train.steps, data=fingerprint[:12], machine=machine)
    if options.resume and options.json.exists():
        record.resume(options.json)
    save = (lambda record: record.write(options.json)) if options.json else (lambda record: None)
    save(record)
    how = {"rows": rows, "seeds": seeds, "folder": folder, "valid_tokens": valid_tokens, "jobs": options.jobs, "threads": options.threads}
    study(record, base, **how, save=save, tell=_tell)
    batch = base.train.global_batch_size * base.train.seq_len
    validated = min(valid_tokens, valid_batches(base, valid_tokens) * batch)
    head = f"{path.name}, {record.conditions['steps']} steps of {batch} tokens, "
    head += f"{len(seeds)} seeds; {validated} tokens to validate on; {machine}."
    return [f"{head}\n", *table(record, rows, seeds), remark(base, rows, steps=record.conditions["steps"])]


def _data(options: argparse.Namespace) -> int:
    from megagate.analysis.benchmark.data import ROWS, Options

    def wanted(folder: Path) -> Options:
        return Options(
            folder=folder,
            documents=options.documents,
            shards=options.shards,
            rounds=options.rounds,
            deadline=time.monotonic() + options.seconds,
            text=options.text,
            megabytes=options.megabytes,
            tokenizer=options.tokenizer,
            gigatoken=_without_gigatoken(),
        )

    packages = ("megatron-core", "tokenizers", "transformers", "numpy")
    return _with_files(options, ROWS, wanted, packages=packages, note="; CPU time of all threads")


def _checkpoint(options: argparse.Namespace) -> int:
    from megagate.analysis.benchmark.checkpoint import ROWS, Options

    def wanted(folder: Path) -> Options:
        deadline = time.monotonic() + options.seconds
        return Options(folder=folder, rounds=options.rounds, deadline=deadline, megabytes=options.megabytes, ranks=options.ranks)

    return _with_files(options, ROWS, wanted, packages=("torch", "safetensors", "blake3"), note="; wall time")


def _convert(options: argparse.Namespace) -> int:
    from megagate.analysis.benchmark.convert import ROWS, Options

    def wanted(folder: Path) -> Options:
        deadline = time.monotonic() + options.seconds
        return Options(folder=folder, rounds=options.rounds, deadline=deadline, megabytes=options.megabytes)

    return _with_files(options, ROWS, wanted, packages=("torch", "safetensors", "blake3"), note="; wall time")


def _with_files(
    options: argparse.Namespace, rows: "Mapping[str, Row]", wanted: "Callable[[Path], Limits]", *, packages: Sequence[str], note: str
) -> int:
    """Measure rows that need a temporary folder, and print their table."""
    from megagate.analysis.benchmark.rows import measure, report
    from megagate.errors import MegagateError

    keys = options.rows.split(",") if options.rows else list(rows)
    if unknown := [key for key in keys if key not in rows]:
        listed = ", ".join(f"{key} ({row.title})" for key, row in rows.items())
        return _refuse(f"--rows: no row {', '.join(unknown)}; there are {listed}")
    if not options.folder.is_dir():
        return _refuse(f"--folder {options.folder}: no such folder; make it, or give another")
    try:
        with stoppable(), tempfile.TemporaryDirectory(prefix="megagate-benchmark-", dir=options.folder) as folder:
            result = measure(rows, keys, wanted(Path(folder)), tell=_tell)
    except MegagateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        _tell("")
    if options.json:
        series = {key: {name: vars(one) for name, one in series.items()} for key, series in result.series.items()}
        options.json.write_text(json.dumps({"machine": _machine(1), "rows": series}, indent=1) + "\n")
    print("\n".join(report(result, f"{_machine(1, packages)}{note}.")))
    print(_command())
    return 0 if result.lines else 1


def _without_gigatoken() -> str:
    """Why gigatoken cannot be measured, or nothing."""
    tool = Path(__file__).with_name("preprocess_data.py")
    if "--tokenizer-backend" not in tool.read_text():
        return f"{tool.name} has no --tokenizer-backend yet"
    return "" if find_spec("gigatoken") else "the package is not installed: pip install 'megagate[fast]'"


def _command() -> str:
    return f"\n    python {shlex.join(['tools/benchmark.py', *sys.argv[1:]])}"


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _machine(threads: int, packages: Sequence[str] = ("torch", "transformers", "deepspeed")) -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = next((line.split(": ", 1)[1] for line in cpuinfo.splitlines() if line.startswith("model name")), platform.machine())
    features = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpuinfo]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{name} ({', '.join(features) or 'no bf16 instructions'}), {threads} threads; {versions}"


def _tell(text: str) -> None:
    """Progress, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
