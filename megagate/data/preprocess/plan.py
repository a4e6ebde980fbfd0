"""How preprocessing cuts its inputs into units of work: the same units for the same inputs and settings, on every machine.

The number of workers and of array tasks has no part in it. The plan is published as `plan.json`; a run that would make another plan
over it is refused, and every finished unit names the plan that it is of.
"""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagate.data.claim import PLAN_NAME, claim_folder
from megagate.data.files import clean_errors, ends_sha256
from megagate.data.hashing import canonical_sha256
from megagate.data.manifest import SPLITS, SplitName, TokenizerIdentity
from megagate.data.preprocess.readers import BY_BYTES, Kind, Part, kind_of, open_dataset_source, open_parquet, suffixes
from megagate.errors import DataError

PLAN_VERSION = 1  # raise it when the same plan would give other tokens
DATASETS_PREFIX = "datasets:"
# A unit is what a kill loses, and each makes shards: a worker takes some seconds to minutes for 256 MiB, so there is no need of larger
# ones while there are not many thousands. Beyond that they grow to 2 GiB, since readers open all shards (two memory maps each, of the
# 65,530 that Linux allows a process): 40 TB are 18,600 units instead of 149,000.
_SMALLEST_UNIT, _LARGE_UNIT, _LARGEST_UNIT = 4 << 20, 256 << 20, 2 << 30
_UNITS, _MANY_UNITS = 256, 4096
_ROWS_PER_UNIT = 50_000  # of a saved data set
_LONG = reprlib.Repr()  # of what a damaged file may hold: cut where it is long or deep
_LONG.maxdict = _LONG.maxstring = _LONG.maxother = 200
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


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
        if len(self.split) != len(SPLITS) or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-9:
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
    """One input: its name below the common folder of all, its kind, its bytes (0 if unknown) and a sha256 of size and both ends."""

    name: str
    kind: Kind
    bytes: int
    identity: str


@dataclass(frozen=True)
class Unit:
    """A part of an input: `sources[source]`, from `begin` to `end` (see `readers.Part`), about `bytes` of it."""

    source: int
    begin: int
    end: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Settings, inputs and units; `places` are the inputs' paths here (path, CONFIG:SPLIT), which are no part of its identity.

    `empty` names the inputs of 0 bytes that were left out.
    """

    settings: Settings
    sources: tuple[Source, ...]
    units: tuple[Unit, ...]
    places: tuple[tuple[str, str], ...]
    empty: tuple[str, ...] = ()

    def body(self) -> dict[str, Any]:
        """The plan as JSON values."""
        value = {
            "plan_version": PLAN_VERSION,
            "settings": asdict(self.settings),
            "sources": [asdict(source) for source in self.sources],
            "units": [[unit.source, unit.begin, unit.end, unit.bytes] for unit in self.units],
            **({"empty": list(self.empty)} if self.empty else {}),
        }
        return dict(json.loads(json.dumps(value)))

    @property
    def sha256(self) -> str:
        """Of its body (hex)."""
        return canonical_sha256(self.body())

    def part(self, index: int) -> Part:
        """What unit `index` reads."""
        unit = self.units[index]
        path, config = self.places[unit.source]
        return Part(path=path, kind=self.sources[unit.source].kind, begin=unit.begin, end=unit.end, config=config)


def make_plan(inputs: Sequence[str], settings: Settings, *, skip_empty: bool = False) -> Plan:
    """Lists the inputs and cuts them; reads their sizes, both ends, and the footers of Parquet files.

    Args:
        inputs: Files, folders (searched for files that can be read), folders of `save_to_disk`, `datasets:NAME:CONFIG:SPLIT`.
        settings: What decides the tokens.
        skip_empty: Leave out files of 0 bytes, instead of refusing them.

    Raises:
        DataError: An input does not exist, is of an unknown kind, empty, given twice, or damaged; or there is none.
    """
    found = [place for name in inputs for place in _expand(name, settings.txt)]
    folder = os.path.commonpath([str(Path(path).absolute().parent) for path, _, kind in found if kind != "datasets"] or ["/"])
    named = sorted(
        (f"{path}:{config}" if kind == "datasets" else os.path.relpath(Path(path).absolute(), folder), path, config, kind)
        for path, config, kind in found
    )
    for (name, *_), (following, *_) in zip(named, named[1:], strict=False):
        if name == following:
            raise DataError(f"--input names {name} twice; each document must come once; leave one out")
    sources = [_source(name, path, config, kind) for name, path, config, kind in named]
    files = [(source, row[1]) for source, row in zip(sources, named, strict=True) if source.kind not in ("datasets", "saved")]
    empty = {path: source.name for source, path in files if not source.bytes}
    if empty and not skip_empty:
        raise DataError(f"{next(iter(empty))} is empty (0 bytes); {len(empty)} inputs are; leave them out, or choose --on-error skip")
    kept = [(source, row) for source, row in zip(sources, named, strict=True) if row[1] not in empty]
    if not kept:
        raise DataError(f"--input {' '.join(inputs)}: no text to read; names must end in {suffixes()}")
    size = settings.unit_bytes or unit_size(sum(source.bytes for source, _ in kept))
    units = [unit for number, (source, row) in enumerate(kept) for unit in _cut(number, source, row[1], row[2], size)]
    return Plan(
        settings=settings,
        sources=tuple(source for source, _ in kept),
        units=tuple(units),
        places=tuple((row[1], row[2]) for _, row in kept),
        empty=tuple(empty.values()),
    )


def unit_size(total: int) -> int:
    """Bytes of a unit, for inputs of `total` bytes."""
    wanted = min(_LARGE_UNIT, max(_SMALLEST_UNIT, total // _UNITS))
    return min(_LARGEST_UNIT, max(wanted, total // _MANY_UNITS))


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
        if "SLURM_ARRAY_TASK_ID" not in environment:
            return 1, 1
        try:
            number, first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{key}", default)) for key, default in _SLURM)
            count = int(environment["SLURM_ARRAY_TASK_COUNT"])
        except (KeyError, ValueError) as error:
            raise DataError(f"SLURM_ARRAY_TASK_ID is set, and {error} is not a number; give --unit-range k/K") from error
        part = (number - first) // max(step, 1) + 1
        if not 1 <= part <= count:
            raise DataError(f"Slurm task {number} of an array of {count} from {first}: its ids do not count up; give --unit-range k/K")
        return part, count
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"--unit-range is {text!r}; it must be k/K with 1 <= k <= K, as 1/8")
    return int(match[1]), int(match[2])


_SLURM = (("ID", ""), ("MIN", "0"), ("STEP", "1"))


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


def _expand(name: str, txt: str) -> list[tuple[str, str, Kind]]:
    """(path, CONFIG:SPLIT, kind) of the inputs that a word of the command line stands for."""
    if name.startswith(DATASETS_PREFIX):
        dataset, _, config = name.removeprefix(DATASETS_PREFIX).partition(":")
        return [(dataset, config, "datasets")]
    path = Path(name)
    if os.path.isdir(path):  # unlike Path's own, takes any text
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return [(name, "", "saved")]
        files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file) and not file.name.startswith("."))
        if not files:
            raise DataError(f"--input {name}: the folder holds nothing that can be read; names must end in {suffixes()}")
        return [entry for file in files for entry in _expand(str(file), txt)]
    if os.path.exists(path):
        kind = kind_of(path)
        if kind is None:
            raise DataError(f"--input {name}: unknown kind of file; names must end in {suffixes()}; convert or rename it")
        return [(name, "", "lines" if kind == "txt" and txt == "line" else kind)]
    if kind_of(path) or not _HUB_NAME.fullmatch(name.partition(":")[0]):
        raise DataError(f"--input {name}: no such file; check the path")
    dataset, _, config = name.partition(":")
    return [(dataset, config, "datasets")]


def _source(name: str, path: str, config: str, kind: Kind) -> Source:
    if kind in ("datasets", "saved"):
        data = open_dataset_source(path, config, saved=kind == "saved")
        known = getattr(data, "_fingerprint", "") if kind == "saved" else f"{data.num_shards} shards"
        return Source(name=name, kind=kind, bytes=0, identity=str(known))
    with clean_errors("read", Path(path)):
        size, identity = ends_sha256(Path(path))
    return Source(name=name, kind=kind, bytes=size, identity=identity)


def _cut(number: int, source: Source, path: str, config: str, size: int) -> list[Unit]:
    if source.kind in BY_BYTES:
        sizes = [(begin, min(size, source.bytes - begin)) for begin in range(0, source.bytes, size)]
        return [Unit(number, begin, begin + own, own) for begin, own in sizes]
    if source.kind == "parquet":
        return _cut_parquet(number, open_parquet(Path(path)).metadata, size)
    if source.kind == "saved":
        rows = len(open_dataset_source(path, config, saved=True))
        return [Unit(number, begin, min(begin + _ROWS_PER_UNIT, rows), 0) for begin in range(0, rows, _ROWS_PER_UNIT)]
    if source.kind == "datasets":
        shards = open_dataset_source(path, config, saved=False).num_shards
        return [Unit(number, index, index + 1, 0) for index in range(shards)]
    return [Unit(number, 0, source.bytes, source.bytes)]


def _cut_parquet(number: int, metadata: Any, size: int) -> list[Unit]:
    """Consecutive row groups up to `size` bytes; a larger group is a unit of its own."""
    units, first, held = [], 0, 0
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group).total_byte_size
        if group > first and held + found > size:
            units.append(Unit(number, first, group, held))
            first, held = group, 0
        held += found
    return [*units, Unit(number, first, metadata.num_row_groups, held)] if metadata.num_row_groups else units
