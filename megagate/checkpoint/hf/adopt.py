"""A checkpoint to train on from, of the model in a Hugging Face directory.

Rows of the mapping stream from the mapped files of the directory to those of the checkpoint. What is fp32 there and needs no change is
never copied; of what does, about `_COMPUTED_BYTES` are held for each file that is written.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from megagate import __version__
from megagate.checkpoint.box import Box
from megagate.checkpoint.hf.adopt_config import Described, describe
from megagate.checkpoint.hf.adopt_files import Weights
from megagate.checkpoint.hf.imported import IMPORTED_DTYPE, IMPORTED_FROM
from megagate.checkpoint.hf.ops import Expert, LessOne
from megagate.checkpoint.hf.table import Layout, Region, Row, mapping
from megagate.checkpoint.rewrite import all_or_nothing, require_free, require_outside, require_root, write_checkpoint
from megagate.checkpoint.saved_model import native_shapes
from megagate.checkpoint.store import Piece, write_rank
from megagate.config.model import ModelConfig
from megagate.config.run import RunConfig, TrainConfig
from megagate.errors import CheckpointError

_COMPUTED_BYTES = 128 << 20
_FILE_BYTES = 512 << 20
_WRITERS = 2
"""Files that are written at a time."""
_BLOCK_BYTES = 64 << 20
"""Of fp32, a tensor that only changes its numbers is taken at a time."""

_OTHER_NAMES: Mapping[Layout, Mapping[str, str]] = MappingProxyType(
    {
        "lfm3": {".self_attn.gate_proj.": ".self_attn.g_proj."},
        "qwen3_5_text": {"model.language_model.": "model."},
    }
)
"""Parts of names in files that transformers, when it loads a class, takes for others; it saves lfm3 so."""

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Adopted:
    """What was written.

    Args:
        source: The directory that was read.
        folder: The new step folder.
        config: A run of the model, also in `config.yaml` beside the folder.
        layout: By which class's layout the directory was read.
        exported: megagate wrote the directory.
        tensors: Tensors in it.
        dtypes: Their types, sorted.
        left_out: Tensors that were not taken, since others say the same.
        rounding: The largest rounding of a norm's weight, 1 + w in fp32.
        below_half: Norm weights below 1/2 that were stored as w - 1 in fp32, and so rounded by up to 2^-25 when that was done.
        narrow: By how much, at most, norm weights were rounded that were stored as w - 1 in 16 bits, if that was done to them there.
    """

    source: Path
    folder: Path
    config: RunConfig
    layout: Layout
    exported: bool
    tensors: int
    dtypes: tuple[str, ...]
    left_out: tuple[str, ...]
    rounding: float
    below_half: int
    narrow: float


def adopt(source: Path, output: Path) -> Adopted:
    """Write the model in the directory `source` as a checkpoint, step 0 without moments, to the new folder of checkpoints `output`.

    Raises:
        CheckpointError: The directory is damaged or incomplete, its config contradicts itself or its tensors, or is of no model here.
        ConfigError: `output` cannot be taken.
        RunError: `output` cannot be written, or there is no space.
    """
    name = "OUT"
    opened = open_directory(source)
    require_free(output, name=name)
    require_outside(output, source, name=name, what="directory")
    require_root(output, name=name)
    model = opened.described.model
    config = RunConfig(model=model, train=_training(opened.described))
    metadata = {
        "data": None,
        "micro_step_samples": None,
        "best_val_loss": None,
        "megagate": __version__,
        IMPORTED_FROM: str(source.absolute()),
        IMPORTED_DTYPE: _dtype_of(opened),
    }
    writer = _Writer(opened)
    with all_or_nothing(output, name=name, source=source):
        folder = write_checkpoint(output, 0, writer.write, config=config, metadata=metadata)
    weights = opened.weights
    return Adopted(
        source,
        folder,
        config,
        opened.described.source,
        opened.described.exported,
        tensors=len(weights.held),
        dtypes=tuple(sorted({str(held.dtype).removeprefix("torch.") for held in weights.held.values()})),
        left_out=opened.left_out,
        rounding=writer.rounding,
        below_half=writer.below_half,
        narrow=writer.narrow,
    )


class Opened(NamedTuple):
    """A directory that fits its config.

    Args:
        described: The model.
        weights: The tensors.
        rows: The mapping between them.
        left_out: Tensors in no row, since others say the same.
    """

    described: Described
    weights: Weights
    rows: list[Row]
    left_out: tuple[str, ...]


def _dtype_of(opened: Opened) -> str:
    """The narrowest type in which an export loses nothing of the matrices."""
    dtypes = {held.dtype for held in opened.weights.held.values() if held.dtype.is_floating_point and len(held.shape) > 1}
    return "bf16" if dtypes == {torch.bfloat16} else "fp32"


def _training(described: Described) -> TrainConfig:
    """How to train on: by default, on sequences no longer than the model is said to have seen."""
    default = TrainConfig()
    return replace(default, seq_len=min(described.max_positions, default.seq_len)) if described.max_positions else default


def open_directory(source: Path) -> Opened:
    """Read the config and the headers, and check that they fit together.

    Raises:
        CheckpointError: As `adopt`.
    """
    if not os.path.isdir(source):  # unlike Path's own, takes any name
        state = "is a file" if os.path.exists(source) else "does not exist"
        raise CheckpointError(f"{source!s:.300} {state}; give the directory of a Hugging Face model: config.json and .safetensors files")
    described = describe(source)
    model = described.model
    experts = (model.moe.num_experts, model.moe.ffn_size, model.hidden_size) if model.is_moe else None
    weights = Weights.open(source, experts=experts).renamed(_OTHER_NAMES.get(described.source, {}))
    _require_enough(weights, model)
    rows = mapping(model, described.source, keep_padding=described.keep_padding)
    if described.empty_shared_expert:
        rows = [row for row in rows if row.native or not row.theirs]
    left_out = tuple(_left_out(weights, described))
    _require_fits(weights, rows, described, left_out)
    return Opened(described, weights, rows, left_out)


def _require_enough(weights: Weights, model: ModelConfig) -> None:
    """Refuse a config that asks for far more than there is, before every layer and expert of it is gone through."""
    switch = model.attention.switch
    heads = len(switch.switched) * switch.num_experts
    needed = model.num_layers * (1 + heads) + model.num_moe_layers * model.moe.num_experts
    if needed > len(weights.held):
        switched = f", and {heads} switched projections in each" if heads else ""
        raise CheckpointError(
            f"{weights.directory}: by its config.json the model has {model.num_layers} layers, {model.num_moe_layers} of them of "
            f"{model.moe.num_experts} experts{switched}, and there are {len(weights.held)} tensors; get the directory anew, with its own "
            "config.json"
        )


def _left_out(weights: Weights, described: Described) -> Iterator[str]:
    """Tensors that say nothing: a tied output projection that is the embedding, a shared expert of width 0, wavelengths."""
    for name, held in weights.held.items():
        of_nothing = ".mlp.shared_expert_gate." in name or (".mlp.shared_expert." in name and 0 in held.shape)
        if name.endswith("rotary_emb.inv_freq") or (described.empty_shared_expert and of_nothing):
            yield name
    if described.model.tie_embeddings and _HEAD in weights.held and _EMBEDDING in weights.held:
        head, embedding = weights.tensor(_HEAD), weights.tensor(_EMBEDDING)
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise CheckpointError(
                f"{weights.where(_HEAD)} is not {_EMBEDDING}, and by the config's tie_word_embeddings they are one; it is not the config "
                "of these tensors, set tie_word_embeddings to false if they were trained apart"
            )
        yield _HEAD


def _require_fits(weights: Weights, rows: list[Row], described: Described, left_out: tuple[str, ...]) -> None:
    """The directory holds every tensor of the config's model in its shape and no other."""
    try:
        expected = {name: shape for row in rows for name, shape in row.shapes().items()}
    except RuntimeError as error:  # no tensor can be so large
        raise CheckpointError(f"{weights.directory}: the sizes in config.json are impossible ({error}); get the directory anew") from error
    found = {name: held for name, held in weights.held.items() if name not in left_out}
    flaws = [f"{name} {list(expected[name])} is missing" for name in expected.keys() - found.keys()]
    flaws += [f"{name} {list(found[name].shape)} in {found[name].file} is not in that model" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if found[name].shape != expected[name]:
            flaws.append(f"{name} in {found[name].file} has the shape {list(found[name].shape)}, not {list(expected[name])}")
    if flaws:
        raise CheckpointError(
            f"{weights.directory}: {len(flaws)} of its tensors are not those of the model in its config.json, read as {described.source}: "
            f"{'; '.join(sorted(flaws)[:3])}; all must be there and no others: get the directory anew, with its own config.json"
        )


def _cuts(row: Row) -> Iterator[tuple[Row, slice]]:
    """A row in parts that fit into memory, or into no memory at all, each with the rows of their one tensor that it is."""
    if isinstance(row.op, Expert) and len(row.theirs) > 1:
        ((name, box),) = row.native
        stack, height = box.offset[0], box.shape[1] // len(row.theirs)
        for index, theirs in enumerate(row.theirs):
            part = Box((stack, index * height, 0), (1, height, box.shape[2]))
            yield Row((Region(name, part),), (theirs,), Expert(1)), slice(None)
    else:
        yield from row.parts(_BLOCK_BYTES // 4)


def _theirs(weights: Weights, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of their tensor in the type of ours, exactly; a view of the file where it has that type."""
    tensor = weights.tensor(name)[rows]
    converted = tensor.to(dtype)
    if not dtype.is_floating_point and not torch.equal(converted.to(tensor.dtype), tensor):
        raise CheckpointError(f"{weights.where(name)} must be whole numbers, and is not; the file is damaged, export it again")
    # The extremes alone need no memory, and are not finite where any element is not.
    if tensor.numel() and dtype.is_floating_point and not all(one.isfinite() for one in tensor.aminmax()):
        raise CheckpointError(f"{weights.where(name)} holds numbers that are not finite, from which nothing can be trained; get it anew")
    return converted


def _native_dtype(row: Row) -> torch.dtype:
    """Masters are fp32, the counts of the routers' biases int32."""
    return torch.int32 if row.native and row.native[0].name.startswith("state/") else torch.float32


class _Writer:
    """Writes the rank files.

    Args:
        opened: What is read.
    """

    def __init__(self, opened: Opened) -> None:
        self._weights, self._rows = opened.weights, opened.rows
        self._shapes = native_shapes(opened.described.model)
        self.rounding, self.below_half, self.narrow = 0.0, 0, 0.0

    def write(self, staging: Path) -> int:
        """Write all tensors as the parts of some ranks; returns how many.

        `write_rank` takes all pieces of its file before it writes the first, which bounds the file; while one waits for the disk the next
        is digested.
        """
        ranks = 0
        writing: deque[Future[None]] = deque()
        with ThreadPoolExecutor(_WRITERS) as pool:
            for pieces in self._files():
                if len(writing) == _WRITERS:
                    writing.popleft().result()
                writing.append(pool.submit(write_rank, staging, ranks, pieces))
                ranks += 1
            while writing:
                writing.popleft().result()
        return ranks

    def _files(self) -> Iterator[list[Piece]]:
        pieces: list[Piece] = []
        computed = held = 0
        for part, rows in (cut for row in self._rows for cut in _cuts(row)):
            for piece, is_view in self._pieces(part, rows):
                pieces.append(piece)
                computed += 0 if is_view else piece.tensor.nbytes
                held += piece.tensor.nbytes
            if computed > _COMPUTED_BYTES or held > _FILE_BYTES:
                yield pieces
                pieces, computed, held = [], 0, 0
        if pieces:
            yield pieces

    def _pieces(self, row: Row, rows: slice) -> Iterator[tuple[Piece, bool]]:
        """Our pieces of one part, each with whether it takes no memory of its own."""
        dtype = _native_dtype(row)
        theirs = [_theirs(self._weights, name, rows, dtype) for name in row.theirs]
        where = self._weights.where(row.theirs[0]) if row.theirs else ""
        made = row.op.from_hf(theirs, where=where)
        if isinstance(row.op, LessOne):
            self._follow(theirs[0], made[0], self._weights.held[row.theirs[0]].dtype)
        mapped = {tensor.untyped_storage().data_ptr() for tensor in theirs} if all(map(self._is_native, row.theirs)) else set()
        for region, tensor in zip(row.native, made, strict=True):
            piece = Piece(region.name, self._shapes[region.name], region.box.offset, tensor)
            yield piece, tensor.untyped_storage().data_ptr() in mapped

    def _is_native(self, name: str) -> bool:
        return self._weights.held[name].dtype in (torch.float32, torch.int32)

    def _follow(self, stored: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        """Remember what rounding does to 1 + w, and what it may have done to w - 1 in the file, of type `dtype`."""
        if not weight.numel():
            return
        self.rounding = max(self.rounding, (stored.double() + 1 - weight.double()).abs().max().item())
        if dtype == torch.float32:
            self.below_half += int((weight < 0.5).sum())
        else:  # half a unit in the last place is at most eps / 2 of the number
            self.narrow = max(self.narrow, stored.abs().max().item() * torch.finfo(dtype).eps / 2)
