"""The small files of an export beside its weights: `config.json` key by key, `generation_config.json`, the tokenizer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagate.checkpoint.hf.adopt_files import read_json
from megagate.checkpoint.hf.hf_config import Use, generation_config, hf_config
from megagate.checkpoint.hf.table import Target
from megagate.config.model import ModelConfig
from megagate.data.tokenizer import TOKENIZER_NAME
from megagate.errors import CheckpointError

_GENERATION = "generation_config.json"
_MISSING = "missing"


def export_flaws(folder: Path, config: Mapping[str, Any], model: ModelConfig, target: Target, use: Use) -> Iterator[str]:
    """What the files of an export say that to-hf does not write for this model and use; which ids end and fill texts is up to config.json.

    Args:
        folder: The export.
        config: Its `config.json`.
        model: The model.
        target: The class that it was written for.
        use: Beside the model; of its ids nothing is read.
    """
    ids = {key: config.get(f"{key.removesuffix('_id')}_token_id") for key in ("eos_id", "pad_id")}
    for key, value in ids.items():
        if value is not None and (type(value) is not int or not 0 <= value < model.vocab_size):
            yield f"config.json has {key.removesuffix('_id')}_token_id {value}, and the model's tokens are 0 to {model.vocab_size - 1}"
            return
    said = Use(use.max_positions, use.dtype, keep_padding=use.keep_padding, **ids)
    yield from _differences("config.json", config, hf_config(model, target, said))
    try:
        yield from _differences(_GENERATION, read_json(folder / _GENERATION), generation_config(said))
    except CheckpointError as error:
        yield str(error)
    yield from _tokenizer_flaws(folder / TOKENIZER_NAME, model)


def _differences(file: str, found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(found.keys() | expected.keys()):
        is_, should = found.get(key, _MISSING), expected.get(key, _MISSING)
        if isinstance(is_, Mapping) and isinstance(should, Mapping):
            yield from _differences(file, is_, should, f"{prefix}{key}.")
        elif is_ != should or isinstance(is_, bool) != isinstance(should, bool):
            told = "to-hf writes no such key" if should is _MISSING else f"to-hf writes {should} for this model"
            yield f"{file} has {prefix}{key} {is_}, and {told}"


def _tokenizer_flaws(path: Path, model: ModelConfig) -> Iterator[str]:
    """Whether it can be read, and has no more tokens than the model. An export may be without."""
    if not path.exists():
        return
    from tokenizers import Tokenizer  # noqa: PLC0415  needed where there is one

    try:
        count = Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # noqa: BLE001 - that library raises nothing more special
        yield f"{path} cannot be read as a tokenizer: {' '.join(str(error).split())[:200]}"
        return
    if count > model.vocab_size:
        yield f"{path} has {count} tokens, and the model {model.vocab_size}"
