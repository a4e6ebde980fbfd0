"""The rules between a config's values, and between them and the number of ranks.

Every rule yields the messages of its violations, so that a user sees all of them at once, before any process group exists.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megagate.config.blend_text import parse_blend, parse_valid
from megagate.config.hardware import Hardware, hardware_rules
from megagate.config.keys import differences, flatten
from megagate.config.model import ModelConfig
from megagate.config.model_rules import divisible, model_rules
from megagate.config.precision_rules import precision_rules
from megagate.config.run import RunConfig
from megagate.errors import ConfigError

SAME_RUN_KEYS = (
    "train.output_dir",
    "train.resume",
    "train.micro_batch_size",
    "train.recompute",
    "optim.implementation",
    "parallel.",
    "precision.norm",
    "data.valid",
    "data.cache_dir",
    "checkpoint.",
    "eval.",
    "log.",
    "observe.",
    "wandb.",
    "profile.",
)
"""Keys (those with a last dot: whole groups) that may change when a run is resumed: where and by whose kernels the work is done, which is
seen in the last bits alone, and what is written down of it. Every other key decides which numbers the run computes, so that a change makes
it another run."""

BASE_HINT = "give a base config first, e.g. --config examples/configs/tiny.yaml, or set {key}"


@dataclass(frozen=True)
class Range:
    """The values that a number may take.

    Args:
        low: The smallest value.
        high: The largest value; None for no limit.
        open_low: `low` itself is excluded.
        open_high: `high` itself is excluded.
    """

    low: float
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def violation(self, key: str, value: float) -> str | None:
        """The message about a value outside, or None."""
        if not math.isfinite(value):
            return f"{key} ({value}) must be a finite number; change {key}"
        if value < self.low or (self.open_low and value == self.low):
            return f"{key} ({value}) must be {'more than' if self.open_low else 'at least'} {self.low:g}; raise {key}"
        if self.high is not None and (value > self.high or (self.open_high and value == self.high)):
            return f"{key} ({value}) must be {'less than' if self.open_high else 'at most'} {self.high:g}; lower {key}"
        return None


_AT_LEAST_0, _AT_LEAST_1 = Range(0), Range(1)
_POSITIVE = Range(0, open_low=True)
_DECAY = Range(0, 1, open_high=True)

RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "model.ffn_size": _AT_LEAST_0,
        "model.norm_eps": _POSITIVE,
        "model.init_std": _POSITIVE,
        "model.attention.gate.constant": _POSITIVE,
        "model.attention.switch.num_experts": _AT_LEAST_1,
        "model.attention.switch.top_k": _AT_LEAST_1,
        "model.attention.rope.base": Range(1, open_low=True),
        "model.residual_clip": _AT_LEAST_0,
        "model.moe.num_experts": _AT_LEAST_0,
        "model.moe.top_k": _AT_LEAST_1,
        "model.moe.ffn_size": _AT_LEAST_0,
        "model.moe.first_dense_layers": _AT_LEAST_0,
        "model.moe.shared_ffn_size": _AT_LEAST_0,
        "model.moe.bias_update_rate": _AT_LEAST_0,
        "model.moe.balance_coef": _AT_LEAST_0,
        "model.moe.z_loss_coef": _AT_LEAST_0,
        "train.steps": _AT_LEAST_1,
        "train.global_batch_size": _AT_LEAST_1,
        "train.micro_batch_size": _AT_LEAST_0,
        "train.seq_len": _AT_LEAST_1,
        "train.seed": _AT_LEAST_0,
        "optim.lr": _POSITIVE,
        "optim.beta1": _DECAY,
        "optim.beta2": _DECAY,
        "optim.eps": _POSITIVE,
        "optim.weight_decay": _AT_LEAST_0,
        "optim.grad_clip": _AT_LEAST_0,
        "schedule.warmup_steps": _AT_LEAST_0,
        "schedule.decay_steps": _AT_LEAST_0,
        "schedule.min_lr": _AT_LEAST_0,
        "precision.fp8.amax_history": Range(1, 65536),  # read whole each micro-step, 256 KB for each of the model's scales
        "parallel.tp": _AT_LEAST_1,
        "parallel.ep": _AT_LEAST_1,
        "checkpoint.every": _AT_LEAST_0,
        "checkpoint.keep": _AT_LEAST_0,
        "eval.every": _AT_LEAST_0,
        "eval.batches": _AT_LEAST_1,
        "eval.min_gain_nats": _AT_LEAST_0,
        "eval.sample_tokens": _AT_LEAST_0,
        "log.every": _AT_LEAST_1,
        "observe.every": _AT_LEAST_0,
        "observe.queries": _AT_LEAST_0,
        "profile.start_step": _AT_LEAST_1,
        "profile.steps": _AT_LEAST_0,
    }
)
"""The range of every number but the model's sizes and `parallel.zero_stage`, which have rules of their own."""

_SIZE_KEYS = (
    "model.vocab_size",
    "model.hidden_size",
    "model.num_layers",
    "model.attention.num_heads",
    "model.attention.num_kv_heads",
    "model.attention.head_dim",
)
"""The sizes that every model needs. They have no usable default, so a missing base config shows here."""

_TEXT_KEYS = ("train.output_dir", "train.resume", "data.path")


def check(config: RunConfig, *, world_size: int, hardware: Hardware | None = None) -> None:
    """Refuses a config that cannot run on `world_size` ranks.

    Args:
        config: The run.
        world_size: Number of ranks.
        hardware: Of this rank; None where it is not known, or the run is elsewhere.

    Raises:
        ConfigError: With one line for each violated rule.
    """
    values = flatten(config)
    violations = [
        *_range_rules(values),
        *_size_rules(config.model),
        *model_rules(config.model),
        *_data_rules(config),
        *_schedule_rules(config),
        *_optimizer_rules(config),
        *_zero_rules(config),
        *_kernel_rules(config),
        *precision_rules(config),
        *(hardware_rules(config, hardware) if hardware is not None else ()),
        *_sharding_rules(config),
        *_world_rules(config, world_size),
    ]
    if violations:
        raise ConfigError("\n".join(violations))


def changed_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """What makes `new` another run than `old`, as (dotted key, old value, new value); empty where `new` may resume `old`."""
    return [change for change in differences(old, new) if not change[0].startswith(SAME_RUN_KEYS)]


def _range_rules(values: Mapping[str, Any]) -> Iterator[str]:
    for key, allowed in RANGES.items():
        violation = allowed.violation(key, values[key])
        if violation is not None:
            yield violation
    for key in _TEXT_KEYS:
        if not values[key]:
            yield f"{key} ('') must not be empty; set {key} or leave it out"


def _size_rules(model: ModelConfig) -> Iterator[str]:
    values = flatten(RunConfig(model=model))
    needed = dict.fromkeys(_SIZE_KEYS, "")
    if model.is_moe:
        needed["model.moe.ffn_size"] = " for a mixture of experts"
        if model.moe.first_dense_layers > 0:
            needed["model.ffn_size"] = f" for the dense layers of a mixture (model.moe.first_dense_layers {model.moe.first_dense_layers})"
    else:
        needed["model.ffn_size"] = " for a dense model (model.moe.num_experts is 0)"
    for key, what_for in needed.items():
        # A negative width of an FFN has been reported by its range.
        if values[key] == 0 or (values[key] < 0 and key not in RANGES):
            yield f"{key} ({values[key]}) must be at least 1{what_for}; {BASE_HINT.format(key=key)}"


def _schedule_rules(config: RunConfig) -> Iterator[str]:
    schedule, steps = config.schedule, config.train.steps
    if schedule.warmup_steps > steps:
        yield f"schedule.warmup_steps ({schedule.warmup_steps}) must be at most train.steps ({steps}); lower schedule.warmup_steps"
    if schedule.min_lr > config.optim.lr:
        yield f"schedule.min_lr ({schedule.min_lr}) must be at most optim.lr ({config.optim.lr}); lower schedule.min_lr"
    if schedule.kind != "wsd":
        return
    room = max(steps - schedule.warmup_steps, 0)
    if schedule.decay_steps == 0:
        yield (
            "schedule.decay_steps (0) must be at least 1 where schedule.kind is wsd; set schedule.decay_steps, "
            "or schedule.kind to constant"
        )
    elif schedule.decay_steps > room:
        yield (
            f"schedule.decay_steps ({schedule.decay_steps}) must be at most train.steps - schedule.warmup_steps ({room}); "
            "lower schedule.decay_steps"
        )


def _optimizer_rules(config: RunConfig) -> Iterator[str]:
    name, implementation = config.optim.name, config.optim.implementation
    if name != "adamw" and implementation != "torch":
        yield (
            f"optim.implementation ({implementation}) must be torch where optim.name is {name}: the others are for adamw; "
            "set optim.implementation to torch"
        )


def _data_rules(config: RunConfig) -> Iterator[str]:
    """What the texts of data sets and their weights violate; whether the data sets are there is seen when they are opened."""
    for parse, text in ((parse_blend, config.data.path), (parse_valid, config.data.valid)):
        try:
            parse(text)
        except ConfigError as error:
            yield str(error)


def _zero_rules(config: RunConfig) -> Iterator[str]:
    stage = config.parallel.zero_stage
    if stage not in (0, 1, 2, 3):
        yield f"parallel.zero_stage ({stage}) must be 0, 1, 2 or 3: there is no such stage; set parallel.zero_stage to 1"
    if stage == 0 and config.model.is_moe:
        yield (
            "parallel.zero_stage (0) must be at least 1 for a mixture of experts: DeepSpeed's stage 0 sums expert gradients over the wrong "
            "ranks; set parallel.zero_stage to 1"
        )
    if stage == 0 and config.precision.dtype == "bf16":
        yield (
            "parallel.zero_stage (0) must be at least 1 where precision.dtype is bf16: DeepSpeed's stage 0 keeps no fp32 masters with fp32 "
            "gradient sums; set parallel.zero_stage to 1 or precision.dtype to fp32"
        )


def _kernel_rules(config: RunConfig) -> Iterator[str]:
    """What the kernel of the experts asks of sizes: rows of whole 16 bytes. `auto` may become bf16 on a GPU, and is checked again then."""
    if not config.model.is_moe:
        return
    dtype = "bf16" if config.precision.dtype == "bf16" else "fp32"
    multiple = {"bf16": 8, "fp32": 4}[dtype]
    for key, size in (("model.hidden_size", config.model.hidden_size), ("model.moe.ffn_size", config.model.moe.ffn_size)):
        if size > 0 and size % multiple:
            yield (
                f"{key} ({size}) must be a multiple of {multiple} for a mixture in {dtype}: PyTorch's grouped matrix product takes rows of "
                f"whole 16 bytes; change {key}"
            )


def _sharding_rules(config: RunConfig) -> Iterator[str]:
    """What tp and ep must divide in the model."""
    model, tp, ep = config.model, config.parallel.tp, config.parallel.ep
    split = {
        "model.attention.num_heads": model.attention.num_heads,
        "train.seq_len": config.train.seq_len,
        f"model.vocab_size {model.vocab_size} padded": model.padded_vocab_size,
    }
    if model.is_moe:
        split["model.moe.shared_ffn_size"] = model.moe.shared_ffn_size
    if not model.is_moe or model.moe.first_dense_layers > 0:
        split["model.ffn_size"] = model.ffn_size
    for key, size in split.items():
        name = key.split()[0].rpartition(".")[2]
        yield from divisible(key, size, "parallel.tp", tp, remedy=f"lower parallel.tp or change {name}")
    kv_heads = model.attention.num_kv_heads
    if min(tp, kv_heads) > 0 and kv_heads % tp and tp % kv_heads:
        yield (
            f"model.attention.num_kv_heads ({kv_heads}) must divide parallel.tp ({tp}) or be divisible by it; "
            "change parallel.tp or num_kv_heads"
        )
    if model.is_moe:
        remedy = "lower parallel.ep or change num_experts"
        yield from divisible("model.moe.num_experts", model.moe.num_experts, "parallel.ep", ep, remedy=remedy)
    elif ep > 1:
        yield f"parallel.ep ({ep}) must be 1 for a dense model (model.moe.num_experts is 0); set parallel.ep to 1"
    if min(tp, ep) > 0 and tp % ep and ep % tp:
        yield f"parallel.tp ({tp}) must divide parallel.ep ({ep}) or be divisible by it; change one of them"


def _world_rules(config: RunConfig, world_size: int) -> Iterator[str]:
    """What the number of ranks and the batch must be divisible by."""
    tp, ep = config.parallel.tp, config.parallel.ep
    for key, size in (("parallel.tp", tp), ("parallel.ep", ep)):
        if size > 0 and world_size % size:
            remedies = [*_other_worlds(config, world_size), f"change {key}"]
            yield f"the number of ranks ({world_size}) must be divisible by {key} ({size}); {' or '.join(remedies)}"
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    if min(tp, batch) < 1 or micro < 0 or world_size % tp:
        return
    dp, least = world_size // tp, max(1, micro)
    if batch % (least * dp):
        factor, change = (f"train.micro_batch_size ({micro}) x ", ["change train.micro_batch_size"]) if micro else ("", [])
        remedies = [f"use a multiple of {least * dp}", *_other_worlds(config, world_size), *change]
        yield (
            f"train.global_batch_size ({batch}) must be divisible by {factor}data-parallel ranks "
            f"({world_size} ranks / parallel.tp {tp} = {dp}); {' or '.join(remedies)}"
        )


def _other_worlds(config: RunConfig, world_size: int) -> Iterator[str]:
    """The remedy of another number of ranks: the nearest ones below and above that fit layout and batch, where there are any."""
    tp, ep = config.parallel.tp, config.parallel.ep
    micro, batch = max(1, config.train.micro_batch_size), config.train.global_batch_size
    if min(tp, ep, batch) < 1:
        return
    unit = math.lcm(tp, ep)
    worlds = [world for world in range(unit, max(2 * world_size, unit) + 1, unit) if batch % (micro * (world // tp)) == 0]
    below = [world for world in worlds if world < world_size][-1:]
    above = [world for world in worlds if world > world_size][:1]
    if below + above:
        ranks = " or ".join(str(world) for world in below + above)
        yield f"start {ranks} ranks"
