"""A gate at G1 added to a checkpoint, or a constant one taken away, such that the model computes what it computed.

    added      Y' = Y * sigmoid(X W) with W = 0 is Y / 2, and W_o Y = (2 W_o) Y': the output projection is doubled
    removed    Y' = Y * f with f independent of the input:  W_o Y' = (W_o f) Y, f on the columns of W_o

A factor that is a power of two changes no digit of any product, so the logits are equal bit for bit; but that the gate's rows ride in the
GEMM of q, k and v, whose kernel may then sum in another order. Only weights are taken over: the moments are left out, and Adam begins anew;
so are the histories of FP8's delayed scaling, which are of products by other factors.

Nothing is held but one output projection at a time: all else goes from the mapped files of the one checkpoint to those of the other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from megagate.checkpoint.folders import run_around
from megagate.checkpoint.rewrite import all_or_nothing, require_free, require_outside, require_root, write_checkpoint
from megagate.checkpoint.saved_model import PRECISION_STATE, require_model, run_of
from megagate.checkpoint.store import Checkpoint, Piece, StoredPiece, write_rank
from megagate.config.count import parameter_shapes
from megagate.config.model import GateConfig, GateGranularity, ModelConfig
from megagate.config.run import RunConfig
from megagate.errors import CheckpointError, ConfigError
from megagate.nn.gate import ACTIVATIONS

_MASTER, _STATE = "master", "state"
_ROWS = 32
"""Rows of an output projection that are scaled at a time, in fp64."""

Factors = Mapping[str, Tensor]
"""What multiplies each output projection, by its name: a scalar or one number per column, fp32."""


@dataclass(frozen=True)
class Retrofit:
    """What was written.

    Args:
        source: The step folder that was read.
        folder: The new step folder.
        config: The new model's run, also in `config.yaml` beside the folder.
        step: Optimizer steps done; the run goes on from there.
        factors: The smallest and the largest factor on the output projections.
        rounding: The largest change of a master by rounding, as a share of it; 0 where none was rounded.
        powers_of_two: Whether all factors are: only then are the models equal bit for bit.
    """

    source: Path
    folder: Path
    config: RunConfig
    step: int
    factors: tuple[float, float]
    rounding: float
    powers_of_two: bool


def add_gate(source: Path, output: Path, granularity: GateGranularity) -> Retrofit:
    """Write the checkpoint of the gated model to the new folder of checkpoints `output`.

    Args:
        source: A run, its folder of checkpoints, or one step's folder, of an ungated model.
        output: A folder that does not exist, or is empty.
        granularity: Of the gate, a sigmoid at G1.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, its model has a gate, or its tensors do not fit its config.
        ConfigError: `granularity` or `output` cannot be taken.
        RunError: `output` cannot be written, or there is no space.
    """
    if granularity not in get_args(GateGranularity):
        raise ConfigError(
            f"--gate ({granularity}) must be {' or '.join(get_args(GateGranularity))}, which add a sigmoid gate at G1, or none, which "
            "removes a constant one; gates at other positions or of other kinds are not added to a trained model, train them from the start"
        )
    with Checkpoint.open(source) as checkpoint:
        config = run_of(checkpoint)
        position = config.model.attention.gate.position
        if position != "none":
            raise CheckpointError(
                f"{checkpoint.folder}: model.attention.gate.position is {position}, so the model is gated already, and "
                f"--gate {granularity} needs an ungated one; give another checkpoint, or remove a gate that is constant by --gate none"
            )
        require_model(checkpoint, config.model, states=False)
        gate = GateConfig(position="G1", granularity=granularity)
        factor = 1 / ACTIVATIONS[gate.activation](torch.zeros(()))
        return _rewrite(checkpoint, config, output, gate=gate, factors=dict.fromkeys(_projections(config.model), factor))


def remove_gate(source: Path, output: Path) -> Retrofit:
    """Write the checkpoint of the model without its gate, which does not depend on the input, to the new folder `output`.

    Args:
        source: A run, its folder of checkpoints, or one step's folder, of a model with a constant gate at G1.
        output: A folder that does not exist, or is empty.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, its gate is not constant, or its tensors do not fit its config.
        ConfigError: `output` cannot be taken.
        RunError: `output` cannot be written, or there is no space.
    """
    with Checkpoint.open(source) as checkpoint:
        config = run_of(checkpoint)
        _require_factor(checkpoint.folder, config.model.attention.gate)
        require_model(checkpoint, config.model, states=False)
        return _rewrite(checkpoint, config, output, gate=GateConfig(), factors=_constant_factors(checkpoint, config.model))


def _require_factor(folder: Path, gate: GateConfig) -> None:
    """Refuse a gate that no factor on the columns of the output projection replaces, whatever its weights are."""
    key = "model.attention.gate"
    at_zero = {name: function(torch.zeros(1)).item() for name, function in ACTIVATIONS.items()}
    if gate.position == "none":
        why, remedy = f"{key}.position is none", "there is no gate to remove; use the checkpoint as it is"
    elif gate.position != "G1":
        why, remedy = f"{key}.position is {gate.position}", "only at G1 does the output projection take a factor; keep the gate"
    elif gate.score == "self" or gate.combine == "add":
        why, remedy = f"{key}.score is {gate.score}, {key}.combine {gate.combine}", "that is no known factor; keep the gate"
    elif gate.score != "constant" and not at_zero[gate.activation]:
        usable = " and ".join(name for name, value in at_zero.items() if value)
        why, remedy = f"{key}.activation is {gate.activation}", f"it is 0 at 0, unlike {usable}; keep the gate"
    else:
        return
    raise CheckpointError(f"{folder}: {why}, and --gate none needs a gate at G1 that multiplies by a constant: {remedy}")


def _constant_factors(checkpoint: Checkpoint, model: ModelConfig) -> Factors:
    """The factors that the gate amounts to.

    Raises:
        CheckpointError: Scores depend on the input.
    """
    gate, attention = model.attention.gate, model.attention
    if gate.score == "constant":
        return dict.fromkeys(_projections(model), torch.tensor(gate.constant))
    weights = {name: f"{_MASTER}/{name.removesuffix('o.weight')}gate.weight" for name in _projections(model)}
    activation = ACTIVATIONS[gate.activation]
    if gate.score == "parameter":
        numbers = {name: activation(checkpoint.read_whole(weight)) for name, weight in weights.items()}  # [n, d or 1]
        return {name: scores.expand(-1, attention.head_dim).flatten() for name, scores in numbers.items()}
    largest = {weight: checkpoint.read_whole(weight).abs().max().item() for weight in weights.values()}
    learnt = {weight: value for weight, value in largest.items() if value != 0}
    if learnt:
        worst = max(learnt, key=learnt.__getitem__)
        raise CheckpointError(
            f"{checkpoint.folder}: the gate depends on the input: the largest weight of {worst} is {learnt[worst]:.3g}, and --gate none "
            f"needs all gate weights to be 0 ({len(learnt)} of {len(largest)} tensors are not); keep a gate that has learnt"
        )
    return dict.fromkeys(_projections(model), activation(torch.zeros(())))


def _projections(model: ModelConfig) -> list[str]:
    """The output projections, which take the factors."""
    return [f"layers.{layer}.attention.o.weight" for layer in range(model.num_layers)]


def _rewrite(checkpoint: Checkpoint, old: RunConfig, output: Path, *, gate: GateConfig, factors: Factors) -> Retrofit:
    """Check what is left to check, and write."""
    new = replace(old, model=replace(old.model, attention=replace(old.model.attention, gate=gate)))
    name = "--output"
    require_free(output, name=name)
    require_outside(output, run_around(checkpoint.folder), name=name)
    require_root(output, name=name)
    checkpoint.verify(names=_taken(checkpoint, old.model))
    rounding = 0.0

    def write(staging: Path) -> int:
        nonlocal rounding
        ranks, rounding = _write(checkpoint, staging, old=old.model, new=new.model, factors=factors)
        return ranks

    with all_or_nothing(output, name=name, source=checkpoint.folder):
        folder = write_checkpoint(output, checkpoint.step, write, config=new, metadata=checkpoint.metadata)
    bounds = min(f.min().item() for f in factors.values()), max(f.max().item() for f in factors.values())
    exact = all((f.frexp().mantissa == 0.5).all() for f in factors.values())
    return Retrofit(checkpoint.folder, folder, new, checkpoint.step, bounds, rounding, exact)


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _taken(checkpoint: Checkpoint, model: ModelConfig) -> list[str]:
    """All tensors but what an optimizer keeps for a parameter beside its master, and what precision keeps; other states as they are."""
    moments_of = parameter_shapes(model).keys()
    others = [name for name in checkpoint.tensors if not name.startswith(PRECISION_STATE)]
    return [name for name in others if _kind(name) in (_MASTER, _STATE) or name.partition("/")[2] not in moments_of]


def _write(checkpoint: Checkpoint, staging: Path, *, old: ModelConfig, new: ModelConfig, factors: Factors) -> tuple[int, float]:
    """Write all tensors as the parts of some ranks; returns how many, and the largest rounding.

    `write_rank` takes all pieces of its file before it writes the first, so each scaled projection has a file to itself; the others hold
    views of the files that are read.
    """
    before, after = parameter_shapes(old), parameter_shapes(new)
    changed = {f"{_MASTER}/{name}" for name in (*factors, *(before.keys() - after.keys()))}
    unchanged = [name for name in _taken(checkpoint, old) if name not in changed]
    rank, rounding = 0, 0.0
    for pieces in _by_file(checkpoint, unchanged):
        write_rank(staging, rank, pieces)
        rank += 1
    added = [_zeros(f"{_MASTER}/{name}", after[name]) for name in after.keys() - before.keys()]
    if added:
        write_rank(staging, rank, added)
        rank += 1
    for name, factor in factors.items():
        weight = checkpoint.read_whole(f"{_MASTER}/{name}")
        rounding = max(rounding, _scale(weight, factor))
        write_rank(staging, rank, [Piece(f"{_MASTER}/{name}", weight.shape, (0, 0), weight)])
        rank += 1
    return rank, rounding


def _by_file(checkpoint: Checkpoint, names: list[str]) -> Iterator[list[Piece]]:
    """The pieces of the tensors as they lie in each file, without reading them."""
    files: dict[str, list[tuple[str, StoredPiece]]] = {}
    for name in names:
        for piece in checkpoint.stored(name).pieces:
            files.setdefault(piece.file, []).append((name, piece))
    for pieces in files.values():
        yield [Piece(name, checkpoint.stored(name).shape, piece.box.offset, checkpoint.mapped(name, piece)) for name, piece in pieces]


def _zeros(name: str, shape: tuple[int, ...]) -> Piece:
    """A tensor of zeros that takes no memory."""
    return Piece(name, shape, (0,) * len(shape), torch.zeros(()).expand(shape))


def _scale(weight: Tensor, factor: Tensor) -> float:
    """Multiply the columns of `weight` in place; returns the largest rounding as a share of the exact product."""
    largest = 0.0
    for rows in weight.split(_ROWS):
        exact = rows.double() * factor.double()
        rows.copy_(exact)
        error = (rows.double() - exact).abs() / exact.abs()
        largest = max(largest, error.nan_to_num(nan=0.0).max().item())  # 0 / 0
    return largest
