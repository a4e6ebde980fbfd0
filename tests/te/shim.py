"""Runs Transformer Engine's real Python layer on CPUs: `stub_extension.py` is the compiled half, and TE's modules see a torch whose
GPU is the CPU.

Only for ranks of their own (`te_ranks.py`): what is patched here stays patched in its process. Pinned to 2.20.2: private names are used.
"""

import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from te.stub_extension import NAME, build

VERSION = "2.20.2"
ENVIRONMENT = {
    "NVTE_PROJECT_BUILDING": "1",  # TE's own switch: import without loading a shared library
    "NVTE_MASKED_SOFTMAX_FUSION": "0",  # attention's softmax by PyTorch
    "TRITON_INTERPRET": "1",  # permutation's Triton kernels run in numpy
    "NVTE_TORCH_COMPILE": "0",  # no compiler runs for TE's small helpers
}
CAPABILITY = (9, 0)
"""TE believes to be on a Hopper: where all recipes but MXFP8 run, and FP8 products want both operands transposed."""


def why_not() -> str | None:
    """Why Transformer Engine cannot be run here, or None."""
    try:
        found = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return "transformer-engine is not installed"
    is_known = found.partition("+")[0] == VERSION  # whichever commit it was built from
    return None if is_known else f"transformer-engine is {found}, not {VERSION}, whose private names the shim uses"


def install() -> None:
    """Make `import transformer_engine.pytorch` work in this process, on the CPU; once."""
    if NAME in sys.modules:
        return
    sys.modules[NAME] = build()
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda _framework: None  # it would load the shared library
    import transformer_engine.pytorch  # noqa: F401 - all its modules are loaded before they are patched

    for module in _modules():
        _patch_module(module)
    _let_cpu_tensors_in()
    _choose_triton_blocks()


def _modules() -> Iterator[ModuleType]:
    yield from [module for name, module in sys.modules.items() if name.startswith("transformer_engine.") and module is not None]


def _patch_module(module: ModuleType) -> None:
    """What one module of TE looks up in its own namespace."""
    if module.__dict__.get("torch") is torch:
        module.torch = _CpuTorch("torch")
    patches = {
        "_empty_tensor": lambda: torch.empty(0),  # torch.Tensor().cuda()
        "get_device_compute_capability": lambda: CAPABILITY,
        "_get_cuda_rng_state": lambda *_args, **_kwargs: torch.empty(0),  # of a GPU's generator; nothing here draws numbers
        "_set_cuda_rng_state": lambda *_args, **_kwargs: None,
    }
    for name, value in patches.items():
        if name in module.__dict__:
            setattr(module, name, value)


class _CpuTorch(ModuleType):
    """torch, but that "cuda" is the CPU. Other packages keep the real one."""

    def __getattr__(self, name: str) -> Any:
        if name in OWN:
            return OWN[name]
        value = getattr(torch, name)
        return _on_cpu(value) if name in FACTORIES else value


FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "arange", "rand", "empty_like", "zeros_like"}


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _device(kwargs["device"])
        return factory(*args, **kwargs)

    return wrapped


def _device(*args: Any) -> Any:
    """The CPU for a GPU; others as they are."""
    is_gpu = isinstance(args[0], int) or str(args[0]).startswith("cuda")
    return torch.device("cpu") if is_gpu else args[0]


class _DeviceType(type):
    """`torch.device` for TE: its instances are the real ones."""

    def __call__(cls, *args: Any) -> torch.device:
        return torch.device(_device(*args))

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.device)


class _Device(metaclass=_DeviceType):
    pass


class _Cuda(ModuleType):
    """`torch.cuda` for TE: one Hopper, never capturing a graph; else the real module."""

    def __getattr__(self, name: str) -> Any:
        return ANSWERS[name] if name in ANSWERS else getattr(torch.cuda, name)


ANSWERS: dict[str, Any] = {
    "is_available": lambda: True,
    "current_device": lambda: "cpu",
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda *_: None,
    "get_device_capability": lambda *_: CAPABILITY,
    "get_device_properties": lambda *_: SimpleNamespace(major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132),
}
OWN: dict[str, Any] = {"cuda": _Cuda("torch.cuda"), "device": _Device}


def _let_cpu_tensors_in() -> None:
    """TE asks `tensor.is_cuda` at its doors, and attention moves its mask to "cuda": in those functions tensors are as if on a GPU."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import permutation
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    doors = [(TransformerEngineBaseModule, "prepare_forward"), (te.DotProductAttention, "forward")]
    for name in [name for name in vars(permutation) if name.startswith(("moe_permute", "moe_unpermute", "moe_sort_chunks"))]:
        doors += [(module, name) for module in (te, permutation) if inspect.isfunction(vars(module).get(name))]
    for owner, name in doors:
        setattr(owner, name, _with_gpu_tensors(getattr(owner, name)))


def _choose_triton_blocks() -> None:
    """Triton's tuner times its choices on a GPU; of one choice nothing is timed. The last has the largest blocks, the fewest in numpy."""
    from transformer_engine.common.triton import permutation
    from triton.runtime.autotuner import Autotuner

    for kernel in vars(permutation).values():
        if isinstance(kernel, Autotuner):
            kernel.configs = kernel.configs[-1:]


def _with_gpu_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with gpu_tensors():
            return method(*args, **kwargs)

    return wrapped


@contextmanager
def gpu_tensors() -> Iterator[None]:
    """While it is open every tensor says that it is on a GPU, and stays where it is when told to go to one; may be nested."""
    patches = {"is_cuda": property(lambda _tensor: True), "to": _on_cpu(torch.Tensor.to)}
    own = {name: torch.Tensor.__dict__.get(name) for name in patches}  # None where the base class has it
    for name, value in patches.items():
        setattr(torch.Tensor, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            if value is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, value)
