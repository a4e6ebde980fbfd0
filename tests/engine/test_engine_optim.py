"""Implementations of the optimizer: what each is given, what it keeps, how it counts, and what is refused."""

import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch
from engine.fused import EmptyToo, GroupCounted, on_cpu, packages
from torch import nn

from megagate.backend import apex
from megagate.config.run import OptimConfig, OptimizerImplementation
from megagate.engine import zero
from megagate.engine.optim import build_implementation, fresh_state
from megagate.engine.zero import require_optimizer
from megagate.errors import ConfigError, MegagateError, RunError

OTHERS = [name for name in get_args(OptimizerImplementation) if name != "torch"]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def build(groups, config: OptimConfig, steps: list[int]) -> torch.optim.Optimizer:
    """`steps`: how many were applied, in its last place."""
    return build_implementation(groups, config, applied_steps=lambda: steps[-1], deepspeed_adam=zero._fused_adam)


@pytest.mark.parametrize("implementation", OTHERS)
def test_the_implementation_is_the_configured_one(implementation):
    config = OptimConfig(implementation=implementation, lr=0.3, beta1=0.7, beta2=0.8, eps=1e-3)
    groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": decay} for decay in (0.4, 0.0)]
    with on_cpu(implementation):
        from deepspeed.ops.adam import FusedAdam

        made = build(groups, config, [0])
    assert type(made) is {"apex": GroupCounted, "te": EmptyToo, "deepspeed": FusedAdam}[implementation]
    assert (made.defaults["lr"], made.defaults["betas"], made.defaults["eps"]) == (0.3, (0.7, 0.8), 1e-3)
    assert made.defaults["bias_correction"] and made.adam_w_mode == 1
    assert [group["weight_decay"] for group in made.param_groups] == [0.4, 0.0]


@pytest.mark.parametrize("implementation", OTHERS)
def test_fresh_state_is_what_it_makes_itself(implementation):
    config, parameter = OptimConfig(implementation=implementation), nn.Parameter(torch.ones(3, 2))
    with on_cpu(implementation):
        optimizer = build([{"params": [parameter]}], config, [0])
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    made, fresh = optimizer.state[parameter], fresh_state(parameter, config, applied_steps=1)
    assert made.keys() == fresh.keys()
    for name, value in made.items():
        assert type(value) is type(fresh[name])
        if name == "step":
            assert value == fresh[name] == 1
        else:
            assert (value.shape, value.dtype) == (fresh[name].shape, fresh[name].dtype) and not fresh[name].any()
    assert fresh_state(parameter, config, applied_steps=0) == {}


@pytest.mark.parametrize("implementation", OTHERS)
def test_parameters_without_a_gradient_keep_the_count(implementation):
    """DeepSpeed's takes the count of a group's last parameter that has a gradient, and counts for that one alone."""
    config = OptimConfig(implementation=implementation, lr=0.1)
    start = [torch.tensor([1.0, -2.0]), torch.tensor([3.0])]
    given = [([1.0, 2.0], [1.0]), ([0.5, -1.0], None), ([2.0, 0.1], None), ([1.0, 1.0], [0.3])]

    def run(config: OptimConfig, others_count: bool) -> list[torch.Tensor]:
        parameters, steps = [nn.Parameter(value.clone()) for value in start], [0]
        with on_cpu(config.implementation):
            optimizer = build([{"params": parameters, "weight_decay": 0.1}], config, steps)
        for gradients in given:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else torch.tensor(gradient)
            optimizer.step()
            steps.append(steps[-1] + 1)
            if others_count:  # PyTorch counts a parameter's own steps, the others those of the engine
                for state in optimizer.state.values():
                    state["step"].fill_(steps[-1])
        return [parameter.detach() for parameter in parameters]

    for found, expected in zip(run(config, False), run(replace(config, implementation="torch"), True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


# ---- refusals


def refusal(config: OptimConfig, device: torch.device, error: type[MegagateError] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        require_optimizer(config, device)
    return str(caught.value)


@pytest.mark.parametrize("implementation", OTHERS)
def test_without_a_gpu(implementation, monkeypatch):
    monkeypatch.setattr(zero.FusedAdamBuilder, "load", None)  # it would compile for minutes
    said = refusal(OptimConfig(implementation=implementation), CPU)
    gpu = "a GPU" if implementation == "deepspeed" else "a CUDA GPU"
    assert said == f"optim.implementation ({implementation}) needs {gpu}, and PyTorch finds none here; set optim.implementation to torch"
    require_optimizer(OptimConfig(), CPU)


def test_apex_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    said = refusal(OptimConfig(implementation="apex"), GPU)
    assert said.startswith("optim.implementation (apex) needs NVIDIA's apex, which is not installed (ModuleNotFoundError: ")
    assert f"install it with `{apex.INSTALL}` (PyPI's package `apex` is another project), or set optim.implementation to torch" in said
    assert "git clone https://github.com/NVIDIA/apex" in apex.INSTALL and "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install" in apex.INSTALL
    assert "--no-build-isolation" in apex.INSTALL


def test_the_other_project_called_apex():
    with packages({"apex": {"__path__": []}}):
        said = refusal(OptimConfig(implementation="apex"), GPU)
    assert "needs NVIDIA's apex, which is not installed (ModuleNotFoundError: No module named 'apex.optimizers')" in said


@pytest.mark.parametrize("key", ["optim.implementation", "precision.norm"])
def test_apex_without_its_kernels(key, monkeypatch):
    kernels = apex.OPTIMIZER_KERNELS if key == "optim.implementation" else apex.NORM_KERNELS
    modules = ["apex", "apex.optimizers", "apex.normalization", "apex.normalization.fused_layer_norm"]
    monkeypatch.setitem(sys.modules, kernels, None)
    with packages({name: {} for name in modules}), pytest.raises(ConfigError) as caught:
        apex.require(key, kernels=kernels, otherwise="native")
    said = str(caught.value)
    assert said.startswith(f"{key} (apex) needs apex's CUDA kernels, without which it was built (ModuleNotFoundError: import of {kernels}")
    assert f"install it with `{apex.INSTALL}`" in said and said.endswith(f"or set {key} to native")
    with packages({name: {} for name in [*modules, kernels]}):
        apex.require(key, kernels=kernels, otherwise="native")


def test_transformer_engine_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    said = refusal(OptimConfig(implementation="te"), GPU)
    assert said.startswith("optim.implementation (te) needs Transformer Engine") and "pip install" in said
    assert said.endswith("or set optim.implementation torch")


def test_a_kernel_that_deepspeed_cannot_compile(monkeypatch):
    def load(_builder: object) -> None:
        raise RuntimeError("Error building extension 'fused_adam': nvcc\nfatal")

    monkeypatch.setattr(zero.FusedAdamBuilder, "load", load)
    said = refusal(OptimConfig(implementation="deepspeed"), GPU, RunError)
    assert said.startswith("optim.implementation (deepspeed) needs a kernel that DeepSpeed compiles on each machine, and could not here ")
    assert "(RuntimeError: Error building extension 'fused_adam': nvcc)" in said and "ds_report" in said
    assert said.endswith("or set optim.implementation to torch")
