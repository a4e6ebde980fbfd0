"""One optimizer step, whatever does the sharding: the loss is formed here, once, for every engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagate.backend.base import KeepsState, Kept
from megagate.backend.documents import squared_lengths
from megagate.backend.kept import put_back
from megagate.checkpoint.reshard import flat_pieces, read_flat
from megagate.checkpoint.saved_model import PRECISION_STATE
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.config.count import Part
from megagate.config.run import RunConfig
from megagate.data.loader import IGNORE_INDEX
from megagate.engine.fragment import Fragment
from megagate.engine.norms import PartNorms
from megagate.engine.optim import MOMENTS, fresh_state
from megagate.engine.saturated import SaturationWatch
from megagate.model.lm import LanguageModel, LossParts
from megagate.nn.base import named_labels
from megagate.nn.moe.balance import AuxLosses, BalanceLoss
from megagate.parallel.comm import total
from megagate.parallel.mesh import ParallelMesh

SCALE = ".scale"
"""How the names of delayed scaling's scales end among what products keep."""


class StepDetail(NamedTuple):
    """What a step tells on request, equal on all ranks.

    Args:
        norms: The gradient's norm, before clipping, of each part that the model has: the root of their summed squares is
            `StepResult.grad_norm`. nan where the step was not applied.
        counts: [MoE layers][E] rows that went to each expert in the step, over all ranks; empty for a dense model.
    """

    norms: Mapping[Part, float]
    counts: tuple[tuple[float, ...], ...]


class StepResult(NamedTuple):
    """One optimizer step, equal on all ranks.

    Args:
        loss: Mean cross-entropy over the step's targets, nats.
        targets: Tokens with a target, over all ranks.
        context: Mean length, over all ranks' tokens, of the text that a token's attention is within: its document, or its whole window.
        grad_norm: Global norm before clipping; inf or nan when a gradient is not finite.
        applied: Whether the parameters were changed.
        aux: The router's losses; None for a dense model.
        saturated: The first tensor with an infinity that delayed scaling's cast made finite, as a sentence; empty where there was none.
        detail: Where it was asked for.
    """

    loss: float
    targets: int
    context: float
    grad_norm: float
    applied: bool
    aux: AuxLosses | None
    saturated: str = ""
    detail: StepDetail | None = None


class Unmatched(NamedTuple):
    """Where what products keep for their precision here is not what a checkpoint holds of it: names of tensors.

    Args:
        begun: Kept here, and not there, or in another shape: what a load does not touch.
        left: There, and not here, or in another shape: what a load does not read.
    """

    begun: list[str]
    left: list[str]


class Engine(ABC):
    """Owns the model, its optimizer and their sharding.

    Args:
        optimizer: The torch optimizer that makes the step, behind whatever shards it.
        replays_backward: Whether the losses of `replay` may be given a backward pass.
    """

    optimizer: torch.optim.Optimizer
    replays_backward = True

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: ParallelMesh):
        self.model, self.config, self.mesh = model, config, mesh
        self.labels = named_labels(model)
        self.applied_steps = 0  # skipped steps do not count: Adam's bias correction depends on it
        self._scales: list[dict[str, Tensor]] = []  # of delayed scaling, before each micro-step of the last step and after it

    def train_step(self, tokens: Tensor, labels: Tensor, *, lr: float, detailed: bool = False) -> StepResult:
        """Accumulate over micro-steps, clip, update; `detailed` tells more of it, and does nothing else.

        Shapes: tokens and labels [accumulation, b, s] int64, the samples of this data-parallel rank.

        Every rank's micro-step loss is CE_sum / T + its share of the auxiliary losses, T the targets of the whole step over all ranks, so
        that the sum over data-parallel ranks and micro-steps is the mean loss of the global batch: no later division by accumulation.
        """
        targets, context = self._measure(tokens, labels)
        balance = self._balance_loss(tokens)
        ce_sum = torch.zeros((), device=tokens.device)
        kept = self._kept()
        scales = {name: one.tensor for name, one in kept.items() if name.endswith(SCALE)}
        self._scales = [{name: scale.clone() for name, scale in scales.items()}]
        last, watch = len(tokens) - 1, SaturationWatch({name.removeprefix(PRECISION_STATE): one for name, one in kept.items()})
        for k, (loss, own) in enumerate(self._losses(self._forward, tokens, labels, targets=targets, balance=balance)):
            ce_sum += own
            self._backward(loss, last=k == last)
            self.model.backend.after_backward(self.model)
            watch.look()
            self._scales.append({name: scale.clone() for name, scale in scales.items()})
        norms = PartNorms(self.config) if detailed else None
        with self._before_steps(norms.add) if norms is not None else nullcontext():
            grad_norm, applied = self._update(lr)
        self.applied_steps += applied
        loss, aux, counts = total(ce_sum, self.mesh.dp).item() / max(1, targets), None, None
        if balance is not None:
            aux, counts = balance.close()
            if applied:
                self.model.follow_counts(counts)
        saturated, detail = watch.close(self.mesh.world), None
        if norms is not None:
            found = norms.close(self.mesh.world, grad_norm=grad_norm, applied=applied, device=tokens.device)
            detail = StepDetail(found, tuple(map(tuple, counts.tolist())) if counts is not None else ())
        return StepResult(loss, targets, context, grad_norm, applied, aux, saturated, detail)

    def replay(self, tokens: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The losses of the last step's micro-steps, one after the other, as their backward passes are given them. Collective.

        Each with the scales of delayed scaling that it had in the step.

        Whoever asks does what he likes with their gradients, but that nothing may reach the parameters' own (`torch.autograd.grad`).
        Neither the engine nor what the model keeps is changed.
        """
        targets, _ = self._measure(tokens, labels)
        with self.model.backend.unrecorded(self.model), put_back(self.model):
            kept = self._kept()
            losses = self._losses(self.model, tokens, labels, targets=targets, balance=self._balance_loss(tokens))
            for scales in self._scales[: len(tokens)]:
                for name, scale in scales.items():
                    kept[name].tensor.copy_(scale)
                yield self._scaled(next(losses)[0])

    def _losses(
        self,
        forward: Callable[[Tensor, Tensor], LossParts],
        tokens: Tensor,
        labels: Tensor,
        *,
        targets: int,
        balance: BalanceLoss | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's loss of each micro-step, with gradient, and the sum of its cross-entropy."""
        for k in range(len(tokens)):
            parts = forward(tokens[k], labels[k])
            loss = parts.ce_sum / max(1, targets)
            if balance is not None:
                loss = loss + balance.share(parts.stats)
            yield loss, parts.ce_sum.detach()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Mean cross-entropy over all targets of all ranks' batches, nats. Each item: tokens and labels [b, s]."""
        self.model.eval()
        ce_sum, targets = 0.0, 0
        for tokens, labels in batches:
            ce_sum += total(self.model(tokens, labels).ce_sum.double(), self.mesh.dp).item()
            targets += self._count_targets(labels)
        self.model.train()
        return ce_sum / max(1, targets)

    def _count_targets(self, labels: Tensor) -> int:
        return int(total((labels != IGNORE_INDEX).sum(), self.mesh.dp))

    def _measure(self, tokens: Tensor, labels: Tensor) -> tuple[int, float]:
        """Targets and `StepResult.context` of a step, by one sum over ranks."""
        if self.model.eod_id is None:
            return self._count_targets(labels), float(tokens.shape[-1])
        own = torch.stack([(labels != IGNORE_INDEX).sum(), squared_lengths(tokens, eod_id=self.model.eod_id)])
        targets, squares = total(own, self.mesh.dp).tolist()
        return targets, squares / (tokens.numel() * self.mesh.dp.size)

    def _balance_loss(self, tokens: Tensor) -> BalanceLoss | None:
        model = self.config.model
        step_tokens = tokens.numel() * self.mesh.dp.size
        return BalanceLoss(model.moe, step_tokens=step_tokens, mesh=self.mesh) if model.is_moe else None

    @abstractmethod
    def _forward(self, tokens: Tensor, labels: Tensor) -> LossParts:
        """Run the model on one micro-batch."""

    def _scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass of a rank's loss begins with."""
        return loss

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of the sum of all data-parallel ranks' losses."""

    @abstractmethod
    def _update(self, lr: float) -> tuple[float, bool]:
        """Clip, step unless a gradient is not finite, clear; returns the global norm and whether the step was applied."""

    def state_pieces(self) -> Iterator[Piece]:
        """This rank's part of masters, moments and what else the model keeps: every element on exactly one rank, without a collective."""
        for name, buffer in self._buffers() if self.mesh.world.rank == 0 else ():
            yield Piece(name, tuple(buffer.shape), (0,) * buffer.dim(), buffer)
        for name, kept in self._kept().items():
            same = self.mesh.edp if kept.shard.axis == "ep" else self.mesh.world  # the ranks that keep the same numbers
            if same.rank == 0:
                yield Piece(name, kept.shard.full_shape, kept.shard.offset, kept.tensor if kept.unit == 1 else kept.tensor / kept.unit)
        for fragment in self._fragments():
            if fragment.owned:
                for kind, flat in self._state(fragment.flat):
                    yield from self._pieces(f"{kind}/{fragment.name}", fragment, flat)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The first parts of the names of what the optimizer holds for every parameter: `master`, and the moments it has by now."""
        return ("master", *(MOMENTS[self.config.optim.name] if self.applied_steps else ()))

    @property
    def state_names(self) -> list[str]:
        """The names of all that `state_pieces` yields over all ranks, in one order on all of them."""
        held = [f"{kind}/{name}" for kind in self.kinds for name in self.labels]
        return [*(name for name, _ in self._buffers()), *self._kept(), *held]

    def unmatched(self, checkpoint: Checkpoint) -> Unmatched:
        """What `load_state` can not take over of what products keep, since the checkpoint was saved with another precision."""
        here = {name: kept.shard.full_shape for name, kept in self._kept().items()}
        there = {name: stored.shape for name, stored in checkpoint.tensors.items() if name.startswith(PRECISION_STATE)}
        begun = [name for name, shape in here.items() if there.get(name) != shape]
        return Unmatched(begun, [name for name, shape in there.items() if here.get(name) != shape])

    def load_state(self, checkpoint: Checkpoint, *, applied_steps: int) -> None:
        """Take masters, moments, weights and what else the model keeps from a checkpoint of any layout; but see `unmatched`."""
        self.applied_steps = applied_steps
        for name, buffer in self._buffers():
            checkpoint.read(name, (0,) * buffer.dim(), buffer)
        begun = self.unmatched(checkpoint).begun
        for name, kept in self._kept().items():
            if name not in begun:
                checkpoint.read(name, kept.shard.offset, kept.tensor)
                kept.tensor.mul_(kept.unit)
        fragments = list(self._fragments())
        for flat in {id(fragment.flat): fragment.flat for fragment in fragments}.values():
            self.optimizer.state[flat] = fresh_state(flat, self.config.optim, applied_steps=applied_steps)
        for fragment in fragments:
            for kind, flat in self._state(fragment.flat):
                read_flat(checkpoint, f"{kind}/{fragment.name}", **self._box(fragment), start=fragment.start, flat=fragment.of(flat))
        self._load_weights(checkpoint)

    @contextmanager
    def recorded_gradients(self) -> Iterator[list[Piece]]:
        """The gradients that the optimizer is given inside the context: clipped, fp32, `grad/NAME`; copies on other ranks too.

        Example:
            with engine.recorded_gradients() as gradients:
                engine.train_step(tokens, labels, lr=lr)
        """
        pieces: list[Piece] = []

        def record(fragment: Fragment) -> None:
            views = self._pieces(f"grad/{fragment.name}", fragment, fragment.flat.grad)
            pieces.extend(replace(piece, tensor=piece.tensor.clone()) for piece in views)

        with self._before_steps(record):
            yield pieces

    @contextmanager
    def _before_steps(self, see: Callable[[Fragment], None]) -> Iterator[None]:
        """Inside the context `see` gets each fragment whose master the optimizer is about to step, with its clipped gradient."""

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            # ZeRO calls the optimizer for a part of its parameters at a time.
            given = {id(flat) for group in optimizer.param_groups for flat in group["params"] if flat.grad is not None}
            for fragment in self._fragments():
                if id(fragment.flat) in given:
                    see(fragment)

        handle = self.optimizer.register_step_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside the context the model's parameters hold this rank's whole shards, to read. Collective."""
        yield

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(name in checkpoints, tensor) of what the model keeps beside parameters, equal on all ranks: the routers' biases."""
        return ((f"state/{name}", buffer) for name, buffer in self.model.named_buffers())

    def _kept(self) -> dict[str, Kept]:
        """What the model's products keep for their precision, by its name in checkpoints."""
        sites = [(path, module) for path, module in self.model.named_modules() if isinstance(module, KeepsState)]
        return {f"{PRECISION_STATE}{path}.{kept.name}": kept for path, site in sites for kept in site.kept_state()}

    def _state(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(kind, tensor) of what the optimizer keeps for one of its tensors."""
        for kind in self.kinds:
            yield kind, flat if kind == "master" else self.optimizer.state[flat][kind]

    def _pieces(self, name: str, fragment: Fragment, flat: Tensor) -> list[Piece]:
        return flat_pieces(name, **self._box(fragment), start=fragment.start, flat=fragment.of(flat))

    def _box(self, fragment: Fragment) -> dict[str, tuple[int, ...]]:
        shard = self.labels[fragment.name].shard
        return {"full_shape": shard.full_shape, "shard_offset": shard.offset, "shard_shape": shard.shape}

    @abstractmethod
    def _fragments(self) -> Iterable[Fragment]:
        """What this rank's optimizer holds."""

    @abstractmethod
    def _load_weights(self, checkpoint: Checkpoint) -> None:
        """Give the model's weights the values of the masters, which have been read."""
