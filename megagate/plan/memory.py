"""Bytes per GPU of a training run, from the config alone.

What DeepSpeed 0.19.8 keeps under `engine/zero_config.py`, with n a rank's parameters and m its ZeRO shard of them (dense ones over dp,
experts over edp); weights of w bytes (bf16 2, fp32 4), gradients accumulated in a bytes:

| stage | weights | gradients | masters | moments | at most beside the activations | at most at the step |
|---|---|---|---|---|---|---|
| 0 (fp32) | w n | a n | the weights | 8 n | - | a bucket |
| 1, bf16 with fp32 gradients | w n | a n | 4 m | 8 m | - | a bucket |
| 1, a = w | w n | a n | 4 m | 8 m | a bucket, gradients of the shard | 4 m, a group at a time |
| 2 | w n | a m | 4 m | 8 m | a bucket two or three times; a = w: gradients of the shard | a = w: 4 m, a group at a time |
| 3 | w m | a m | 4 m | 8 m | a bucket twice, gathered weights | 4 m, a group at a time |

So stage 1 (`BF16_Optimizer`) does not shard the fp32 gradients: every rank keeps the sums of all its parameters. `tests/plan` compares
weights, gradients, masters and moments with a running engine, small and of four ranks, within 3 % (ZeRO rounds its shards up). The last two
columns are read in DeepSpeed's source and compared with nothing: upper bounds, no measurements. Temporaries of single layers are not
counted: they are smaller than those of the loss.

Under FP8 activations are an upper bound (`fp8.py`).

Experts are taken to get equally many rows. Those of an uneven router may need more than the tenth that `hardware.USABLE` leaves, above all
without recomputation: `Memory.kept_if_twice` tells what a rank needs whose experts get twice their share.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from megagate.config.count import is_replicated, parameters
from megagate.config.model import ModelConfig
from megagate.config.precision_rules import size_multiple
from megagate.config.rules import check
from megagate.config.run import RunConfig
from megagate.errors import ConfigError
from megagate.plan.activations import FP32, Micro, peak
from megagate.plan.fp8 import fp8_copies
from megagate.plan.hardware import USABLE, gpu_bytes, gpu_hardware

LARGEST_BUCKET = 500_000_000
"""Elements of a communication bucket: `engine/zero_config.py`, a floor below."""
GATHERED = 1_050_000_000
"""Elements that stage 3 holds gathered at most: its defaults `max_live_parameters` and `prefetch_bucket_size`."""


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU at the fullest moment.

    Args:
        weights: In the dtype of the model.
        gradients: Sums over micro-steps, in the dtype in which they are accumulated.
        masters: fp32 copies of the weights.
        moments: The optimizer's fp32 state, both moments of Adam.
        buffers: What ZeRO holds while activations are there: buckets, gathered weights.
        step: What ZeRO holds at the optimizer's step, when activations are gone.
        kept: Activations, and the loss's temporaries, when nothing is recomputed.
        recomputed: The same when each block is recomputed.
        kept_if_twice: `kept` of a rank whose experts get twice their share of the rows in every layer; no more than `kept` where each rank
            has all experts, or there are none.
        recomputed_if_twice: `recomputed` of such a rank.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    buffers: int
    step: int
    kept: int
    recomputed: int
    kept_if_twice: int
    recomputed_if_twice: int

    def total(self, *, recompute: bool) -> int:
        """All of it, without what is never there at the same time."""
        states = self.weights + self.gradients + self.masters + self.moments
        return states + max(self.buffers + (self.recomputed if recompute else self.kept), self.step)


class Held(NamedTuple):
    """Elements of a kind of parameters on one rank: n, and m, the rank's ZeRO shard. Fractions of an element count as one."""

    whole: int
    shard: int


def estimate(config: RunConfig, *, world_size: int) -> Memory:
    """The memory of a run whose config has passed `rules.check` for this number of ranks. `precision.dtype` auto counts as bf16."""
    parallel, dp = config.parallel, world_size // config.parallel.tp
    element = FP32 if config.precision.dtype == "fp32" else 2
    accumulated = FP32 if config.precision.grad_dtype == "fp32" else element
    groups = held(config.model, tp=parallel.tp, ep=parallel.ep, world_size=world_size)
    n, m = (sum(group[i] for group in groups) for i in range(2))
    stage = parallel.zero_stage
    buffers, step = _zero_buffers(groups, stage=stage, element=element, accumulated=accumulated)
    moments = {"adamw": 2, "sgd": 0}[config.optim.name]
    by_document = config.data.attention == "document"
    rows = max(Micro.row_multiple, size_multiple(config.precision.fp8))
    micro = Micro(
        config.micro_batch(dp), config.train.seq_len, parallel.tp, parallel.ep, element, row_multiple=rows, documents=by_document
    )
    uneven = replace(micro, share=min(2, parallel.ep))

    def activations(of: Micro, *, recompute: bool) -> int:
        return peak(config.model, of, recompute=recompute) + fp8_copies(config, of, recompute=recompute)

    return Memory(
        weights=element * (m if stage == 3 else n),
        gradients=accumulated * (m if stage >= 2 else n),
        masters=FP32 * m if stage else 0,
        moments=moments * FP32 * (m if stage else n),
        buffers=buffers,
        step=step,
        kept=activations(micro, recompute=False),
        recomputed=activations(micro, recompute=True),
        kept_if_twice=activations(uneven, recompute=False),
        recomputed_if_twice=activations(uneven, recompute=True),
    )


def held(model: ModelConfig, *, tp: int, ep: int, world_size: int) -> tuple[Held, Held]:
    """What one rank holds of dense parameters and of experts."""
    dense = experts = 0
    for parameter in parameters(model, padded=True):
        if parameter.part == "experts":
            experts += parameter.size // ep
        else:
            dense += parameter.size // (1 if is_replicated(model, parameter, tp=tp) else tp)
    return Held(dense, math.ceil(dense * tp / world_size)), Held(experts, math.ceil(experts * ep / world_size))


def _zero_buffers(groups: tuple[Held, Held], *, stage: int, element: int, accumulated: int) -> tuple[int, int]:
    """Bytes beside the activations, and at the step."""
    n, m = (sum(group[i] for group in groups) for i in range(2))
    bucket, same = min(LARGEST_BUCKET, n), accumulated == element
    copied = FP32 * max(group.shard for group in groups)
    if stage == 0 or (stage == 1 and not same):
        return 0, accumulated * bucket
    match stage:
        case 1:
            return element * (bucket + m), copied
        case 2 if same:
            return element * (2 * bucket + m), copied
        case 2:
            return (2 * element + accumulated) * bucket, 0
    return 2 * accumulated * bucket + element * min(n, GATHERED), copied


def check_gpu(config: RunConfig, *, world_size: int, gpu: str, key: str = "--gpu") -> None:
    """Refuses a run that GPUs of a kind cannot do: kernels that they lack, more than 90 % of their memory.

    Args:
        config: The run; `precision.dtype` auto counts as bf16.
        world_size: Number of ranks.
        gpu: A name, or GB.
        key: Where it was given, for messages.

    Raises:
        ConfigError: Or the GPU is unknown, or a rule is violated.
    """
    if config.precision.dtype == "auto":
        config = replace(config, precision=replace(config.precision, dtype="bf16"))
    gpu_bytes(gpu, key=key)
    check(config, world_size=world_size, hardware=gpu_hardware(gpu))
    check_fits(config, estimate(config, world_size=world_size), world_size=world_size, gpu=gpu, key=key)


def check_fits(config: RunConfig, memory: Memory, *, world_size: int, gpu: str, key: str = "--gpu") -> None:
    """Refuses a run that does not fit.

    Raises:
        ConfigError: The GPU is unknown, or more than 90 % of its memory would be needed.
    """
    available = gpu_bytes(gpu, key=key)
    usable = int(USABLE * available)
    needed = memory.total(recompute=config.train.recompute)
    if needed <= usable:
        return
    raise ConfigError(
        f"{key} {gpu} ({available / 1e9:.3g} GB) must hold the run in {USABLE:.0%} of its memory ({usable / 1e9:.1f} GB), and it needs "
        f"{needed / 1e9:.1f} GB per GPU; {_remedy(config, memory, world_size=world_size, usable=usable)}"
    )


def _remedy(config: RunConfig, memory: Memory, *, world_size: int, usable: int) -> str:
    """What makes a run smaller that needs more than `usable` bytes."""
    recompute, recomputed = "set train.recompute to true", memory.total(recompute=True)
    if not config.train.recompute and recomputed <= usable:
        return recompute
    remedy = "spread it over more ranks (parallel.ep, parallel.tp, parallel.zero_stage)"
    if not config.train.recompute and recomputed < memory.total(recompute=False):
        remedy = f"{recompute} and {remedy}"
    if config.micro_batch(world_size // config.parallel.tp) == 1:
        return remedy
    return f"{remedy}, or {'lower train.micro_batch_size' if config.train.micro_batch_size else 'set train.micro_batch_size to 1'}"
