"""Text to a data set of tokens: `python tools/preprocess_data.py --help`."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagate.data.manifest import Manifest
    from megagate.data.preprocess.plan import Plan
    from megagate.data.preprocess.units import Progress, UnitRecord


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 done; 2 bad input, 130 interrupted: finished units stay, and the same command goes on."""
    options = _parser().parse_args(arguments)
    from megagate.errors import MegagateError

    try:
        return _run(options)
    except MegagateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished units are kept, and the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py",
        allow_abbrev=False,
        description="Tokenizes text into shards that Megatron can read, with a manifest. It may be killed at any moment: the same command "
        "goes on, and the result is the same to the byte. Several machines that share the output take --unit-range 1/K to K/K of one plan, "
        "and one runs --finalize at the end.",
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="IN", help="files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt), folders of them, a"
        " folder of save_to_disk, or a data set of the datasets package: NAME, or datasets:NAME:CONFIG:SPLIT")  # fmt: skip
    add("--tokenizer", required=True, metavar="T", help="bytes, a tokenizer.json, a folder with one, or a name of the hub")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the data set; one plan each")
    add("--tokenizer-backend", choices=("auto", "tokenizers", "gigatoken"), default="auto", help="package that makes the ids;"
        " ids are the same, gigatoken is faster; auto takes it where it is installed and passes a check (default: auto)")  # fmt: skip
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: one per CPU)")
    add("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    add("--eod-token", metavar="TOKEN", help="token that ends documents (default: the tokenizer's eos_token, else <|endoftext|>)")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True, help="end each document so (default: yes)")
    add("--split", default="0.998,0.001,0.001", metavar="A,B,C", help="shares of train, valid and test, by a hash of each document")
    add("--txt", choices=("file", "line"), default="file", help="what a document of a .txt is (default: the file)")
    add("--max-document-bytes", type=int, default=8 << 20, metavar="N", help="a longer one is bad (default: 8388608);"
        " one that cannot be cut at words (one run of letters, or any with SentencePiece) takes 70 to 370 times its size"
        " in memory")  # fmt: skip
    add("--unit-bytes", type=int, default=0, metavar="N", help="input per unit (default: 1/256 of all, 4 to 256 MiB; over 1 TiB more)")
    add("--unit-range", metavar="k/K", help="make only this share of the units (default: of the Slurm array task, else all)")
    add("--finalize", action="store_true", help="only check that all units are there, and publish the manifest")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at bad input: stop, or skip and count it (default: stop)")
    return parser


def _run(options: argparse.Namespace) -> int:
    from megagate.data.manifest import MANIFEST_NAME
    from megagate.data.preprocess.backends import choose_backend
    from megagate.data.preprocess.plan import Settings, make_plan, parse_range, publish_plan
    from megagate.data.preprocess.publish import finalize, place_tokenizer
    from megagate.data.preprocess.team import Job, run_units
    from megagate.data.preprocess.tokenizer_source import find_tokenizer
    from megagate.data.preprocess.units import missing_units

    part, parts = parse_range(options.unit_range, {} if options.finalize else os.environ)
    split = _split(options.split)
    tokenizer = find_tokenizer(options.tokenizer, eod=options.eod_token)
    settings = Settings(
        tokenizer=tokenizer.identity(),
        text_key=options.text_key,
        append_eod=options.append_eod,
        split=split,
        max_document_bytes=options.max_document_bytes,
        unit_bytes=options.unit_bytes,
        txt=options.txt,
    )
    plan = make_plan(options.input, settings, skip_empty=options.on_error == "skip")
    if plan.empty:
        print(f"skipped {len(plan.empty)} empty inputs, the first is {plan.empty[0]}")
    if plan.left_out:
        left_out = ", ".join(f"{count} {ending}" for ending, count in plan.left_out)
        print(f"left out {sum(count for _, count in plan.left_out)} files of folders, by ending: {left_out}")
    publish_plan(options.output, plan)  # refuses another plan's folder before anything in it changes
    place_tokenizer(options.output, tokenizer)
    if newer := plan.newer_inputs(options.output):
        print(f"{len(newer)} inputs were written after the plan was made, the first is {newer[0]}; samples of them are the same as then: if"
            " the rest may not be, begin again with an empty --output", file=sys.stderr)  # fmt: skip
    # Once the set is there its small parts, and the records of units, may be gone.
    if not options.finalize and not (options.output / MANIFEST_NAME).exists():
        todo = missing_units(options.output, plan, part=part, parts=parts)
        mine = len(range(part - 1, len(plan.units), parts))
        print(f"{len(plan.sources)} inputs, {len(plan.units)} units; {mine} are of share {part}/{parts}, {mine - len(todo)} of them done")
        backend, reason = choose_backend(options.tokenizer_backend, tokenizer, plan) if todo else ("tokenizers", "")
        if reason:
            print(f"the ids are made by tokenizers: {reason}")
        elif backend == "gigatoken":
            print("the ids are made by gigatoken, whose ids of probes and of the first documents are those of tokenizers")
        job = Job(plan=plan, folder=options.output, backend=backend, on_error=options.on_error)
        with _Bar(plan, todo) as bar:
            records = run_units(job, todo, workers=options.workers, report=bar.add)
        _tell_skipped(records)
        if parts > 1:
            print(f"share {part}/{parts} is done; when all are, run the same command with --finalize")
            return 0
    _tell(finalize(options.output, plan), options.output)
    return 0


def _split(text: str) -> tuple[float, float, float]:
    from megagate.errors import DataError

    try:
        train, valid, test = (float(share) for share in text.split(","))
    except ValueError as error:
        raise DataError(f"--split is {text!r}; it must be three shares that sum to 1, as 0.998,0.001,0.001") from error
    return train, valid, test


class _Bar:
    """The progress of this run, on standard error: part of the input done, time left, and rates."""

    def __init__(self, plan: "Plan", units: list[int]) -> None:
        from tqdm import tqdm

        size = sum(plan.units[unit].bytes for unit in units)
        self._bar = tqdm(total=size or None, unit="B", unit_scale=True, mininterval=1, disable=not units)
        self._documents = self._bytes = self._tokens = 0
        self._start = time.monotonic()

    def add(self, progress: "Progress") -> None:
        """Takes a report."""
        self._documents += progress.documents
        self._bytes += progress.text_bytes
        self._tokens += progress.tokens
        seconds = max(time.monotonic() - self._start, 1e-3)
        rates = f"{self._documents / seconds:,.0f} documents/s, {self._bytes / 1e6 / seconds:.2f} MB/s"
        self._bar.set_postfix_str(f"{rates}, {self._tokens / seconds:,.0f} tokens/s", refresh=False)
        self._bar.update(progress.input_bytes)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _tell_skipped(records: "list[UnitRecord]") -> None:
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record.skipped)
    if not skipped:
        return
    print(f"skipped {skipped.total()}: {', '.join(f'{count} {reason}' for reason, count in sorted(skipped.items()))}; the first:")
    print("\n".join(f"  {message}" for message in [message for record in records for message in record.messages][:5]))


def _tell(manifest: "Manifest", folder: Path) -> None:
    body = manifest.body()["totals"]
    for split, totals in body.items():
        print(f"{split:<6} {totals['documents']:>14,} documents {totals['tokens']:>18,} tokens {totals['shards']:>7,} shards")
    lost = manifest.source.get("skipped", 0)
    print(f"{folder}: vocabulary {manifest.tokenizer.vocab_size:,}, fingerprint {manifest.fingerprint[:12]}, {lost} skipped in all")


if __name__ == "__main__":
    sys.exit(main())
