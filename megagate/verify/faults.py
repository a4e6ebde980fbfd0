"""Faults that other training stacks have had, put into an engine on purpose, to see that the doctor finds them.

Each fault changes one engine object that is thrown away afterwards; nothing is patched for others.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megagate.backend.base import RowLinear
from megagate.config.run import RunConfig
from megagate.engine.base import Engine
from megagate.errors import ConfigError
from megagate.nn.moe.balance import BalanceLoss
from megagate.nn.moe.layer import MoE
from megagate.nn.moe.router import RouterStats
from megagate.parallel.comm import gather
from megagate.parallel.mesh import Axis


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        text: What is wrong.
        axis: The axis that must have more than one rank for it to matter.
        inject: Puts it into an engine.
        of_experts: It needs a mixture of experts.
        of_documents: It needs windows that are cut into documents.
    """

    text: str
    axis: str
    inject: Callable[[Engine], None]
    of_experts: bool = False
    of_documents: bool = False


def check_fault(name: str, config: RunConfig, *, world_size: int) -> None:
    """Refuse a fault that could not show.

    Raises:
        ConfigError: There is no such fault, or it cannot show in this run.
    """
    if name not in FAULTS:
        raise ConfigError(f"--fault {name} is not one of {', '.join(FAULTS)}; choose one of these")
    fault, parallel = FAULTS[name], config.parallel
    sizes = {"tp": parallel.tp, "dp": world_size // parallel.tp, "ep": parallel.ep, "world": world_size}
    if sizes[fault.axis] == 1:
        raise ConfigError(f"--fault {name} needs more than one rank on the axis {fault.axis}; choose another layout or fault")
    if fault.of_experts and not config.model.is_moe:
        raise ConfigError(f"--fault {name} needs a mixture of experts, and model.moe.num_experts is 0; choose another fault")
    if fault.of_documents and config.data.attention != "document":
        raise ConfigError(f"--fault {name} needs data.attention document, it is {config.data.attention}; set it, or choose another fault")
    if fault.inject is _norm_forgets_experts and _norm_is_by_group(config):
        raise ConfigError(
            f"--fault {name} changes nothing at parallel.zero_stage 3, nor in bf16 with fp32 gradients at stage 1, where DeepSpeed sums "
            "norms of experts by their group; choose stage 2"
        )


def _norm_is_by_group(config: RunConfig) -> bool:
    """DeepSpeed's stage 3, and its optimizer for bf16 with fp32 gradients at stage 1, do not look at the mark."""
    own_sums = config.precision.dtype == "bf16" and config.precision.grad_dtype == "fp32"
    return config.parallel.zero_stage == 3 or (config.parallel.zero_stage == 1 and own_sums)


def inject(name: str, engine: Engine) -> None:
    """Put the named fault into the engine.

    Raises:
        ConfigError: As `check_fault`.
    """
    check_fault(name, engine.config, world_size=engine.mesh.world.size)
    FAULTS[name].inject(engine)


def _expert_gradients_times_ep(engine: Engine) -> None:
    for name, parameter in engine.model.named_parameters():
        if engine.labels[name].shard.axis == "ep":
            parameter.register_hook(lambda grad: grad * engine.mesh.ep.size)


def _norm_without_sum(engine: Engine) -> None:
    engine.model.layers[0].ffn_norm.tp = Axis("tp")


def _aux_over_dp(engine: Engine) -> None:
    make = engine._balance_loss

    def make_small(tokens: Tensor) -> BalanceLoss:
        loss = make(tokens)
        share = loss.share
        loss.share = lambda stats: share(stats) / engine.mesh.dp.size
        return loss

    engine._balance_loss = make_small


def _tokens_on_every_tp_rank(engine: Engine) -> None:
    for block in engine.model.layers:
        block.moe.forward = _RedundantMoE(block.moe, engine.mesh.tp)


def _wrong_vocabulary_shard(engine: Engine) -> None:
    embedding = engine.model.embedding
    label = embedding.labels["weight"]
    shard = replace(label.shard, index=(label.shard.index + 1) % label.shard.parts)
    embedding.labels = {"weight": replace(label, shard=shard)}


def _in_place_collective(engine: Engine) -> None:
    for block in engine.model.layers:
        block.attention.out = _reducing_its_input(block.attention.out, engine.mesh.tp)


def _norm_forgets_experts(engine: Engine) -> None:
    for name, parameter in engine.model.named_parameters():
        if engine.labels[name].shard.axis == "ep":
            parameter.tensor_model_parallel = False


def _gradients_over_dp(engine: Engine) -> None:
    backward = engine._backward
    engine._backward = lambda loss, *, last: backward(loss / engine.mesh.dp.size, last=last)


def _borders_missed(engine: Engine) -> None:
    if engine.mesh.tp.rank == engine.mesh.tp.size - 1:
        engine.model.eod_id = None


def _stale_weights(engine: Engine) -> None:
    update, norm = engine._update, engine.model.layers[0].ffn_norm.weight

    def update_and_restore(lr: float) -> tuple[float, bool]:
        before = norm.detach().clone()
        result = update(lr)
        norm.data.copy_(before)
        return result

    engine._update = update_and_restore


def _hang(engine: Engine) -> None:
    if engine.mesh.world.rank == engine.mesh.world.size - 1:
        engine._backward = lambda loss, *, last: threading.Event().wait()


class _RedundantMoE:
    """A MoE block whose tp ranks all route all tokens and each keep their own part of the result: experts see each token tp times."""

    def __init__(self, moe: MoE, tp: Axis):
        self.moe, self.tp = moe, tp

    def __call__(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        shared, self.moe.shared_expert = self.moe.shared_expert, None
        out, stats = MoE.forward(self.moe, _Replicate.apply(x, self.tp))
        self.moe.shared_expert = shared
        out = _OwnPart.apply(out, self.tp)
        return (out if shared is None else out + shared(x)), stats


class _Replicate(Function):
    """All tokens on every rank; its gradient is this rank's part, as if all ranks had computed the same."""

    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return gather(x, tp, 1)

    @staticmethod
    def backward(ctx, grad):
        return _own(grad, ctx.tp), None


class _OwnPart(Function):
    """The reverse of `_Replicate`."""

    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return _own(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return gather(grad, ctx.tp, 1), None


def _own(x: Tensor, tp: Axis) -> Tensor:
    return x.chunk(tp.size, dim=1)[tp.rank].clone()


def _reducing_its_input(product: RowLinear, tp: Axis) -> RowLinear:
    """A row-parallel product that sums its *input* over tp, in place, after using it."""

    def reduce(x: Tensor, weight: Tensor) -> Tensor:
        out = product(x, weight)
        with torch.no_grad():
            dist.all_reduce(x.data, group=tp.group)  # autograd saved x for the weight's gradient, and does not notice
        return out

    return reduce


FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "expert-gradients-times-ep": Fault("expert gradients ep times too large", "ep", _expert_gradients_times_ep, True),
        "norm-without-sum": Fault("the gradient of one norm is not summed over tp", "tp", _norm_without_sum),
        "aux-over-dp": Fault("auxiliary losses divided by dp", "dp", _aux_over_dp, True),
        "tokens-on-every-tp-rank": Fault("each tp rank sends all tokens to the experts", "tp", _tokens_on_every_tp_rank, True),
        "wrong-vocabulary-shard": Fault("each tp rank looks up the next one's rows of the vocabulary", "tp", _wrong_vocabulary_shard),
        "in-place-collective": Fault("a collective writes to a tensor that autograd has saved", "tp", _in_place_collective),
        "norm-forgets-experts": Fault("the clip norm counts experts on the first tp rank only", "tp", _norm_forgets_experts, True),
        "gradients-over-dp": Fault("gradients divided by dp once too often", "dp", _gradients_over_dp),
        "borders-missed": Fault("attention of the last tp rank crosses the borders of documents", "tp", _borders_missed, of_documents=True),
        "stale-weights": Fault("forward passes go on with the first weights of a norm", "world", _stale_weights),
        "hang": Fault("the last rank stops in its first backward pass", "world", _hang),
    }
)
