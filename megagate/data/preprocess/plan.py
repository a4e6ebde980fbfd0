"""How preprocessing cuts its inputs into units of work: the same units for the same inputs and settings, on every machine.

The number of workers and of array tasks has no part in it. The plan is published as `plan.json`; a run that would make another plan
over it is refused, and every finished unit names the plan that it is of.
"""

import hashlib
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megagate.data.claim import PLAN_NAME, claim_folder
from megagate.data.files import clean_errors, sampled_sha256
from megagate.data.hashing import canonical_sha256
from megagate.data.manifest import SPLITS, SplitName, TokenizerIdentity
from megagate.data.preprocess.inputs import Place, check_once, find_inputs
from megagate.data.preprocess.readers import BY_BYTES, Kind, Part, open_dataset_source, open_parquet, suffixes
from megagate.errors import DataError

PLAN_VERSION = 2  # raise it when the same plan would give other tokens
# A unit is what a kill loses, and each makes shards: a worker takes some seconds to minutes for 256 MiB, so there is no need of larger
# ones while there are not many thousands. Beyond that they grow, since every rank of every run opens all shards, at 0.01 ms each: 40 TB are
# 4,096 units of 10 GB instead of 149,000.
_SMALLEST_UNIT, _LARGE_UNIT = 4 << 20, 256 << 20
_UNITS, _MANY_UNITS = 256, 4096
_ROWS_PER_UNIT = 50_000  # of a saved data set
_LONG = reprlib.Repr()  # of what a damaged file may hold: cut where it is long or deep
_LONG.maxdict = _LONG.maxstring = _LONG.maxother = 200


@dataclass(frozen=True)
class Settings:
    """What decides the tokens, beside the inputs.

    Args:
        tokenizer: Who makes the ids.
        text_key: Key or column of the text.
        append_eod: Whether each document ends in `eod_id`.
        split: Shares of train, valid and test; they sum to 1.
        max_document_bytes: A longer document is bad.
        unit_bytes: Bytes of input per unit; 0 chooses by the size of the inputs.
        txt: `file` (a .txt is a document) or `line` (each of its lines is).
    """

    tokenizer: TokenizerIdentity
    text_key: str = "text"
    append_eod: bool = True
    split: tuple[float, float, float] = (0.998, 0.001, 0.001)
    max_document_bytes: int = 8 << 20
    unit_bytes: int = 0
    txt: str = "file"

    def __post_init__(self) -> None:
        shares = all(math.isfinite(share) and share >= 0 for share in self.split)
        if len(self.split) != len(SPLITS) or not shares or abs(sum(self.split) - 1) > 1e-9:
            raise DataError(f"--split is {self.split}; it must be three shares ({', '.join(SPLITS)}) that sum to 1, as 0.998,0.001,0.001")
        if self.max_document_bytes < 1 or self.unit_bytes < 0:
            raise DataError(f"--max-document-bytes ({self.max_document_bytes}) and --unit-bytes ({self.unit_bytes}) must be positive")

    def split_of(self, data: bytes) -> SplitName:
        """The split of a document, by its own hash: adding documents moves none to another split."""
        draw = int.from_bytes(hashlib.sha256(data).digest()[:8], "little") / 2**64
        if draw < self.split[0]:
            return "train"
        return "valid" if draw < self.split[0] + self.split[1] or not self.split[2] else "test"


@dataclass(frozen=True)
class Source:
    """One input: its name below the common folder of all, its kind, its bytes (0 if unknown) and a sha256 of size and samples."""

    name: str
    kind: Kind
    bytes: int
    identity: str


@dataclass(frozen=True)
class Piece:
    """A part of an input: `sources[source]`, from `begin` to `end` (see `readers.Part`), about `bytes` of it (0 if unknown)."""

    source: int
    begin: int
    end: int
    bytes: int


@dataclass(frozen=True)
class Unit:
    """What is made in one go: a piece, or several small ones that follow each other."""

    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Of all pieces."""
        return sum(piece.bytes for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """Settings, inputs and units, and what is no part of its identity: where the inputs lie here, and what was seen of them.

    Args:
        settings: What decides the tokens, beside the inputs.
        sources: The inputs.
        units: What is made in one go.
        places: Where the inputs lie here.
        times: Their times of modification (ns; 0 for data sets).
        empty: Inputs of 0 bytes that were left out.
        left_out: (ending, number) of the files of folders that are no inputs.
    """

    settings: Settings
    sources: tuple[Source, ...]
    units: tuple[Unit, ...]
    places: tuple[Place, ...]
    times: tuple[int, ...]
    empty: tuple[str, ...] = ()
    left_out: tuple[tuple[str, int], ...] = ()

    def body(self) -> dict[str, Any]:
        """The plan as JSON values."""
        value = {
            "plan_version": PLAN_VERSION,
            "settings": asdict(self.settings),
            "sources": [asdict(source) for source in self.sources],
            "units": [[[piece.source, piece.begin, piece.end, piece.bytes] for piece in unit.pieces] for unit in self.units],
            **({"empty": list(self.empty)} if self.empty else {}),
        }
        return dict(json.loads(json.dumps(value)))

    @cached_property
    def sha256(self) -> str:
        """Of its body (hex). Every unit asks for it, and the body may be large."""
        return canonical_sha256(self.body())

    def part(self, piece: Piece) -> Part:
        """What is read for a piece."""
        place = self.places[piece.source]
        return Part(path=place.path, kind=place.kind, begin=piece.begin, end=piece.end, config=place.config)

    def check_unchanged(self, piece: Piece) -> None:
        """Raises `DataError` if the file of a piece was written since the plan was made."""
        path, before = Path(self.places[piece.source].path), self.times[piece.source]
        if before != _modified(self.places[piece.source]):
            raise DataError(f"{path} was changed while it was read; inputs must not change; begin again with an empty --output")

    def newer_inputs(self, folder: Path) -> list[str]:
        """Names of the inputs that were written after `plan.json`: their samples are the same, the rest may not be."""
        with clean_errors("read", folder / PLAN_NAME):
            made = (folder / PLAN_NAME).stat().st_mtime_ns
        return [source.name for source, time in zip(self.sources, self.times, strict=True) if time > made]


def make_plan(inputs: Sequence[str], settings: Settings, *, skip_empty: bool = False) -> Plan:
    """Lists the inputs and cuts them; reads their sizes, samples (see `sampled_sha256`), and the footers of Parquet files.

    Args:
        inputs: Files, folders (searched for files that can be read), folders of `save_to_disk`, `datasets:NAME:CONFIG:SPLIT`.
        settings: What decides the tokens.
        skip_empty: Leave out files of 0 bytes, instead of refusing them.

    Raises:
        DataError: An input does not exist, is of an unknown kind, empty, given twice, or damaged; or there is none.
    """
    left_out: Counter[str] = Counter()
    found = [place for name in inputs for place in find_inputs(name, settings.txt, left_out)]
    folder = os.path.commonpath([str(Path(place.path).absolute().parent) for place in found if place.kind != "datasets"] or ["/"])
    named = sorted((_name(place, folder), place) for place in found)
    for (name, _), (following, _) in zip(named, named[1:], strict=False):
        if name == following:
            raise DataError(f"--input names {name} twice; each document must come once; leave one out")
    check_once((place.path, Path(place.path)) for _, place in named if place.is_file())
    known = [(_modified(place), _source(name, place), place) for name, place in named]
    empty = [(place.path, source.name) for _, source, place in known if place.is_file() and not source.bytes]
    if empty and not skip_empty:
        raise DataError(f"{empty[0][0]} is empty (0 bytes); {len(empty)} inputs are; leave them out, or choose --on-error skip")
    kept = [(time, source, place) for time, source, place in known if source.bytes or not place.is_file()]
    if not kept:
        raise DataError(f"--input {' '.join(inputs)}: no text to read; names must end in {suffixes()}")
    size = settings.unit_bytes or unit_size(sum(source.bytes for _, source, _ in kept))
    pieces = [piece for number, (_, source, place) in enumerate(kept) for piece in _cut(number, source, place, size)]
    times, sources, places = zip(*kept, strict=True)
    return Plan(
        settings=settings,
        sources=sources,
        units=tuple(_grouped(pieces, size)),
        places=places,
        times=times,
        empty=tuple(name for _, name in empty),
        left_out=tuple(sorted(left_out.items())),
    )


def _name(place: Place, folder: str) -> str:
    return f"{place.path}:{place.config}" if place.kind == "datasets" else os.path.relpath(Path(place.path).absolute(), folder)


def _modified(place: Place) -> int:
    if not place.is_file():
        return 0
    with clean_errors("read", Path(place.path)):
        return Path(place.path).stat().st_mtime_ns


def _grouped(pieces: Sequence[Piece], size: int) -> Iterator[Unit]:
    """Neighbours of up to `size` bytes together: a unit makes up to seven files. Pieces of unknown size stay alone."""
    held: list[Piece] = []
    total = 0
    for piece in pieces:
        if held and not (held[-1].bytes and piece.bytes and total + piece.bytes <= size):
            yield Unit(tuple(held))
            held, total = [], 0
        held.append(piece)
        total += piece.bytes
    if held:
        yield Unit(tuple(held))


def unit_size(total: int) -> int:
    """Bytes of a unit, for inputs of `total` bytes."""
    return max(min(_LARGE_UNIT, max(_SMALLEST_UNIT, total // _UNITS)), total // _MANY_UNITS)


def publish_plan(folder: Path, plan: Plan) -> None:
    """Writes `plan.json`, or checks that the one there is equal.

    Raises:
        DataError: The folder holds work of another plan.
    """
    claim_folder(folder, plan.body(), difference=_difference)


def parse_range(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """`k/K` to (k, K), k from 1; without it the place of this task in its Slurm array, and (1, 1) where there is none.

    Raises:
        DataError: It is not of that form, or the array's task ids do not count up from the first.
    """
    if text is None:
        return _slurm_range(environment) if "SLURM_ARRAY_TASK_ID" in environment else (1, 1)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"--unit-range is {text!r}; it must be k/K with 1 <= k <= K, as 1/8")
    return int(match[1]), int(match[2])


def _slurm_range(environment: Mapping[str, str]) -> tuple[int, int]:
    try:
        number, count = (int(environment[f"SLURM_ARRAY_TASK_{key}"]) for key in ("ID", "COUNT"))
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{key}", default)) for key, default in (("MIN", "0"), ("STEP", "1")))
        last = int(environment.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step))
    except (KeyError, ValueError) as error:
        raise DataError(f"SLURM_ARRAY_TASK_ID is set, and {error} is not a number; give --unit-range k/K") from error
    place, apart = divmod(number - first, max(step, 1))
    # A task of `--array=3`, submitted alone for the fourth of sixteen, would take itself for the only one.
    if first > 1 or last != first + (count - 1) * step or apart or not 0 <= place < count:
        raise DataError(
            f"Slurm task {number} of an array of {count} from {first} to {last}: it must count up from 0 or 1, without gaps, or the"
            " share of the task is unknown; give --unit-range k/K with the K of all tasks, or the whole --array again"
        )
    return place + 1, count


def _difference(stored: Any, body: dict[str, Any]) -> str:
    if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
        return f"{PLAN_NAME} is not one of preprocessing"
    for key, value in body["settings"].items():
        if stored["settings"].get(key) != value:
            return f"{key} was {_LONG.repr(stored['settings'].get(key))}, and is {value!r} now"
    if stored.get("sources") != body["sources"]:
        sources = stored.get("sources")
        listed = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
        before = {source["name"]: source for source in listed if isinstance(source.get("name"), str)}
        now = {source["name"]: source for source in body["sources"]}
        names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return f"{len(names)} inputs were added, removed or changed, the first is {names[0]}" if names else "the inputs' order"
    return "the units or the version of the plan differ"


def _source(name: str, place: Place) -> Source:
    path, config, kind = place
    if not place.is_file():
        data = open_dataset_source(path, config, saved=kind == "saved")
        known = getattr(data, "_fingerprint", "") if kind == "saved" else f"{data.num_shards} shards"
        return Source(name=name, kind=kind, bytes=0, identity=str(known))
    with clean_errors("read", Path(path)):
        size, identity = sampled_sha256(Path(path))
    return Source(name=name, kind=kind, bytes=size, identity=identity)


def _cut(number: int, source: Source, place: Place, size: int) -> list[Piece]:
    if source.kind in BY_BYTES:
        sizes = [(begin, min(size, source.bytes - begin)) for begin in range(0, source.bytes, size)]
        return [Piece(number, begin, begin + own, own) for begin, own in sizes]
    if source.kind == "parquet":
        return _cut_parquet(number, open_parquet(Path(place.path)).metadata, size)
    if source.kind == "saved":
        rows = len(open_dataset_source(place.path, place.config, saved=True))
        return [Piece(number, begin, min(begin + _ROWS_PER_UNIT, rows), 0) for begin in range(0, rows, _ROWS_PER_UNIT)]
    if source.kind == "datasets":
        shards = open_dataset_source(place.path, place.config, saved=False).num_shards
        return [Piece(number, index, index + 1, 0) for index in range(shards)]
    return [Piece(number, 0, source.bytes, source.bytes)]


def _cut_parquet(number: int, metadata: Any, size: int) -> list[Piece]:
    """Consecutive row groups up to `size` bytes; a larger group is a piece of its own."""
    pieces, first, held = [], 0, 0
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group).total_byte_size
        if group > first and held + found > size:
            pieces.append(Piece(number, first, group, held))
            first, held = group, 0
        held += found
    return [*pieces, Piece(number, first, metadata.num_row_groups, held)] if metadata.num_row_groups else pieces
