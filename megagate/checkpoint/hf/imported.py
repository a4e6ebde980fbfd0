"""What a checkpoint remembers of the Hugging Face directory that it was adopted from, for its way back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagate.data.tokenizer import TOKENIZER_NAME
from megagate.errors import DataError

IMPORTED_FROM, IMPORTED_DTYPE = "imported_from", "imported_dtype"
"""Keys of the checkpoint's metadata: the directory, and the type of its weights, `fp32` or `bf16`."""


def imported_dtype(metadata: Mapping[str, Any]) -> str | None:
    """In which type an adopted checkpoint was, None for any other checkpoint."""
    return metadata.get(IMPORTED_DTYPE)


def imported_tokenizer(metadata: Mapping[str, Any], *, purpose: str, remedy: str) -> str | None:
    """The directory with the tokenizer of an adopted checkpoint, None for any other checkpoint.

    Args:
        metadata: Of the checkpoint.
        purpose: Who needs it, for messages.
        remedy: What to do where it is not there, for messages.

    Raises:
        DataError: The directory is gone, or has none.
    """
    if metadata.get(IMPORTED_FROM) is None:
        return None
    folder = str(metadata[IMPORTED_FROM])
    if has_tokenizer(Path(folder)):
        return folder
    what = f"has no {TOKENIZER_NAME}" if os.path.isdir(folder) else "is gone"
    raise DataError(f"{folder}, from which this checkpoint was adopted and whose tokenizer {purpose} needs, {what}; {remedy}")


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a tokenizer that data can be prepared with."""
    return os.path.isfile(folder / TOKENIZER_NAME)
