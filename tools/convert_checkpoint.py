"""Convert checkpoints to Hugging Face's form and back: `python tools/convert_checkpoint.py to-hf --help`, `from-hf --help`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megagate.config.command import NewFolder, exit_code_of, positive

if TYPE_CHECKING:
    from megagate.checkpoint.hf.adopt import Adopted
    from megagate.checkpoint.hf.export import Export


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 done; 1 written, but not verified; 2 bad input, 128 + signal stopped: nothing was written."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: options.run(options), stopped=NewFolder(options.output).interrupted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", allow_abbrev=False, description="Checkpoints to Hugging Face's form and back, verified."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_to_hf(commands)
    _add_from_hf(commands)
    return parser


def _add_to_hf(commands: argparse._SubParsersAction) -> None:
    to_hf = commands.add_parser(
        "to-hf",
        allow_abbrev=False,
        help="a checkpoint of a run -> a folder for transformers' from_pretrained",
        description="Writes the model of a checkpoint as a class of transformers that holds it exactly, or with code of its own where none "
        "does; then loads it again and compares.",
    )
    to_hf.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, its folder of checkpoints, or one step")
    to_hf.add_argument("output", type=Path, metavar="OUT", help="a folder that does not exist")
    to_hf.add_argument(
        "--format",
        default="auto",
        help="auto (default: a class of transformers where one holds the model), stock (refuse otherwise), remote-code, or one class: "
        "qwen3, qwen3_moe, qwen3_next, qwen3_5_text, lfm3, afmoe",
    )
    to_hf.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights (default: the run's, in which its forward pass used them)")
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    to_hf.add_argument(
        "--tokenizer", metavar="T", help="a tokenizer.json, a folder with one, or none (default: that of the run's data set)"
    )
    to_hf.add_argument("--keep-padding", action="store_true", help="keep the rows that pad the vocabulary to a multiple of 128")
    to_hf.add_argument("--max-position-embeddings", type=positive, metavar="N", help="(default: the run's train.seq_len)")
    to_hf.add_argument("--verify", default=True, action=argparse.BooleanOptionalAction, help="load and compare what was written (default)")
    to_hf.set_defaults(run=_to_hf)


def _add_from_hf(commands: argparse._SubParsersAction) -> None:
    from_hf = commands.add_parser(
        "from-hf",
        allow_abbrev=False,
        help="a folder of transformers' kind -> a checkpoint to train on from",
        description="Writes a native checkpoint, without moments, of the model in a folder that save_pretrained, or to-hf, has written. No "
        "code of that folder is run.",
    )
    from_hf.add_argument("folder", type=Path, metavar="DIR", help="with config.json and .safetensors files")
    from_hf.add_argument("output", type=Path, metavar="OUT", help="a new or empty folder of checkpoints")
    from_hf.add_argument("--verify", default=True, action=argparse.BooleanOptionalAction, help="compare what was written (default)")
    from_hf.set_defaults(run=_from_hf)


def _to_hf(options: argparse.Namespace) -> int:
    from megagate.checkpoint.hf.export import export

    done = export(
        options.checkpoint,
        options.output,
        format=options.format,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tokenizer=options.tokenizer,
        keep_padding=options.keep_padding,
        max_positions=options.max_position_embeddings,
    )
    _tell_export(done)
    passed = not options.verify or _verify_export(done, max_positions=options.max_position_embeddings)
    dtype = "torch.float32" if done.wide else "'auto'"
    code = ", trust_remote_code=True" if done.target == "remote-code" else ""
    print(f"load it with: AutoModelForCausalLM.from_pretrained({str(done.folder)!r}, dtype={dtype}{code})" if passed else "do not use it")
    return 0 if passed else 1


def _tell_export(done: "Export") -> None:
    from megagate.checkpoint.hf.targets import explain, remarks

    print(f"{done.source}, step {done.step} -> {done.folder}: {len(done.files)} files, {done.nbytes / 1e6:,.1f} MB")
    print(f"written for {explain(done.config.model, done.target)}")
    print("\n".join(remarks(done.config.model, done.target) + [f"{done.tensors:,} tensors in {done.dtype}"]))
    if done.padding:
        print(f"left out: {done.padding} rows that pad the vocabulary to {done.config.model.padded_vocab_size:,}")
    elif done.config.model.padded_vocab_size != done.config.model.vocab_size:
        print(f"the vocabulary is padded to {done.config.model.padded_vocab_size:,}: a sampler must not choose ids from the padding")
    if done.wide:
        print(f"{len(done.wide)} norms are in fp32, since {done.dtype} would round w - 1, and w with it by up to {_most(done.wide)}")
        print("dtype='auto' rounds them when it loads: load it in fp32, as below, or use --format remote-code, whose norms are w itself")
    if done.rounded:
        print(f"NOT EXACT: {len(done.rounded)} norms are stored as w - 1, which fp32 rounds, by up to {_most(done.rounded)}")
    if done.broken:
        count, first = sum(done.broken.values()), next(iter(done.broken))
        print(f"NOT FINITE: {count:,} numbers are NaN or infinite, in {len(done.broken)} tensors ({first}): train on from an earlier step")
    print(f"tokenizer: {done.tokenizer}")
    for folder in done.unfinished:
        print(f"{folder} is of another export to the same place; unless that is at work, remove it")


def _most(changes: dict[str, float]) -> str:
    worst = max(changes, key=changes.__getitem__)
    return f"{changes[worst]:.1e} of w ({worst})"


def _verify_export(done: "Export", *, max_positions: int | None) -> bool:
    """Print what was compared; returns whether all is equal."""
    from megagate.checkpoint.hf.verify import verify_export
    from megagate.errors import MegagateError

    try:
        found = verify_export(done.source, done.folder, dtype=done.dtype, max_positions=max_positions)
    except MegagateError as error:
        print(f"NOT VERIFIED: {error}", file=sys.stderr)
        return False
    except KeyboardInterrupt:
        print(f"NOT VERIFIED: interrupted; {done.folder} stands, and --no-verify leaves verification out", file=sys.stderr)
        return False
    print("\n".join(found.lines()))
    return found.passed


def _from_hf(options: argparse.Namespace) -> int:
    from megagate.checkpoint.hf.adopt import adopt

    done = adopt(options.folder, options.output)
    _tell_adopted(done)
    passed = not options.verify or _compare_adopted(done)
    files = shlex.join(["--config", str(options.output / "config.yaml"), "--train.resume", str(options.output)])
    print(f"go on with: {files} --train.output_dir NEW" if passed else f"{done.folder} stays as it is, but do not train on it")
    return 0 if passed else 1


def _tell_adopted(done: "Adopted") -> None:
    from megagate.checkpoint.hf.imported import has_tokenizer
    from megagate.config.count import count_parameters
    from megagate.data.tokenizer import TOKENIZER_NAME

    origin = "written by to-hf" if done.exported else "not written by to-hf, so that training settings have their defaults"
    parameters = count_parameters(done.config.model).total
    print(f"{done.source} -> {done.folder}")
    print(f"read as {done.layout}, {origin}")
    print(f"{done.tensors:,} tensors ({', '.join(done.dtypes)}), {parameters:,} parameters, as fp32 masters")
    if done.left_out:
        print(f"left out, since they say nothing more: {', '.join(done.left_out[:3])}{', ...' if len(done.left_out) > 3 else ''}")
    if done.rounding:
        print(f"NOT EXACT: norms are stored as w - 1, and w was rounded by up to {done.rounding:.1e} in fp32")
    if done.below_half and done.exported:
        print(f"{done.below_half:,} norm weights are below 1/2: rounded by up to {2**-25:.1e} when an fp32 file took them as w - 1")
    if done.narrow and done.exported:
        most = f"by up to {done.narrow:.1e}"
        print(f"norms are stored as w - 1 in 16 bits: w was rounded {most} if another tool saved them so; to-hf does so where it is exact")
    if has_tokenizer(done.source):
        print(f"prepare data to train on with its tokenizer: --tokenizer {shlex.quote(str(done.source / TOKENIZER_NAME))}")
    print("the checkpoint has no moments and no place in the data: training begins at step 0 with a new optimizer")


def _compare_adopted(done: "Adopted") -> bool:
    """Print what was compared; returns whether all is equal."""
    from megagate.checkpoint.hf.verify import verify_adopted
    from megagate.errors import MegagateError

    try:
        found = verify_adopted(done.source, done.folder)
    except MegagateError as error:
        print(f"NOT VERIFIED: {error}", file=sys.stderr)
        return False
    except KeyboardInterrupt:
        print(f"NOT VERIFIED: interrupted; {done.folder} stands, and --no-verify leaves verification out", file=sys.stderr)
        return False
    print("\n".join(found.lines()))
    return found.passed


if __name__ == "__main__":
    sys.exit(main())
