"""The models of an analysis: native checkpoints and Hugging Face folders, both read part by part."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megagate.checkpoint.folders import run_around
from megagate.checkpoint.hf.adopt import open_directory
from megagate.checkpoint.hf.adopt_config import CONFIG
from megagate.checkpoint.hf.export import DTYPES
from megagate.checkpoint.hf.imported import has_tokenizer, imported_dtype, imported_tokenizer
from megagate.checkpoint.hf.tokenizer_files import RunTokenizer, run_tokenizer
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt
from megagate.checkpoint.saved_model import native_shapes, require_model, run_of
from megagate.checkpoint.store import Checkpoint
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig
from megagate.config.run import RunConfig
from megagate.data.preprocess.tokenizer_source import find_tokenizer
from megagate.data.tokenizer import TOKENIZER_NAME, AnyTokenizer
from megagate.errors import CheckpointError, DataError, MegagateError

ReadPart = Callable[[str], dict[str, Tensor]]
"""The parameters (fp32) and buffers of a part of the model, `layers.0.` for one, by the rest of their names; of their own memory."""

_REMEDY = "put it back there"
_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Source:
    """A model that can be read.

    Its weights are those with which its forward pass was trained: masters of a run in bf16 are rounded to bf16, as `to-hf` does.

    Args:
        name: As the user calls it.
        path: Where it lies.
        kind: What lies there, in words.
        model: Its config.
        length: The longest sequence in tokens that it was trained on; 0 where nothing says so.
        within_documents: It was trained with attention within documents.
        tokenizer: Of its text; None where there is none.
        tokenizer_origin: Where it is from, or why there is none, for people.
        read: Its weights.
    """

    name: str
    path: Path
    kind: str
    model: ModelConfig
    length: int
    within_documents: bool
    tokenizer: AnyTokenizer | None
    tokenizer_origin: str
    read: ReadPart


def open_source(name: str, path: Path) -> Source:
    """Open what lies at `path`: a run, its folder of checkpoints, one step, or a Hugging Face folder. Weights are not read yet.

    Raises:
        CheckpointError: It is none of these, or damaged.
    """
    try:
        if not os.path.isdir(path):  # unlike Path's own, takes any name
            state = "is a file" if os.path.exists(path) else "does not exist"
            raise CheckpointError(f"{path!s:.300} {state}; give a run, its checkpoints, one step, or a Hugging Face folder")
        return _of_folder(name, path) if os.path.isfile(path / CONFIG) else _of_checkpoint(name, path)
    except MegagateError as error:
        raise type(error)(f"--models {name}: {error}") from error


def attention_words(attention: AttentionConfig) -> str:
    """A gate in words, and switch heads, whose scores are not those of a gate."""
    words, switch = gate_words(attention.gate), attention.switch
    if not switch.switched:
        return words
    return f"{words}; switch heads {switch.projections}, {switch.top_k} of {switch.num_experts}: not scored here"


def gate_words(gate: GateConfig) -> str:
    """A gate in words."""
    if gate.position == "none":
        return "none"
    if gate.score == "constant":
        return f"times {gate.constant:g} at {gate.position}"
    if gate.score == "self":
        return f"{gate.activation} of itself at {gate.position}"
    words = [f"{gate.granularity} at {gate.position}", gate.activation]
    if gate.head_shared:
        words.insert(1, "head-shared")
    if gate.score == "parameter":
        words.append("independent of the input")
    if gate.combine == "add":
        words.append("added")
    return ", ".join(words)


def _of_checkpoint(name: str, path: Path) -> Source:
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; it has no {CONFIG} either, as a Hugging Face folder has") from error
    config = run_of(checkpoint)
    require_model(checkpoint, config.model)
    dtype = DTYPES.get(imported_dtype(checkpoint.metadata) or config.precision.dtype, torch.float32)
    tokenizer, origin = _found(lambda: _tokenizer_of_run(checkpoint, config))
    within, recipe = config.data.attention == "document", config.precision.fp8.recipe
    words = [f"native, step {checkpoint.step:,}", f"weights as in its {_WORDS[dtype]} forward pass"]
    words += [f"without its FP8 ({recipe})"] * (recipe != "none") + ["trained with attention within documents"] * within
    return Source(
        name,
        path,
        ", ".join(words),
        config.model,
        config.train.seq_len,
        within,
        tokenizer,
        origin,
        lambda prefix: _masters(checkpoint, config.model, prefix, dtype),
    )


def _masters(checkpoint: Checkpoint, model: ModelConfig, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Digested before they are used."""
    found = {}
    for name in native_shapes(model):
        short = name.partition("/")[2]
        if short.startswith(prefix):
            checkpoint.verify(names=[name])
            tensor = checkpoint.read_whole(name)
            if tensor.is_floating_point() and dtype != torch.float32:
                tensor.copy_(tensor.to(dtype))
            found[short.removeprefix(prefix)] = tensor
            # Or the pages of its files that were read would stay in memory, beside the tensors; they are opened again when asked for.
            checkpoint.close()
    return found


class _PassingTensors(FolderTensors):
    """Lets go of the files after each tensor: their pages would stay in memory beside what is made of them."""

    def read_fp32(self, name: str) -> Tensor:
        """See `FolderTensors`."""
        tensor = super().read_fp32(name)
        self.weights.let_go()
        return tensor


def _of_folder(name: str, path: Path) -> Source:
    opened = open_directory(path)
    described, weights = opened.described, opened.weights
    read = Rebuilt(described.model, opened.rows, _PassingTensors(path, weights)).under
    # Norms may be wider than the matrices.
    dtypes = {held.dtype for held in weights.held.values() if held.dtype.is_floating_point and len(held.shape) > 1}
    words = " and ".join(sorted(_WORDS.get(dtype, str(dtype)) for dtype in dtypes))
    tokenizer, origin = _found(lambda: _tokenizer_of_folder(path))
    kind = f"Hugging Face {described.source}, weights in {words}"
    return Source(name, path, kind, described.model, described.max_positions, False, tokenizer, origin, read)


def _tokenizer_of_run(checkpoint: Checkpoint, config: RunConfig) -> RunTokenizer:
    words = {"purpose": "the analysis", "remedy": _REMEDY}
    if (folder := imported_tokenizer(checkpoint.metadata, **words)) is not None:
        return RunTokenizer(find_tokenizer(folder), folder)
    return run_tokenizer(config, run_around(checkpoint.folder), **words)


def _tokenizer_of_folder(path: Path) -> RunTokenizer:
    if not has_tokenizer(path):
        return RunTokenizer(None, f"no {TOKENIZER_NAME} in {path}")
    return RunTokenizer(find_tokenizer(str(path)), str(path))


def _found(find: Callable[[], RunTokenizer]) -> RunTokenizer:
    """The tokenizer, or why there is none, which is no error yet: who brings ids, or names a tokenizer, needs none."""
    try:
        return find()
    except DataError as error:
        return RunTokenizer(None, str(error))
