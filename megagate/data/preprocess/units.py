"""Text to token shards, one unit of the plan at a time; a unit appears whole, with a record of it, or not at all.

`OUT/plan.json`, then for each unit `OUT/units/part-00012-train.bin` and `.idx` (and of the other splits, where it has documents), and last
`OUT/units/part-00012.json`. Each file is written under a temporary name, flushed and renamed, and its bytes depend on the plan alone:
whoever is killed is run again, and two that write the same unit write the same bytes. `publish.finalize` makes the data set of them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megagate.data.files import AtomicFile, clean_errors
from megagate.data.manifest import MANIFEST_NAME, SPLITS, SplitName
from megagate.data.preprocess.backends import Encoder
from megagate.data.preprocess.plan import Plan
from megagate.data.preprocess.readers import BadDocument, Document, read_part
from megagate.data.shards import ShardStats, ShardWriter, token_dtype
from megagate.errors import DataError

UNITS_FOLDER = "units"
OnError = Literal["skip", "stop"]
_BATCH_BYTES = 1 << 18  # of text tokenized at once: a tokenizer takes some 100 times as much memory
_BATCH_DOCUMENTS = 512  # bad and empty ones too: only a report shows that the parent has died
_TOLD = 5  # messages of skipped documents kept by each unit


class Progress(NamedTuple):
    """What was done since the last report; `input_bytes` of the plan's, so that they sum to it at the end of a unit."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    input_bytes: int = 0


@dataclass(frozen=True)
class UnitRecord:
    """A finished unit.

    Args:
        plan: sha256 of the plan it is of.
        unit: Its index.
        shards: Split to the shard's statistics (as `ShardStats`), for splits that have documents.
        empty: Documents without text, which are left out.
        skipped: Reason to number of what could not be used.
        messages: The first few of these, with places.
    """

    plan: str
    unit: int
    shards: dict[str, dict[str, Any]]
    empty: int
    skipped: dict[str, int]
    messages: list[str]

    def stats(self, split: SplitName) -> ShardStats | None:
        """Of the shard of a split, if there is one."""
        found = self.shards.get(split)
        return None if found is None else ShardStats(**found)


def part_prefix(folder: Path, unit: int, split: SplitName) -> Path:
    """Of the shard that a unit adds to a split."""
    return folder / UNITS_FOLDER / f"part-{unit:05d}-{split}"


def record_path(folder: Path, unit: int) -> Path:
    """Of the record of a unit."""
    return folder / UNITS_FOLDER / f"part-{unit:05d}.json"


def read_record(folder: Path, plan_sha256: str, unit: int) -> UnitRecord | None:
    """The record of a unit, or None while it is not finished.

    Raises:
        DataError: It is damaged, or of another plan.
    """
    path = record_path(folder, unit)
    if not path.exists():
        return None
    with clean_errors("read", path):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
        record = _checked_record(value)
    except (ValueError, TypeError, RecursionError) as error:
        told = str(error).encode("ascii", errors="backslashreplace").decode()  # it may quote what no terminal can print
        raise DataError(f"{path} is damaged ({told}); remove it, and run again: its unit is then made again") from error
    if record.plan != plan_sha256 or record.unit != unit:
        raise DataError(f"{path} is of another plan or unit; one folder is for one plan; remove it, or choose another --output")
    return record


def _checked_record(value: Any) -> UnitRecord:
    """A record from JSON; `TypeError` or `ValueError` where it is none."""
    record = UnitRecord(**value)
    counts = [("unit", record.unit), ("empty", record.empty), *_items(record.skipped)]
    for split, found in _items(record.shards):
        if split not in SPLITS:
            raise ValueError(f"split {split!r}")
        stats = asdict(ShardStats(**found))
        counts += [(key, number) for key, number in stats.items() if not key.endswith("sha256")]
        if not all(isinstance(text, str) for key, text in stats.items() if key.endswith("sha256")):
            raise TypeError("a sha256 is no text")
    for key, number in counts:
        if type(number) is not int or not -1 <= number < 2**63:
            raise TypeError(f"{key} is no count")
    if not isinstance(record.messages, list) or not all(isinstance(message, str) for message in record.messages):
        raise TypeError("messages are no texts")
    return record


def _items(value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return list(value.items())


def missing_units(folder: Path, plan: Plan, *, part: int = 1, parts: int = 1) -> list[int]:
    """Units of share `part` of `parts` (from 1) that have no record yet; shares take turns, so that each gets some of every input.

    None is missing once the data set is published: their files may be deleted then.
    """
    if (folder / MANIFEST_NAME).exists():
        return []
    sha256 = plan.sha256
    return [unit for unit in range(part - 1, len(plan.units), parts) if read_record(folder, sha256, unit) is None]


class UnitWriter:
    """Tokenizes the documents of one unit and writes them, by split.

    Args:
        plan: Whose unit it is.
        unit: Its index.
        folder: The output; its folder of units exists.
        encoder: Makes the ids; those of the plan's tokenizer.
        on_error: `stop` raises at the first bad document, `skip` counts it.
        report: Called after each batch; may raise to stop.
    """

    def __init__(
        self, plan: Plan, unit: int, *, folder: Path, encoder: Encoder, on_error: OnError, report: Callable[[Progress], None]
    ) -> None:
        self._plan, self._unit, self._folder = plan, unit, folder
        self._name, self._path = "", ""  # of the piece that is read: within the plan, and here
        self._encoder, self._on_error, self._report = encoder, on_error, report
        self._dtype = token_dtype(plan.settings.tokenizer.vocab_size)
        self._writers: dict[SplitName, ShardWriter] = {}
        self._stack = ExitStack()
        self._documents = self._items = self._empty = self._consumed = self._told = 0
        self._skipped: Counter[str] = Counter()
        self._messages: list[str] = []

    def run(self) -> UnitRecord:
        """Does all of it and publishes the record.

        Raises:
            DataError: Bad input under `stop`, input that cannot be read, an id that is not of the vocabulary, a full disk.
        """
        batch: list[Document] = []
        held = 0
        with self._stack:
            for item in self._read():
                self._consumed += item.consumed
                self._items += 1
                if isinstance(item, BadDocument):
                    self._note(item)
                elif not item.data:
                    self._empty += 1
                else:
                    batch.append(item)
                    held += len(item.data)
                if held >= _BATCH_BYTES or not self._items % _BATCH_DOCUMENTS:
                    self._write(batch)
                    batch, held = [], 0
            self._write(batch)
        return self._publish()

    def _read(self) -> Iterator[Document | BadDocument]:
        settings = self._plan.settings
        for piece in self._plan.units[self._unit].pieces:
            part = self._plan.part(piece)
            self._name, self._path = self._plan.sources[piece.source].name, part.path
            yield from read_part(part, text_key=settings.text_key, longest=settings.max_document_bytes)
            self._plan.check_unchanged(piece)

    def _note(self, item: BadDocument) -> None:
        if self._on_error == "stop":
            raise DataError(f"{item.message}; repair it, or choose --on-error skip")
        self._skipped[item.reason] += 1
        if len(self._messages) < _TOLD:
            # The name within the plan: a record must not depend on where the inputs lie.
            self._messages.append(item.message.replace(self._path, self._name, 1))

    def _write(self, batch: list[Document]) -> None:
        settings = self._plan.settings
        arrays = self._encoder.encode_batch([document.text for document in batch])
        end = [np.array([settings.tokenizer.eod_id], dtype=np.uint32)] if settings.append_eod else []
        splits = [settings.split_of(document.data) for document in batch]
        tokens = 0
        for split in SPLITS:
            chosen = [ids for ids, own in zip(arrays, splits, strict=True) if own == split and ids.size + len(end)]
            if not chosen:
                continue
            ids = np.concatenate([part for one in chosen for part in (one, *end)])
            self._check_ids(int(ids.min()), int(ids.max()))
            self._writer(split).add_many(ids, lengths=[one.size + len(end) for one in chosen])
            tokens += ids.size
        self._documents += len(batch)
        # At most the unit's own bytes: its last line may end in the next one's.
        done = min(self._consumed, self._plan.units[self._unit].bytes)
        self._report(Progress(len(batch), sum(len(document.data) for document in batch), tokens, done - self._told))
        self._told = done

    def _check_ids(self, low: int, high: int) -> None:
        limit = self._plan.settings.tokenizer.vocab_size
        if low < 0 or high >= limit:
            raise DataError(
                f"{self._path}: the tokenizer made ids {low} to {high} within {_BATCH_DOCUMENTS} documents after document"
                f" {self._documents} of unit {self._unit}; ids must be in [0, {limit}); the tokenizer's file is not the plan's: begin again"
            )

    def _writer(self, split: SplitName) -> ShardWriter:
        if split not in self._writers:
            prefix = part_prefix(self._folder, self._unit, split)
            self._writers[split] = self._stack.enter_context(ShardWriter(prefix, dtype=self._dtype))
        return self._writers[split]

    def _publish(self) -> UnitRecord:
        record = UnitRecord(
            plan=self._plan.sha256,
            unit=self._unit,
            shards={split: asdict(self._writers[split].finish()) for split in SPLITS if split in self._writers},
            empty=self._empty,
            skipped=dict(sorted(self._skipped.items())),
            messages=self._messages,
        )
        path = record_path(self._folder, self._unit)
        with clean_errors("write", path), AtomicFile(path) as file:
            file.write((json.dumps({field.name: getattr(record, field.name) for field in fields(record)}, indent=1) + "\n").encode())
        self._report(Progress(input_bytes=self._plan.units[self._unit].bytes - self._told))
        return record


def write_unit(
    plan: Plan, unit: int, *, folder: Path, encoder: Encoder, on_error: OnError, report: Callable[[Progress], None]
) -> UnitRecord:
    """Makes one unit, see `UnitWriter`; another process may make the same one at the same time."""
    try:
        return UnitWriter(plan, unit, folder=folder, encoder=encoder, on_error=on_error, report=report).run()
    except DataError:
        # Another process may have finished everything meanwhile, and swept our temporary files away: its bytes are ours.
        record = read_record(folder, plan.sha256, unit)
        if record is None:
            raise
        return record
