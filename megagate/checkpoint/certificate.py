"""The second part of a checkpoint's certificate: what the step after it did, which a resumed run must do again.

The first part lies in the index and its tensors: a digest of each piece, the data's cursor, the generator's state. It proves that the
files are those that were written. The fingerprint in the index (`fingerprint.py`) is taken of the state in memory, before and after, so it
proves that what was written was the state and that what was read is it, under any layout. What the state was taken from, and what is made
of it, only the next step can tell: its tokens prove the cursor, its loss and gradient norm the weights, and how far each tensor moved
masters and moments, as far as the circumstances let two sound steps agree.

    STEP/next_step.json     {"digest": blake3 of the rest, "content": {"step": 101, "tokens": ..., "loss": ..., ...}}

Pure data and comparison; `train/certify.py` measures.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from blake3 import blake3

from megagate.checkpoint.durable import write_file
from megagate.config.keys import differences
from megagate.config.run import RunConfig
from megagate.errors import CheckpointError

NEXT_STEP_NAME = "next_step.json"

SAME_STEP_KEYS = (
    "train.steps",
    "train.output_dir",
    "train.resume",
    "train.recompute",
    "train.micro_batch_size",
    "train.on_nonfinite",
    "data.path",
    "data.valid",
    "data.cache_dir",
    "optim.lr",
    "optim.implementation",
    "schedule.",
    "precision.dtype",
    "precision.grad_dtype",
    "precision.norm",
    "parallel.",
    "checkpoint.",
    "eval.",
    "log.",
    "observe.",
    "wandb.",
    "profile.",
)
"""Keys that leave a step's numbers as they are, or change them only through what is compared anyway: the tokens, the learning rate of
that very step, the samples of a micro-step, the layout, the dtype."""


@dataclass(frozen=True)
class Circumstances:
    """What the last bits of a step's numbers depend on, beside the state and the tokens.

    Args:
        dp: Data-parallel ranks.
        tp: Tensor-parallel ranks.
        ep: Expert-parallel ranks.
        zero_stage: ZeRO's.
        micro_step_samples: Samples of a micro-step over all ranks.
        device: Its kind, `cpu` or `cuda`.
        device_name: Its model, as the system names it.
        dtype: Of weights and activations.
        grad_dtype: In which gradients are summed: `fp32` or `model`.
        torch: PyTorch's version.
        threads: Of PyTorch in each rank.
        optimizer: Whose kernel made the step, `optim.implementation`; records of versions that had but PyTorch's do not name it.
        norm: Whose kernel normed, `precision.norm`; likewise.
        fp8: The recipe of products in FP8, or `none`.
    """

    dp: int
    tp: int
    ep: int
    zero_stage: int
    micro_step_samples: int
    device: str
    device_name: str
    dtype: str
    grad_dtype: str
    torch: str
    threads: int
    optimizer: str = "torch"
    norm: str = "native"
    fp8: str = "none"


@dataclass(frozen=True)
class NextStep:
    """What one optimizer step did, whatever the layout.

    Args:
        step: Counted from 1.
        tokens: Digest of its samples, hexadecimal: the sum modulo 2^64, over samples, of a 64-bit blake3 of (number, tokens, targets).
        loss: Nats.
        grad_norm: Global, before clipping.
        lr: Its learning rate.
        applied: Whether the parameters were changed; where not, a number that is not finite is null in the file.
        updates: How far each tensor of the state moved, root of the sum of squared differences, fp64, by its name such as `master/NAME`.
        circumstances: Of the run that did it.
        bits: Of each tensor after the step, the sum of its elements' bits as int32, modulo 2^64, hexadecimal: the same bits or not, and
            comparable in the same circumstances alone.
    """

    step: int
    tokens: str
    loss: float
    grad_norm: float
    lr: float
    applied: bool
    updates: Mapping[str, float]
    circumstances: Circumstances
    bits: Mapping[str, str] = field(default_factory=dict)

    @property
    def update_norm(self) -> float:
        """How far all masters together moved."""
        return math.sqrt(math.fsum(norm**2 for name, norm in self.updates.items() if _is_master(name)))


@dataclass(frozen=True)
class Tolerance:
    """By how much a recomputed number may differ, relative; 0 demands the same bits.

    Args:
        loss: Of the loss.
        grad_norm: Of the gradient norm.
        update_norm: Of how far all masters moved together.
        update: Of how far one tensor moved.
    """

    loss: float
    grad_norm: float
    update_norm: float
    update: float


EXACT = Tolerance(0.0, 0.0, 0.0, 0.0)
FP32 = Tolerance(loss=1e-5, grad_norm=1e-5, update_norm=1e-5, update=1e-4)
BF16 = Tolerance(loss=5e-3, grad_norm=5e-2, update_norm=5e-3, update=0.5)
"""Of one tensor's update sound runs have differed by 7 %, where few elements of it move. Damage to the state below that is the
fingerprint's to find, which knows no tolerance."""


def tolerance(a: Circumstances, b: Circumstances) -> Tolerance:
    """What two runs of the same step may differ by: nothing in the same circumstances on CPUs, whose kernels sum in a fixed order."""
    if a == b and a.device == "cpu":
        return EXACT
    return FP32 if (a.dtype, a.fp8) == (b.dtype, b.fp8) == ("fp32", "none") else BF16


@dataclass(frozen=True)
class Scope:
    """Which parts of a recorded step the resumed run can be held to; a reason where it cannot.

    Args:
        tokens: Why other tokens are no error; empty where they are.
        loss: Why the loss is not compared.
        gradients: Why the gradient norm is not.
        updates: Why the updates are not.
        masters: Why those of the masters, and of all of them together, are not, where those of the moments are.
    """

    tokens: str = ""
    loss: str = ""
    gradients: str = ""
    updates: str = ""
    masters: str = ""

    @property
    def unchecked(self) -> list[str]:
        """What is left out and why, as sentences."""
        named = {"the loss": self.loss, "the gradient norm": self.gradients, "the updates": self.updates}
        named["the updates of the masters"] = self.masters
        reasons: dict[str, list[str]] = {}
        for what, why in named.items():
            if why:
                reasons.setdefault(why, []).append(what)
        return [f"{' and '.join(what)}: {why}" for why, what in reasons.items()]


def scope(recorded: NextStep, now: Circumstances, *, there: RunConfig, here: RunConfig, lr: float) -> Scope:
    """What of `recorded`, a step of the run `there`, the run `here` must reproduce at the learning rate `lr`."""
    changed = [key for key, _, _ in differences(there, here)]
    tokens = "data.path changed" if "data.path" in changed else ""
    if not (recorded.applied and math.isfinite(recorded.loss)):
        why = f"step {recorded.step} was skipped there, since a number was not finite"
        return Scope(tokens, why, why, why)
    others = [key for key in changed if not key.startswith(SAME_STEP_KEYS)]
    of_the_update = [key for key in others if key.startswith("optim.")]
    if len(others) > len(of_the_update):
        why = f"the config changed ({', '.join(others)})"
        return Scope(tokens, why, why, why)
    gradients = _other_micro_steps(recorded.circumstances, now, here)
    updates = gradients or (f"the config changed ({', '.join(of_the_update)})" if of_the_update else "")
    masters = ""
    if not updates and lr != recorded.lr:  # which the moments do not depend on
        masters = f"the learning rate of step {recorded.step} is {lr:.6g} now and was {recorded.lr:.6g}"
    return Scope(tokens, "", gradients, updates, masters)


def _other_micro_steps(there: Circumstances, now: Circumstances, config: RunConfig) -> str:
    """Why the gradients differ where a micro-step holds other samples; empty where they do not depend on it."""
    moe = config.model.moe
    if there.micro_step_samples == now.micro_step_samples or not (config.model.is_moe and moe.balance_coef):
        return ""
    if moe.balance_scope == "sequence":
        return ""
    now_and_then = f"{now.micro_step_samples} samples now and of {there.micro_step_samples} there"
    return f"the balance loss counts experts over micro-steps of {now_and_then}"


def compare(recorded: NextStep, found: NextStep, what: Scope, *, same_state: bool = False) -> tuple[str | None, list[str]]:
    """The first quantity of a recomputed step that is not what was recorded, with both values, or None; and what was not compared.

    Where an update differs, the sentence names the tensor whose update differs most, also behind a loss or norm that differs first: the
    one in which the difference is most visible, which need not be where it came from. `same_state`: the state before the step is known to
    be the one that was saved, which the sentence then says.
    """
    if found.tokens != recorded.tokens and what.tokens:
        return None, [f"nothing of it: it has other tokens, as {what.tokens}"]
    if found.tokens != recorded.tokens:
        return f"its tokens have the digest {found.tokens}, {recorded.tokens} was recorded", []
    difference = _first_difference(recorded, found, what)
    if difference is not None and same_state:
        difference = f"the step differs, though it began with the very state that was saved: {difference}"
    return difference, what.unchecked


def _first_difference(recorded: NextStep, found: NextStep, what: Scope) -> str | None:
    allowed = tolerance(recorded.circumstances, found.circumstances)
    candidates = [
        (what.loss, "the loss", found.loss, recorded.loss, allowed.loss),
        (what.gradients, "the gradient norm", found.grad_norm, recorded.grad_norm, allowed.grad_norm),
    ]
    worst = None if what.updates else worst_update(recorded, found, of_masters=not what.masters)
    if worst is not None:
        name, distance = worst
        values = found.updates.get(name, math.nan), recorded.updates.get(name, math.nan)
        candidates.append(("", f"the update of {name}", *values, allowed.update))
        whole = "the norm of the whole update"
        candidates.append((what.masters, whole, found.update_norm, recorded.update_norm, allowed.update_norm))
    for left_out, quantity, now, then, limit in candidates:
        if not left_out and not _agree(now, then, limit):
            rule = f"they must agree to {limit:g}" if limit else "they must be the same bits, as layout, device and versions are the same"
            most = "" if worst is None or worst[0] in quantity else _most_visible(*worst)
            return f"{quantity} is {now!r}, {then!r} was recorded ({rule}){most}"
    compared = [name for name in sorted(recorded.bits) if not (what.masters and _is_master(name))]
    other = [name for name in compared if found.bits.get(name) != recorded.bits[name]]
    if allowed == EXACT and not what.updates and other:
        rest = f" and {len(other) - 1} others end" if len(other) > 1 else " ends"
        sums = f"the sum of the first is {found.bits.get(other[0])}, {recorded.bits[other[0]]} was recorded"
        return f"{other[0]}{rest} with other bits ({sums}, and layout, device and versions are the same)"
    return None


def _most_visible(name: str, distance: float) -> str:
    """The tensor whose update tells most of a difference: not the culprit."""
    if not distance:
        return "; the updates of all tensors agree"
    by = f", by {100 * distance:.3g} %" if math.isfinite(distance) else ""
    return f"; it is most visible in the update of {name}{by}"


def worst_update(recorded: NextStep, found: NextStep, *, of_masters: bool) -> tuple[str, float] | None:
    """The tensor whose update differs most, masters or not, and by what share of it; None where no tensor moved there nor here."""
    names = [name for name in sorted(recorded.updates.keys() | found.updates.keys()) if of_masters or not _is_master(name)]
    shares = {name: _share(found.updates.get(name, math.nan), recorded.updates.get(name, math.nan)) for name in names}
    return max(shares.items(), key=lambda item: item[1]) if shares else None


def _is_master(name: str) -> bool:
    return name.startswith("master/")


def _share(a: float, b: float) -> float:
    """|a - b| as a share of the larger; infinite where one of them is no number."""
    if a == b:
        return 0.0
    share = abs(a - b) / max(abs(a), abs(b))
    return share if math.isfinite(share) else math.inf


def _agree(a: float, b: float, limit: float) -> bool:
    return _share(a, b) <= limit


def write_next_step(folder: Path, content: NextStep) -> None:
    """Put `next_step.json` into the published step folder `folder`, at once.

    Raises:
        RunError: No space; the checkpoint stands without it.
    """
    values = asdict(content)
    for name in ("loss", "grad_norm"):
        values[name] = values[name] if math.isfinite(values[name]) else None
    write_file(folder / NEXT_STEP_NAME, json.dumps({"digest": _digest(values), "content": values}, indent=1).encode())


def read_next_step(folder: Path) -> NextStep | None:
    """What the step after the checkpoint `folder` did; None where nobody has recorded it.

    Raises:
        CheckpointError: The file is damaged, or lacks what this version compares.
    """
    path = folder / NEXT_STEP_NAME
    if not path.is_file():
        return None
    try:
        sealed = json.loads(path.read_bytes())
        values = dict(sealed["content"])
        sound = sealed["digest"] == _digest(values)
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path} is damaged or was edited: it does not have the digest that it records; resume from another step, or delete the file, "
            "and the resume will say that it could not do the step again"
        )
    return _decoded(path, values)


def _decoded(path: Path, values: Mapping[str, Any]) -> NextStep:
    """A sound record, with what a later version has added left out."""
    missing = [one.name for one in fields(NextStep) if one.name not in values]
    place = values.get("circumstances")
    if isinstance(place, Mapping):
        missing += [f"circumstances.{one.name}" for one in fields(Circumstances) if one.name not in place and one.default is MISSING]
    if missing:
        raise CheckpointError(
            f"{path} does not record {', '.join(missing)}, so another version of megagate wrote it; resume with that one, or delete the "
            "file, and the resume will say that it could not do the step again"
        )
    known = {one.name: values[one.name] for one in fields(NextStep)}
    for name in ("loss", "grad_norm"):
        known[name] = math.nan if known[name] is None else known[name]
    known["circumstances"] = Circumstances(**{one.name: place[one.name] for one in fields(Circumstances) if one.name in place})
    return NextStep(**known)


def _digest(values: Mapping[str, Any]) -> str:
    return blake3(json.dumps(values, sort_keys=True).encode()).hexdigest()
