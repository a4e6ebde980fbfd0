"""The native checkpoint store: pickle-free (safetensors and JSON), crash-safe, readable under any layout.

A save, on all ranks of any world:

    rank 0      begin(root, step)                                  then a barrier
    each rank   write_rank(staging_path(root, step), rank, pieces)  no collective; then tell rank 0 (on failure: `discard`)
    rank 0      publish(root, step, world_size=..., metadata=...)  then prune(root, keep=...)

A load, under any other layout: `Checkpoint.open(path)`, `verify(rank=..., world_size=...)`, then `read` for boxes, or
`reshard.read_flat` for the flat fragments of an optimizer. `clean_leftovers(root)` comes first in every run. Tensors are
*logical*: full shape and a name such as `master/layers.0.attention.q.weight`, whatever the ranks hold of it.

`folders` owns the names on the disk, `rankfile` what a rank writes, `publish` and `index` what makes it whole, `reader` the way
back; callers import from here.
"""

from megagate.checkpoint.box import Box
from megagate.checkpoint.durable import write_file
from megagate.checkpoint.folders import (
    begin,
    clean_leftovers,
    complete_steps,
    discard,
    prune,
    read_pointer,
    resolve,
    set_pointer,
    staging_path,
    step_path,
)
from megagate.checkpoint.index import StoredPiece, StoredTensor
from megagate.checkpoint.publish import publish
from megagate.checkpoint.rankfile import Piece, write_rank
from megagate.checkpoint.reader import Checkpoint

__all__ = [
    "Box",
    "Checkpoint",
    "Piece",
    "StoredPiece",
    "StoredTensor",
    "begin",
    "clean_leftovers",
    "complete_steps",
    "discard",
    "prune",
    "publish",
    "read_pointer",
    "resolve",
    "set_pointer",
    "staging_path",
    "step_path",
    "write_file",
    "write_rank",
]
