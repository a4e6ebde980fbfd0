"""What a run's checkpoint says of its model: the config, and the tensors that this model has, which must be those that are there."""

import torch

from megagate.checkpoint.box import Shape
from megagate.checkpoint.store import Checkpoint
from megagate.config.count import parameter_shapes
from megagate.config.keys import from_dict
from megagate.config.model import ModelConfig
from megagate.config.run import RunConfig
from megagate.errors import CheckpointError, ConfigError

PRECISION_STATE = "state/fp8/"
"""What the names of tensors begin with that products keep for their precision: no part of the model, and of no use to another one."""


def native_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The full shape of every tensor of the model itself in its checkpoints: masters, and the counts of the routers' biases."""
    shapes = {f"master/{name}": shape for name, shape in parameter_shapes(model).items()}
    if model.is_moe and model.moe.bias_update_rate:
        layers = (layer for layer in range(model.num_layers) if model.is_moe_layer(layer))
        shapes |= {f"state/layers.{layer}.moe.router.bias_steps": (model.moe.num_experts,) for layer in layers}
    return shapes


def run_of(checkpoint: Checkpoint) -> RunConfig:
    """The config of the run that saved a checkpoint.

    Raises:
        CheckpointError: It has none, or one of another version.
    """
    settings = checkpoint.metadata.get("config")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{checkpoint.folder} holds no config, so no run saved it; give a run, its checkpoints, or one of its steps")
    try:
        return from_dict(settings)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.folder}: its config is of another version: {error}") from error


def require_model(checkpoint: Checkpoint, model: ModelConfig, *, states: bool = True) -> None:
    """Refuse a checkpoint whose masters and states are not those of `model`, in names, shapes and dtypes.

    Args:
        checkpoint: It.
        model: By its config.
        states: False looks at the masters only, for who takes states as they are. What precision keeps is never looked at.

    Raises:
        CheckpointError: With the first that differ.
    """
    kinds = ("master/", "state/") if states else ("master/",)
    expected = {name: shape for name, shape in native_shapes(model).items() if name.startswith(kinds)}
    found = {name: stored for name, stored in checkpoint.tensors.items() if name.startswith(kinds) and not name.startswith(PRECISION_STATE)}
    flaws = [f"{name} is missing" for name in expected.keys() - found.keys()]
    flaws += [f"{name} {list(found[name].shape)} is not in that model" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        dtype = torch.float32 if name.startswith("master/") else torch.int32
        if found[name].shape != expected[name]:
            flaws.append(f"{name} has the shape {list(found[name].shape)}, not {list(expected[name])}")
        elif found[name].dtype != dtype:
            flaws.append(f"{name} is stored as {found[name].dtype}, not {dtype}")
    if flaws:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(flaws)} of its tensors are not those of the model in its config: {', '.join(sorted(flaws)[:3])}; "
            "it was changed after it was saved, or saved by another version; give one that a run wrote"
        )
