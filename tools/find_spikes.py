"""Finds loss spikes: `python tools/find_spikes.py --help`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megagate.config.command import exit_code_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 fine, with and without events; 2 bad input."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="find_spikes.py",
        allow_abbrev=False,
        description="Finds the loss spikes of a run: steps whose loss is far above what the losses before let expect. Prints its rule.",
    )
    add = parser.add_argument
    add("--input", type=_file, required=True, metavar="FILE", help="a run's metrics.jsonl, or any JSON lines with `step` and `loss`")
    what = 'print {"events": [{"step", "loss", "excess"}], "steps": n}; the rule goes to the other stream'
    add("--json", action="store_true", help=f'{what}; "lost": n is there where n steps were replaced and not done again')
    return parser


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a run's metrics.jsonl")
    return Path(text)


def _run(options: argparse.Namespace) -> int:
    from megagate.train.curve import read_curve
    from megagate.train.spikes import LEAST, RULE, SpikeDetector

    curve = read_curve(options.input)
    steps, losses = curve.finite()
    spikes = SpikeDetector().take(losses)
    print(f"rule: {RULE}", file=sys.stderr if options.json else sys.stdout)
    for text in curve.notes:
        print(f"note: {text}", file=sys.stderr)
    lost = f"{curve.lost} steps that the file has were replaced and not done again"
    if curve.lost:
        print(f"WARNING: {lost}: {len(curve.steps)} are left; steps must rise, but for a run that goes back", file=sys.stderr)
    if len(losses) <= LEAST:
        print(f"note: none could be judged: {len(losses)} finite losses, and the rule needs {LEAST} before the first", file=sys.stderr)
    if options.json:
        events = [{"step": steps[one.index], "loss": losses[one.index], "excess": one.excess} for one in spikes]
        print(json.dumps({"events": events, "steps": len(curve.steps)} | ({"lost": curve.lost} if curve.lost else {})))
        return 0
    for one in spikes:
        many = f"{one.excess / one.sigma:,.1f} sigma"
        print(f"step {steps[one.index]:,}: loss {losses[one.index]:.6g}, {one.excess:.4g} nats above the line ({many})")
    print(f"{len(spikes)} loss spike{'s' * (len(spikes) != 1)} in {len(curve.steps):,} steps{f' ({lost})' if curve.lost else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
