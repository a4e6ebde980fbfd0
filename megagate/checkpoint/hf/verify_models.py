"""A folder's model as transformers loads it, and the same tensors in our own model: logits, and a greedy continuation with cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megagate.backend.native import NativeBackend
from megagate.checkpoint.hf.hf_config import REMOTE_MODEL_TYPE
from megagate.checkpoint.hf.table import NAMES, Target
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt, without_place
from megagate.checkpoint.hf.verify_logits import LENGTH, NEW_TOKENS, PROMPT, SEQUENCES, Agreement, agreement, fixed_tokens
from megagate.checkpoint.hf.verify_room import classes_of, clean_room
from megagate.checkpoint.hf.verify_stream import give_buffers, streamed_ours, streamed_theirs, wide_logits
from megagate.config.model import ModelConfig
from megagate.errors import CheckpointError, MegagateError
from megagate.model.lm import LanguageModel
from megagate.nn.routes import watched_gaps
from megagate.parallel.mesh import ParallelMesh

_PART_TOLERANCE = 1e-4
"""Of an attention's or feed-forward's output, as a share of its largest number: beyond it the part is named as the first that differs."""


@dataclass(frozen=True)
class Outcome:
    """What the models did.

    Args:
        logits: On the fixed tokens; None where no model could be loaded.
        greedy: Of the logits in a cached continuation.
        greedy_tokens: How many tokens were continued.
        flaws: What is wrong.
    """

    logits: Agreement | None
    greedy: Agreement | None
    greedy_tokens: int
    flaws: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """What is compared.

    Args:
        folder: Of Hugging Face's kind.
        model: Its model in our words.
        target: Its class.
        tensors: Its tensors.
        weights: What they are in our model.
        left_out: Of the tensors, those that say nothing more.
        config: The content of its `config.json`, as it was checked.
        experts: How transformers runs experts: None for its default, which users of an export run. Where their model only serves to
            check ours, `eager` is sturdier: it has no kernels, so no rules of sizes.
    """

    folder: Path
    model: ModelConfig
    target: Target
    tensors: FolderTensors
    weights: Rebuilt
    left_out: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    experts: str | None = None

    @property
    def remote(self) -> bool:
        """Whether the class comes along in the folder."""
        return self.target == "remote-code"

    @property
    def bytes_whole(self) -> int:
        """Memory of both models in fp32, and of what their passes need."""
        return 4 * (2 * self.tensors.elements + 4 * SEQUENCES * LENGTH * self.model.padded_vocab_size)


@torch.no_grad()
def compare_whole(case: Case) -> Outcome:
    """Both models in memory.

    Raises:
        CheckpointError: Transformers cannot load theirs, or run it; or its tensors cannot be ours.
    """
    with _quiet(), clean_room(case.folder, case.config, case.tensors.files) as room:
        flaws = config_flaws(_config(case, room), case.model)
        with _running_theirs(case, flaws):
            theirs, said = _load(case, room)
        if said:
            return Outcome(None, None, 0, (*said, *flaws))
        ours = _ours(case.model)
        ours.load_state_dict(case.weights.under(""), assign=True)
        logits, found = _compare_logits(case, ours, theirs, flaws)
        greedy, count = compare_greedy(case, ours, theirs, flaws)
    if greedy.flaw and logits.flaw is None:
        found.append(f"in a greedy continuation with cache {greedy.flaw}")
    return Outcome(logits, greedy, count, (*flaws, *found))


@torch.no_grad()
def compare_streamed(case: Case) -> Outcome:
    """One part of one model in memory at a time.

    Raises:
        CheckpointError: As `compare_whole`.
    """
    with _quiet(), clean_room(case.folder, case.config, case.tensors.files) as room:
        config = _config(case, room)
        flaws = config_flaws(config, case.model)
        with _running_theirs(case, flaws):
            theirs = _on_meta(case, config)
            give_buffers(theirs, theirs.config)
        if strange := sorted(set(without_place(case.tensors, theirs.state_dict())) - case.left_out):
            flaws.append(f"{type(theirs).__name__} by config.json has no place for {strange[:3]}, so that no logits were compared")
            return Outcome(None, None, 0, tuple(flaws))
        ours = _ours(case.model)
        tied = case.model.tie_embeddings
        with streamed_ours(ours, case.weights), streamed_theirs(theirs, case.target, case.tensors, tied=tied):
            logits, found = _compare_logits(case, ours, theirs, flaws)
    return Outcome(logits, None, 0, (*flaws, *found))


def config_flaws(config: Any, model: ModelConfig) -> list[str]:
    """Settings of a config, as transformers has read it, that contradict the model: some change too little to show in logits."""
    attention, moe = model.attention, model.moe
    expected = {
        "head_dim": attention.head_dim,
        "rms_norm_eps": model.norm_eps,
        "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    if model.is_moe:
        expected |= {"num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.renormalize}
    flaws = [_contradiction(key, getattr(config, key), value) for key, value in expected.items() if getattr(config, key, value) != value]
    flaws += _attention_flaws(config)
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        settings = {"rope_theta": attention.rope.base, "partial_rotary_factor": 1.0, "rope_type": "default"}
        flaws += [_contradiction(key, rope[key], value) for key, value in settings.items() if rope.get(key, value) != value]
    entry = getattr(config, REMOTE_MODEL_TYPE, None)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), Mapping):
        return flaws  # a damaged one is told where config.json is compared as it stands
    return [*flaws, *model_flaws(entry["model"], model)]


def _attention_flaws(config: Any) -> Iterator[str]:
    """Layers that are not of full attention over all that the model was trained on."""
    kinds = set(getattr(config, "layer_types", None) or ())
    for kind in sorted(kinds - {"full_attention", "sliding_attention"}):
        yield _contradiction("layer_types", kind, "full_attention")
    window, positions = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0)
    if "sliding_attention" in kinds and window is not None and window < positions:
        yield _contradiction("sliding_window", window, f"{positions} positions, max_position_embeddings")


def model_flaws(entry: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """Where a model, as nested settings, is not this one."""
    ours = dict(_leaves(asdict(model)))
    theirs = dict(_leaves(entry))
    return [_contradiction(f"megagate.model.{key}", theirs.get(key), value) for key, value in ours.items() if theirs.get(key) != value]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _ropes(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One, or one for each kind of layers."""
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def _contradiction(key: str, found: object, expected: object) -> str:
    return f"config.json, as transformers reads it, has {key} {found}, and the model {expected}"


def _ours(model: ModelConfig) -> LanguageModel:
    """On the meta device."""
    backend = NativeBackend(torch.device("cpu"))
    return LanguageModel(model, dtype=torch.float32, backend=backend, mesh=ParallelMesh.single()).eval()


def _config(case: Case, room: Path) -> Any:
    """As transformers reads it."""
    with _running_theirs(case, []):
        loader, _ = classes_of(case.target)
        config = loader.from_pretrained(room, local_files_only=True)
        if case.experts is not None and not case.remote:
            config._experts_implementation = case.experts
        return config


def _load(case: Case, room: Path) -> tuple[Any, list[str]]:
    """Their model in fp32, and what its loading complained of."""
    _, loader = classes_of(case.target)
    model, info = loader.from_pretrained(
        room, config=_config(case, room), dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    told = {kind: sorted(map(str, set(found) - case.left_out)) for kind, found in info.items()}
    return model.eval(), [f"transformers, loading it, reports {kind}: {names[:3]}" for kind, names in told.items() if names]


def _on_meta(case: Case, config: Any) -> Any:
    _, loader = classes_of(case.target)
    build = loader._from_config if case.remote else loader.from_config
    with torch.device("meta"):
        return build(config, dtype=torch.float32).eval()


@contextmanager
def _running_theirs(case: Case, flaws: list[str]) -> Iterator[None]:
    """Whatever transformers raises inside is told as one error, with the flaws of the config that may have led to it."""
    try:
        yield
    except MegagateError:
        raise
    except Exception as error:
        import transformers  # noqa: PLC0415  heavy

        reason = " ".join(str(error).split())[:300]
        found = "".join(f"{flaw}; " for flaw in flaws)
        raise CheckpointError(
            f"{found}transformers {transformers.__version__} cannot load and run it as {case.target}, so that no logits were compared: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _compare_logits(case: Case, ours: LanguageModel, theirs: nn.Module, flaws: list[str]) -> tuple[Agreement, list[str]]:
    """On the fixed tokens; where they differ, with the first part that does."""
    tokens = fixed_tokens(case.model.vocab_size)[:, : _window(theirs.config)]
    with watched_gaps(ours) as gaps, _watched(_our_parts(case, ours)) as mine:
        our_logits = ours.logits(tokens)
    with _running_theirs(case, flaws), _watched(_their_parts(case, theirs)) as other:
        their_logits = theirs(input_ids=tokens, use_cache=False).logits.float()
    found = agreement(our_logits, their_logits, gaps, wide=lambda: wide_logits(case.model, case.weights, tokens))
    if found.flaw is None:
        return found, []
    first = next((name for name in mine if _apart(mine[name], other[name])), None)
    agreed = f"each attention and feed-forward agrees to {_PART_TOLERANCE:.0e} of its largest output"
    where = f"the first part whose output differs is {first}" if first else agreed
    return found, [f"{found.flaw}; {where}"]


def _window(config: Any) -> int:
    """Tokens that all layers attend to: a window may be as short as the longest sequence of the training."""
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return (getattr(config, "sliding_window", None) or LENGTH) if slides else LENGTH


def _apart(ours: Tensor, theirs: Tensor) -> bool:
    return not (ours - theirs).abs().max() <= _PART_TOLERANCE * ours.abs().max()


def _our_parts(case: Case, model: LanguageModel) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"embedding": model.embedding}
    for index, block in enumerate(model.layers):
        parts |= {f"layers.{index}.attention": block.attention, f"layers.{index}.ffn": block.moe if block.is_moe else block.ffn}
    return parts


def _their_parts(case: Case, model: nn.Module) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"embedding": model.get_submodule("model.embed_tokens")}
    for index, block in enumerate(model.get_submodule("model.layers")):
        ffn = block.get_submodule(NAMES[case.target].ffn)
        parts |= {f"layers.{index}.attention": block.get_submodule("self_attn"), f"layers.{index}.ffn": ffn}
    return parts


@contextmanager
def _watched(parts: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the parts."""
    outputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, __: object, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [part.register_forward_hook(keeper(name)) for name, part in parts.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def compare_greedy(case: Case, ours: LanguageModel, theirs: Any, flaws: list[str]) -> tuple[Agreement, int]:
    """Their greedy continuation with cache, the logits of each step against ours of the whole text without a cache.

    Where the logits agree, so do the tokens, but for ties within the error.
    """
    from transformers import GenerationConfig  # noqa: PLC0415  heavy

    new = min(NEW_TOKENS, _window(theirs.config) // 2)
    prompt = fixed_tokens(case.model.vocab_size)[:, : min(PROMPT, _window(theirs.config) - new)]
    # No token ends a text here; their own config would stop at the first of them.
    theirs.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    with _running_theirs(case, flaws):
        made = theirs.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True, output_logits=True, return_dict_in_generate=True
        )
    steps = torch.stack(made.logits, dim=1).float()  # [b, new, V]
    text, first = made.sequences[:, :-1], prompt.shape[1] - 1
    with watched_gaps(ours) as gaps:
        logits = ours.logits(text)[:, first:]
    # A route that flips anywhere in the prompt shows at the first step.
    of_steps = [torch.cat([gap[:, : first + 1].amin(1, keepdim=True), gap[:, first + 1 :]], 1) for gap in gaps]
    found = agreement(logits, steps, of_steps, wide=lambda: wide_logits(case.model, case.weights, text)[:, first:])
    return found, made.sequences[:, prompt.shape[1] :].numel()


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers shows no bars and says nothing but errors."""
    from transformers.utils import logging  # noqa: PLC0415  heavy

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
