"""What the engine tells DeepSpeed, left out piece by piece: each omission is a context manager around the building of an engine."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

from megagate.engine.optim import parameter_groups
from megagate.nn.base import named_labels

Omission = Callable[[], AbstractContextManager]


@contextmanager
def _after_registration(change: Callable) -> Iterator[None]:
    """`change(engine/zero.py, model)` undoes something of what `_register` did."""
    from megagate.engine import zero

    def register(model, config, mesh):
        mpu = own(model, config, mesh)
        change(zero, model)
        return mpu

    own = zero._register
    with patch.object(zero, "_register", register):
        yield


def without_marks(axis: str, *names: str) -> Omission:
    """Parameters that are cut over `axis` lack attributes."""

    def change(zero, model) -> None:
        parameters = dict(model.named_parameters())
        for name, label in named_labels(model).items():
            for mark in names if label.shard.axis == axis else ():
                delattr(parameters[name], mark)

    return lambda: _after_registration(change)


def without_group(table: str) -> Omission:
    """A table of DeepSpeed's groups is empty."""
    return lambda: _after_registration(lambda zero, model: getattr(zero.deepspeed_groups, table).clear())


def without_marker() -> AbstractContextManager:
    return _after_registration(lambda zero, model: delattr(model, "expert_marker"))


@contextmanager
def without_mpu() -> Iterator[None]:
    from megagate.engine import zero

    own = zero._register
    with patch.object(zero, "_register", lambda model, config, mesh: own(model, config, mesh) and None):
        yield


@contextmanager
def without_expert_groups() -> Iterator[None]:
    """The optimizer's groups mix experts with other parameters."""
    from megagate.engine import zero

    with patch.object(zero, "_groups", lambda model, config, mesh: parameter_groups(list(model.named_parameters()), config.optim)):
        yield


@contextmanager
def without_leaves() -> Iterator[None]:
    from megagate.engine import zero

    with patch.object(zero, "set_z3_leaf_module"):
        yield


@contextmanager
def without_external_parameter() -> Iterator[None]:
    import deepspeed

    with patch.object(deepspeed.zero, "register_external_parameter"):
        yield


PLACEMENT = ("ds_zero_placement_family", "ds_zero_partition_group_name", "ds_zero_partition_process_group")
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
