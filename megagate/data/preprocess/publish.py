"""The last step of preprocessing: every unit is there, so the parts become a data set, by its manifest."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from megagate.data.claim import publish_once
from megagate.data.concatenate import Promise, append_documents, small_runs
from megagate.data.files import clean_errors, file_sha256
from megagate.data.manifest import SPLITS, Manifest, ShardEntry, SplitName, TokenizerIdentity
from megagate.data.preprocess.plan import Plan
from megagate.data.preprocess.units import UNITS_FOLDER, UnitRecord, part_prefix, read_record, record_path
from megagate.data.shards import Shard, ShardStats, ShardWriter, token_dtype
from megagate.data.transfer import LinkError, copy_shard, linked_shard
from megagate.errors import DataError

FULL_SHARD = 1 << 22  # tokens; windows never cross shards, so that many small ones would lose many tokens


class Placeable(Protocol):
    """A tokenizer, or the file of one."""

    def identity(self) -> TokenizerIdentity:
        """With the name of its file; empty where it has none."""

    def save(self, path: Path) -> object:
        """Writes the file."""


def place_tokenizer(folder: Path, tokenizer: Placeable) -> None:
    """Writes the tokenizer into the output, where readers look for it, unless it is there.

    Raises:
        DataError: Another tokenizer is there, or the folder cannot be written.
    """
    identity = tokenizer.identity()
    path = folder / identity.file
    if not identity.file:
        return
    if not path.exists():
        tokenizer.save(path)
        return
    with clean_errors("read", path):
        found = file_sha256(path)
    if found != identity.sha256:
        raise DataError(f"{path} is another tokenizer, or the same one written by another program; choose an empty folder for --output")


def finalize(folder: Path, plan: Plan) -> Manifest:
    """Checks that every unit of the plan is there, makes shards of their parts, and writes `dataset.json`; then `units/` may be deleted.

    Parts of at least `FULL_SHARD` tokens get hard links in the folder itself, copies where there can be none; runs of smaller ones of a
    split are copied into one shard. What is copied is compared with its record's sha256; of what is linked only the sizes are, and
    `manifest.verify` reads it. Doing it again changes nothing.

    Raises:
        DataError: Units are missing or damaged, there are no documents, or the folder cannot be written.
    """
    return publish_once(folder, plan.sha256, lambda: _assemble(folder, plan, _records(folder, plan)), places=(UNITS_FOLDER,))


def _assemble(folder: Path, plan: Plan, records: list[UnitRecord]) -> Manifest:
    entries = [entry for split in SPLITS for entry in _shards_of(folder, plan, records, split)]
    if not entries:
        skipped = sum(sum(record.skipped.values()) for record in records)
        raise DataError(f"{folder}: the inputs have no documents ({skipped} were skipped); it needs one; check --input and --text-key")
    return Manifest(
        tokenizer=plan.settings.tokenizer,
        dtype=token_dtype(plan.settings.tokenizer.vocab_size).name,
        shards=tuple(entries),
        source=_facts(plan, records),
    )


def ranges(numbers: list[int]) -> str:
    """Sorted numbers in words: `3, 7-9`."""
    parts: list[str] = []
    for number in numbers:
        first, _, last = parts[-1].partition("-") if parts else ("", "", "")
        if parts and int(last or first) == number - 1:
            parts[-1] = f"{first}-{number}"
        else:
            parts.append(str(number))
    return ", ".join(parts[:10]) + (" and more" if len(parts) > 10 else "")


def _records(folder: Path, plan: Plan) -> list[UnitRecord]:
    sha256 = plan.sha256
    found = [read_record(folder, sha256, unit) for unit in range(len(plan.units))]
    missing = [unit for unit, record in enumerate(found) if record is None]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(found)} units are missing: {ranges(missing)}; run the same command without --finalize first,"
            " with every --unit-range"
        )
    return [record for record in found if record is not None]


def _shards_of(folder: Path, plan: Plan, records: list[UnitRecord], split: SplitName) -> Iterator[ShardEntry]:
    parts = [_part(folder, record.unit, split, stats) for record in records if (stats := record.stats(split)) is not None]
    vocab_size = plan.settings.tokenizer.vocab_size
    for number, run in enumerate(small_runs([part.promise.stats.tokens for part in parts], FULL_SHARD)):
        own = parts[run.start : run.stop]
        name = f"{split}-{number:05d}"
        for part in own:
            part.promise.check_sizes(Shard(part.prefix))
        if own[0].promise.stats.tokens >= FULL_SHARD:
            stats = _take_over(own[0], folder / name, vocab_size)
        else:
            stats = _join(own, folder / name, vocab_size)
        yield ShardEntry.of(name, split=split, stats=stats)


class _Part(NamedTuple):
    """A shard of a unit, and what the unit's record says of it."""

    prefix: Path
    promise: Promise


def _part(folder: Path, unit: int, split: SplitName, stats: ShardStats) -> _Part:
    record = record_path(folder, unit)
    remedy = f"remove {record}, and run again without --finalize: the unit is then made again"
    return _Part(part_prefix(folder, unit, split), Promise(stats, by=record.name, remedy=remedy))


def _take_over(part: _Part, prefix: Path, vocab_size: int) -> ShardStats:
    try:
        with linked_shard(part.prefix, prefix):
            return part.promise.stats
    except LinkError:
        return copy_shard(part.prefix, prefix, vocab_size=vocab_size, promise=part.promise)


def _join(parts: list[_Part], prefix: Path, vocab_size: int) -> ShardStats:
    with ShardWriter(prefix, dtype=token_dtype(vocab_size)) as writer:
        for part in parts:
            shard = Shard(part.prefix)
            shard.check_index()
            append_documents(writer, shard, 0, shard.documents, vocab_size=vocab_size, promise=part.promise)
    return writer.finish()


def _facts(plan: Plan, records: list[UnitRecord]) -> dict[str, str | int]:
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record.skipped)
    if plan.empty:
        skipped["empty file"] = len(plan.empty)
    return {
        "name": "preprocessed",
        "plan_sha256": plan.sha256,
        "inputs": len(plan.sources),
        "input_bytes": sum(source.bytes for source in plan.sources),
        "units": len(plan.units),
        "empty_documents": sum(record.empty for record in records),
        "skipped": skipped.total(),
        **{f"skipped, {reason}": count for reason, count in sorted(skipped.items())},
    }
