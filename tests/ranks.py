"""Ranks for tests: one pool of processes for the whole session, so that torch and DeepSpeed are imported once.

`run_ranks(function, world_size, *args)` runs a module-level function of a test file in worlds of 1, 2 or 4.
"""

import gc
import sys
from collections.abc import Callable
from typing import Any

from megagate.parallel.spawn import RankError, RankPool, start_server

# Ranks are CPU ranks also where there is a GPU; Triton, which their server may load, has an interpreter for those.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

# What a call can leave behind in DeepSpeed 0.19.8, by module: name and value after import. The tables of deepspeed.utils.groups are missing
# here because DeepSpeed clears them itself (`_release_process_group_references`). Left alone on purpose: compiled ops, the accelerator,
# warnings given once, and caches keyed by their arguments.
DEEPSPEED_STATE: dict[str, dict[str, Any]] = {
    "deepspeed": {"dist": None},
    "deepspeed.comm.comm": {"cdb": None, "nccl_backend": None, "mpi_backend": None, "ccl_backend": None, "hccl_backend": None},
    "deepspeed.runtime.activation_checkpointing.checkpointing": {
        "deepspeed_checkpointing_enabled": False,
        "mpu": None,
        "mp_rank": 0,
        "mp_size": 1,
        "mp_group": None,
        "num_layers": None,
        "PARTITION_ACTIVATIONS": False,
        "CPU_CHECKPOINT": False,
        "CONTIGUOUS_CHECKPOINTING": False,
        "SYNCHRONIZE": False,
        "PROFILE_TIME": False,
        "_checkpoint_grad_enabled": True,
    },
    "deepspeed.runtime.torch_autocast": {"TORCH_AUTOCAST_INITIALIZED": False, "TORCH_AUTOCAST_DTYPE": None},
    "deepspeed.runtime.tensor_parallel.init_utils": {"_TP_MODEL_INIT_ARGS": None},
    "deepspeed.runtime.pipe.p2p": {"_groups": None, "_grid": None},
    "deepspeed.runtime.zero.parameter_offload": {"FWD_MODULE_STACK": []},
    "deepspeed.runtime.zero.partition_parameters": {"zero_init_context": 0, "top_level_context": None, "reuse_buffers": False},
}
ZERO_IMPORTS = ["torch._dynamo", "torch._inductor.compile_fx"]  # by ZeRO's first step: seconds in each rank
JOB_IMPORTS = ["megagate.train.job", "megagate.train.main"]  # of a study's runs, each forked from the server: seconds in each
ZERO_INIT_COUNTERS = {"param_id": 0, "num_persisted_parameters": 0, "num_persisted_elements": 0, "apply_param_persistence": False}


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """What `function(RankContext, *args)` returned in each rank; see `megagate.parallel.spawn.run_ranks`."""
    __tracebackhide__ = True
    start()
    try:
        return POOL.run(function, world_size, *args, timeout=timeout)
    except RankError as error:
        raise error.with_traceback(None)  # noqa: B904 - its text has the rank's own; the way through the pool tells nothing


def start() -> None:
    """Start the server of the ranks, which loads torch and DeepSpeed while the first tests run; nothing to do where it runs already."""
    tests_of_engines, tests_of_runs = ("deepspeed" in sys.modules, "megagate.analysis.lr.local" in sys.modules)
    modules = ["deepspeed", *(ZERO_IMPORTS if tests_of_engines or tests_of_runs else []), *(JOB_IMPORTS if tests_of_runs else [])]
    start_server(preload=modules, environment=ENVIRONMENT)


def before_call() -> None:
    """In a rank: keep DeepSpeed from compiling its shared-memory op, which takes minutes."""
    if "deepspeed" in sys.modules:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def after_call() -> None:
    """In a rank: end DeepSpeed's engines and give its module-level state the values it has after import."""
    if "deepspeed" not in sys.modules:
        return
    from deepspeed import DeepSpeedEngine
    from deepspeed.utils import groups

    # An engine hangs on its parameters' gradient hooks, a cycle through C++ that no collection sees: it must be told to let go, and what
    # stage 3 hangs on a parameter is taken away. Else every call would leave its groups' threads behind, and these wake all the time.
    for engine in [thing for thing in gc.get_objects() if issubclass(type(thing), DeepSpeedEngine)]:
        held = [*engine.module.parameters(), *engine.module.modules(), engine.optimizer, engine]
        engine.destroy()
        for thing in held:
            vars(thing).clear()
    groups._release_process_group_references()
    for module_name, values in DEEPSPEED_STATE.items():
        module = sys.modules.get(module_name)
        for name, value in values.items() if module else ():
            if not hasattr(module, name):
                raise AttributeError(f"{module_name} has no {name}: another version of DeepSpeed? Mend DEEPSPEED_STATE in tests/ranks.py")
            setattr(module, name, list(value) if isinstance(value, list) else value)
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload:  # stage 3 numbers modules in a default argument, and compares the numbers between ranks
        offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
    zero_init = sys.modules["deepspeed"].zero.Init
    for name, value in ZERO_INIT_COUNTERS.items():
        setattr(zero_init, name, value)


POOL = RankPool(environment=ENVIRONMENT, before=before_call, after=after_call)
