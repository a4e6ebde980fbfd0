"""The tokenizer of an export: that of the data set on which the run was trained, or one that is named."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megagate.config.blend_text import parse_blend
from megagate.config.run import RunConfig
from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.dataset import EMBEDDED, SYNTHETIC
from megagate.data.embedded import embedded_folder
from megagate.data.files import clean_errors
from megagate.data.manifest import MANIFEST_NAME, read_manifest
from megagate.data.preprocess.tokenizer_source import find_tokenizer, tokenizer_file
from megagate.data.tokenizer import TOKENIZER_NAME, AnyTokenizer, Tokenizer, load_tokenizer
from megagate.errors import ConfigError, DataError

CONFIG_NAME = "tokenizer_config.json"
BESIDE = ("chat_template.jinja", "special_tokens_map.json")
"""Files that come along as they are: transformers 5 keeps the chat template in one of its own, transformers 4 the special tokens."""
NONE = "none"
_ANY_VERSION = "PreTrainedTokenizerFast"
"""The class of a `tokenizer.json` in transformers 4 and 5 alike; 5 writes `TokenizersBackend`, which 4 does not know."""
OWN_FILE = f"--tokenizer PATH names a {TOKENIZER_NAME}, --tokenizer {NONE} exports without"
"""What to do where an export's tokenizer is not there."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What goes into an export.

    Args:
        origin: Where it is from, or why there is none, for people.
        eos_id: Of the token that ends documents; None for none.
        pad_id: Of the token that fills rows; None for none.
        files: Content by name; empty where there is no tokenizer.
    """

    origin: str
    eos_id: int | None = None
    pad_id: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def tokenizer_files(named: str | None, config: RunConfig, run: Path, *, max_length: int) -> TokenizerFiles:
    """The tokenizer files of an export.

    Args:
        named: What `--tokenizer` names; None for the run's own.
        config: The run's.
        run: The folder of the run as it lies now, which may not be its `train.output_dir`.
        max_length: Longest text in tokens, for `model_max_length`.

    Raises:
        DataError: There is no such tokenizer, or the run's data set is not here.
        ConfigError: It has more tokens than the model.
    """
    if named == NONE:
        return TokenizerFiles(f"none, as --tokenizer {NONE} asks")
    if named is not None:
        return _named(named, config, max_length=max_length)
    own = run_tokenizer(config, run, purpose="the export", remedy=OWN_FILE)
    if own.tokenizer is None:
        return TokenizerFiles(own.origin)
    return _files(own.tokenizer, own.origin, config, max_length=max_length)


class RunTokenizer(NamedTuple):
    """The tokenizer of the data set on which a run was trained.

    Args:
        tokenizer: None where ids have no text.
        origin: Its file (of one that is built in, the folder of the data set), or why there is none, for people.
    """

    tokenizer: AnyTokenizer | None
    origin: str


def run_tokenizer(config: RunConfig, run: Path, *, purpose: str, remedy: str) -> RunTokenizer:
    """The tokenizer of a run's own data set.

    Args:
        config: The run's.
        run: The folder of the run as it lies now, which may not be its `train.output_dir`.
        purpose: Who needs it, for messages.
        remedy: What to do where it is not there, for messages.

    Raises:
        DataError: The data set is not here, or damaged.
    """
    path = parse_blend(config.data.path).paths[0]  # all data sets of a blend have the same
    if path == SYNTHETIC:
        return RunTokenizer(None, f"none: data.path {SYNTHETIC} has ids without text")
    folder = _folder(path, config, run, purpose=purpose, remedy=remedy)
    identity = read_manifest(folder).tokenizer
    tokenizer = load_tokenizer(folder, identity)
    if tokenizer is None:
        return RunTokenizer(None, f"none: the data set {folder} does not say which tokenizer made its ids")
    return RunTokenizer(tokenizer, str(folder / identity.file))


def _folder(path: str, config: RunConfig, run: Path, *, purpose: str, remedy: str) -> Path:
    """Of the run's data set."""
    if path != EMBEDDED:
        folder = Path(path)
        if not (folder / MANIFEST_NAME).is_file():
            raise DataError(f"data.path ({path}), whose tokenizer {purpose} needs, has no {MANIFEST_NAME} here; {remedy}")
        return folder
    places = [Path(config.data.cache_dir or Path(config.train.output_dir) / "data"), run / "data"]
    found = [folder for place in places for folder in sorted(place.glob(f"{EMBEDDED}-{config.model.vocab_size}-*"))]
    if not found:
        raise DataError(
            f"the data set {EMBEDDED}, whose tokenizer {purpose} needs, lies neither in {places[0]} nor in {places[1]}; {remedy}"
        )
    if len(found) > 1:  # of several Pythons: only the one that is running knows which is its own
        own = [folder for folder in found if folder == embedded_folder(folder.parent, config.model.vocab_size)]
        found = own or found
    return found[0]


def _named(named: str, config: RunConfig, *, max_length: int) -> TokenizerFiles:
    tokenizer = find_tokenizer(named)
    path = named if isinstance(tokenizer, ByteTokenizer) else tokenizer_file(named)
    return _files(tokenizer, path, config, max_length=max_length)


def _files(tokenizer: AnyTokenizer, path: Path | str, config: RunConfig, *, max_length: int) -> TokenizerFiles:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, and model.vocab_size is {config.model.vocab_size}; it is not the one "
            f"that the model was trained with; {OWN_FILE}"
        )
    ids = {"eos_id": _id(tokenizer.eod_id), "pad_id": _id(tokenizer.pad_id)}
    if isinstance(tokenizer, ByteTokenizer):
        return TokenizerFiles(f"none: the built-in tokenizer of bytes is no {TOKENIZER_NAME}; ids 0 to 255 are the bytes of UTF-8", **ids)
    path = Path(path)
    with clean_errors("read", path):
        files = {TOKENIZER_NAME: path.read_bytes()}
        beside = {name: path.with_name(name) for name in (CONFIG_NAME, *BESIDE)}
        files |= {name: there.read_bytes() for name, there in beside.items() if there.is_file()}
    own = _for_any_version(files[CONFIG_NAME], beside[CONFIG_NAME]) if CONFIG_NAME in files else _config(tokenizer, max_length)
    return TokenizerFiles(str(path), **ids, files=files | {CONFIG_NAME: own})


def _for_any_version(content: bytes, path: Path) -> bytes:
    """A `tokenizer_config.json` as transformers 4 and 5 read it, and without the code that it may point to: that does not come along.

    Raises:
        DataError: It is none.
    """
    try:
        settings = json.loads(content)
    except ValueError:  # no UTF-8, no JSON
        settings = None
    if not isinstance(settings, dict):
        raise DataError(f"{path} must be a JSON object; put the tokenizer's own back, or take it away, and the export writes one")
    changed = {name: value for name, value in settings.items() if name != "auto_map"}
    if "auto_map" in settings or settings.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = _ANY_VERSION
    if isinstance(settings.get("extra_special_tokens"), list):  # the name of 5, under which 4 expects an object
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return content if changed == settings else _json(changed)


def _config(tokenizer: Tokenizer, max_length: int) -> bytes:
    settings: dict[str, Any] = {
        "tokenizer_class": _ANY_VERSION,
        "eos_token": tokenizer.spelling(tokenizer.eod_id),
        "pad_token": tokenizer.spelling(tokenizer.pad_id),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return _json({key: value for key, value in settings.items() if value is not None})


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _id(index: int) -> int | None:
    return index if index >= 0 else None
