"""From what the ranks wrote to one complete checkpoint: merge, prove that nothing is missing or doubled, and give it its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megagate.checkpoint.box import Box, Shape, find_flaw
from megagate.checkpoint.durable import write_file
from megagate.checkpoint.folders import INDEX_NAME, discard, install, staging_path
from megagate.checkpoint.index import Contents, Index, StoredPiece, StoredTensor, encode_index
from megagate.checkpoint.rankfile import manifest_path, rank_file, read_manifest
from megagate.data.files import sync_folder
from megagate.errors import CheckpointError, RunError


def publish(root: Path, step: int, *, world_size: int, metadata: Mapping[str, Any]) -> Path:
    """Make the checkpoint of `step` complete; called by one rank after `write_rank` has returned on all of them.

    Until the rename at its end no reader sees the checkpoint, afterwards it is whole; `latest` names it last. A refused checkpoint
    stays as `.tmp`, to be looked at, until the next `begin` or `clean_leftovers`.

    Args:
        root: Folder of all checkpoints.
        step: Optimizer steps done.
        world_size: Ranks that wrote.
        metadata: JSON values to keep with the tensors (config, data cursor, random state, versions); tuples come back as lists.

    Returns:
        The step folder.

    Raises:
        CheckpointError: a rank's part is missing or incomplete, or some element of a tensor is held by no piece or by several.
        RunError: no space; the unfinished folder is removed.
    """
    staging = staging_path(root, step)
    contents = _merge(staging, world_size)
    proved: set[tuple[Shape, tuple[Box, ...]]] = set()
    for name, tensor in contents.tensors.items():
        _require_each_once(name, tensor, proved)
    content = encode_index(Index(step, dict(metadata), contents))
    try:
        write_file(staging / INDEX_NAME, content)
    except RunError:
        discard(root, step)
        raise
    for rank in range(world_size):
        manifest_path(staging, rank).unlink()
    sync_folder(staging)
    return install(root, step)


def _merge(staging: Path, world_size: int) -> Contents:
    """The contents of all ranks as one, after a check that all are there, of the recorded size, and agree on each tensor."""
    missing = [rank for rank in range(world_size) if not manifest_path(staging, rank).is_file()]
    if missing:
        raise CheckpointError(
            f"{staging}: ranks {missing} of {world_size} left no finished part; the folder must be on a disk that all ranks share"
        )
    expected = {name for rank in range(world_size) for name in (rank_file(rank), manifest_path(staging, rank).name)}
    strange = sorted(path.name for path in staging.iterdir() if path.name not in expected)
    if strange:
        raise CheckpointError(f"{staging}: holds {strange}, which none of the {world_size} ranks of this save wrote; save again")
    files: dict[str, int] = {}
    kinds: dict[str, tuple[Shape, torch.dtype]] = {}
    pieces: dict[str, list[StoredPiece]] = {}
    for rank in range(world_size):
        part = read_manifest(manifest_path(staging, rank))
        for name, tensor in part.tensors.items():
            shape, dtype = kinds.setdefault(name, (tensor.shape, tensor.dtype))
            if (shape, dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"{name}: rank {rank} gives it shape {tensor.shape} and {tensor.dtype}, another rank {shape} and {dtype}; all ranks "
                    "must give the full shape and one dtype"
                )
            pieces.setdefault(name, []).extend(tensor.pieces)
        files.update(part.files)
    merged = Contents(files, {name: StoredTensor(*kinds[name], tuple(pieces[name])) for name in pieces})
    merged.require_files(staging)
    return merged


def _require_each_once(name: str, tensor: StoredTensor, proved: set[tuple[Shape, tuple[Box, ...]]]) -> None:
    """Refuse what is not held exactly once; a master and its moments are cut alike, so that one proof, kept in `proved`, is enough."""
    boxes = [piece.box for piece in tensor.pieces]
    cut = (tensor.shape, tuple(boxes))
    if cut in proved:
        return
    flaw = find_flaw(tensor.shape, boxes)
    if flaw is None:
        proved.add(cut)
        return
    holders = [tensor.pieces[i].file for i in flaw.holders]
    held = f"{len(holders)} pieces (in {', '.join(holders[:4])})" if holders else "no piece"
    raise CheckpointError(
        f"{name}: elements {flaw.region} of the full shape {tensor.shape} are held by {held}, each must be held by exactly one; "
        "what several ranks replicate is given by one of them, what is sharded by all of them"
    )
