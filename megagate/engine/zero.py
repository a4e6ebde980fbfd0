"""DeepSpeed ZeRO on the folded grid. The only file that knows DeepSpeed (0.19.8: private names are used)."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.ops
import deepspeed.runtime.bf16_optimizer
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.op_builder import FusedAdamBuilder
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from megagate.checkpoint.store import Checkpoint
from megagate.config.run import OptimConfig, RunConfig
from megagate.engine.base import Engine
from megagate.engine.fragment import Fragment
from megagate.engine.optim import build_implementation, parameter_groups, require_implementation
from megagate.engine.zero_config import zero_config
from megagate.errors import RunError
from megagate.model.lm import LanguageModel, LossParts
from megagate.nn.base import Weight, named_labels
from megagate.parallel.comm import total
from megagate.parallel.mesh import Axis, ParallelMesh


class ZeroEngine(Engine):
    """The model under ZeRO, its expert groups registered so that norms, sums and partitions are those of one process."""

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: ParallelMesh):
        super().__init__(model, config, mesh)
        _tame_deepspeed()
        self.stage = config.parallel.zero_stage
        groups = _groups(model, config, mesh)
        self.optimizer = build_implementation(groups, config.optim, applied_steps=lambda: self.applied_steps, deepspeed_adam=_fused_adam)
        self.replays_backward = self.stage < 3  # whose hooks on the graph know no other way than `backward`
        mpu = _register(model, config, mesh)
        dtype = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=zero_config(config, dtype=dtype, dp=mesh.dp.size, local_parameters=sum(p.numel() for p in model.parameters())),
            mpu=mpu,
        )
        self.zero = self.engine.optimizer
        self._flats = _Flats(self.optimizer)

    def _forward(self, tokens: Tensor, labels: Tensor) -> LossParts:
        return self.engine(tokens, labels)

    def _scaled(self, loss: Tensor) -> Tensor:
        # DeepSpeed sums dense gradients over dp and expert gradients over edp, and divides both by dp. The all-to-all's adjoint has
        # already brought an expert the gradient of all tokens of its ep group, so both are 1/dp of the sum over ranks.
        return loss * self.mesh.dp.size

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(self._scaled(loss), scale_wrt_gas=False)

    def _update(self, lr: float) -> tuple[float, bool]:
        for group in self.zero.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            return self._update_replicated()
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), not self.zero.overflow

    def _update_replicated(self) -> tuple[float, bool]:
        """Stage 0, where DeepSpeed keeps the norm to itself and steps on whatever is in the gradients: clip and refuse here."""
        norm = _global_norm(self.model, self.mesh)
        applied = math.isfinite(norm)
        if applied:
            limit = self.config.optim.grad_clip or math.inf
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, torch.tensor(norm))
        else:
            self.optimizer.zero_grad()  # nothing to apply: SGD and AdamW pass parameters without a gradient
        self.engine.step()
        return norm, applied

    def _fragments(self) -> Iterator[Fragment]:
        """What this rank's partitions hold, padding left out."""
        for name, parameter in self.model.named_parameters():
            shard = self.labels[name].shard
            owned = bool(shard.axis) or self.mesh.tp.rank == 0  # what every tp rank holds is written once
            if self.stage == 0:
                yield Fragment(name, 0, parameter, 0, parameter.numel(), owned=owned and self.mesh.dp.rank == 0)
            elif self.stage == 3:
                group, offset, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = padded * self.zero._get_param_partition_rank(parameter)
                size = min(padded, parameter.ds_numel - start)
                if size > 0:
                    yield Fragment(name, start, self.zero.fp32_partitioned_groups_flat[group], offset, size, owned=owned)
            elif parameter._hp_mapping is not None:
                start, master = parameter._hp_mapping.lp_fragment_address.start, parameter._hp_mapping.hp_fragment
                yield Fragment(name, start, *self._flats.find(master), master.numel(), owned=owned)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """At stage 3 the parameters are gathered for a while."""
        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), enabled=self.stage == 3):
            yield

    def _load_weights(self, checkpoint: Checkpoint) -> None:
        if self.stage == 3:
            self._load_partitions()
            return
        for name, parameter in self.model.named_parameters():
            master = torch.empty(parameter.shape, dtype=torch.float32)
            checkpoint.read(f"master/{name}", self.labels[name].shard.offset, master)
            parameter.data.copy_(master)

    def _load_partitions(self) -> None:
        """What DeepSpeed does with the masters at the end of a step of stage 3; forward passes gather what they read."""
        zero = self.zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)


class _Flats:
    """The flat tensors of an optimizer of stage 1 or 2, looked up by their views."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        self._by_storage = {flat.untyped_storage().data_ptr(): flat for flat in flats}

    def find(self, view: Tensor) -> tuple[Tensor, int]:
        """The tensor that `view` is a part of, and where it begins in it."""
        flat = self._by_storage[view.untyped_storage().data_ptr()]
        return flat, view.storage_offset() - flat.storage_offset()


def _global_norm(model: LanguageModel, mesh: ParallelMesh) -> float:
    """Of gradients that are summed over dp and, where they are replicated over tp, equal there: those count once."""
    labels = named_labels(model)
    squares = {name: parameter.grad.float().square().sum() for name, parameter in model.named_parameters()}
    sharded = sum(square for name, square in squares.items() if labels[name].shard.axis)
    replicated = sum(square for name, square in squares.items() if not labels[name].shard.axis)
    return math.sqrt(total(sharded, mesh.tp) + replicated)


def _tame_deepspeed() -> None:
    """Switch off what DeepSpeed offers no switch for. Idempotent."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It would compile its shared-memory op at start-up on CPUs: minutes, and a killed compilation leaves a lock for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its bf16 optimizer prints a page about memory, whatever the level of the log.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None


def require_optimizer(config: OptimConfig, device: torch.device) -> None:
    """See `require_implementation`."""
    require_implementation(config, device=device, load_deepspeed=_load_fused_adam)


def _load_fused_adam() -> None:
    """Compile the kernel, once on each machine, and load it."""
    try:
        FusedAdamBuilder().load()
    except Exception as error:  # DeepSpeed, PyTorch and ninja raise each their own
        reason = str(error).strip().splitlines()[:1]
        raise RunError(
            f"optim.implementation (deepspeed) needs a kernel that DeepSpeed compiles on each machine, and could not here "
            f"({type(error).__name__}: {' '.join(reason)}); see that nvcc of CUDA {torch.version.cuda}, a C++ compiler and ninja are "
            "there (`ds_report` lists them), or set optim.implementation to torch"
        ) from error


def _fused_adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW with one kernel launch for many tensors; its kernel is compiled when it is first made on a machine."""
    return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)


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
        if expert and config.parallel.zero_stage == 3:
            parameter.ds_zero_placement_family, parameter.ds_zero_partition_group_name = "autoep_expert", name
            parameter.ds_zero_partition_process_group = mesh.edp.group or lone
        # "Distinct on every tp rank": true of experts too, since the grid folds them over tp; without it the norm leaves some out.
        if mesh.tp.size > 1 and (expert or label.shard.axis == "tp"):
            parameter.tensor_model_parallel = True
    if marked:
        deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep.group or lone
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp.group or lone
        if config.parallel.zero_stage != 3:
            model.expert_marker = _ExpertMarker(config.model.moe.num_experts, name, mesh.ep.size)
    if config.parallel.zero_stage == 3:
        _tell_who_reads(model)
    return _Mpu(mesh.tp, mesh.tp.group, mesh.dp, mesh.dp.group or lone) if mesh.tp.size > 1 else None


def _tell_who_reads(model: LanguageModel) -> None:
    """Stage 3 gathers a module's own parameters before its forward; a `Weight` has none, its parent reads it."""
    for module in model.modules():
        if module is not model and any(isinstance(child, Weight) for child in module.children()):
            set_z3_leaf_module(module, True)
    deepspeed.zero.register_external_parameter(model, model.output_weight)


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
