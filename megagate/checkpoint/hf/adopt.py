"""A checkpoint to train on from, of the model in a Hugging Face directory.

Rows of the mapping stream from the mapped files of the directory to those of the checkpoint. What is fp32 there and needs no change is
never copied; of what does, about `_COMPUTED_BYTES` are held for each file that is written.
"""

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
from megagate.checkpoint.hf.ops import Expert, LessOne, Same, Scaled
from megagate.checkpoint.hf.table import Layout, Region, Row, mapping
from megagate.checkpoint.rewrite import all_or_nothing, require_free, require_outside, require_root, write_checkpoint
from megagate.checkpoint.saved_model import native_shapes
from megagate.checkpoint.store import Checkpoint, Piece, write_rank
from megagate.config.model import ModelConfig
from megagate.config.run import RunConfig, TrainConfig
from megagate.errors import CheckpointError, RunError

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
        below_half: Norm weights below 1/2 that were stored as w - 1, and so rounded by up to 2^-25 when that was done.
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
    require_outside(output, source, name=name)
    require_root(output, name=name)
    model = opened.described.model
    config = RunConfig(model=model, train=_training(opened.described))
    metadata = {
        "data": None,
        "micro_step_samples": None,
        "best_val_loss": None,
        "megagate": __version__,
        "imported_from": str(source),
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
    )


def check_adopted(adopted: Adopted) -> int:
    """Make their tensors of ours again and compare them with the directory's, bit by bit; norms stored as w - 1 to their rounding.

    Returns:
        The number of tensors that were compared.

    Raises:
        CheckpointError: One differs, or a file of the checkpoint is damaged.
    """
    opened = open_directory(adopted.source)
    with Checkpoint.open(adopted.folder) as checkpoint:
        checkpoint.verify()
        for cut in (cut for row in opened.rows for cut in _cuts(row)):
            ours = [_read(checkpoint, region) for region in cut.row.native]
            for name, made in zip(cut.row.theirs, cut.row.op.to_hf(ours), strict=True):
                _require_same(opened.weights, name, made, cut, ours)
    return len({name for row in opened.rows for name in row.theirs})


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


class _Cut(NamedTuple):
    """A row of the mapping, or as much of it as is taken at a time.

    Args:
        row: Its regions are those of this part.
        rows: The rows of their one tensor; None for all of theirs.
    """

    row: Row
    rows: slice | None = None


def _training(described: Described) -> TrainConfig:
    """How to train on: by default, on sequences no longer than the model is said to have seen."""
    default = TrainConfig()
    return replace(default, seq_len=min(described.max_positions, default.seq_len)) if described.max_positions else default


def open_directory(source: Path) -> Opened:
    """Read the config and the headers, and check that they fit together.

    Raises:
        CheckpointError: As `adopt`.
    """
    if not source.is_dir():
        state = "is a file" if source.exists() else "does not exist"
        raise CheckpointError(f"{source} {state}; give the directory of a Hugging Face model, with config.json and .safetensors files")
    described = describe(source)
    weights = Weights.open(source).renamed(_OTHER_NAMES.get(described.source, {}))
    _require_enough(weights, described.model)
    rows = mapping(described.model, described.source, keep_padding=described.keep_padding)
    if described.empty_shared_expert:
        rows = [row for row in rows if row.native or not row.theirs]
    left_out = tuple(_left_out(weights, described))
    _require_fits(weights, rows, described, left_out)
    return Opened(described, weights, rows, left_out)


def _require_enough(weights: Weights, model: ModelConfig) -> None:
    """Refuse a config that asks for far more than there is, before every layer and expert of it is gone through."""
    needed = model.num_layers + model.num_moe_layers * model.moe.num_experts
    if needed > len(weights.held):
        raise CheckpointError(
            f"{weights.directory}: by its config.json the model has {model.num_layers} layers, {model.num_moe_layers} of them of "
            f"{model.moe.num_experts} experts, and there are {len(weights.held)} tensors; get the directory anew, with its own config.json"
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


def _cuts(row: Row) -> Iterator[_Cut]:
    """A row in parts that fit into memory, or into no memory at all."""
    if isinstance(row.op, Expert) and len(row.theirs) > 1:
        ((name, box),) = row.native
        stack, height = box.offset[0], box.shape[1] // len(row.theirs)
        for index, theirs in enumerate(row.theirs):
            part = Box((stack, index * height, 0), (1, height, box.shape[2]))
            yield _Cut(Row((Region(name, part),), (theirs,), Expert(1)))
    elif isinstance(row.op, Same | Scaled | LessOne) and row.native[0].box.volume * 4 > _BLOCK_BYTES:
        ((name, (offset, shape)),) = row.native
        step = max(1, _BLOCK_BYTES // 4 * shape[0] // row.native[0].box.volume)
        for begin in range(0, shape[0], step):
            end = min(begin + step, shape[0])
            part = Box((offset[0] + begin, *offset[1:]), (end - begin, *shape[1:]))
            yield _Cut(Row((Region(name, part),), row.theirs, row.op), slice(begin, end))
    else:
        yield _Cut(row)


def _theirs(weights: Weights, name: str, cut: _Cut, dtype: torch.dtype) -> Tensor:
    """Their tensor, or the part of it, in the type of ours, exactly; a view of the file where it has that type."""
    tensor = weights.tensor(name) if cut.rows is None else weights.tensor(name)[cut.rows]
    converted = tensor.to(dtype)
    if not dtype.is_floating_point and not torch.equal(converted.to(tensor.dtype), tensor):
        raise CheckpointError(f"{weights.where(name)} must be whole numbers, and is not; the file is damaged, export it again")
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
        self.rounding, self.below_half = 0.0, 0

    def write(self, staging: Path) -> int:
        """Write all tensors as the parts of some ranks; returns how many.

        `write_rank` takes all pieces of its file before it writes the first, which bounds the file; while one waits for the disk the next
        is digested.
        """
        ranks = 0
        writing: deque[Future[None]] = deque()
        try:
            with ThreadPoolExecutor(_WRITERS) as pool:
                for pieces in self._files():
                    if len(writing) == _WRITERS:
                        writing[0].result()
                        writing.popleft()
                    writing.append(pool.submit(write_rank, staging, ranks, pieces))
                    ranks += 1
                while writing:
                    writing[0].result()
                    writing.popleft()
        except FileNotFoundError as error:
            for other in writing:  # which failed first, and took the folder away with its file; its error says why
                if isinstance(cause := other.exception(), RunError):
                    raise cause from error
            raise
        return ranks

    def _files(self) -> Iterator[list[Piece]]:
        pieces: list[Piece] = []
        computed = held = 0
        for cut in (cut for row in self._rows for cut in _cuts(row)):
            for piece, is_view in self._pieces(cut):
                pieces.append(piece)
                computed += 0 if is_view else piece.tensor.nbytes
                held += piece.tensor.nbytes
            if computed > _COMPUTED_BYTES or held > _FILE_BYTES:
                yield pieces
                pieces, computed, held = [], 0, 0
        if pieces:
            yield pieces

    def _pieces(self, cut: _Cut) -> Iterator[tuple[Piece, bool]]:
        """Our pieces of one part, each with whether it takes no memory of its own."""
        row, dtype = cut.row, _native_dtype(cut.row)
        theirs = [_theirs(self._weights, name, cut, dtype) for name in row.theirs]
        where = self._weights.where(row.theirs[0]) if row.theirs else ""
        made = row.op.from_hf(theirs, where=where)
        if isinstance(row.op, LessOne):
            self._follow(theirs[0], made[0])
        mapped = {tensor.untyped_storage().data_ptr() for tensor in theirs} if all(map(self._is_native, row.theirs)) else set()
        for region, tensor in zip(row.native, made, strict=True):
            piece = Piece(region.name, self._shapes[region.name], region.box.offset, tensor)
            yield piece, tensor.untyped_storage().data_ptr() in mapped

    def _is_native(self, name: str) -> bool:
        return self._weights.held[name].dtype in (torch.float32, torch.int32)

    def _follow(self, stored: Tensor, weight: Tensor) -> None:
        """Remember what rounding does to 1 + w."""
        error = (stored.double() + 1 - weight.double()).abs().max().item() if weight.numel() else 0.0
        self.rounding = max(self.rounding, error)
        self.below_half += int((weight < 0.5).sum())


def _read(checkpoint: Checkpoint, region: Region) -> Tensor:
    out = torch.empty(region.box.shape, dtype=checkpoint.stored(region.name).dtype)
    checkpoint.read(region.name, region.box.offset, out)
    return out


def _require_same(weights: Weights, name: str, made: Tensor, cut: _Cut, ours: list[Tensor]) -> None:
    """A tensor made of ours is the directory's."""
    theirs = _theirs(weights, name, cut, _native_dtype(cut.row))
    if isinstance(cut.row.op, LessOne):
        error = (theirs.double() + 1 - ours[0].double()).abs()
        same = bool((error <= torch.finfo(torch.float32).eps / 2 * ours[0].double().abs().clamp(min=1)).all())
    else:
        same = torch.equal(made.contiguous().view(torch.int32), theirs.contiguous().view(torch.int32))
    if not same:
        raise CheckpointError(
            f"{weights.where(name)} is not what the checkpoint gives back: the conversion is wrong, or one of them was changed meanwhile; "
            "convert again, and report it if it stays so"
        )
