"""Records of studies that go on over several calls: written whole, and resumed only under the same conditions."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagate.errors import RunError

_ROOT = Path(__file__).parents[2]


def problem_of(path: Path | None, *, resume: bool) -> str:
    """What is wrong with `--json` and `--resume`; empty where nothing is."""
    if resume and not path:
        return "--resume needs --json FILE, the record to go on with"
    if path and path.exists() and not resume:
        return f"--json {path}: exists; give --resume to go on with it, or another name"
    if path and not path.parent.is_dir():
        return f"--json {path}: no folder {path.parent}; make it, or give another name"
    return ""


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the file at once: a stop leaves the last complete one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(record) + "\n")
    os.replace(part, path)


def require_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse what was measured under other conditions.

    Raises:
        RunError: With the first condition that differs.
    """
    for key, value in here.items():
        if there.get(key) != value:
            raise RunError(
                f"--json {path}: measured with {key} = {there.get(key)}, this run has {value}: the two cannot be one study;"
                " give another name"
            )


def code_digest(folders: Sequence[str]) -> str:
    """Of the code of some of the library's folders: what two versions of it gave is no study."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
