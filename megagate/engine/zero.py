"""DeepSpeed ZeRO 1 and 2 on the folded grid. The only file that knows DeepSpeed (0.19.8: private names are used)."""

import logging
from collections.abc import Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import deepspeed.runtime.bf16_optimizer
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from megagate.checkpoint.reshard import flat_pieces, read_flat
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.config.run import RunConfig
from megagate.engine.base import Engine
from megagate.engine.optim import MOMENTS, build_optimizer, fresh_state, parameter_groups
from megagate.engine.zero_config import zero_config
from megagate.model.lm import LanguageModel, LossParts
from megagate.nn.base import named_labels
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.shard import Shard


class ZeroEngine(Engine):
    """The model under ZeRO, its expert groups registered so that norms, sums and partitions are those of one process."""

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: ParallelMesh):
        super().__init__(model, config, mesh)
        _tame_deepspeed()
        self.labels = named_labels(model)
        mpu = _register(model, config, mesh)
        dtype = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(_groups(model, config, mesh), config.optim),
            config=zero_config(config, dtype=dtype, dp=mesh.dp.size, local_parameters=sum(p.numel() for p in model.parameters())),
            mpu=mpu,
        )
        self.zero = self.engine.optimizer

    def _forward(self, tokens: Tensor, labels: Tensor) -> LossParts:
        return self.engine(tokens, labels)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        # DeepSpeed sums dense gradients over dp and expert gradients over edp, and divides both by dp. The all-to-all's adjoint has
        # already brought an expert the gradient of all tokens of its ep group, so both are 1/dp of the sum over ranks.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.mesh.dp.size, scale_wrt_gas=False)

    def _update(self, lr: float) -> tuple[float, bool]:
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), not self.zero.overflow

    def state_pieces(self) -> Iterator[Piece]:
        """Views of the flat partitions, cut into boxes of the logical tensors."""
        for name, kind, start, flat in self._fragments():
            shard = self.labels[name].shard
            if shard.axis or self.mesh.tp.rank == 0:  # what every tp rank holds is written once
                yield from flat_pieces(f"{kind}/{name}", **_box(shard), start=start, flat=flat)

    def load_state(self, checkpoint: Checkpoint, *, applied_steps: int) -> None:
        """Fill the flat partitions in place, then the weights from the masters."""
        self.applied_steps = applied_steps
        for group in self.zero.optimizer.param_groups:
            for flat in group["params"]:
                self.zero.optimizer.state[flat].update(fresh_state(flat, self.config.optim, applied_steps=applied_steps))
        for name, kind, start, flat in self._fragments():
            read_flat(checkpoint, f"{kind}/{name}", **_box(self.labels[name].shard), start=start, flat=flat)
        for name, parameter in self.model.named_parameters():
            master = torch.empty(parameter.shape, dtype=torch.float32)
            checkpoint.read(f"master/{name}", self.labels[name].shard.offset, master)
            parameter.data.copy_(master)

    def _fragments(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(parameter, kind of state, first element in the flattened local shard, 1-D view) of what this rank's partitions hold."""
        # DeepSpeed 0.19.8 links moments of the first parameter group only; asking again after a step links them all.
        self.zero._hp_optimizer_states_linked = False
        if self.applied_steps and MOMENTS[self.config.optim.name]:
            self.zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.model.named_parameters():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            start = mapping.lp_fragment_address.start
            yield name, "master", start, mapping.hp_fragment.detach()
            for moment in MOMENTS[self.config.optim.name] if self.applied_steps else ():
                yield name, moment, start, mapping.optim_fragment[moment]


def _tame_deepspeed() -> None:
    """Switch off what DeepSpeed offers no switch for. Idempotent."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It would compile its shared-memory op at start-up on CPUs: minutes, and a killed compilation leaves a lock for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its bf16 optimizer prints a page about memory, whatever the level of the log.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None


def _box(shard: Shard) -> dict[str, tuple[int, ...]]:
    return {"full_shape": shard.full_shape, "shard_offset": shard.offset, "shard_shape": shard.shape}


class _Mpu:
    """What DeepSpeed asks of a model-parallel unit. No name here may be `initialize_sequence_parallel`: it would drop tp from the norm."""

    def __init__(self, tp: Axis, tp_group: dist.ProcessGroup, dp: Axis, dp_group: dist.ProcessGroup):
        self._tp, self._tp_group, self._dp, self._dp_group = tp, tp_group, dp, dp_group

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dp_group


class _ExpertMarker(DeepSpeedMoE):
    """A module without parameters that tells DeepSpeed that the model has experts; without it ZeRO 1 and 2 fail on expert groups."""

    def __init__(self, num_experts: int, group_name: str, ep_size: int):
        nn.Module.__init__(self)
        self.num_experts, self.expert_group_name, self.ep_size = num_experts, group_name, ep_size

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are registered already."""


def _experts_are_marked(config: RunConfig, mesh: ParallelMesh) -> bool:
    """With tp = ep = 1 experts are ordinary replicated parameters."""
    return config.model.is_moe and mesh.tp.size * mesh.ep.size > 1


def _register(model: LanguageModel, config: RunConfig, mesh: ParallelMesh) -> _Mpu | None:
    """Tell DeepSpeed which parameters differ between which ranks. Returns the model-parallel unit, None without tensor parallelism."""
    lone = _lone_group(mesh.world)
    marked, name = _experts_are_marked(config, mesh), f"ep_size_{mesh.ep.size}"
    parameters = dict(model.named_parameters())
    for key, label in named_labels(model).items():
        parameter, expert = parameters[key], label.shard.axis == "ep" and marked
        if expert:
            parameter.allreduce, parameter.group_name = False, name
        # "Distinct on every tp rank": true of experts too, since the grid folds them over tp; without it the norm leaves some out.
        if mesh.tp.size > 1 and (expert or label.shard.axis == "tp"):
            parameter.tensor_model_parallel = True
    if marked:
        known = deepspeed_groups
        known._EXPERT_PARALLEL_GROUP[name], known._EXPERT_PARALLEL_GROUP_RANKS[name] = mesh.ep.group or lone, list(mesh.ep.ranks)
        known._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp.group or lone
        known._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(mesh.edp.ranks)
        model.expert_marker = _ExpertMarker(config.model.moe.num_experts, name, mesh.ep.size)
    return _Mpu(mesh.tp, mesh.tp.group, mesh.dp, mesh.dp.group or lone) if mesh.tp.size > 1 else None


def _lone_group(world: Axis) -> dist.ProcessGroup | None:
    """A group of this rank alone: DeepSpeed wants a group even where an axis has size 1. Collective over the world."""
    made = [dist.new_group([rank]) for rank in world.ranks]
    return made[world.rank]


def _groups(model: LanguageModel, config: RunConfig, mesh: ParallelMesh) -> list[dict[str, Any]]:
    """Optimizer groups: with and without weight decay, experts apart and named as DeepSpeed looks them up."""
    if not _experts_are_marked(config, mesh):
        return parameter_groups(list(model.named_parameters()), config.optim)
    labels = named_labels(model)
    experts = [(name, p) for name, p in model.named_parameters() if labels[name].shard.axis == "ep"]
    dense = [(name, p) for name, p in model.named_parameters() if labels[name].shard.axis != "ep"]
    marks = {"moe": True, "name": f"ep_size_{mesh.ep.size}"}
    return parameter_groups(dense, config.optim) + [group | marks for group in parameter_groups(experts, config.optim)]
