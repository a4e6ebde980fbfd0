"""The parts of Transformer Engine's backend that need none of it: what is said where it is not there, and rows as the host knows them."""

import importlib.metadata
import sys

import pytest
import torch

from megagate.backend.build import build_backend
from megagate.backend.native import NativeBackend
from megagate.backend.te import TransformerEngineBackend, fused_adam
from megagate.backend.te_sites import Splits
from megagate.config.hardware import INSTALL
from megagate.config.run import PrecisionConfig
from megagate.errors import ConfigError
from megagate.parallel.mesh import ParallelMesh

CPU, PRECISION = torch.device("cpu"), PrecisionConfig(backend="te")


def backend() -> None:
    TransformerEngineBackend(PRECISION, device=CPU, mesh=ParallelMesh.single(), norm=NativeBackend(CPU).norm)


def optimizer() -> None:
    fused_adam([{"params": [torch.zeros(2, requires_grad=True)]}], lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize(
    ("use", "key", "otherwise"), [(backend, "precision.backend", "native"), (optimizer, "optim.implementation", "torch")]
)
def test_its_absence_is_told_with_what_installs_it(use, key, otherwise, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # as if it were not installed
    with pytest.raises(ConfigError) as caught:
        use()
    message = str(caught.value)
    assert message.startswith(f"{key} (te) needs Transformer Engine 2.20.2")
    assert f"install it by `{INSTALL['transformer_engine']}`, or set {key} {otherwise}" in message


@pytest.mark.parametrize("version", ["2.19.0", "2.20.0.dev0+d0067d0", "2.20.20"])
def test_another_version_is_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"transformer_engine": version}.__getitem__)
    with pytest.raises(ConfigError) as caught:
        backend()
    message = str(caught.value)
    assert message.startswith("precision.backend (te) needs Transformer Engine 2.20.2, ") and f"and finds {version} " in message
    assert f"install it by `{INSTALL['transformer_engine']}`, or set precision.backend native" in message


def test_the_version_may_name_the_commit_that_it_was_built_from(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"transformer_engine": "2.20.2+0123abc"}.__getitem__)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ConfigError, match="cannot be imported here"):
        backend()


def test_it_is_not_built_without_a_gpu():
    with pytest.raises(ConfigError, match=r"precision\.backend \(te\) .*GPU.*native"):
        build_backend(PRECISION, device=CPU, mesh=ParallelMesh.single())


def test_splits_are_of_the_ends_at_hand_and_read_once():
    splits = Splits()
    first, second = torch.tensor([16, 16, 48], dtype=torch.int32), torch.tensor([16, 32, 48], dtype=torch.int32)
    rows = splits(first)
    assert rows.tolist() == [16, 0, 32] and rows.dtype == torch.int64
    assert splits(first) is rows
    assert splits(second).tolist() == [16, 16, 16]
    del first  # another tensor may come to lie where it lay
    assert splits(torch.tensor([32, 32, 48], dtype=torch.int32)).tolist() == [32, 0, 16]
