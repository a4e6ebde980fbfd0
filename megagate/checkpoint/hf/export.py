"""A checkpoint as a folder for Hugging Face transformers: weights, config, tokenizer, and code where no class of theirs holds the model.

Everything is written under a temporary name beside its place and renamed at the end: the folder is there whole or not at all.
"""

import errno
import glob
import json
import os
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megagate.checkpoint.durable import create, write_all
from megagate.checkpoint.folders import ROOT_NAME, run_around
from megagate.checkpoint.hf.hf_config import CODE_PATTERN, Use, generation_config, hf_config
from megagate.checkpoint.hf.imported import imported_dtype, imported_tokenizer
from megagate.checkpoint.hf.ops import LeftOut
from megagate.checkpoint.hf.shards import INDEX_NAME, Planned, by_file, forward, index_file, plan, write_shard
from megagate.checkpoint.hf.source import FILES, Source
from megagate.checkpoint.hf.table import Row, Target, mapping, mapping_flaws
from megagate.checkpoint.hf.targets import REMOTE, installed_transformers, select
from megagate.checkpoint.hf.tokenizer_files import OWN_FILE, TokenizerFiles, tokenizer_files
from megagate.checkpoint.rewrite import require_outside, require_root
from megagate.checkpoint.saved_model import native_shapes, require_model, run_of
from megagate.checkpoint.store import Checkpoint
from megagate.config.run import RunConfig
from megagate.data.files import sync_folder
from megagate.errors import ConfigError, RunError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNFINISHED = ".megagate-export"
"""How the name of a folder ends while it is written."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Args:
        source: The step folder that was read.
        folder: The new folder.
        target: The class that it is for.
        config: Of the run.
        step: Optimizer steps done.
        dtype: Of the weights, `fp32` or `bf16`.
        files: Bytes of each file.
        tensors: How many there are.
        wide: Tensors that stay fp32 in a bf16 file, since bf16 would round w - 1; by how much at most, as a share of w, by name.
        rounded: Of norms that are stored as w - 1, the largest rounding of each that is not exact in fp32, as a share of w, by name.
        broken: How many numbers of a tensor are NaN or infinite in the file, by name, where there are any.
        padding: Rows that pad the vocabulary and were left out.
        tokenizer: Where it is from, or why there is none.
        unfinished: Folders of other exports to the same place, at work or killed; which of them, cannot be told from here.
    """

    source: Path
    folder: Path
    target: Target
    config: RunConfig
    step: int
    dtype: str
    files: dict[str, int]
    tensors: int
    wide: dict[str, float]
    rounded: dict[str, float]
    broken: dict[str, int]
    padding: int
    tokenizer: str
    unfinished: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def export(
    source: Path,
    output: Path,
    *,
    format: str = "auto",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    keep_padding: bool = False,
    max_positions: int | None = None,
) -> Export:
    """Write the model of a checkpoint to the new folder `output`.

    Args:
        source: A run, its folder of checkpoints, or one step's folder.
        output: A folder that does not exist, in one that does.
        format: See `targets.Format`.
        dtype: Of the weights, `fp32` or `bf16`; None for what the run's forward pass used.
        max_shard_size: Of one file of weights, as in `5GB`.
        tokenizer: A `tokenizer.json`, a folder with one, or `none`; None for the run's own.
        keep_padding: Write the rows that pad the vocabulary, too.
        max_positions: `max_position_embeddings`; None for the run's `train.seq_len`.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or its tensors do not fit its config.
        ConfigError: The format cannot hold the model, or `output`, `dtype` or `max_shard_size` cannot be taken.
        DataError: The tokenizer is not there, or damaged.
        RunError: `output` cannot be written, or there is no space.
    """
    with Checkpoint.open(source, max_open_files=FILES) as checkpoint:
        config = run_of(checkpoint)
        require_model(checkpoint, config.model)
        run = run_around(checkpoint.folder)
        _require_free(output, run if (run / ROOT_NAME).is_dir() else checkpoint.folder)  # a step alone may lie anywhere
        target = select(config.model, format, installed=installed_transformers())
        kind = _dtype(dtype or imported_dtype(checkpoint.metadata), config)
        length = max_positions or config.train.seq_len
        tokenizer = tokenizer or imported_tokenizer(checkpoint.metadata, purpose="the export", remedy=OWN_FILE)
        words = tokenizer_files(tokenizer, config, run, max_length=length)
        use = Use(length, {"fp32": "float32", "bf16": "bfloat16"}[kind], words.eos_id, words.pad_id, keep_padding)
        rows = _sound_mapping(config, target, keep_padding=keep_padding)
        with Source(checkpoint, _order(rows)) as reader:
            planned, wide, rounded = _decide(plan(rows, DTYPES[kind]), reader, DTYPES[kind])
            files, broken = _write(output, by_file(planned, max_shard_size), reader, DTYPES[kind], _small_files(config, target, use, words))
        return Export(
            source=checkpoint.folder,
            folder=output,
            target=target,
            config=config,
            step=checkpoint.step,
            dtype=kind,
            files=files,
            tensors=len(planned),
            wide=wide,
            rounded=rounded,
            broken=broken,
            padding=sum(row.op.shape[0] for row in rows if isinstance(row.op, LeftOut)),
            tokenizer=words.origin,
            unfinished=tuple(_unfinished(output)),
        )


def _dtype(wanted: str | None, config: RunConfig) -> str:
    kind = wanted or config.precision.dtype
    if kind not in DTYPES:
        name = "--dtype" if wanted else "the run's precision.dtype"
        raise ConfigError(f"{name} ({kind}) must be {' or '.join(DTYPES)}; give --dtype")
    return kind


def _require_free(output: Path, source: Path) -> None:
    if os.path.lexists(output):  # unlike Path's own, takes places that may not be looked into
        raise ConfigError(f"OUT ({output}) must be a new folder, and it exists; choose another, or remove it")
    if not os.path.isdir(output.absolute().parent):
        raise ConfigError(f"OUT ({output}): there is no folder {output.absolute().parent} to write it in; make it, or choose another")
    require_outside(output, source, name="OUT")
    require_root(output, name="OUT")


def _sound_mapping(config: RunConfig, target: Target, *, keep_padding: bool) -> list[Row]:
    rows = mapping(config.model, target, keep_padding=keep_padding)
    flaws = mapping_flaws(rows, native_shapes(config.model))
    assert not flaws, f"the mapping to {target} leaves out or repeats what it must name once: {flaws[:3]}"
    return rows


def _order(rows: list[Row]) -> list[str]:
    """Names of tensors as they are read: those that may be rounded, to decide on them, then all that is written."""
    inexact = [region.name for row in rows if not row.op.exact for region in row.native]
    return inexact + [region.name for row in rows if row.theirs for region in row.native]


def _decide(planned: list[Planned], source: Source, dtype: torch.dtype) -> tuple[list[Planned], dict[str, float], dict[str, float]]:
    """The plan with fp32 for what `dtype` would round; what `dtype` would change of each of those, and what even fp32 changes."""
    decided, wide, rounded = [], {}, {}
    for one in planned:
        if not one.row.op.exact:
            made = forward(one.row, source, dtype)[one.index]
            (weight,) = (source.read(region).to(dtype) for region in one.row.native)
            if not torch.equal(made.to(dtype).float(), made):
                one = replace(one, dtype=torch.float32)
                wide[one.name] = _change(one, made.to(dtype), weight)
            if change := _change(one, made, weight):
                rounded[one.name] = change
        decided.append(one)
    return decided, wide, rounded


def _change(one: Planned, made: torch.Tensor, weight: torch.Tensor) -> float:
    """Between a weight and what `made` gives back, the largest, as a share of the weight."""
    (back,) = one.row.op.from_hf([made.double()], where=one.name)
    return ((back - weight).abs() / weight.abs()).nan_to_num(nan=0.0).max().item()


def _small_files(config: RunConfig, target: Target, use: Use, words: TokenizerFiles) -> dict[str, bytes]:
    files = {
        "config.json": _json(hf_config(config.model, target, use)),
        "generation_config.json": _json(generation_config(use)),
        **words.files,
    }
    if target == REMOTE:
        files |= {path.name: path.read_bytes() for path in sorted(Path(__file__).parent.glob(CODE_PATTERN))}
    return files


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _write(
    output: Path, shards: dict[str, list[Planned]], source: Source, dtype: torch.dtype, small: dict[str, bytes]
) -> tuple[dict[str, int], dict[str, int]]:
    """Write all files under a temporary name, then give the folder its own; returns the bytes of each, and `Export.broken`."""
    # A random name, since another export to the same place, on this machine or another, may be at work: the first to end has the place.
    # Not tempfile, whose folders only the owner can read.
    staging = output.with_name(f".{output.name}.{secrets.token_hex(6)}{_UNFINISHED}")
    if len(shards) > 1:
        small = {**small, INDEX_NAME: index_file(shards)}
    size = sum(one.nbytes for tensors in shards.values() for one in tensors) + sum(map(len, small.values()))
    files, broken = {}, {}
    try:
        others = _unfinished(output)
        staging.mkdir()
        _require_space(output, size, others)
        for name, tensors in shards.items():
            files[name], found = write_shard(staging / name, tensors, source, dtype)
            broken |= found
        for name, content in small.items():
            with create(staging / name) as descriptor:
                write_all(descriptor, memoryview(content))
            files[name] = len(content)
        sync_folder(staging)
        _require_written(staging, files)
        os.rename(staging, output)
        sync_folder(output.absolute().parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            remedy = "free space or quota, or choose a larger disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
            raise RunError(
                f"OUT ({output}), {size / 1e6:,.1f} MB, cannot be written ({error.strerror}); nothing was left there; {remedy}, or choose "
                "another folder"
            ) from error
        raise
    return files, broken


def _require_written(staging: Path, files: dict[str, int]) -> None:
    """Nobody took a file away, or cut it, while the others were written.

    Raises:
        RunError: Somebody did.
    """
    found = {path.name: path.stat().st_size for path in staging.iterdir()}
    lost = sorted(name for name, size in files.items() if found.get(name) != size)
    if lost:
        raise RunError(f"{staging}: {', '.join(lost[:3])} went away or changed while it was written; leave the folder alone, export again")


def _unfinished(output: Path) -> list[Path]:
    """Folders that exports to this place have begun. They are left alone: one may be at work, on a machine whose processes are not seen."""
    return sorted(output.absolute().parent.glob(f".{glob.escape(output.name)}.*{_UNFINISHED}"))


def _require_space(output: Path, size: int, others: list[Path]) -> None:
    free = shutil.disk_usage(output.absolute().parent).free
    if free < size:
        remove = "".join(f"remove {path} unless an export is at work there, " for path in others[:1])
        raise RunError(
            f"OUT ({output}) needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there; nothing was left there; "
            f"{remove}free space, choose a larger disk, or --dtype bf16"
        )
