"""What the words of `--input` stand for: files, files of folders, saved data sets, and data sets of the `datasets` package."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from megagate.data.files import clean_errors
from megagate.data.preprocess.readers import Kind, kind_of, suffixes
from megagate.errors import DataError

DATASETS_PREFIX = "datasets:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Place(NamedTuple):
    """Where an input lies: its path or the name of a data set, CONFIG:SPLIT of the latter, and how it is read."""

    path: str
    config: str
    kind: Kind

    def is_file(self) -> bool:
        """Whether it is one file."""
        return self.kind not in ("datasets", "saved")


def find_inputs(name: str, txt: str, left_out: Counter[str]) -> list[Place]:
    """The inputs that a word of the command line stands for; links to folders are followed.

    Args:
        name: The word.
        txt: `file` or `line`, see `Settings`.
        left_out: Counts the files of folders that are no inputs, by the endings of their names.

    Raises:
        DataError: It does not exist, is of an unknown kind, or a folder that holds nothing to read, or that cannot be listed.
    """
    if name.startswith(DATASETS_PREFIX):
        dataset, _, config = name.removeprefix(DATASETS_PREFIX).partition(":")
        return [Place(dataset, config, "datasets")]
    path = Path(name)
    if os.path.isdir(path):  # unlike Path's own, takes any text
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return [Place(name, "", "saved")]
        files = [file for file in _walk(path, ()) if _is_input(file, left_out)]
        if not files:
            raise DataError(f"--input {name}: the folder holds nothing that can be read; names must end in {suffixes()}")
        return [_file(str(file), txt) for file in files]
    if os.path.exists(path):
        return [_file(name, txt)]
    if kind_of(path) or not _HUB_NAME.fullmatch(name.partition(":")[0]):
        raise DataError(f"--input {name}: no such file; check the path")
    dataset, _, config = name.partition(":")
    return [Place(dataset, config, "datasets")]


def _file(name: str, txt: str) -> Place:
    kind = kind_of(Path(name))
    if kind is None:
        raise DataError(f"--input {name}: unknown kind of file; names must end in {suffixes()}; convert or rename it")
    return Place(name, "", "lines" if kind == "txt" and txt == "line" else kind)


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """All that is below and no folder; a link to a folder that it lies in is not followed."""
    with clean_errors("list", folder):
        found = folder.stat()
        paths = sorted(folder.iterdir())
    own = (found.st_dev, found.st_ino)
    for path in paths if own not in above else ():
        if path.is_dir():
            yield from _walk(path, (*above, own))
        else:
            yield path


def _is_input(path: Path, left_out: Counter[str]) -> bool:
    if path.name.startswith("."):
        left_out["hidden"] += 1
    elif not path.is_file():
        left_out["broken links"] += 1  # or pipes and the like
    elif not kind_of(path):
        left_out["".join(path.suffixes[-2:]).lower() or "no ending"] += 1
    else:
        return True
    return False


def check_once(files: Iterable[tuple[str, Path]]) -> None:
    """Refuses one file under two names.

    Args:
        files: Names of messages, and paths.

    Raises:
        DataError: Two are links to the same file, or one cannot be read.
    """
    seen: dict[tuple[int, int], str] = {}
    for name, path in files:
        with clean_errors("read", path):
            found = path.stat()
        other = seen.setdefault((found.st_dev, found.st_ino), name)
        if other != name:
            raise DataError(f"--input names one file twice, as {other} and as {name}; each document must come once; leave one out")
