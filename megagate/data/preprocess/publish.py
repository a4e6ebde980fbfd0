"""The last step of preprocessing: every unit is there, so the parts become a data set, by its manifest."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megagate.data.concatenate import append_documents, small_runs
from megagate.data.files import clean_errors, file_sha256
from megagate.data.manifest import MANIFEST_NAME, SPLITS, Manifest, ShardEntry, SplitName, open_shards, read_manifest, write_manifest
from megagate.data.preprocess.plan import Plan
from megagate.data.preprocess.units import UNITS_FOLDER, UnitRecord, part_prefix, read_record, sweep
from megagate.data.shards import Shard, ShardStats, ShardWriter, bin_path, token_dtype
from megagate.data.tokenizer import AnyTokenizer
from megagate.errors import DataError

FULL_SHARD = 1 << 22  # tokens; windows never cross shards, so that many small ones would lose many tokens


def place_tokenizer(folder: Path, tokenizer: AnyTokenizer) -> None:
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
    """Checks that every unit of the plan is there, merges small parts, and writes `dataset.json`.

    Parts of at least `FULL_SHARD` tokens stay where they are; runs of smaller ones of a split are copied into one shard. Doing it again
    changes nothing.

    Raises:
        DataError: Units are missing or damaged, there are no documents, or the folder cannot be written.
    """
    if (folder / MANIFEST_NAME).exists():
        manifest = _standing(folder, plan)
        _sweep(folder)  # whoever made it may have been killed before it did so
        return manifest
    try:
        records = _records(folder, plan)
        manifest = _assemble(folder, plan, records)
        write_manifest(folder, manifest)
    except DataError:
        if not (folder / MANIFEST_NAME).exists():
            raise
        return _standing(folder, plan)  # another process was faster, and has swept our temporary files away
    _sweep(folder)
    return manifest


def _sweep(folder: Path) -> None:
    for place in (folder, folder / UNITS_FOLDER):
        sweep(place, ".*.tmp")


def _standing(folder: Path, plan: Plan) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.source.get("plan_sha256") != plan.sha256:
        raise DataError(f"{folder} holds a data set of another plan; one folder is for one plan; choose another --output")
    for split in SPLITS:
        open_shards(folder, manifest, split=split)
    return manifest


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
    number = 0
    parts = [(record.unit, stats) for record in records for stats in [record.stats(split)] if stats is not None]
    for run in small_runs([stats.tokens for _, stats in parts], FULL_SHARD):
        for unit, stats in parts[run.start : run.stop]:
            _check_part(part_prefix(folder, unit, split), stats)
        if len(run) == 1:
            unit, stats = parts[run.start]
            yield ShardEntry.of(f"{UNITS_FOLDER}/{part_prefix(folder, unit, split).name}", split=split, stats=stats)
        else:
            name = f"{split}-{number:05d}"
            yield ShardEntry.of(name, split=split, stats=_merge(folder, [parts[index][0] for index in run], split, name, plan))
            number += 1


def _check_part(prefix: Path, stats: ShardStats) -> None:
    shard = Shard(prefix)
    if (shard.tokens, shard.documents) != (stats.tokens, stats.documents):
        raise DataError(
            f"{bin_path(prefix)} has {shard.tokens} tokens of {shard.documents} documents, and its unit's record says {stats.tokens} of"
            f" {stats.documents}; it was changed since; remove the record, and run again"
        )


def _merge(folder: Path, units: list[int], split: SplitName, name: str, plan: Plan) -> ShardStats:
    vocab_size = plan.settings.tokenizer.vocab_size
    with ShardWriter(folder / name, dtype=token_dtype(vocab_size)) as writer:
        for unit in units:
            shard = Shard(part_prefix(folder, unit, split))
            shard.check_index()
            append_documents(writer, shard, 0, shard.documents, vocab_size=vocab_size)
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
