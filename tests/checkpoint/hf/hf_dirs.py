"""Hugging Face directories of small random models, and checkpoints read back."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megagate.checkpoint.hf.adopt import Adopted, open_directory
from megagate.checkpoint.hf.hf_config import Use, hf_config
from megagate.checkpoint.hf.table import Target, mapping
from megagate.checkpoint.hf.verify_files import FolderTensors
from megagate.checkpoint.hf.verify_tensors import compare_adopted
from megagate.checkpoint.saved_model import native_shapes
from megagate.checkpoint.store import Checkpoint
from megagate.config.model import ModelConfig
from megagate.errors import CheckpointError

USE = Use(max_positions=64)


def random_state(model: ModelConfig, *, seed: int = 0, padding: float = 0.0) -> dict[str, Tensor]:
    """Masters and counts of a model, no norm of which is 1, many below 1/2; the rows that pad the vocabulary are `padding`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in native_shapes(model).items():
        if name.startswith("state/"):
            state[name] = torch.randint(-9, 9, shape, generator=generator, dtype=torch.int32)
        elif name.endswith("norm.weight"):
            state[name] = 2.5 * torch.rand(shape, generator=generator)
        else:
            state[name] = 0.3 * torch.randn(shape, generator=generator)
    for name in ("master/embedding.weight", "master/head.weight"):
        if name in state:
            state[name][model.vocab_size :] = padding
    return state


def theirs_of(model: ModelConfig, target: Target, state: dict[str, Tensor], *, keep_padding: bool = False) -> dict[str, Tensor]:
    """The tensors of an export."""
    made = {}
    for row in mapping(model, target, keep_padding=keep_padding):
        native = [state[name][tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for name, box in row.native]
        made |= dict(zip(row.theirs, row.op.to_hf(native), strict=True))
    return made


def write_directory(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, shards: int = 1) -> Path:
    """A directory with a config and weights in one file or in several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    named = {name: files[index % shards] for index, name in enumerate(whole)}
    for file in files:
        save_file({name: tensor for name, tensor in whole.items() if named[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    return folder


def export_of(folder: Path, model: ModelConfig, target: Target, state: dict[str, Tensor], *, keep_padding: bool = False) -> Path:
    """What to-hf writes of a state, but for the tokenizer and the code."""
    use = Use(max_positions=USE.max_positions, keep_padding=keep_padding)
    return write_directory(folder, hf_config(model, target, use), theirs_of(model, target, state, keep_padding=keep_padding))


def require_verified(done: Adopted) -> int:
    """What an adoption wrote is what it read, bit by bit; returns how many tensors of the directory that is. No model is run.

    Raises:
        CheckpointError: It is not.
    """
    opened = open_directory(done.source)
    with Checkpoint.open(done.folder) as checkpoint:
        tensors = FolderTensors(done.source, opened.weights)
        found = compare_adopted(opened.rows, checkpoint, tensors, left_out=opened.left_out)
    if found.flaws:
        raise CheckpointError("; ".join(found.flaws))
    return found.tensors


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whose digests are right."""
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.verify()
        return {name: checkpoint.read_whole(name) for name in checkpoint.tensors}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit; of norms below 1/2 that went through w - 1, not to one ulp of that."""
    assert found.keys() == expected.keys()
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in expected.items()}
    return [name for name, tensor in expected.items() if not torch.equal(found[name].view(torch.int32), tensor.view(torch.int32))]


def near(found: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> bool:
    """Whether the elements in which tensors differ are norms below 1/2, within one ulp of w - 1."""
    for name in names:
        off = found[name] != expected[name]
        if not name.endswith("norm.weight") or (expected[name][off] >= 0.5).any():
            return False
        if ((found[name] - expected[name]).abs() > 2.0**-24).any():
            return False
    return True
