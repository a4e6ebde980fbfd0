"""One folder is for one plan, also when several begin at once."""

import json
from pathlib import Path

import pytest

from megagate.data.claim import PLAN_NAME, claim_folder
from megagate.data.files import AtomicFile
from megagate.errors import DataError


def test_of_several_writers_of_one_file_the_first_has_its_way(tmp_path: Path) -> None:
    files = [AtomicFile(tmp_path / "a") for _ in range(3)]
    for number, file in enumerate(files):
        file.write(f"{number}".encode())
    for file in (files[1], files[0], files[2]):
        file.publish_first()
    assert (tmp_path / "a").read_bytes() == b"1" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_plan_is_written_once_and_then_compared(tmp_path: Path) -> None:
    folder = tmp_path / "new/place"
    claim_folder(folder, {"a": [1]}, difference=lambda *_: "?")
    before = (folder / PLAN_NAME).read_bytes()
    assert json.loads(before) == {"a": [1]}
    claim_folder(folder, {"a": [1]}, difference=lambda *_: "?")
    told: list[object] = []
    with pytest.raises(DataError, match=f"{folder} holds the work of another plan: it differs; one folder is for one plan; choose another"):
        claim_folder(folder, {"a": [2]}, difference=lambda *both: told.extend(both) or "it differs")
    assert told == [{"a": [1]}, {"a": [2]}] and (folder / PLAN_NAME).read_bytes() == before
    (folder / PLAN_NAME).rename(folder / "dataset.json")
    with pytest.raises(DataError, match="holds a data set that was not made by this plan"):
        claim_folder(folder, {"a": [1]}, difference=lambda *_: "?")
    assert [path.name for path in folder.iterdir()] == ["dataset.json"]
