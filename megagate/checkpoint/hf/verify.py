"""Is a folder of Hugging Face's kind the model of a checkpoint? Tensors bit by bit, and what transformers computes with them.

`verify_export` asks it of what was exported, `verify_adopted` of what was adopted. Neither changes or removes anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from megagate.checkpoint.hf.adopt_files import read_json
from megagate.checkpoint.hf.hf_config import REMOTE_MODEL_TYPE
from megagate.checkpoint.hf.source import run_of
from megagate.checkpoint.hf.table import Row, Target, mapping
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt
from megagate.checkpoint.hf.verify_logits import Agreement
from megagate.checkpoint.hf.verify_models import Case, Outcome, compare_streamed, compare_whole, foreign_code
from megagate.checkpoint.hf.verify_tensors import Compared, compare_adopted, compare_export
from megagate.checkpoint.store import Checkpoint
from megagate.config.model import ModelConfig
from megagate.errors import CheckpointError, MegagateError

How = Literal["whole", "streamed", "tensors"]
"""Both models in memory, a part of one at a time, or no model was run."""
_HEADROOM = 1.2
"""Memory that has to be there, as a multiple of what both models take."""


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
    """

    how: How
    tensors: int
    logits: Agreement | None = None
    greedy: Agreement | None = None
    greedy_tokens: int = 0
    flaws: tuple[str, ...] = ()

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
        return lines + [f"WRONG: {flaw}" for flaw in self.flaws]


def verify_export(checkpoint: Path, folder: Path, *, memory: int | None = None) -> Verification:
    """Compare an export with the checkpoint that it was made of.

    Args:
        checkpoint: A run, its folder of checkpoints, or one step.
        folder: The export.
        memory: Bytes that both models may take together; None for what is available.

    Raises:
        CheckpointError: The checkpoint is damaged. What is wrong with the export is told in the result.
    """
    return _verify(checkpoint, folder, _export_tensors, memory=memory)


def verify_adopted(source: Path, checkpoint: Path, *, memory: int | None = None) -> Verification:
    """Compare a checkpoint with the folder that it was adopted from, of a class that transformers has, or of our own.

    Args:
        source: The folder.
        checkpoint: The folder of checkpoints that was made of it, or one step.
        memory: As for `verify_export`.

    Raises:
        CheckpointError: The checkpoint is damaged. What does not fit the source is told in the result.
    """
    return _verify(checkpoint, source, _adopted_tensors, memory=memory)


CompareTensors = Callable[[list[Row], Checkpoint, FolderTensors, dict[str, object]], Compared]


def _export_tensors(rows: list[Row], checkpoint: Checkpoint, tensors: FolderTensors, config: dict[str, object]) -> Compared:
    name = str(config.get("dtype", config.get("torch_dtype", "float32")))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name)
    if dtype is None:
        raise CheckpointError(f"{tensors.folder}: config.json has dtype {name}, an export has float32 or bfloat16; write the folder again")
    return compare_export(rows, checkpoint, tensors, dtype=dtype)


def _adopted_tensors(rows: list[Row], checkpoint: Checkpoint, tensors: FolderTensors, config: dict[str, object]) -> Compared:
    return compare_adopted(rows, checkpoint, tensors)


def _verify(checkpoint: Path, folder: Path, compare: CompareTensors, *, memory: int | None) -> Verification:
    with Checkpoint.open(checkpoint) as opened:
        model = run_of(opened).model
        try:
            case, compared = _compare_tensors(opened, folder, model, compare)
        except MegagateError as error:
            return Verification("tensors", 0, flaws=(str(error),))
    flaws = [*compared.flaws, *([] if compared.loadable else ["no logits were compared, since names or shapes are wrong"])]
    if case.remote and (strange := foreign_code(folder)):
        compared = Compared(compared.tensors, compared.flaws, loadable=False)
        flaws.append(f"{' and '.join(strange)}: not as in this version, and no other code is run, so that no logits were compared")
    if not compared.loadable:
        return Verification("tensors", compared.tensors, flaws=tuple(flaws))
    limit = available_memory() if memory is None else memory
    whole = limit is None or _HEADROOM * case.bytes_whole <= limit
    try:
        outcome = compare_whole(case) if whole else compare_streamed(case)
    except CheckpointError as error:  # an op that cannot take a tensor back
        outcome = Outcome(None, None, 0, (str(error),))
    return Verification(
        how="whole" if whole else "streamed",
        tensors=compared.tensors,
        logits=outcome.logits,
        greedy=outcome.greedy,
        greedy_tokens=outcome.greedy_tokens,
        flaws=tuple(dict.fromkeys([*flaws, *outcome.flaws])),
    )


def _compare_tensors(checkpoint: Checkpoint, folder: Path, model: ModelConfig, compare: CompareTensors) -> tuple[Case, Compared]:
    config = read_json(folder / "config.json")
    target = _target(folder, config)
    tensors = FolderTensors(folder)
    padded = config.get("vocab_size") == model.padded_vocab_size
    rows = mapping(model, target, keep_padding=padded)
    case = Case(folder, model, target, tensors, Rebuilt(model, rows, tensors))
    return case, compare(rows, checkpoint, tensors, config)


def _target(folder: Path, config: dict[str, object]) -> Target:
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
