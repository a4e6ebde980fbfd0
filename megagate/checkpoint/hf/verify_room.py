"""Transformers never sees a folder that is verified: it loads from a clean one with the config and the weights that were read, and no more.

Beside those a folder may hold what transformers follows, and may run: another config, code, adapters, settings of generation.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megagate.checkpoint.hf.adopt_config import FOLLOWED
from megagate.checkpoint.hf.adopt_files import INDEX, SINGLE
from megagate.checkpoint.hf.hf_config import CODE_PATTERN
from megagate.checkpoint.hf.table import Target

_DROPPED = (*FOLLOWED, "auto_map", "quantization_config", "attn_implementation", "experts_implementation")
"""Keys that choose code or files. What begins with an underscore is private to transformers, and may choose kernels of others."""
_OWN = Path(__file__).parent
"""Where the code lies that exports bring along."""


def foreign_code(folder: Path) -> list[str]:
    """Files of code in the folder, at any depth, that are not, or not as, those that exports bring along; and those that are missing."""
    ours = {path.name: path.read_bytes() for path in sorted(_OWN.glob(CODE_PATTERN))}
    theirs = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.py")) if path.is_file()}
    return sorted({name for name, _ in ours.items() ^ theirs.items()})


@contextmanager
def clean_room(folder: Path, config: Mapping[str, Any], files: Iterable[str]) -> Iterator[Path]:
    """A folder, for as long as the context, with `config` but for the keys that choose code, and with links to files of weights."""
    kept = {key: value for key, value in config.items() if key not in _DROPPED and not key.startswith("_")}
    names = sorted(files)
    with TemporaryDirectory(prefix="megagate-verify-") as made:
        room = Path(made)
        (room / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        for name in names if names == [SINGLE] else [*names, INDEX]:
            (room / name).symlink_to((folder / name).resolve())
        yield room


def classes_of(target: Target) -> tuple[Any, Any]:
    """What loads a config, and a model: transformers' own, or, for exports that bring code along, that same code out of this package."""
    if target == "remote-code":
        from megagate.checkpoint.hf.modeling_megagate import MegagateForCausalLM  # noqa: PLC0415  needs transformers, heavy

        return MegagateForCausalLM.config_class, MegagateForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415  heavy

    return AutoConfig, AutoModelForCausalLM
