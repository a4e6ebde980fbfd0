"""Looks at tokenized data: `python tools/inspect_data.py --help`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagate.config.command import exit_code_of

if TYPE_CHECKING:
    from megagate.data.inspection import Lengths, Opened, Sample

_SHARDS_TOLD = 20
_TOKENS_PER_CHARACTER = 2  # read of a sample; a character rarely has more


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 fine; 1 --verify found damage; 2 bad input."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options), failed=1 if options.verify else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inspect_data.py",
        allow_abbrev=False,
        description="Tells what prepared data sets and bare Megatron shards hold: counts, tokenizer, lengths and text of documents.",
    )
    add = parser.add_argument
    add("input", nargs="+", metavar="IN", help="folder with a dataset.json, or prefix of a shard (the path with or without .bin or .idx)")
    add("--split", metavar="S", help="only this one for lengths and documents: train, valid or test (default: all)")
    add("--samples", type=int, default=2, metavar="N", help="documents to show (default: the first 2)")
    add("--random", type=int, metavar="SEED", help="show random ones instead of the first")
    add("--document", type=int, metavar="I", help="show this one, counted from 0 in the order of the split's shards")
    add("--characters", type=int, default=300, metavar="N", help="of each document shown (default: 300)")
    add("--tokenizer", metavar="T", help="of bare shards: bytes, a tokenizer.json, a folder with one, a prepared data set, a hub's name")
    add("--eod-token", metavar="TOKEN", help="of that tokenizer (default: its eos_token, else <|endoftext|>)")
    add("--seq-len", type=int, default=4096, metavar="S", help="window of training, to tell documents that are longer (default: 4096)")
    add("--plot", type=Path, metavar="FILE", help="draw the histogram of lengths as a PNG")
    add("--verify", action="store_true", help="read every byte and compare it with the manifest; exit code 1 at the first bad file")
    add("--json", action="store_true", help="print all of it as one JSON array, with an object for each input")
    return parser


def _run(options: argparse.Namespace) -> int:
    from megagate.data.inspection import named_tokenizer, open_input, plot
    from megagate.errors import DataError

    if options.samples < 0 or options.characters < 1 or options.seq_len < 1:
        raise DataError("--samples must be 0 or more, --characters and --seq-len 1 or more")
    if options.plot is not None and len(options.input) > 1:
        raise DataError(f"--plot {options.plot} is one file, and there are {len(options.input)} inputs; name one")
    tokenizer = None if options.tokenizer is None else named_tokenizer(options.tokenizer, eod=options.eod_token)
    found = []
    for name in options.input:
        opened = open_input(name, tokenizer=tokenizer)
        value, lengths = _look(opened, options)
        found.append(value)
        if not options.json:
            _tell(opened, value, lengths)
        if options.plot is not None:
            plot(lengths, options.plot, title=opened.name)
    if options.json:
        print(json.dumps(found, indent=1))
    return 0


def _look(opened: "Opened", options: argparse.Namespace) -> "tuple[dict[str, Any], Lengths]":
    from megagate.data.inspection import check_all, chosen, facts, lengths_of, sample

    value = facts(opened)
    if options.verify:
        from tqdm import tqdm

        with tqdm(total=opened.files, unit="B", unit_scale=True, mininterval=1, file=sys.stderr) as bar:
            value["verified"] = {"max_id": check_all(opened, report=bar.update), "hashes": opened.manifest is not None}
    shards = opened.select(options.split)
    lengths = lengths_of(shards, window=options.seq_len)
    value["lengths"] = {
        "split": options.split,
        "documents": lengths.documents,
        "tokens": lengths.tokens,
        "shortest": lengths.shortest,
        "longest": lengths.longest,
        "median": lengths.quantile(0.5),
        "p99": lengths.quantile(0.99),
        "seq_len": options.seq_len,
        "longer_than_seq_len": lengths.longer,
        "octaves": lengths.octaves.tolist(),
    }
    numbers = [options.document] if options.document is not None else chosen(lengths.documents, options.samples, seed=options.random)
    samples = sample(opened, shards, numbers, most=options.characters * _TOKENS_PER_CHARACTER)
    value["samples"] = [_shown(one, options.characters) for one in samples]
    return value, lengths


def _shown(one: "Sample", characters: int) -> "dict[str, Any]":
    value = asdict(one)
    value["ids"] = one.ids[: characters // 6 + 1]
    value["text"] = None if one.text is None else one.text[:characters]
    return value


def _tell(opened: "Opened", value: "dict[str, Any]", lengths: "Lengths") -> None:
    from megagate.data.inspection import bars, visible

    print(value["name"])
    if opened.manifest is not None:
        tokenizer = opened.manifest.tokenizer
        print(f"  fingerprint {value['fingerprint']}")
        print(f"  tokenizer   {tokenizer.kind}, sha256 {tokenizer.sha256[:12] or '-'}, vocabulary {tokenizer.vocab_size:,},"
              f" eod {tokenizer.eod_id}, pad {tokenizer.pad_id}; ids stored as {value['dtype']}")  # fmt: skip
        print("  source      " + visible(", ".join(f"{key}: {fact}" for key, fact in value["source"].items())))
    else:
        print("  a bare shard: nothing says who made its ids, and there is no sha256; tools/merge_data.py makes a data set of it")
    for split, totals in value["splits"].items():
        print(f"  {split:<6} {totals['documents']:>15,} documents {totals['tokens']:>19,} tokens {totals['shards']:>7,} shards")
    for shard in value["shards"][:_SHARDS_TOLD]:
        print(visible(f"    {shard['prefix']}: {shard['documents']:,} documents, {shard['tokens']:,} tokens of {shard['dtype']}"))
    if len(value["shards"]) > _SHARDS_TOLD:
        print(f"    and {len(value['shards']) - _SHARDS_TOLD:,} more (--json lists all)")
    _tell_lengths(value["lengths"])
    print("\n".join(bars(lengths)))
    for one in value["samples"]:
        print(f"document {one['number']:,} ({one['document']:,} of {visible(one['shard'])}), {one['tokens']:,} tokens:")
        text = " ".join(map(str, one["ids"])) if one["text"] is None else visible(one["text"])
        print("  " + text.replace("\n", "\n  "))
    if "verified" in value:
        what = "every sha256 is the manifest's" if value["verified"]["hashes"] else "the index is sound; there is no sha256 to compare"
        print(f"verified: {what}; largest id {value['verified']['max_id']:,}")


def _tell_lengths(found: "dict[str, Any]") -> None:
    if not found["documents"]:
        print("  no documents")
        return
    mean = found["tokens"] / found["documents"]
    median, most = ("131,072 or more" if found[key] is None else f"{found[key]:,}" for key in ("median", "p99"))
    share = found["longer_than_seq_len"] / found["documents"]
    print(f"  tokens per document: {found['shortest']:,} to {found['longest']:,}, mean {mean:,.1f}, median {median}, 99 % up to {most};"
          f" {share:.2%} longer than {found['seq_len']:,}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
