"""How large is a model, and does its training fit a GPU? `python tools/count_params.py --help`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megagate.config.run import RunConfig
    from megagate.plan.figures import Figures
    from megagate.plan.memory import Memory

LAYOUT_KEYS = ("dp", "tp", "ep", "zero")


class Plan(NamedTuple):
    """A run on so many ranks, and what it takes on each."""

    config: "RunConfig"
    world_size: int
    memory: "Memory"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and count; returns the exit code: 0, or 2 for bad input and for a run that does not fit the GPU."""
    options, settings = _parser().parse_known_args(arguments)
    from megagate.errors import MegagateError

    try:
        if options.gpu == "list":
            return _gpus(options)
        return _all(options, settings) if options.all else _one(options, settings)
    except MegagateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="count_params.py",
        allow_abbrev=False,
        usage="%(prog)s (--preset NAME | --config F) [--KEY VALUE] ... [--layout L [--gpu GPU]] [--json], or --all [--json]",
        description="Parameters, FLOPs and KV cache of a model, beside the paper's figure where it is one of the paper's; with a layout "
        "also bytes per GPU. From the config alone: no GPU and no PyTorch is needed.",
    )
    parser.add_argument("--all", action="store_true", help="list every preset")
    parser.add_argument("--json", action="store_true", help="print one JSON object (with --all: one per preset, by name)")
    parser.add_argument("--layout", metavar="L", help="such as dp=8,tp=1,ep=8,zero=1; tp, ep and zero are the config's where left out")
    parser.add_argument("--world", type=int, metavar="N", help="ranks, in the config's own layout (instead of --layout)")
    what_for = "a name (`--gpu list` shows them) or GB: refuse a run that needs over 90 %% of it, or, by name, kernels that it lacks"
    parser.add_argument("--gpu", metavar="GPU", help=what_for)
    return parser


def _gpus(options: argparse.Namespace) -> int:
    from megagate.plan.hardware import GPU_BYTES

    if options.json:
        print(json.dumps(dict(GPU_BYTES), indent=1))
    else:
        print("\n".join(f"{name:<14} {size / 1e9:>5.0f} GB" for name, size in GPU_BYTES.items()))
    return 0


def _all(options: argparse.Namespace, settings: list[str]) -> int:
    from megagate.errors import ConfigError
    from megagate.plan.figures import of_all

    if settings or options.layout or options.world is not None or options.gpu:
        raise ConfigError("--all goes with --json only; name one preset or config for everything else")
    rows = of_all()
    if options.json:
        print(json.dumps({row.name: _record(row) for row in rows}, indent=1))
        return 0
    names = f"{'total M':>9} {'active M':>9} {'MFLOPs':>7} {'KV bytes':>8} {'added M':>8} {'paper':>6}"
    print(f"{'preset':<30} {names}  (FLOPs and bytes of KV cache are for each token)")
    for row in rows:
        paper = "" if row.paper_added_millions is None else f"{row.paper_added_millions:g}"
        mark = "differs" if row.agrees is False else ""
        size = f"{row.total / 1e6:>9.1f} {row.active / 1e6:>9.1f} {row.flops_per_token / 1e6:>7.0f} {row.kv_cache_bytes_per_token:>8}"
        numbers = f"{size} {row.added / 1e6:>8.1f} {paper:>6}"
        print(f"{row.name:<30} {numbers}  {mark:<8} {row.title}".rstrip())
    first = {note: row.name for row in reversed(rows) for note in row.notes}
    print("\n".join(f"{name}: {note}" for note, name in reversed(first.items())))
    return 0


def _one(options: argparse.Namespace, settings: list[str]) -> int:
    from megagate.config.cli import parse
    from megagate.plan.figures import of_run

    config = parse(settings, prog="count_params.py")
    plan = _plan(config, options)
    _check_model(config)
    figures = of_run(config, preset_name=_last_preset(settings))
    if options.json:
        print(json.dumps(_record(figures) | (_memory_record(plan) if plan else {}), indent=1))
    else:
        print("\n".join([*_lines(figures, config), *(_memory_lines(plan) if plan else [])]), flush=True)
    if plan and options.gpu:
        from megagate.plan.memory import check_fits

        check_fits(plan.config, plan.memory, world_size=plan.world_size, gpu=options.gpu)
    return 0


def _check_model(config: "RunConfig") -> None:
    """All rules but those of the layout: a model can be counted before it has one."""
    from megagate.config.rules import check
    from megagate.config.run import ParallelConfig

    check(replace(config, parallel=ParallelConfig()), world_size=1)


def _last_preset(settings: list[str]) -> str | None:
    """The name that goes with the last `--preset` of a command line that can be parsed."""
    for word, following in reversed(list(zip(settings, [*settings[1:], ""], strict=True))):
        if word == "--preset" or word.startswith("--preset="):
            return word.partition("=")[2] or following
    return None


def _plan(config: "RunConfig", options: argparse.Namespace) -> Plan | None:
    """The run under its layout; None where none was asked for."""
    from megagate.config.rules import check
    from megagate.errors import ConfigError
    from megagate.plan.hardware import gpu_bytes, gpu_hardware
    from megagate.plan.memory import estimate

    hardware = None
    if options.gpu:
        gpu_bytes(options.gpu)
        hardware = gpu_hardware(options.gpu)
    if options.layout and options.world is not None:
        raise ConfigError(f"--world ({options.world}) is dp x tp of --layout ({options.layout}); leave one of them out")
    if not options.layout and options.world is None:
        if options.gpu:
            raise ConfigError(f"--gpu ({options.gpu}) needs the number of ranks; add --layout dp=8,tp=1,ep=8,zero=1, or --world 8")
        return None
    world_size = options.world
    if options.layout:
        layout = {"tp": config.parallel.tp, "ep": config.parallel.ep, "zero": config.parallel.zero_stage} | _layout(options.layout)
        parallel = replace(config.parallel, tp=layout["tp"], ep=layout["ep"], zero_stage=layout["zero"])
        config, world_size = replace(config, parallel=parallel), layout["dp"] * layout["tp"]
    if world_size < 1:
        remedy = "give --layout a dp and a tp above 0" if options.layout else "give --world the number of ranks"
        key = "the number of ranks" if options.layout else "--world"
        raise ConfigError(f"{key} ({world_size}) must be at least 1; {remedy}")
    if config.precision.dtype == "auto":  # as on the GPUs that this is about: the rules, too, are those of bf16
        config = replace(config, precision=replace(config.precision, dtype="bf16"))
    check(config, world_size=world_size, hardware=hardware)
    return Plan(config, world_size, estimate(config, world_size=world_size))


def _layout(text: str) -> dict[str, int]:
    from megagate.errors import ConfigError

    layout = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in LAYOUT_KEYS or key in layout or not value.isdecimal():
            raise ConfigError(f"--layout {text}: {part!r} must be dp, tp, ep or zero with a number, each once; write dp=8,tp=1,ep=8,zero=1")
        layout[key] = int(value)
    if "dp" not in layout:
        raise ConfigError(f"--layout {text} must name dp, the data-parallel ranks; write dp=8,tp=1,ep=8,zero=1")
    return layout


# ---- what is printed


def _record(figures: "Figures") -> dict[str, object]:
    return asdict(figures) | {"agrees": figures.agrees}


def _lines(figures: "Figures", config: "RunConfig") -> list[str]:
    lines = [
        f"{figures.name}{': ' if figures.title else ''}{figures.title}",
        f"  total    {figures.total:>17,}",
        f"  active   {figures.active:>17,}  for each token, the embedding matrix included",
        f"  added    {figures.added:>17,}  to {figures.baseline}",
    ]
    if figures.equal_ffn_size is not None:
        lines.append(f"           model.ffn_size {figures.equal_ffn_size} has the ungated model's parameters")
    if figures.agrees is not None:
        verdict = "agrees to its printed precision" if figures.agrees else "DIFFERS"
        lines.append(f"  paper    {figures.paper_added_millions:>15g} M  added; {verdict}")
    lines += [
        f"  FLOPs    {figures.flops_per_token:>17,}  for each token, forward and backward, at sequences of {config.train.seq_len}",
        f"  KV cache {figures.kv_cache_bytes_per_token:>17,}  bytes for each token, bf16",
    ]
    return [*lines, *figures.notes]


def _memory_record(plan: Plan) -> dict[str, object]:
    from megagate.plan.fp8 import memory_notes

    memory = plan.memory
    totals = {"total": memory.total(recompute=False), "total_recompute": memory.total(recompute=True)}
    return {"world_size": plan.world_size, "recompute": plan.config.train.recompute, "bytes_per_gpu": asdict(memory) | totals} | {
        "memory_notes": list(memory_notes(plan.config))
    }


def _memory_lines(plan: Plan) -> list[str]:
    from megagate.plan.fp8 import memory_notes

    parallel, memory = plan.config.parallel, plan.memory
    dp = plan.world_size // parallel.tp
    items = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("masters", memory.masters),
        ("moments", memory.moments),
        ("ZeRO's buffers, at most", memory.buffers),
        ("activations", memory.kept),
        ("activations, recomputing", memory.recomputed),
        ("instead of buffers and activations: step, at most", memory.step),
        ("in all", memory.total(recompute=False)),
        ("in all, recomputing", memory.total(recompute=True)),
    ]
    if memory.kept_if_twice > memory.kept:
        items += [
            ("activations if its experts get twice their share", memory.kept_if_twice),
            ("the same, recomputing", memory.recomputed_if_twice),
        ]
    layout = f"dp={dp} tp={parallel.tp} ep={parallel.ep} zero={parallel.zero_stage}"
    configured = "recomputes" if plan.config.train.recompute else "does not recompute"
    head = f"GB per GPU with {layout}, micro-batch {plan.config.micro_batch(dp)} (the config {configured}):"
    return [head, *(f"  {name:<50} {size / 1e9:>8.2f}" for name, size in items), *memory_notes(plan.config)]


if __name__ == "__main__":
    sys.exit(main())
