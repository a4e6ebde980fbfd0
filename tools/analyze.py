"""Shows what the gates of trained models do: `python tools/analyze.py --help`."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megagate.config.command import exit_code, exit_code_of, positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 done, 2 bad input, 128 + signal stopped."""
    options = _parser().parse_args(arguments)
    said = f"stopped; {options.output} may hold a part of the files, or those of an earlier analysis"
    return exit_code_of(lambda: _run(options), stopped=lambda stop: (said, exit_code(stop)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="analyze.py",
        allow_abbrev=False,
        description="Measures models on the same text: gate scores, attention on the first token, the largest activations, perplexity. "
        "Prints a table and writes it, figures and maps of attention. Memory holds one block of one model at a time.",
    )
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=PATH", help="runs, checkpoints, one step, or Hugging Face folders")
    add("--data", type=Path, required=True, help="text (.txt, .md, .jsonl, .jsonl.zst, .parquet), or a prepared data set")
    add("--output", type=Path, required=True, metavar="DIR", help="a folder; what an earlier analysis wrote there is replaced")
    add("--num-samples", type=positive, default=16, metavar="N", help="sequences to read at most (default: 16)")
    add("--seq-len", type=positive, metavar="N", help="tokens of each (default: 4096, or as many as all models were trained on)")
    add("--layers", type=positive, nargs="+", metavar="L", help="of the maps, from 1 on (default: 1 7 21 28, spread over fewer layers)")
    add("--map-tokens", type=positive, default=64, metavar="N", help="tokens of the maps (default: 64)")
    spans = ["trained", "causal", "document"]
    add("--attention", choices=spans, default="trained", help="as each model was trained (default), across or within documents")
    add("--tokenizer", metavar="T", help="a tokenizer.json, a folder with one, or bytes (default: the models' own)")
    add("--text-key", default="text", metavar="KEY", help="of JSON lines and Parquet (default: text)")
    add("--device", default=None, help="as PyTorch names it (default: cuda where there is one, else cpu)")
    add("--json", action="store_true", help="print the whole analysis as JSON instead of the table")
    return parser


def _run(options: argparse.Namespace) -> int:
    import torch

    from megagate.analysis.gate.analyze import Request, analyze, claimed, write
    from megagate.analysis.gate.figures import clear, draw
    from megagate.analysis.gate.table import table_text, write_tables

    request = Request(
        models=tuple(options.models),
        data=options.data,
        seq_len=options.seq_len,
        samples=options.num_samples,
        layers=tuple(options.layers) if options.layers else None,
        map_tokens=options.map_tokens,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        attention=options.attention,
        tokenizer=options.tokenizer,
        text_key=options.text_key,
    )
    with claimed(options.output, request) as output:
        with _progress() as bar:
            analysis = analyze(request, bar=bar, note=lambda text: print(f"note: {text}", file=sys.stderr))
        clear(output)
        written = [write(analysis, output), *write_tables(analysis, output), *draw(analysis, output)]
    print(json.dumps(analysis.to_json(), indent=1) if options.json else table_text(analysis), flush=True)
    print("\n".join(f"wrote {path}" for path in written), file=sys.stderr)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int], Callable[[int], object]]]:
    """What makes a bar on the standard error, once the total is known, and gives what it is told by."""
    from tqdm import tqdm

    with ExitStack() as stack:
        yield lambda total: stack.enter_context(tqdm(total=total, unit="block", mininterval=1, file=sys.stderr, disable=None)).update


if __name__ == "__main__":
    sys.exit(main())
