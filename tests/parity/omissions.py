"""What the engine tells DeepSpeed, left out piece by piece: each omission is a context manager around the building of an engine."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

from torch import nn

from megagate.engine import zero
from megagate.engine.optim import parameter_groups
from megagate.nn.base import named_labels

Omission = Callable[[], AbstractContextManager]
PLACEMENT = ("ds_zero_placement_family", "ds_zero_partition_group_name", "ds_zero_partition_process_group")


def after_registration(change: Callable[[nn.Module], None]) -> AbstractContextManager:
    """`change(model)` undoes something of what the engine registered."""
    own = zero._register

    def register(model, config, mesh):
        mpu = own(model, config, mesh)
        change(model)
        return mpu

    return patch.object(zero, "_register", register)


def without_marks(axis: str, *names: str) -> Omission:
    """Parameters that are cut over `axis` lack attributes."""

    def change(model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, label in named_labels(model).items():
            for mark in names if label.shard.axis == axis else ():
                delattr(parameters[name], mark)

    return lambda: after_registration(change)


def without_group(table: str) -> Omission:
    """A table of DeepSpeed's groups is empty."""
    return lambda: after_registration(lambda model: getattr(zero.deepspeed_groups, table).clear())


def without_marker() -> AbstractContextManager:
    return after_registration(lambda model: delattr(model, "expert_marker"))


def without_mpu() -> AbstractContextManager:
    own = zero._register
    return patch.object(zero, "_register", lambda *args: own(*args) and None)


def without_expert_groups() -> AbstractContextManager:
    """The optimizer's groups mix experts with other parameters."""
    return patch.object(zero, "_groups", lambda model, config, mesh: parameter_groups(list(model.named_parameters()), config.optim))


def without_leaves() -> AbstractContextManager:
    return patch.object(zero, "set_z3_leaf_module")


def without_external_parameter() -> AbstractContextManager:
    return patch.object(zero.deepspeed.zero, "register_external_parameter")


OMISSIONS: dict[str, Omission] = {
    "nothing": nullcontext,
    "tensor_model_parallel of experts": without_marks("ep", "tensor_model_parallel"),
    "tensor_model_parallel of cut parameters": without_marks("tp", "tensor_model_parallel"),
    "allreduce": without_marks("ep", "allreduce"),
    "group_name": without_marks("ep", "group_name"),
    "placement": without_marks("ep", *PLACEMENT),
    "placement family": without_marks("ep", PLACEMENT[0]),
    "partition group name": without_marks("ep", PLACEMENT[1]),
    "partition process group": without_marks("ep", PLACEMENT[2]),
    "expert group": without_group("_EXPERT_PARALLEL_GROUP"),
    "expert-data group": without_group("_EXPERT_DATA_PARALLEL_GROUP"),
    "expert marker": without_marker,
    "mpu": without_mpu,
    "optimizer groups": without_expert_groups,
    "leaf modules": without_leaves,
    "external parameter": without_external_parameter,
}
