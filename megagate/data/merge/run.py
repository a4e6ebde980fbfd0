"""Doing a merge: shards appear one by one, whole, each with a record, and the manifest last; the same command goes on after any end.

`OUT/plan.json`, the tokenizer, then for each shard `OUT/NAME.bin` and `.idx`, `OUT/merged/NAME.json`, and last `OUT/dataset.json`. The
bytes depend on the plan alone, so that two that do the same merge at once do no harm.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megagate.data.claim import PLAN_NAME, publish_once
from megagate.data.concatenate import Promise, append_documents, check_ids, document_blocks, document_offsets
from megagate.data.files import AtomicFile, clean_errors, file_sha256, make_folder
from megagate.data.manifest import Manifest, ShardEntry, check_entry
from megagate.data.merge.plan import Member, MergePlan, Piece, Target
from megagate.data.preprocess.publish import place_tokenizer
from megagate.data.shards import Shard, ShardStats, ShardWriter, idx_path
from megagate.data.transfer import LinkError, copy_shard, linked_shard
from megagate.errors import DataError

RECORDS = "merged"
Report = Callable[[int], None]


@dataclass(frozen=True)
class Work:
    """What is left to do: shards, how many of them are written (not linked), bytes to read and bytes to write."""

    targets: tuple[Target, ...]
    written: int
    read_bytes: int
    write_bytes: int


def work_left(folder: Path, plan: MergePlan, *, copy: bool) -> Work:
    """The shards that have no record yet.

    Raises:
        DataError: A record is damaged.
    """
    itemsize = np.dtype(plan.dtype).itemsize
    todo = tuple(target for target in plan.targets if _record(folder, plan, target) is None)
    written = [target for target in todo if copy or target.rewritten]
    read = sum(_bytes(target) for target in todo if copy or target.rewritten or target.pieces[0].member.entry is None)
    return Work(todo, len(written), read, sum(target.tokens * itemsize for target in written))


def run_merge(folder: Path, plan: MergePlan, *, copy: bool = False, workers: int = 1, report: Report = lambda _: None) -> Manifest:
    """Makes all shards that are missing and publishes the manifest; doing it again changes nothing.

    Args:
        folder: The output, claimed by `publish_merge`.
        plan: What to do.
        copy: Write shards that could be linked.
        workers: Threads, each at a shard of its own.
        report: Told the bytes of tokens read since it was last called, one call at a time; may raise to stop.

    Raises:
        DataError: An input is damaged or holds ids above the vocabulary, a link cannot be made, the disk is full.
    """

    def make() -> Manifest:
        if plan.maker.tokenizer is not None:
            place_tokenizer(folder, plan.maker.tokenizer)
        _make_all(folder, plan, copy=copy, workers=workers, report=report)
        return _assemble(folder, plan)

    return publish_once(folder, plan.sha256, make, places=(RECORDS,))


def _make_all(folder: Path, plan: MergePlan, *, copy: bool, workers: int, report: Report) -> None:
    if workers < 1:
        raise DataError(f"--workers is {workers}; it must be at least 1")
    work = work_left(folder, plan, copy=copy)
    with clean_errors("write", folder):
        make_folder(folder / RECORDS)
        free = shutil.disk_usage(folder).free
    if work.write_bytes > free:
        raise DataError(
            f"{folder} has {free:,} bytes free, and {work.write_bytes:,} have to be written; choose another disk"
            + (", or leave out --copy" if copy else "")
        )
    lock, ended = threading.Lock(), threading.Event()

    def told(count: int) -> None:
        if ended.is_set():
            raise DataError("stopped")
        with lock:
            report(count)

    with ThreadPoolExecutor(workers) as pool:
        try:
            tasks = [pool.submit(_make, folder, plan, target, copy=copy, report=told) for target in work.targets]
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            failed = next((task.exception() for task in tasks if task in done and task.exception()), None)
            if failed is not None:
                raise failed
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _make(folder: Path, plan: MergePlan, target: Target, *, copy: bool, report: Report) -> None:
    vocab_size, prefix = plan.maker.identity.vocab_size, folder / target.name
    unended = sum(_unended(piece, plan.maker.identity.eod_id) for piece in target.pieces if piece.member.entry is None)
    if target.rewritten:
        stats = _rewrite(prefix, plan, target, report)
    elif copy:
        member = target.pieces[0].member
        stats = copy_shard(member.prefix, prefix, vocab_size=vocab_size, promise=_promise(member), report=report)
    else:
        stats = _link(prefix, target.pieces[0].member, vocab_size=vocab_size, report=report)
    entry = ShardEntry.of(target.name, split=target.split, stats=stats)
    path = _record_path(folder, target)
    with clean_errors("write", path), AtomicFile(path) as file:
        file.write((json.dumps({"plan": plan.sha256, "unended": unended, "entry": asdict(entry)}, indent=1) + "\n").encode())


def _promise(member: Member) -> Promise | None:
    return None if member.entry is None else Promise(member.entry.stats, by="its manifest", remedy="leave it out, or copy it again")


def _rewrite(prefix: Path, plan: MergePlan, target: Target, report: Report) -> ShardStats:
    vocab_size = plan.maker.identity.vocab_size
    with ShardWriter(prefix, dtype=np.dtype(plan.dtype)) as writer:
        for piece in target.pieces:
            shard, promise = Shard(piece.member.prefix), _promise(piece.member)
            shard.check_index()
            append_documents(writer, shard, piece.first, piece.last, vocab_size=vocab_size, promise=promise, report=report)
    return writer.finish()


def _link(prefix: Path, member: Member, *, vocab_size: int, report: Report) -> ShardStats:
    try:
        with linked_shard(member.prefix, prefix):
            return _scan(member.prefix, vocab_size=vocab_size, report=report) if member.entry is None else member.entry.stats
    except LinkError as error:
        raise DataError(f"{error}; choose an --output on that disk, or --copy") from error


def _scan(prefix: Path, *, vocab_size: int, report: Report) -> ShardStats:
    """Reads a shard once: its index, its ids, both hashes."""
    shard = Shard(prefix)
    shard.check_index()
    digest, high = hashlib.sha256(), -1
    for begin, ids, _ in document_blocks(shard):
        high = max(high, check_ids(shard, ids, begin=begin, vocab_size=vocab_size))
        digest.update(ids)
        report(ids.nbytes)
    with clean_errors("read", idx_path(prefix)):
        idx_sha256, idx_bytes = file_sha256(idx_path(prefix)), idx_path(prefix).stat().st_size
    size = shard.tokens * shard.dtype.itemsize
    return ShardStats(shard.tokens, shard.documents, high, size, idx_bytes, digest.hexdigest(), idx_sha256)


def _unended(piece: Piece, eod_id: int) -> int:
    """How many of the first documents of a piece, at most 1,000, do not end as documents of this tokenizer do."""
    if eod_id < 0:
        return 0
    shard = Shard(piece.member.prefix)
    shard.check_index()
    ends = document_offsets(shard, piece.first, min(piece.last, piece.first + 1_000))
    full = ends[1:][np.diff(ends) > 0]
    return int((shard.stream[full - 1] != eod_id).sum())


def _assemble(folder: Path, plan: MergePlan) -> Manifest:
    entries, unended = [], 0
    for target in plan.targets:
        record = _record(folder, plan, target)
        if record is None:
            raise DataError(f"{_record_path(folder, target)} is missing, after it was written; run the same command again")
        entries.append(record[0])
        unended += record[1]
    return Manifest(
        tokenizer=plan.maker.identity,
        dtype=plan.dtype,
        shards=tuple(entries),
        source={"name": "merged", "plan_sha256": plan.sha256, "inputs": len(plan.inputs), UNENDED: unended},
    )


UNENDED = "documents without an end, of the first 1,000 of each bare prefix"


def _record_path(folder: Path, target: Target) -> Path:
    return folder / RECORDS / f"{target.name}.json"


def _record(folder: Path, plan: MergePlan, target: Target) -> tuple[ShardEntry, int] | None:
    """A finished shard's entry of the manifest, and its count of documents without an end; None while it is not finished."""
    path = _record_path(folder, target)
    if not path.exists():
        return None
    with clean_errors("read", path):
        raw = path.read_bytes()
    again = f"{path} is damaged; remove it, and run again: its shard is then made again"
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(again) from error
    if not isinstance(value, dict) or not isinstance(value.get("entry"), dict) or type(value.get("unended")) is not int:
        raise DataError(again)
    if value.get("plan") != plan.sha256:
        raise DataError(f"{path} is of another merge; one folder is for one plan ({PLAN_NAME}); choose another --output")
    entry = check_entry(value["entry"], str(path))
    if (entry.prefix, entry.split, entry.tokens) != (target.name, target.split, target.tokens):
        raise DataError(again)
    return entry, value["unended"]


def _bytes(target: Target) -> int:
    return sum(piece.tokens * np.dtype(piece.member.dtype).itemsize for piece in target.pieces)


def describe(plan: MergePlan, work: Work, *, copy: bool) -> Sequence[str]:
    """What is going to happen, in lines for a person."""
    linked = len(work.targets) - work.written
    lines = [f"{len(plan.inputs)} inputs, {len(plan.targets)} shards of {plan.dtype}; {len(plan.targets) - len(work.targets)} of them done"]
    if linked:
        lines.append(f"{linked} are linked: they share the inputs' files, which must not be changed any more")
    if work.written:
        why = "copied" if copy else "written anew (cut, joined, or of another type)"
        lines.append(f"{work.written} are {why}: {_size(work.write_bytes)}")
    if work.read_bytes:
        lines.append(f"{_size(work.read_bytes)} have to be read once, for sha256 and the largest id")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
