"""A user's run made small enough for a minute's work, with its layout, precision and options."""

import math
from dataclasses import dataclass, replace

from megagate.config.model import VOCAB_MULTIPLE, AttentionConfig, ModelConfig, MoEConfig
from megagate.config.rules import check
from megagate.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig

LAYERS, EXPERTS, TOP_K, SWITCH_EXPERTS = 2, 8, 3, 3
"""What a shrunken model has at most, where the layout allows it."""
CLIP, LR = 0.1, 0.1
RESIDUAL_CLIP = 0.05
"""Of what a small model's blocks yield: some of it is clipped, most is not."""


@dataclass(frozen=True)
class Sizes:
    """Of a shrunken model, at most, where the layout allows it.

    Args:
        hidden: Width of the residual stream.
        head_dim: Of attention heads.
        width: Of feed-forwards, each expert's and each tp rank's.
        sequence: Tokens.
        exact: Not smaller where the user's are: what a rank multiplies is then of these sizes, or multiples.
        kept: Layers on top, where some are kept out of what is looked at.
    """

    hidden: int = 64
    head_dim: int = 8
    width: int = 32
    sequence: int = 8
    exact: bool = False
    kept: int = 0


FOR_LAYOUTS = Sizes()
FOR_FP8 = Sizes(hidden=256, head_dim=32, width=128, sequence=128, exact=True)
"""FP8's products need multiples of 16 and 32 on each rank; scales of blocks need more than one block of 128."""


def fit_layout(config: RunConfig, *, world_size: int) -> RunConfig:
    """The same run where its layout fits the ranks, else with tp and ep lowered to their largest divisors that do.

    Raises:
        ConfigError: The layout cannot exist on any number of ranks.
    """
    tp, ep = config.parallel.tp, config.parallel.ep
    if math.lcm(tp, ep) <= world_size:
        return config
    check(config, world_size=math.lcm(tp, ep))
    tp = max(_divisors(tp, world_size))
    ep = max(d for d in _divisors(ep, world_size) if d % tp == 0 or tp % d == 0)
    return replace(config, parallel=replace(config.parallel, tp=tp, ep=ep))


def shrink(config: RunConfig, *, world_size: int, sizes: Sizes = FOR_LAYOUTS) -> RunConfig:
    """A small run with the same layout, precision, options and kinds of layers, trained by SGD with active clipping.

    Args:
        config: A run that `world_size` ranks can do.
        world_size: Number of ranks.
        sizes: How small.
    """
    tp = config.parallel.tp
    dp = world_size // tp
    accumulation = min(2, config.train.global_batch_size // (config.micro_batch(dp) * dp))
    micro_batch = 1 if dp > 2 else 2
    train = TrainConfig(
        global_batch_size=accumulation * micro_batch * dp,
        micro_batch_size=micro_batch,
        seq_len=_multiple(tp, sizes.sequence),
        recompute=config.train.recompute,
    )
    # Adam would hide errors of scale, and decay be most of an update; clipping is active where the run clips at all.
    optim = OptimConfig(name="sgd", lr=LR, weight_decay=0.0, grad_clip=CLIP if config.optim.grad_clip else 0.0)
    model = _model(config.model, sizes, tp=tp, ep=config.parallel.ep)
    data = DataConfig(attention=config.data.attention)
    return replace(RunConfig(), model=model, train=train, data=data, optim=optim, parallel=config.parallel, precision=config.precision)


def _model(model: ModelConfig, sizes: Sizes, *, tp: int, ep: int) -> ModelConfig:
    padded = math.lcm(2 * VOCAB_MULTIPLE, tp)
    return replace(
        model,
        vocab_size=padded if model.vocab_size % VOCAB_MULTIPLE == 0 else padded - 6,
        hidden_size=sizes.hidden,
        num_layers=min(model.num_layers, LAYERS + sizes.kept),
        ffn_size=_ffn(sizes, tp=tp) if model.ffn_size else 0,
        residual_clip=RESIDUAL_CLIP if model.residual_clip else 0.0,
        attention=_attention(model.attention, sizes, tp=tp),
        moe=_moe(model.moe, sizes, tp=tp, ep=ep) if model.is_moe else model.moe,
    )


def _attention(attention: AttentionConfig, sizes: Sizes, *, tp: int) -> AttentionConfig:
    """Fewer heads; key/value heads are cut or replicated over tp as they were."""
    kv_heads = attention.num_kv_heads
    per_kv_head = attention.num_heads // kv_heads
    if kv_heads >= tp:
        kv_heads = tp if tp > 1 else min(kv_heads, 2)
    heads = math.lcm(tp, kv_heads * min(per_kv_head, 2))
    switch = attention.switch
    experts = min(switch.num_experts, SWITCH_EXPERTS)
    few = replace(switch, num_experts=experts, top_k=experts if switch.top_k == switch.num_experts else min(switch.top_k, experts - 1))
    head_dim = sizes.head_dim if sizes.exact else min(attention.head_dim, sizes.head_dim)
    return replace(attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, switch=few)


def _moe(moe: MoEConfig, sizes: Sizes, *, tp: int, ep: int) -> MoEConfig:
    experts = min(moe.num_experts, _multiple(ep, EXPERTS))
    return replace(
        moe,
        num_experts=experts,
        top_k=min(moe.top_k, TOP_K, experts),
        ffn_size=sizes.width if sizes.exact else min(moe.ffn_size, sizes.width),
        first_dense_layers=min(moe.first_dense_layers, LAYERS - 1),
        shared_ffn_size=_ffn(sizes, tp=tp) if moe.shared_ffn_size else 0,
    )


def _ffn(sizes: Sizes, *, tp: int) -> int:
    return tp * sizes.width if sizes.exact else _multiple(tp, sizes.width)


def _divisors(number: int, other: int) -> list[int]:
    """The common divisors."""
    return [d for d in range(1, number + 1) if number % d == 0 and other % d == 0]


def _multiple(unit: int, least: int) -> int:
    """The smallest multiple of `unit` that is at least `least`."""
    return -(-least // unit) * unit
