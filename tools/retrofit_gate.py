"""Add a gate to a trained model without changing what it computes: `python tools/retrofit_gate.py --help`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megagate.config.command import NewFolder, exit_code_of

if TYPE_CHECKING:
    from megagate.checkpoint.retrofit import Retrofit


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 written; 1 written, then stopped; 2 bad input, 128 + signal stopped: nothing was written."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options), stopped=NewFolder(options.output).interrupted)


def _run(options: argparse.Namespace) -> int:
    from megagate.checkpoint.retrofit import add_gate, remove_gate

    if options.gate == "none":
        done = remove_gate(options.checkpoint, options.output)
    else:
        done = add_gate(options.checkpoint, options.output, options.gate)
    _tell(done, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retrofit_gate.py",
        allow_abbrev=False,
        description="Writes a checkpoint of the same model with a gate on the attention output (G1) whose weights are 0, so that every "
        "score is 1/2, and with the output projections doubled: the logits are the same, and training goes on with a gate that can learn. "
        "--gate none takes away a gate that does not depend on the input. Weights and the place in the data are kept, the optimizer's "
        "moments are not.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="A", help="a run, its folder of checkpoints, or one step")
    parser.add_argument("--gate", required=True, metavar="KIND", help="elementwise or headwise adds a gate, none removes a constant one")
    parser.add_argument("--output", type=Path, required=True, metavar="B", help="a new folder of checkpoints, for --train.resume B")
    return parser


def _tell(done: "Retrofit", options: argparse.Namespace) -> None:
    print(f"{done.source}, step {done.step} -> {done.folder}")
    if options.gate == "none":
        print("the gate is removed")
    else:
        print(f"added: a sigmoid gate at G1, {options.gate}, {done.config.model.num_layers} weights of zeros")
    low, high = done.factors
    print(f"output projections: x {low:g}" + (f" to {high:g}" if low != high else ""))
    if done.powers_of_two and not done.rounding:
        print("exact, by powers of two: logits are equal bit for bit where the gate has a GEMM of its own;")
        print("its rows in the GEMM of q, k and v may choose another kernel, which sums in another order")
    else:
        why = "at the ends of fp32's range" if done.powers_of_two else "these are no powers of two"
        print(f"NOT EXACT: {why}; masters were rounded by up to {done.rounding:.1e} of themselves, and logits are equal to rounding only")
    print("moments were left out: the optimizer begins anew; the step, and with it the learning rate and the place in the data, goes on")
    if done.step >= done.config.train.steps:
        print(f"raise train.steps, which is {done.config.train.steps}: the run was at its end")
    files = shlex.join(["--config", str(options.output / "config.yaml"), "--train.resume", str(options.output)])
    print(f"go on with: {files} --train.output_dir NEW")


if __name__ == "__main__":
    sys.exit(main())
