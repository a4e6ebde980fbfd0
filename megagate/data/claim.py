"""One folder is for one plan: who makes a data set says in `plan.json` what it is made of, before anything else is written there.

The manifest is written last, once: whoever comes later, or is overtaken, takes the one that stands there.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megagate.data.files import AtomicFile, clean_errors, make_folder, sweep
from megagate.data.manifest import MANIFEST_NAME, SPLITS, Manifest, open_shards, read_manifest, write_manifest
from megagate.errors import DataError

PLAN_NAME = "plan.json"


def claim_folder(folder: Path, body: dict[str, Any], *, difference: Callable[[Any, dict[str, Any]], str]) -> None:
    """Writes `plan.json`, or checks that the one there is equal; of several writers at once the first decides.

    Args:
        folder: The output; made if need be.
        body: The plan as JSON values.
        difference: What to say of a stored value (any JSON) that differs from the body.

    Raises:
        DataError: The folder holds a data set or work of another plan, or cannot be written.
    """
    path = folder / PLAN_NAME
    with clean_errors("write", path):
        make_folder(folder)
        if not path.exists():
            if (folder / MANIFEST_NAME).exists():
                raise DataError(f"{folder} holds a data set that was not made by this plan; choose another --output")
            file = AtomicFile(path)
            try:
                file.write(json.dumps(body).encode() + b"\n")
                file.publish_first()
            except BaseException:
                file.discard()
                raise
        raw = path.read_bytes()
    try:
        stored = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: not JSON ({error}); remove the folder and begin again") from error
    if stored != body:
        raise DataError(
            f"{folder} holds the work of another plan: {difference(stored, body)}; one folder is for one plan; choose another --output, or"
            " the same inputs and settings as before"
            + ("" if (folder / MANIFEST_NAME).exists() else "; or remove the folder, in which nothing is published yet, and begin anew")
        )


def publish_once(folder: Path, plan_sha256: str, make: Callable[[], Manifest], *, places: Sequence[str]) -> Manifest:
    """Makes a data set and publishes its manifest, unless it stands there; then removes the temporary files of all who were killed.

    Args:
        folder: Claimed for the plan.
        plan_sha256: The plan that the data set's `source` names.
        make: Makes all shards, and returns what they are.
        places: Folders within it that are swept, too.

    Raises:
        DataError: `make` or writing failed, a data set of another plan stands there, or its files are not those of its manifest.
    """
    if not (folder / MANIFEST_NAME).exists():
        try:
            write_manifest(folder, make())
        except DataError:
            if not (folder / MANIFEST_NAME).exists():
                raise
            # Another process was faster, and has swept our temporary files away.
    manifest = read_manifest(folder)
    if manifest.source.get("plan_sha256") != plan_sha256:
        raise DataError(f"{folder} holds a data set that was not made by this plan; choose another --output")
    for split in SPLITS:
        open_shards(folder, manifest, split=split)
    for place in (folder, *(folder / name for name in places)):
        sweep(place)
    return manifest
