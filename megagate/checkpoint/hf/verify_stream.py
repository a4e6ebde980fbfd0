"""Models that are larger than memory: their weights come just before a part's forward pass, and go after it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from megagate.backend.base import GroupedLinear
from megagate.backend.native import NativeBackend
from megagate.checkpoint.hf.table import NAMES, Target
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt, as_theirs
from megagate.config.model import ModelConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

Load = Callable[[], Mapping[str, Tensor]]


class _WideBackend(NativeBackend):
    """Plain PyTorch whose norms and experts are in the dtype of their inputs, also fp64."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * w."""
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    def grouped_linear(self, width: int, rows: int, *, num_experts: int, mesh: ParallelMesh) -> GroupedLinear:
        """Expert by expert: the grouped kernel has no fp64."""
        return _expert_by_expert


def _expert_by_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    made = torch.zeros(x.shape[0], weight.shape[1], dtype=x.dtype)
    for matrix, first, end in zip(weight, [0, *ends.tolist()], ends.tolist(), strict=False):
        made[first:end] = F.linear(x[first:end], matrix)
    return made


class _Wide:
    """Our tensors, in fp64."""

    def __init__(self, weights: Rebuilt):
        self._weights = weights

    def under(self, prefix: str) -> dict[str, Tensor]:
        """As of the narrow ones."""
        found = self._weights.under(prefix)
        return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


@contextmanager
def streamed_ours(model: LanguageModel, weights: Rebuilt | _Wide) -> Iterator[None]:
    """Inside, the model's forward pass reads each part's weights just before it. The model is on the meta device."""
    parts: dict[str, nn.Module] = {"embedding": model.embedding, "final_norm": model.final_norm}
    parts |= {f"layers.{index}": block for index, block in enumerate(model.layers)}
    last = "embedding" if model.config.tie_embeddings else "head"
    output = getattr(model, last)
    with _streamed({part: lambda name=name: weights.under(f"{name}.") for name, part in parts.items()}) as handles:
        # The output projection has no forward of its own: it is read when the pass comes to the norm before it.
        handles.append(model.final_norm.register_forward_pre_hook(lambda *_: _fill(output, weights.under(f"{last}."))))
        handles.append(model.register_forward_hook(lambda *_: _drop(output)))
        yield


@contextmanager
def streamed_theirs(model: nn.Module, target: Target, tensors: FolderTensors, *, tied: bool) -> Iterator[None]:
    """As `streamed_ours`, for a model of transformers."""
    names = NAMES[target]
    parts = {"model.embed_tokens": "model.embed_tokens", f"model.{names.final_norm}": f"model.{names.final_norm}"}
    parts |= {f"model.layers.{index}": f"model.layers.{index}" for index in range(len(model.model.layers))}
    parts |= {"lm_head": "model.embed_tokens" if tied else "lm_head"}
    modules = {model.get_submodule(name): f"{source}." for name, source in parts.items()}
    loads = {module: lambda m=module, prefix=prefix: as_theirs(tensors, prefix, m.state_dict()) for module, prefix in modules.items()}
    with _streamed(loads):
        yield


def wide_logits(config: ModelConfig, weights: Rebuilt, tokens: Tensor) -> Tensor:
    """Our logits with matrix products, norms' products and attention in fp64, a part of the model in memory at a time.

    What the model does in fp32 whatever its weights are (routers, the gate's score) stays so.
    """
    model = LanguageModel(config, dtype=torch.float64, backend=_WideBackend(torch.device("cpu")), mesh=ParallelMesh.single()).eval()
    with streamed_ours(model, _Wide(weights)):
        return model.logits(tokens)


def give_buffers(model: nn.Module, config: object) -> None:
    """Modules whose buffers are no part of a checkpoint (tables of angles) are made again, off the meta device."""
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(config))


@contextmanager
def _streamed(loads: Mapping[nn.Module, Load]) -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    for module, load in loads.items():
        handles.append(module.register_forward_pre_hook(lambda module, _, load=load: _fill(module, load()), prepend=True))
        handles.append(module.register_forward_hook(lambda module, *_: _drop(module)))
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    module.load_state_dict(weights, assign=True)


def _drop(module: nn.Module) -> None:
    module.to("meta")
