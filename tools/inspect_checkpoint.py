"""Looks at checkpoints: `python tools/inspect_checkpoint.py --help`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagate.config.command import exit_code_of

if TYPE_CHECKING:
    from megagate.checkpoint.inspection import Comparison
    from megagate.checkpoint.store import Checkpoint

_SHORT = (
    "model.num_layers",
    "model.hidden_size",
    "model.vocab_size",
    "model.attention.num_heads",
    "model.attention.num_kv_heads",
    "model.attention.gate.position",
    "model.attention.gate.granularity",
    "model.moe.num_experts",
    "model.moe.top_k",
    "train.seq_len",
    "train.global_batch_size",
    "parallel.tp",
    "parallel.ep",
    "parallel.zero_stage",
    "precision.dtype",
    "data.path",
)
_TOLD = 20  # differences of a kind; --tensors lists all
_WIDTH = 100  # characters of a value


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 fine; 1 --verify found damage, or --compare a difference; 2 bad input."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options), failed=1 if options.verify else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inspect_checkpoint.py",
        allow_abbrev=False,
        description="Tells what a checkpoint holds: step, config, tensors and sizes, what the step after it did; and in what it differs "
        "from another one, whatever the layouts.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="DIR", help="a run, its folder of checkpoints (both mean the latest), or one step-* folder")
    add("--verify", action="store_true", help="read every byte, compare digests and fingerprints; exit code 1 where anything is damaged")
    add("--compare", type=Path, metavar="OTHER", help="read both and tell in what they differ; exit code 1 where they do")
    add("--tensors", action="store_true", help="list every tensor with shape, dtype, pieces and files; of --compare, all that differ")
    add("--config", action="store_true", help="print all of the config")
    add("--json", action="store_true", help="print all of it as one JSON object")
    return parser


def _run(options: argparse.Namespace) -> int:
    from megagate.checkpoint.inspection import compare, damages, facts, finite, shared_bytes
    from megagate.checkpoint.store import Checkpoint

    with Checkpoint.open(options.checkpoint) as checkpoint:
        value = facts(checkpoint)
        if not options.json:
            _tell(value, options)
        if options.verify:
            value["damages"] = _with_bar(_bytes(checkpoint), lambda report: damages(checkpoint, report=report))
            if not options.json:
                _tell_damages(value)
        comparison = None
        if options.compare is not None:
            with Checkpoint.open(options.compare) as other:
                comparison = _with_bar(shared_bytes(checkpoint, other), lambda report: compare(checkpoint, other, report=report))
                value["compared"] = {"with": str(other.folder), "same": comparison.same, **asdict(comparison)}
            if not options.json:
                _tell_comparison(value["compared"]["with"], comparison, options)
    if options.json:
        print(json.dumps(finite(value), indent=1))
    return 1 if value.get("damages") or (comparison is not None and not comparison.same) else 0


def _with_bar(total: int, action: Any) -> Any:
    """What `action` returns, which reports the bytes that it has read."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, mininterval=1, file=sys.stderr, disable=None) as bar:
        return action(bar.update)


def _bytes(checkpoint: "Checkpoint") -> int:
    from megagate.checkpoint.inspection import size_of

    return sum(map(size_of, checkpoint.tensors.values()))


def _tell(value: dict[str, Any], options: argparse.Namespace) -> None:
    from megagate.checkpoint.inspection import flattened

    files, metadata = value["files"], value["metadata"]
    _say(f"{value['folder']}: step {value['step']:,}, {_size(sum(files.values()))} by {len(files)} rank{'s' * (len(files) != 1)}"
         + (f", {_size(min(files.values()))} to {_size(max(files.values()))} each" if len(files) > 1 else ""))  # fmt: skip
    config = metadata.get("config")
    settings = flattened(config) if isinstance(config, Mapping) else {}
    shown = settings if options.config else {key: settings[key] for key in _SHORT if settings.get(key) is not None}
    _say("config" + ("" if options.config or not settings else " (--config prints all)") + (": none" if not settings else ""))
    for key, one in shown.items():
        _say(f"  {key}: {_value(one)}")
    for key, one in flattened({key: one for key, one in metadata.items() if key != "config"}).items():
        _say(f"{key}: {_value(one)}")
    _say("tensors")
    for kind, one in value["kinds"].items():
        dtypes = ", ".join(one["dtypes"])
        _say(f"  {kind:<12} {one['tensors']:>6,} tensors {one['elements']:>16,} elements {_size(one['bytes']):>12} {dtypes}")
    for name, one in value["tensors"].items() if options.tensors else ():
        where = one["files"][0] if len(one["files"]) == 1 else f"{len(one['files'])} files"
        _say(f"  {name} {one['dtype']} {one['shape']}: {one['pieces']} piece{'s' * (one['pieces'] != 1)} in {where}")
    _tell_fingerprint(value["fingerprint"], options)
    _tell_certificate(value["next_step"], options)


def _tell_fingerprint(prints: dict[str, str] | None, options: argparse.Namespace) -> None:
    if prints is None:
        _say("fingerprint of the state in memory: none, so a resume cannot compare what it has loaded with it")
        return
    _say(f"fingerprint of the state in memory: of {len(prints):,} tensors (--verify takes it again from the files)")
    for name, one in prints.items() if options.tensors else ():
        _say(f"  fingerprint of {name}: {one}")


def _tell_certificate(step: dict[str, Any] | None, options: argparse.Namespace) -> None:
    if step is None:
        _say("certificate: digests of all tensors; nobody has recorded what the next step did, so a resume cannot compare it")
        return
    done = "" if step["applied"] else ", skipped: a number was not finite"
    _say(f"certificate: digests of all tensors, and step {step['step']:,}{done}:")
    _say(f"  loss {step['loss']:.6f}, gradient norm {step['grad_norm']:.6g}, update norm {step['update_norm']:.6g}, "
         f"learning rate {step['lr']:.6g}, tokens {step['tokens']}")  # fmt: skip
    _say("  " + ", ".join(f"{key} {one}" for key, one in step["circumstances"].items()))
    for name, norm in step["updates"].items() if options.tensors else ():
        _say(f"  update of {name}: {norm:.6g}")


def _tell_damages(value: dict[str, Any]) -> None:
    for text in value["damages"]:
        _say(f"DAMAGED: {text}")
    pieces = sum(one["pieces"] for one in value["tensors"].values())
    if not value["damages"]:
        prints = "" if value["fingerprint"] is None else f", and {len(value['fingerprint']):,} tensors their fingerprints"
        _say(f"verified: {pieces:,} pieces have the digests that were recorded when they were saved{prints}")


def _tell_comparison(other: str, found: "Comparison", options: argparse.Namespace) -> None:
    _say(f"compared with {other}")
    most = None if options.tensors else _TOLD
    _list([f"{key}: {_value(a)}, there {_value(b)}" for key, (a, b) in found.settings.items()], "setting", "differ", most)
    _list(found.missing, "tensor", "only here", most)
    _list(found.extra, "tensor", "only there", most)
    _list([f"{name}: {a}, there {b}" for name, (a, b) in found.reshaped.items()], "tensor", "of another shape or dtype", most)
    others = [one for one in found.tensors if not one.same_bits]
    if not options.tensors:  # the worst first; NaN before all
        others.sort(key=lambda one: (one.largest == one.largest, -one.largest))
    lines = [
        f"{one.name}: largest difference {one.largest:.6g}, largest value {one.scale:.6g}, {one.unequal:,} of {one.elements:,} elements"
        for one in others
    ]
    _list(lines, "tensor", "of other bits", most)
    _say(f"  {len(found.tensors) - len(others):,} tensors have the same bits")
    _say("they are the same" if found.same else "their tensors are the same" if found.same_tensors else "they differ")


def _list(lines: Sequence[str], what: str, how: str, most: int | None) -> None:
    if lines:
        _say(f"  {len(lines):,} {what}{'s' * (len(lines) != 1)} {how}:")
    for line in lines[:most]:
        _say(f"    {line}")
    if most is not None and len(lines) > most:
        _say(f"    and {len(lines) - most:,} more (--tensors lists all)")


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}... ({len(text):,} characters)"


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _say(text: str) -> None:
    from megagate.data.inspection import visible

    print(visible(text))


if __name__ == "__main__":
    sys.exit(main())
