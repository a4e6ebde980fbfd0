"""Is a folder of Hugging Face's kind the model of a checkpoint? Tensors bit by bit, and what transformers computes with them.

`verify_export` asks it of what was exported, `verify_adopted` of what was adopted. Neither changes or removes anything.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megagate.checkpoint.hf.adopt import open_directory
from megagate.checkpoint.hf.adopt_files import read_json
from megagate.checkpoint.hf.hf_config import REMOTE_MODEL_TYPE
from megagate.checkpoint.hf.table import Target, mapping
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt
from megagate.checkpoint.hf.verify_logits import Agreement
from megagate.checkpoint.hf.verify_models import Case, Outcome, compare_streamed, compare_whole, foreign_code, model_flaws
from megagate.checkpoint.hf.verify_tensors import Compared, compare_adopted, compare_export
from megagate.checkpoint.saved_model import run_of
from megagate.checkpoint.store import Checkpoint
from megagate.errors import CheckpointError, MegagateError

How = Literal["whole", "streamed", "tensors"]
"""Both models in memory, a part of one at a time, or no model was run."""
_HEADROOM = 1.2
"""Memory that has to be there, as a multiple of what both models take."""

_NOT_RUN = "logits were NOT compared: the code that was released with these models is not run, and transformers has no class for them"


@dataclass(frozen=True)
class Verification:
    """What was compared, and what is wrong.

    Args:
        how: How the models were run.
        tensors: Tensors that were compared bit by bit.
        logits: On fixed tokens; None where no model could be run.
        greedy: Of a cached greedy continuation; None where none was made.
        greedy_tokens: Tokens of that continuation.
        flaws: What is wrong, or could not be verified; each a sentence.
        notes: What is not compared for models of this kind.
    """

    how: How
    tensors: int
    logits: Agreement | None = None
    greedy: Agreement | None = None
    greedy_tokens: int = 0
    flaws: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Nothing is wrong, and all that was to be compared was."""
        return not self.flaws

    def lines(self) -> list[str]:
        """The outcome in words."""
        lines = [f"tensors: {self.tensors} compared bit by bit"]
        if self.logits is not None:
            how = "each model whole" if self.how == "whole" else "read block by block, since both do not fit into memory"
            lines.append(f"logits: {_of(self.logits)} ({how}, fp32)")
        if self.greedy is not None:
            lines.append(f"greedy continuation with cache: {self.greedy_tokens} tokens, {_of(self.greedy)}")
        elif self.how == "streamed":
            lines.append("greedy continuation: not made, each token would read the whole model from the disk")
        return [*lines, *self.notes, *(f"WRONG: {flaw}" for flaw in self.flaws)]


def verify_export(checkpoint: Path, folder: Path, *, memory: int | None = None) -> Verification:
    """Compare an export with the checkpoint that it was made of.

    Args:
        checkpoint: A run, its folder of checkpoints, or one step.
        folder: The export.
        memory: Bytes that both models may take together; None for what is available.

    Raises:
        CheckpointError: There is no such checkpoint, or its index is damaged. What is wrong with the export is told in the result.
    """
    with Checkpoint.open(checkpoint) as opened:
        model = run_of(opened).model
        try:
            config = read_json(folder / "config.json")
            target, tensors = _target(folder, config), FolderTensors(folder)
            rows = mapping(model, target, keep_padding=config.get("vocab_size") == model.padded_vocab_size)
            compared = compare_export(rows, opened, tensors, dtype=_dtype(folder, config))
        except MegagateError as error:
            return Verification("tensors", 0, flaws=(str(error),))
    return _with_models(Case(folder, model, target, tensors, Rebuilt(model, rows, tensors)), compared, memory=memory)


def verify_adopted(source: Path, checkpoint: Path, *, memory: int | None = None) -> Verification:
    """Compare a checkpoint with the folder that it was adopted from.

    Of models that were released with code of their own tensors alone are compared, since that code is not run.

    Args:
        source: The folder.
        checkpoint: The folder of checkpoints that was made of it, or one step.
        memory: As for `verify_export`.

    Raises:
        CheckpointError: There is no such checkpoint, or its index is damaged. What does not fit the source is told in the result.
    """
    with Checkpoint.open(checkpoint) as saved:
        model = run_of(saved).model
        try:
            opened = open_directory(source)
            if flaws := model_flaws(asdict(opened.described.model), model):
                return Verification("tensors", 0, flaws=tuple(flaws))
            tensors, target = FolderTensors(source, opened.weights), opened.described.source
            compared = compare_adopted(opened.rows, saved, tensors, left_out=opened.left_out)
        except MegagateError as error:
            return Verification("tensors", 0, flaws=(str(error),))
    if target == "gated_attention":
        return Verification("tensors", compared.tensors, flaws=compared.flaws, notes=(_NOT_RUN,))
    weights = Rebuilt(model, opened.rows, tensors)
    return _with_models(Case(source, model, target, tensors, weights, frozenset(opened.left_out)), compared, memory=memory)


def _with_models(case: Case, compared: Compared, *, memory: int | None) -> Verification:
    """After the tensors, what the models compute."""
    flaws, loadable = list(compared.flaws), compared.loadable
    if not loadable:
        flaws.append("no logits were compared, since names or shapes are wrong")
    elif case.remote and (strange := foreign_code(case.folder)):
        flaws.append(f"{' and '.join(strange)}: not as in this version, and no other code is run, so that no logits were compared")
        loadable = False
    if not loadable:
        return Verification("tensors", compared.tensors, flaws=tuple(flaws))
    limit = available_memory() if memory is None else memory
    whole = limit is None or _HEADROOM * case.bytes_whole <= limit
    try:
        outcome = compare_whole(case) if whole else compare_streamed(case)
    except CheckpointError as error:  # transformers cannot run it, or an op cannot take a tensor back
        outcome = Outcome(None, None, 0, (str(error),))
    return Verification(
        how="whole" if whole else "streamed",
        tensors=compared.tensors,
        logits=outcome.logits,
        greedy=outcome.greedy,
        greedy_tokens=outcome.greedy_tokens,
        flaws=tuple(dict.fromkeys([*flaws, *outcome.flaws])),
    )


def _dtype(folder: Path, config: dict[str, Any]) -> torch.dtype:
    """In which an export's weights were used."""
    name = config.get("dtype", config.get("torch_dtype", "float32"))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name)
    if dtype is None:
        raise CheckpointError(f"{folder}: config.json has dtype {name}, an export has float32 or bfloat16; write the folder again")
    return dtype


def _target(folder: Path, config: dict[str, Any]) -> Target:
    kind = config.get("model_type")
    if kind == REMOTE_MODEL_TYPE:
        return "remote-code"
    known = get_args(Target)
    if kind not in known:
        can = ", ".join((*(name for name in known if name != "remote-code"), REMOTE_MODEL_TYPE))
        raise CheckpointError(f"{folder}: config.json has model_type {kind}, and verified can be {can}; compare it by other means")
    return kind


def available_memory() -> int | None:
    """Bytes that a process may still take, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return int(found.split()[1]) * 1024 if found else None


def _of(found: Agreement) -> str:
    text = f"largest error {found.max_error:.2e} of {found.tolerance:.0e} allowed, at {found.positions} positions"
    return f"{text} ({found.left_out} behind near-ties of routers left out)" if found.left_out else text
