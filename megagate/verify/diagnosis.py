"""From what the ranks and the reference recorded to a verdict that names the part that is wrong."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from megagate.checkpoint.store import Piece
from megagate.config.count import Part, parameter_parts
from megagate.config.run import RunConfig
from megagate.engine.base import StepResult
from megagate.engine.optim import clipping
from megagate.parallel.mesh import ParallelMesh
from megagate.verify.account import SentRow
from megagate.verify.compare import Agreement, compare, whole_tensors
from megagate.verify.trial import DTYPES, Outcome

FP32_LIMIT = 5e-6
"""Of a number relative, of a tensor's element relative to the largest of its tensor: several times what rounding does in a small model."""
FP32_UPDATE_LIMIT = 1e-3
OWN_UPDATE_LIMIT = 5e-2
"""Of an update's length: the weights of a norm are near 1, and their updates near the rounding of that."""
FP32_EPS = 2.0**-23
BF16_LIMIT = 3.0
"""Times the distance between one process in bf16 and one in fp32."""
BF16_NUMBER_FLOOR = 5e-3
"""Relative; a single number may by chance be exact in the yardstick."""
SAME_FACTOR, SAME_FACTOR_BF16 = 1e-3, 0.05
"""Relative; factors nearer than this are the same. In bf16 at the most; as near as its own rounding lets them be."""
SMALLEST_SCALE = 1e-3
"""Of a gradient, as a share of the model's largest: one that cancels to nothing, like a top-1 router's, is rounding and nothing else."""
TITLES: Mapping[Part, str] = {"shared_expert": "shared expert", "ffn": "dense FFN"}
"""Where a part's title is not its name."""


@dataclass(frozen=True)
class Row:
    """One line about tensors.

    Args:
        what: A group of parameters, or what else is compared.
        ratio: Factor between ours and the reference's.
        error: fp32: the worst difference as a share of its tensor's scale; bf16: the distance in units of bf16's own rounding.
        where: The tensor with the worst difference.
        ok: Whether the error is within its limit.
        factor: In words, where ours is a multiple of the reference's; else empty.
    """

    what: str
    ratio: float
    error: float
    where: str
    ok: bool
    factor: str = ""


@dataclass(frozen=True)
class Number:
    """One line about a number: a loss or a norm, and what it should be."""

    what: str
    ours: float
    reference: float
    ok: bool


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Args:
        gradients: Of the first step, by group of parameters, and of the auxiliary losses alone.
        later: Gradients of the steps after it, a row for each.
        outputs: Of the forward pass, in its order.
        initial: The first weights, which are bit-identical under every layout.
        updates: What the steps changed in the fp32 masters.
        weights: Of this run alone: its updates beside lr times its gradients, by group, and the weights that it uses beside its masters.
        numbers: Losses and norms of all steps.
        sent: Bytes that the first rank sent in one step.
        causes: What is wrong, the likely cause first; empty where all is well.
    """

    gradients: list[Row]
    later: list[Row]
    outputs: list[Row]
    initial: Row
    updates: Row
    weights: list[Row]
    numbers: list[Number]
    sent: list[SentRow]
    causes: list[str] = field(default_factory=list)


def diagnose(
    config: RunConfig, mesh: ParallelMesh, outcomes: list[Outcome], expected: Outcome, *, fp32: Outcome | None, sent: list[SentRow]
) -> Diagnosis:
    """Compare.

    Args:
        config: The run.
        mesh: Its sizes can be the cause of a factor.
        outcomes: Of all ranks.
        expected: Of one process in the same precision.
        fp32: Of one process in fp32, where the run is in bf16: how far bf16 itself is from it is the yardstick.
        sent: Bytes, passed on.
    """
    judge = _Judge(config, mesh, has_yardstick=fp32 is not None)
    if not all(step.applied for step in outcomes[0].steps):
        initial = judge.initial(outcomes, expected)
        causes = ["a step was skipped because a gradient is not finite"]
        return Diagnosis([], [], [], initial, initial, [], judge.numbers(outcomes[0], expected, fp32), sent, causes)
    parts = parameter_parts(config.model)
    cross_entropy = [_cross_entropy(one) for one in (*outcomes, expected, *([fp32] if fp32 else []))]
    ours, reference = cross_entropy[: len(outcomes)], cross_entropy[len(outcomes)]
    yard = cross_entropy[-1] if fp32 else None
    scales = _scales(expected)
    gradients = judge.rows(_joined(ours), reference, yard, {name: TITLES.get(part, part) for name, part in parts.items()}, scales)
    if expected.aux_gradients:
        routers = {name: "auxiliary losses" for name, part in parts.items() if part == "router"}
        aux = _joined(one.aux_gradients for one in outcomes)
        gradients += judge.rows(aux, expected.aux_gradients, fp32.aux_gradients if fp32 else None, routers, scales)
    later: list[Row] = []
    for step in range(1, len(expected.gradients)):
        everything = dict.fromkeys(parts, f"all, step {step + 1}")
        own = _joined(one.gradients[step] for one in outcomes)
        later += judge.rows(own, expected.gradients[step], fp32.gradients[step] if fp32 else None, everything, scales)
    names = {piece.name.partition("/")[2] for piece in expected.outputs}
    outputs = judge.rows(
        _joined(one.outputs for one in outcomes), expected.outputs, fp32.outputs if fp32 else None, {name: name for name in names}
    )
    initial = judge.initial(outcomes, expected)
    updates = judge.updates(outcomes, expected, fp32)
    numbers = judge.numbers(outcomes[0], expected, fp32) + judge.clip_norms(outcomes)
    found = Diagnosis(gradients, later, outputs, initial, updates, judge.weights(outcomes, parts), numbers, sent)
    return replace(found, causes=_causes(found, outcomes, unit=judge.unit))


def _cross_entropy(outcome: Outcome) -> list[Piece]:
    """The first step's gradient without the auxiliary losses', which were measured with the same weights and tokens."""
    if not outcome.aux_gradients:
        return outcome.gradients[0]
    both = zip(outcome.gradients[0], outcome.aux_gradients, strict=True)
    return [replace(piece, tensor=piece.tensor - aux.tensor) for piece, aux in both]


def _scales(reference: Outcome) -> dict[str, float]:
    """Of the terms that the first step's gradients are sums of, by tensor: a gradient is known to the rounding of these."""
    wholes = whole_tensors(reference.gradients[0])
    aux = whole_tensors(reference.aux_gradients)
    scales = {name: max(x.abs().max().item() for x in (whole, aux.get(name, whole))) for name, whole in wholes.items()}
    least = SMALLEST_SCALE * max(scales.values())
    return {name: max(scale, least) for name, scale in scales.items()}


def _joined(pieces: Iterable[list[Piece]]) -> list[Piece]:
    return [piece for some in pieces for piece in some]


def _updates(outcome: Outcome) -> list[Piece]:
    """Masters after the last step less those before the first."""
    both = zip(outcome.masters, outcome.initial, strict=True)
    return [replace(after, tensor=after.tensor - before.tensor) for after, before in both]


class _Judge:
    """Limits: absolute in fp32, in units of bf16's own rounding in bf16."""

    def __init__(self, config: RunConfig, mesh: ParallelMesh, *, has_yardstick: bool):
        self.config, self.mesh, self.bf16 = config, mesh, has_yardstick
        self.unit = "x bf16's own rounding" if has_yardstick else "of its scale"

    def rows(
        self,
        pieces: list[Piece],
        expected: list[Piece],
        fp32: list[Piece] | None,
        groups: Mapping[str, str],
        scales: Mapping[str, float] | None = None,
    ) -> list[Row]:
        """A row for each group of tensors, in the order of `expected`; tensors without a group are left out."""
        ours = _grouped(compare(pieces, whole_tensors(expected), scales=scales), groups)
        yard = _grouped(compare(expected, whole_tensors(fp32)), groups) if fp32 is not None else {}
        return [self._row(what, agreement, yard.get(what)) for what, agreement in ours.items()]

    def _row(self, what: str, agreement: Agreement, yard: Agreement | None) -> Row:
        error, limit = agreement.worst, FP32_LIMIT
        if yard is not None:
            error, limit = (agreement.distance / yard.distance if yard.distance else agreement.distance), BF16_LIMIT
        ok = error <= limit or agreement.worst <= FP32_LIMIT  # in bf16 too what is nothing in fp32 is nothing
        same = SAME_FACTOR if yard is None else min(SAME_FACTOR_BF16, BF16_LIMIT * yard.distance)
        told = not ok and agreement.is_multiple(same) and abs(agreement.ratio - 1) > same
        return Row(what, agreement.ratio, error, agreement.where, ok, self._factor(agreement.ratio, same) if told else "")

    def _factor(self, ratio: float, same: float) -> str:
        """In words, with the axes whose size, or its inverse, is the ratio: `2.00 x the reference = ep`."""
        sizes = {axis: getattr(self.mesh, axis).size for axis in ("tp", "dp", "ep", "edp", "world")}
        known = sizes | {f"1/{axis}": 1 / size for axis, size in sizes.items()}
        named = {name: value for name, value in known.items() if value != 1 and abs(ratio / value - 1) <= same}
        names = "".join(f" = {name}" for name in named)
        return f"{next(iter(named.values()), ratio):.2f} x the reference{names}"

    def initial(self, outcomes: list[Outcome], expected: Outcome) -> Row:
        """The weights before the first step, to the bit."""
        agreements = compare(_joined(one.initial for one in outcomes), whole_tensors(expected.initial))
        (agreement,) = _grouped(agreements, dict.fromkeys(agreements, "")).values()
        return Row("initial weights", agreement.ratio, agreement.worst, agreement.where, agreement.worst == 0)

    def updates(self, outcomes: list[Outcome], expected: Outcome, fp32: Outcome | None) -> Row:
        """What all steps changed. In fp32 the length of the difference counts: an element's change is near the rounding of the element."""
        ours, reference = _joined(_updates(one) for one in outcomes), whole_tensors(_updates(expected))
        (agreement,) = _grouped(compare(ours, reference), dict.fromkeys(reference, "")).values()
        if fp32 is None:
            return Row("updates", agreement.ratio, agreement.distance, agreement.where, agreement.distance <= FP32_UPDATE_LIMIT)
        yard = compare(_updates(expected), whole_tensors(_updates(fp32)))
        return self._row("updates", agreement, _grouped(yard, dict.fromkeys(yard, ""))[""])

    def weights(self, outcomes: list[Outcome], parts: Mapping[str, Part]) -> list[Row]:
        """What this run did with its own gradients, which needs no reference and is exact in bf16 too."""
        wanted: dict[str, Tensor] = {}
        for count, step in enumerate(outcomes[0].steps):
            rate = self.config.optim.lr / clipping(step.grad_norm, self.config.optim.grad_clip)
            for name, gradient in whole_tensors(_joined(one.gradients[count] for one in outcomes)).items():
                wanted[name] = wanted.get(name, 0) - rate * gradient
        groups = {name: TITLES.get(part, part) for name, part in parts.items()}
        made = _grouped(compare(_joined(_updates(one) for one in outcomes), wanted), groups)
        pieces = _joined(one.masters for one in outcomes)
        whole = whole_tensors(pieces)
        sizes = _grouped(compare(pieces, whole), groups)
        rows = []
        for what, update in made.items():
            # Each step rounds a weight once: of an update that is smaller than that, nothing need be left.
            rounding = (FP32_EPS * len(outcomes[0].steps)) ** 2 * sizes[what].expected
            ok = update.distance <= OWN_UPDATE_LIMIT or update.squares <= rounding
            rows.append(Row(f"{what}: update", update.ratio, update.distance, update.where, ok))
        dtype = DTYPES[self.config.precision.dtype]
        masters = {name: x.to(dtype).float() for name, x in whole.items()}
        used = compare(_joined(one.weights for one in outcomes), masters)
        (agreement,) = _grouped(used, dict.fromkeys(used, "")).values()
        return [*rows, Row("weights in use", agreement.ratio, agreement.worst, agreement.where, agreement.worst == 0)]

    def numbers(self, ours: Outcome, expected: Outcome, fp32: Outcome | None) -> list[Number]:
        """Each loss and norm."""
        ours_by_name, expected_by_name = _numbers(ours), _numbers(expected)
        limits = dict.fromkeys(ours_by_name, FP32_LIMIT)
        if fp32 is not None:
            yard = {name: _relative(expected_by_name[name], value) for name, value in _numbers(fp32).items()}
            limits = dict.fromkeys(ours_by_name, max(BF16_NUMBER_FLOOR, BF16_LIMIT * max(yard.values())))
        return [
            Number(name, value, expected_by_name[name], _relative(value, expected_by_name[name]) <= limits[name])
            for name, value in ours_by_name.items()
        ]

    def clip_norms(self, outcomes: list[Outcome]) -> list[Number]:
        """The norm that was clipped by, beside that of the very gradients: exact in bf16 too, where the reference's differs by rounding."""
        numbers = []
        for count, step in enumerate(outcomes[0].steps):
            wholes = whole_tensors(_joined(one.gradients[count] for one in outcomes)).values()
            norm = math.sqrt(sum(whole.double().square().sum().item() for whole in wholes))
            ok = _relative(step.grad_norm, norm) <= FP32_LIMIT
            numbers.append(Number(f"norm of the gradients, step {count + 1}", step.grad_norm, norm, ok))
        return numbers


def _grouped(agreements: Mapping[str, Agreement], groups: Mapping[str, str]) -> dict[str, Agreement]:
    together: dict[str, Agreement] = {}
    for name, agreement in agreements.items():
        if name in groups:
            together.setdefault(groups[name], Agreement()).add(agreement)
    return together


def _same(one: Outcome, other: Outcome) -> bool:
    """Whether two ranks tell the same numbers: sums over different groups may round differently."""
    numbers = zip(_numbers(one).values(), _numbers(other).values(), strict=True)
    return all(_relative(value, expected) <= FP32_LIMIT for value, expected in numbers)


def _numbers(outcome: Outcome) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for count, step in enumerate(outcome.steps, 1):
        numbers[f"loss, step {count}"] = step.loss
        numbers[f"gradient norm, step {count}"] = step.grad_norm
        if step.aux is not None:
            numbers[f"balance loss, step {count}"] = step.aux.balance
            numbers[f"z-loss, step {count}"] = step.aux.z
    return numbers | {"loss of one more batch": outcome.val_loss}


def _relative(value: float, expected: float) -> float:
    return abs(value / expected - 1) if expected else abs(value)


def _causes(found: Diagnosis, outcomes: list[Outcome], *, unit: str) -> list[str]:
    """What is wrong. A fault shows in all that comes after it, so only the first kind that is found is told."""
    first: list[StepResult] = outcomes[0].steps
    if not found.initial.ok:
        return [f"initial weights differ by {found.initial.error:.1e} {unit} in {found.initial.where}"]
    for row in found.outputs:
        if not row.ok:
            return [f"{row.what}: its output differs by {row.error:.1e} {unit}, and all that follows with it"]
    wrong = [row for row in found.gradients if not row.ok]
    if wrong:
        if len(wrong) == len(found.gradients) and len({row.factor for row in wrong}) == 1 and wrong[0].factor:
            return [f"all parameters: gradients are {wrong[0].factor}"]
        multiples = [f"{row.what}: gradients are {row.factor}" for row in wrong if row.factor]
        return multiples + [f"{row.what}: gradients differ by {row.error:.1e} {unit} in {row.where}" for row in wrong if not row.factor]
    for row in found.weights:
        if not row.ok:
            beside = "its master" if row.what == "weights in use" else "lr x its clipped gradient"
            return [f"{row.what}: not {beside} in {row.where} (ratio {row.ratio:.4f}, difference {row.error:.1e})"]
    numbers = [number for number in found.numbers if not number.ok]
    if numbers:
        worst = numbers[0]
        return [f"{worst.what}: {worst.ours:.7g}, expected {worst.reference:.7g} ({worst.ours / worst.reference:.4f} x)"]
    if unlike := [row for row in found.later if not row.ok]:
        return [f"gradients of {unlike[0].what.removeprefix('all, ')} differ by {unlike[0].error:.1e} {unit} in {unlike[0].where}"]
    if not found.updates.ok:
        return [f"what {len(first)} steps changed differs ({found.updates.error:.1e}), most in {found.updates.where}"]
    if any(not _same(one, outcomes[0]) for one in outcomes):
        return ["ranks tell different losses or norms for the same step"]
    return []
