"""Several data sets, or bare Megatron shards, to one data set: `python tools/merge_data.py --help`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagate.data.manifest import SplitName


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 done; 2 bad input, 130 interrupted: finished shards stay, and the same command goes on."""
    options = _parser().parse_args(arguments)
    from megagate.errors import MegagateError

    try:
        return _run(options)
    except MegagateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, and the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="merge_data.py",
        allow_abbrev=False,
        description="Makes one data set, with one manifest, of prepared data sets and of bare Megatron shards. Shards are hard-linked, so "
        "that terabytes take no space, and no time but one reading of bare ones, for their sha256 and largest id. It may be killed at any "
        "moment: the same command goes on.",
    )
    add = parser.add_argument
    add("--input", nargs="+", default=[], metavar="IN", help="folders with a dataset.json, whose splits are kept, and prefixes of Megatron"
        " shards (the path with or without .bin or .idx), all of which are for training unless --split cuts them")  # fmt: skip
    add("--valid", nargs="+", default=[], metavar="IN", help="inputs of which everything is for validation (Megatron's --valid-data-path)")
    add("--test", nargs="+", default=[], metavar="IN", help="inputs of which everything is for testing (Megatron's --test-data-path)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the merged data set; new or empty, or of the same merge")
    add("--tokenizer", metavar="T", help="who made bare shards: bytes, a tokenizer.json, a folder with one, a name of the hub, or the"
        " folder of a prepared data set")  # fmt: skip
    add("--eod-token", metavar="TOKEN", help="token that ends documents (default: the tokenizer's eos_token, else <|endoftext|>)")
    add("--vocab-size", type=int, default=0, metavar="V", help="instead of --tokenizer, for ids without a text: they are below V")
    add("--eod-id", type=int, default=-1, metavar="ID", help="with --vocab-size: the id that ends documents (default: none does)")
    add("--split", metavar="A,B,C", help="weights by which each prefix under --input is cut into train, valid and test, as Megatron's"
        " --split: ranges of documents in order (default: 1,0,0); what is cut is written anew")  # fmt: skip
    add("--shard-tokens", type=int, default=0, metavar="N", help="join neighbours to shards of at least N tokens (default: leave them)")
    add("--copy", action="store_true", help="copy what could be linked: for another disk, or to be independent of the inputs")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="shards worked at at once (default: one per CPU)")
    return parser


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megagate.data.merge.plan import ALL_TRAIN, make_merge, named_maker, publish_merge
    from megagate.data.merge.run import UNENDED, describe, run_merge, work_left
    from megagate.errors import DataError

    wishes: list[tuple[str, SplitName | None]] = [(name, None) for name in options.input]
    wishes += [(name, "valid") for name in options.valid]
    wishes += [(name, "test") for name in options.test]
    if not wishes:
        raise DataError("there is nothing to merge; name data sets or prefixes with --input")
    maker = named_maker(options.tokenizer, eod=options.eod_token, vocab_size=options.vocab_size, eod_id=options.eod_id)
    split = ALL_TRAIN if options.split is None else _split(options.split)
    plan = make_merge(wishes, maker=maker, split=split, shard_tokens=options.shard_tokens)
    publish_merge(options.output, plan)
    work = work_left(options.output, plan, copy=options.copy)
    print("\n".join(describe(plan, work, copy=options.copy)), flush=True)
    with tqdm(total=work.read_bytes, unit="B", unit_scale=True, mininterval=1, disable=not work.read_bytes) as bar:
        manifest = run_merge(options.output, plan, copy=options.copy, workers=options.workers, report=bar.update)
    for name, totals in manifest.body()["totals"].items():
        print(f"{name:<6} {totals['documents']:>14,} documents {totals['tokens']:>18,} tokens {totals['shards']:>7,} shards")
    if manifest.source.get(UNENDED):
        print(f"{manifest.source[UNENDED]} {UNENDED}: data.attention document would join them to the next")
    print(f"{options.output}: vocabulary {manifest.tokenizer.vocab_size:,}, fingerprint {manifest.fingerprint[:12]}")
    return 0


def _split(text: str) -> tuple[float, ...]:
    from megagate.errors import DataError

    try:
        weights = tuple(float(weight) for weight in text.split(","))
    except ValueError as error:
        raise DataError(f"--split is {text!r}; it must be three weights, as 949,50,1") from error
    return weights + (0.0,) * (3 - len(weights))  # as Megatron fills it up


if __name__ == "__main__":
    sys.exit(main())
