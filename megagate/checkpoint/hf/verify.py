"""Is a folder of Hugging Face's kind the model of a checkpoint? Tensors bit by bit, and what transformers computes with them.

`verify_export` asks it of what was exported, `verify_adopted` of what was adopted. Neither changes or removes anything.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from megagate.checkpoint.hf.adopt import open_directory
from megagate.checkpoint.hf.adopt_config import CONFIG, target_of
from megagate.checkpoint.hf.adopt_files import read_json
from megagate.checkpoint.hf.hf_config import Use, hf_config
from megagate.checkpoint.hf.table import mapping
from megagate.checkpoint.hf.targets import reasons
from megagate.checkpoint.hf.verify_config import export_flaws
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt
from megagate.checkpoint.hf.verify_logits import Agreement
from megagate.checkpoint.hf.verify_memory import available_memory
from megagate.checkpoint.hf.verify_models import Case, Outcome, compare_streamed, compare_whole, model_flaws
from megagate.checkpoint.hf.verify_released import Regrouped
from megagate.checkpoint.hf.verify_room import foreign_code
from megagate.checkpoint.hf.verify_tensors import Compared, compare_adopted, compare_export
from megagate.checkpoint.saved_model import run_of
from megagate.checkpoint.store import Checkpoint
from megagate.errors import CheckpointError, MegagateError

How = Literal["whole", "streamed", "tensors"]
"""Both models in memory, a part of one at a time, or no model was run."""
_NAMES: Mapping[str, str] = MappingProxyType({"fp32": "float32", "bf16": "bfloat16"})
"""Of dtypes, ours and theirs."""
_HEADROOM = 1.2
"""Memory that has to be there, as a multiple of what both models take."""

_NOT_RUN = "logits: NOT compared: the code released with these models is not run, and without QK-norm transformers has no class for them"
_AS_OTHER = "logits: of a qwen3_5_text model of the same tensors, made in memory: the code released with these models is not run"


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
            how = "each model whole" if self.how == "whole" else "each read block by block"
            lines.append(f"logits: {_of(self.logits)} ({how}, fp32)")
            lines += _rounding(self.logits)
        if self.greedy is not None:
            lines.append(f"greedy continuation with cache: {self.greedy_tokens} tokens, {_of(self.greedy)}")
            lines += _rounding(self.greedy)
        elif self.how == "streamed":
            lines.append("greedy continuation: not made, each token would read the whole model from the disk")
        return [*lines, *self.notes, *(f"WRONG: {flaw}" for flaw in self.flaws)]


def verify_export(
    checkpoint: Path, folder: Path, *, dtype: str | None = None, max_positions: int | None = None, memory: int | None = None
) -> Verification:
    """Compare an export with the checkpoint that it was made of.

    Args:
        checkpoint: A run, its folder of checkpoints, or one step.
        folder: The export.
        dtype: That was asked for, `fp32` or `bf16`; None for what its `config.json` says.
        max_positions: That were asked for; None for the run's sequence length.
        memory: Bytes that both models may take together; None for what is available.

    Raises:
        CheckpointError: There is no such checkpoint, or its index is damaged. What is wrong with the export is told in the result.
    """
    with Checkpoint.open(checkpoint) as opened:
        run = run_of(opened)
        model = run.model
        try:
            config = read_json(folder / CONFIG)
            target, kind = target_of(folder / CONFIG, config.get("model_type")), dtype or _dtype(folder, config)
            if unheld := reasons(model, target):
                raise CheckpointError(f"{folder}: config.json has model_type {target}, which cannot hold the model: {unheld[0]}")
            tensors, keep_padding = FolderTensors(folder), config.get("vocab_size") == model.padded_vocab_size
            use = Use(max_positions or run.train.seq_len, _NAMES[kind], keep_padding=keep_padding)
            rows = mapping(model, target, keep_padding=keep_padding)
            told = tuple(export_flaws(folder, config, model, target, use))
            compared = compare_export(rows, opened, tensors, dtype=getattr(torch, _NAMES[kind]))
        except MegagateError as error:
            return Verification("tensors", 0, flaws=(str(error),))
    case = Case(folder, model, target, tensors, Rebuilt(model, rows, tensors), config=config)
    return _with_models(case, replace(compared, flaws=(*told, *compared.flaws)), memory=memory)


def verify_adopted(source: Path, checkpoint: Path, *, memory: int | None = None) -> Verification:
    """Compare a checkpoint with the folder that it was adopted from.

    Of models that were released with code of their own, which is not run, logits are compared with those of another class that holds
    them; where none does (without QK-norm), tensors alone are.

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
            tensors, target, config = FolderTensors(source, opened.weights), opened.described.source, read_json(source / CONFIG)
            compared = compare_adopted(opened.rows, saved, tensors, left_out=opened.left_out)
        except MegagateError as error:
            return Verification("tensors", 0, flaws=(str(error),))
    weights, left_out = Rebuilt(model, opened.rows, tensors), frozenset(opened.left_out)
    if target != "gated_attention":
        case = Case(source, model, target, tensors, weights, left_out, config=config, experts="eager")
        return _with_models(case, compared, memory=memory)
    other = "qwen3_5_text"
    if reasons(model, other):
        return Verification("tensors", compared.tensors, flaws=compared.flaws, notes=(_NOT_RUN,))
    use = Use(max(1, opened.described.max_positions), keep_padding=opened.described.keep_padding)
    case = Case(source, model, other, Regrouped(model, tensors), weights, left_out, config=hf_config(model, other, use))
    # Block by block whatever the memory: nothing of that class lies in files that transformers could load whole.
    return replace(_with_models(case, compared, memory=0), notes=(_AS_OTHER,))


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


def _dtype(folder: Path, config: dict[str, Any]) -> str:
    """In which an export's weights were used, in our words."""
    found = config.get("dtype", config.get("torch_dtype", "float32"))
    kind = next((ours for ours, theirs in _NAMES.items() if theirs == found), None)
    if kind is None:
        raise CheckpointError(f"{folder}: config.json has dtype {found}, an export has float32 or bfloat16; write the folder again")
    return kind


def _of(found: Agreement) -> str:
    text = f"largest error {found.max_error:.2e} of {found.tolerance:.0e} allowed, at {found.positions} positions"
    return f"{text} ({found.left_out} behind near-ties of routers left out)" if found.left_out else text


def _rounding(found: Agreement) -> Iterator[str]:
    """What was passed though it is beyond the tolerance, said aloud."""
    if found.rounding is not None:
        yield (
            f"beyond {found.tolerance:.0e}, and passed as rounding of fp32: {found.rounding.positions} positions, at which theirs is up to "
            f"{found.rounding.theirs:.2e} from our model in fp64, and our own fp32 up to {found.rounding.ours:.2e} (largest logit "
            f"{found.largest:.3g})"
        )
