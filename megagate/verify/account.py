"""What one rank sends in a step, beside what it has to."""

import math
from typing import NamedTuple

from torch import Tensor

from megagate.backend.base import KeepsState
from megagate.backend.te_sites import TENSORS
from megagate.engine.base import Engine
from megagate.parallel.traffic import Kind, Sent
from megagate.verify.minimum import FP32, StepShape, Term, step_terms, total_by_axis, zero_terms
from megagate.verify.wire import RoutedRows, WireCounter, axis_names

OF_MODEL = ("megagate.", "transformer_engine.")
"""Modules that send what `step_terms` are of."""


class SentRow(NamedTuple):
    """One line: what a rank sends in a step.

    Args:
        sender: `model` (through `parallel/comm.py`, and Transformer Engine's amaxes) or `ZeRO` (DeepSpeed's gradients, weights and norm).
        axis: Axes that are the same ranks, joined.
        kind: Of collective; for ZeRO all kinds together, since it may choose another kind than the cheapest.
        calls: Collectives.
        bytes: Sent.
        minimum: Bytes that have to be sent; of ZeRO without the few of its norm.
    """

    sender: str
    axis: str
    kind: str
    calls: int
    bytes: int
    minimum: int


def account(engine: Engine, tokens: Tensor, labels: Tensor) -> list[SentRow]:
    """Train one step, counting. Collective; each rank has its own rows.

    Shapes: tokens and labels [accumulation, b, s] int64.
    """
    rows = RoutedRows(engine.model, engine.mesh.ep)
    with WireCounter(engine.mesh) as wire:
        engine.train_step(tokens, labels, lr=engine.config.optim.lr)
    rows.close()
    rows_out, rows_in = rows.exchange()
    step = _shape(engine, tokens, rows_out=rows_out, rows_in=rows_in)
    names = axis_names(engine.mesh)
    ours: dict[tuple[str, Kind], Sent] = {}
    zero: dict[str, Sent] = {}
    for (axis, kind, module), sent in wire.traffic.sent.items():
        if module.startswith(OF_MODEL):
            ours[axis, kind] = ours.get((axis, kind), Sent()).plus(sent)
        else:
            zero[axis] = zero.get(axis, Sent()).plus(sent)
    least = total_by_axis(step_terms(engine.config.model, step), names)
    table = [_row("model", axis, kind, ours.get((axis, kind)), least.get((axis, kind))) for axis, kind in sorted({*ours, *least})]
    least_zero: dict[str, Sent] = {}
    for (axis, _), sent in total_by_axis(_zero_terms(engine, step), names).items():
        least_zero[axis] = least_zero.get(axis, Sent()).plus(sent)
    table += [_row("ZeRO", axis, "all kinds", zero.get(axis), least_zero.get(axis)) for axis in sorted({*zero, *least_zero})]
    return [row for row in table if row.bytes or row.minimum]


def _row(sender: str, axis: str, kind: str, sent: Sent | None, least: Sent | None) -> SentRow:
    sent, least = sent or Sent(), least or Sent()
    return SentRow(sender, axis, kind, sent.calls, sent.bytes, least.bytes)


def _shape(engine: Engine, tokens: Tensor, *, rows_out: int, rows_in: int) -> StepShape:
    config, mesh = engine.config, engine.mesh
    micro_steps, batch, seq_len = tokens.shape
    dense, experts = _amaxes(engine)
    return StepShape(
        world=mesh.world.size,
        tp=mesh.tp.size,
        ep=mesh.ep.size,
        batch=batch,
        seq_len=seq_len,
        micro_steps=micro_steps,
        dtype_bytes=engine.model.dtype.itemsize,
        recompute=config.train.recompute,
        whole_blocks=config.precision.backend == "te",
        rows_out=rows_out,
        rows_in=rows_in,
        norm_over_tp=config.parallel.zero_stage == 0,
        documents=engine.model.eod_id is not None,
        dense_amaxes=dense,
        expert_amaxes=experts,
    )


def _amaxes(engine: Engine) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of delayed scaling, dense and of experts: how many amaxes each all-reduce of a micro-step has.

    An emulation reduces one amax for each scale it keeps. Transformer Engine reduces all places of its histories, those of a forward pass
    at its end and those of a backward pass at its own; without expert parallelism all in one.
    """
    kept = [kept for site in engine.model.modules() if isinstance(site, KeepsState) for kept in site.kept_state()]
    scales = [one.shard for one in kept if one.name.endswith(".scale")]
    dense, experts = (sum(math.prod(shard.shape) for shard in scales if bool(shard.axis) == cut) for cut in (False, True))
    if engine.config.precision.backend != "te":
        return (dense,), (experts,)
    if engine.mesh.ep.size == 1:
        dense, experts = dense + experts, 0
    used = sum(len(names) for _, names in TENSORS.values())  # of the places of each product
    return tuple(tuple(scales // used * places for places, _ in TENSORS.values()) for scales in (dense, experts))


def _zero_terms(engine: Engine, step: StepShape) -> list[Term]:
    """What ZeRO has to send."""
    stage, labels = engine.config.parallel.zero_stage, engine.labels.values()
    dense, experts = (sum(math.prod(label.shard.shape) for label in labels if (label.shard.axis == "ep") == cut) for cut in (False, True))
    terms = zero_terms(
        step,
        dense=dense,
        experts=experts,
        grad_bytes=FP32 if engine.config.precision.grad_dtype == "fp32" else step.dtype_bytes,
        reductions=step.micro_steps if stage >= 2 else 1,
        gathers=2 * step.micro_steps if stage == 3 else 1,
    )
    return [term for term in terms if term.what != "norm"]
