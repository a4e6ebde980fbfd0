"""Which Hugging Face class holds a model exactly, and which version of transformers has it.

What no class takes goes out as remote code.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Literal, get_args

import torch

from megagate.checkpoint.hf.ops import Op, QueryAndGate, Zeros
from megagate.checkpoint.hf.table import NO_SHARED_EXPERT, Target, mapping
from megagate.config.model import GateConfig, ModelConfig
from megagate.errors import ConfigError

REMOTE: Target = "remote-code"
Format = Literal["auto", "stock", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "lfm3", "afmoe", "remote-code"]
"""What a user may ask for: a target, the preferred one (`auto`), or the preferred one that is not remote code (`stock`)."""

TRANSFORMERS: Mapping[Target, str] = MappingProxyType(
    {
        "qwen3": "4.51.0",
        "qwen3_moe": "4.51.0",
        "qwen3_next": "5.15.0",
        "qwen3_5_text": "5.15.0",
        "lfm3": "5.23.0",
        "afmoe": "5.0.0",
        "remote-code": "4.53.0",
    }
)
"""The first version of transformers that runs what is exported: fp32 logits to 1e-5, and generation with a cache.

Exports of several models of each class were run with 4.51.0, 4.57.6, 5.0.0, 5.14.0, 5.15.0, 5.22.2 and 5.23.0 where it has the class, and
with none between. Caches of versions before 5.15.0 (tried: 5.2.0, 5.14.0) refuse qwen3_next and qwen3_5_text where all layers are of full
attention: 5.14.0 computes their logits, and cannot generate. 5.22.2 has no lfm3, and 4.57.6 no afmoe.
Remote code was run with 4.53.0, 4.53.3, 4.57.6 and 5.23.0; 4.51.0 has no `masking_utils`, which it needs.
"""


def choose(model: ModelConfig) -> Target:
    """The target that is preferred for a model: of the stock classes that hold it the first by the order of `Target`, else remote code."""
    return next(target for target in get_args(Target) if not reasons(model, target))


def reasons(model: ModelConfig, target: Target) -> list[str]:
    """Why `target` cannot hold a model, each as `key (value): what the class has instead`; empty if it can."""
    return [] if target == REMOTE else [*_of_any_stock_class(model), *_RULES[target](model)]


def select(model: ModelConfig, wanted: str, *, installed: str | None) -> Target:
    """The target that `--format` asks for.

    Args:
        model: The model.
        wanted: A `Format`.
        installed: The version of transformers here; None for none, and then no class is too new.

    Raises:
        ConfigError: There is no such format, it cannot hold the model, or the class is newer than the installed transformers.
    """
    if wanted not in get_args(Format):
        raise ConfigError(f"--format ({wanted}) must be one of {', '.join(get_args(Format))}; choose one, or leave it out")
    target: Target = choose(model) if wanted in ("auto", "stock") else wanted  # type: ignore[assignment]
    if wanted == "stock" and target == REMOTE:
        raise ConfigError(f"--format (stock): {_why_none(model)}; use --format {REMOTE}, which brings the class along")
    if found := reasons(model, target):
        raise ConfigError(f"--format ({target}) is not for this model: {'; '.join(found)}; use --format {choose(model)}, which can")
    if installed is not None and _parts(installed) < _parts(TRANSFORMERS[target]):
        raise ConfigError(
            f"--format ({wanted}): the class {target} needs transformers {TRANSFORMERS[target]} or newer, {installed} is installed; "
            f"upgrade it, or use --format {REMOTE}, which runs with transformers {TRANSFORMERS[REMOTE]} or newer"
        )
    return target


def explain(model: ModelConfig, target: Target) -> str:
    """Why a target was taken, and what it needs, in words."""
    needs = f"transformers {TRANSFORMERS[target]} or newer"
    if target != REMOTE:
        return f"the class {target}, which holds the model exactly; {needs}"
    why = _why_none(model) if choose(model) == REMOTE else f"asked for, though {choose(model)} holds the model too"
    return f"{REMOTE}, which is loaded with trust_remote_code=True ({why}); {needs}"


def remarks(model: ModelConfig, target: Target) -> list[str]:
    """What an export has that the model has not, and who misreads it: a line each."""
    found = []
    rows = [row for row in mapping(model, target) if isinstance(row.op, QueryAndGate | Zeros)]
    ours = sum(torch.Size(region.box.shape).numel() for row in rows for region in row.native)
    theirs = sum(torch.Size(shape).numel() for row in rows for shape in row.shapes().values())
    if parts := list(_stand_ins(model, [row.op for row in rows])):
        words = " and ".join(parts)
        found.append(f"what the class has and the model has not is made up for, exactly: by {words}; {theirs - ours:,} parameters more")
    if target == "qwen3_next" and model.moe.first_dense_layers:
        found.append("SGLang takes every layer of this class for a mixture, and does not read mlp_only_layers: do not serve this with it")
    return found


def _stand_ins(model: ModelConfig, ops: Iterable[Op]) -> Iterator[str]:
    gates = {op.rows for op in ops if isinstance(op, QueryAndGate)}
    shared = {len(op.shapes) for op in ops if isinstance(op, Zeros)}
    if 0 in gates:
        yield "gates of zeros, whose scores are 1/2, before output projections that are doubled"
    if gates - {0, model.attention.head_dim}:
        yield f"each head's gate row {model.attention.head_dim} times"
    if 1 in shared:
        yield "gates of zeros of shared experts that are doubled"
    if shared - {1}:
        yield f"shared experts of zeros, {NO_SHARED_EXPERT} wide"


def _why_none(model: ModelConfig) -> str:
    nearest = min((target for target in get_args(Target) if target != REMOTE), key=lambda target: len(reasons(model, target)))
    return f"no class of transformers holds this model; the nearest, {nearest}, does not because of {'; '.join(reasons(model, nearest))}"


def installed_transformers() -> str | None:
    """The version of transformers here, None where there is none; nothing is imported."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _of_any_stock_class(model: ModelConfig) -> Iterator[str]:
    attention, gate = model.attention, model.attention.gate
    if attention.switch.projections != "none":
        yield f"model.attention.switch.projections ({attention.switch.projections}): no class has switch heads"
    if not attention.qk_norm:
        yield "model.attention.qk_norm (false): the class always norms queries and keys"
    if model.residual_clip:
        yield f"model.residual_clip ({model.residual_clip}): no class clips"
    if gate.position == "none":
        return
    known = GateConfig("G1", gate.granularity)
    for field in ("position", "score", "activation", "combine", "head_shared"):
        value = getattr(gate, field)
        if value != getattr(known, field):
            yield f"model.attention.gate.{field} ({str(value).lower() if isinstance(value, bool) else value}): {_ONLY}"


_ONLY = "classes only multiply the attention output (G1) by the sigmoid of scores of the input, each head by its own"


def _dense(model: ModelConfig) -> Iterator[str]:
    if model.is_moe:
        yield f"model.moe.num_experts ({model.moe.num_experts}): the class is dense"


def _mixture(model: ModelConfig) -> Iterator[str]:
    moe = model.moe
    if not model.is_moe:
        yield "model.moe.num_experts (0): the class is of mixtures"
        return
    if moe.score != "softmax":
        yield f"model.moe.score ({moe.score}): the class's router is a softmax"
    if moe.bias_update_rate:
        yield f"model.moe.bias_update_rate ({moe.bias_update_rate}): the class's router has no bias"


def _no_gate(model: ModelConfig) -> Iterator[str]:
    if model.attention.gate.position != "none":
        yield f"model.attention.gate.position ({model.attention.gate.position}): the class has no gate"


def _no_sandwich(model: ModelConfig) -> Iterator[str]:
    if model.sandwich_norm:
        yield "model.sandwich_norm (true): the class has no norms behind attention and feed-forward"


def _qwen3(model: ModelConfig) -> Iterator[str]:
    yield from _dense(model)
    yield from _no_gate(model)
    yield from _no_sandwich(model)


def _qwen3_moe(model: ModelConfig) -> Iterator[str]:
    yield from _mixture(model)
    yield from _no_gate(model)
    yield from _no_sandwich(model)
    if model.moe.shared_ffn_size:
        yield f"model.moe.shared_ffn_size ({model.moe.shared_ffn_size}): the class has no shared expert"


def _qwen3_next(model: ModelConfig) -> Iterator[str]:
    if model.is_moe:
        yield from _mixture(model)
    else:
        yield "model.moe.num_experts (0): the class could hold a dense model, but that is not offered: vLLM refuses it without a mixture"
    yield from _no_sandwich(model)


def _qwen3_5_text(model: ModelConfig) -> Iterator[str]:
    yield from _dense(model)
    yield from _no_sandwich(model)


def _lfm3(model: ModelConfig) -> Iterator[str]:
    yield from _dense(model)
    gate = model.attention.gate
    if gate.position != "none" and gate.granularity != "headwise":
        yield f"model.attention.gate.granularity ({gate.granularity}): the class's gate has one score per head"


def _afmoe(model: ModelConfig) -> Iterator[str]:
    if model.is_moe:
        yield f"model.moe.num_experts ({model.moe.num_experts}): the class's router is a sigmoid with a scale and shared experts"
    if not model.sandwich_norm:
        yield "model.sandwich_norm (false): the class always has norms behind attention and feed-forward"
    gate = model.attention.gate
    if gate.position == "none":
        yield "model.attention.gate.position (none): the class always gates"
    elif gate.granularity != "elementwise":
        yield f"model.attention.gate.granularity ({gate.granularity}): the class's gate has one score per channel"


_RULES: Mapping[Target, Callable[[ModelConfig], Iterator[str]]] = MappingProxyType(
    {
        "qwen3": _qwen3,
        "qwen3_moe": _qwen3_moe,
        "qwen3_next": _qwen3_next,
        "qwen3_5_text": _qwen3_5_text,
        "lfm3": _lfm3,
        "afmoe": _afmoe,
    }
)
