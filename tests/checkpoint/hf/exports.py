"""Exports for the tests of verification, and what may be wrong with one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hf_exports import language_model, masters, run_config, save
from safetensors.torch import load_file, save_file
from torch import Tensor

from megagate.checkpoint.hf.export import export
from megagate.config.model import ModelConfig
from megagate.config.run import RunConfig

Tensors = dict[str, Tensor]
Config = dict[str, Any]
Change = Callable[[Tensors, Config], object]


class Exported(NamedTuple):
    """A run and the folder that was made of its checkpoint."""

    checkpoint: Path
    folder: Path


def exported(folder: Path, model: ModelConfig, *, dtype: str = "fp32", **options: Any) -> Exported:
    config: RunConfig = replace(run_config(model, dtype=dtype))
    folder.mkdir(exist_ok=True)
    run = save(folder / "run", masters(language_model(model)), config)
    export(run, folder / "out", **options)
    return Exported(run, folder / "out")


def spoil(folder: Path, change: Change) -> None:
    """Write an export of one file again after a change of its tensors and its config."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    change(tensors, settings)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(settings))
