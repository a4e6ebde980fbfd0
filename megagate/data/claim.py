"""One folder is for one plan: who makes a data set says in `plan.json` what it is made of, before anything else is written there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagate.data.files import AtomicFile, clean_errors
from megagate.data.manifest import MANIFEST_NAME
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
        folder.mkdir(parents=True, exist_ok=True)
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
            " the same inputs and settings as before, or remove the folder if nothing in it is needed"
        )
