"""`--tokenizer NAME_OR_PATH` to a tokenizer: `bytes`, a `tokenizer.json`, a folder of the Hugging Face kind, or a name of their hub."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megagate.data.byte_tokenizer import BYTES, ByteTokenizer
from megagate.data.files import clean_errors
from megagate.data.tokenizer import EOD, PAD, TOKENIZER_NAME, AnyTokenizer, Tokenizer
from megagate.errors import DataError

_CONFIG_NAME = "tokenizer_config.json"


def find_tokenizer(name: str, *, eod: str | None = None) -> AnyTokenizer:
    """The tokenizer of a name or a path.

    Args:
        name: `bytes`, the path of a `tokenizer.json`, of a folder that holds one, or `owner/name` of the Hugging Face hub.
        eod: Token that ends documents; by default `eos_token` of `tokenizer_config.json`, else `<|endoftext|>`.

    Raises:
        DataError: It does not exist, is damaged, or has no such token.
    """
    if name == BYTES:
        if eod is not None:
            raise DataError(f"--eod-token is {eod!r}; the tokenizer {BYTES} has its own end of document, id 256; leave the option out")
        return ByteTokenizer()
    path = tokenizer_file(name)
    config = _config(path.with_name(_CONFIG_NAME))
    end = eod or _token(config, "eos_token") or EOD
    fill = _token(config, "pad_token")
    if fill == end:
        fill = None  # many models fill with their end of document; who masks padding would then mask the ends
    return Tokenizer.load(path, eod=end, pad=fill or (None if config or end == PAD else PAD))


def tokenizer_file(name: str) -> Path:
    """The `tokenizer.json` that a name or a path other than `bytes` means.

    Raises:
        DataError: There is none.
    """
    path = Path(name)
    if os.path.isdir(path):  # unlike Path's own, takes any text
        path = path / TOKENIZER_NAME
        if not path.is_file():
            raise DataError(f"--tokenizer {name}: the folder has no {TOKENIZER_NAME}; save a fast tokenizer there, or name the file itself")
        return path
    if os.path.isfile(path):
        return path
    if path.is_absolute() or name.startswith(".") or path.suffix == ".json" or name.count("/") > 1:
        raise DataError(f"--tokenizer {name}: no such file; it must be {BYTES}, a tokenizer.json, a folder with one, or a name of the hub")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import (  # noqa: PLC0415  heavy, and only needed here
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    try:
        if try_to_load_from_cache(name, TOKENIZER_NAME) is None:
            get_hf_file_metadata(hf_hub_url(name, TOKENIZER_NAME))  # asks once, a download for a minute: a path may be misspelled
        path = Path(hf_hub_download(name, TOKENIZER_NAME))
    except Exception as error:  # the package raises errors of several others
        raise DataError(
            f"--tokenizer {name}: neither a file or folder here nor to be had from the hub ({str(error).splitlines()[0]}); it must be"
            f" {BYTES}, a tokenizer.json, a folder with one, or a name of the hub; check the spelling, or copy the file here"
        ) from error
    with suppress(Exception):  # optional: without it the default names hold
        hf_hub_download(name, _CONFIG_NAME)
    return path


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with clean_errors("read", path):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); repair it, or remove it and give --eod-token") from error
    return value if isinstance(value, dict) else {}


def _token(config: dict[str, Any], key: str) -> str | None:
    """The value is a string or an object with `content`."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
