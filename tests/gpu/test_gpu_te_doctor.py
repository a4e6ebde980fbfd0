"""Transformer Engine's real kernels, for the first user with a GPU: nothing here has ever run. What each test shows stands in the README.

A recipe that the GPU or its CUDA has not is skipped with the reason, and so is everything where the package is not installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagate.backend.base import KeepsState
from megagate.backend.build import build_backend
from megagate.config.cli import parse
from megagate.config.hardware import hardware_rules
from megagate.config.run import RunConfig
from megagate.engine.reference import ReferenceEngine
from megagate.nn.base import named_labels
from megagate.parallel.init import read_hardware
from megagate.parallel.mesh import ParallelMesh
from megagate.verify.precision import HIGH, RECIPES, examine_precision, precision_of, precision_order
from megagate.verify.precision_report import render_precision
from megagate.verify.trial import batch, build_model

pytestmark = pytest.mark.gpu
NANO = Path(__file__).parents[2] / "examples" / "configs" / "nano.yaml"


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def run(*words: str) -> RunConfig:
    """A run in bf16 with sizes that every recipe takes."""
    config = parse(["--config", str(NANO), "--precision.dtype", "bf16", *words], prog="test")
    return precision_order(config, world_size=1, gpu=True, examined="te").config


def with_recipe(config: RunConfig, recipe: str, *, emulated: bool = False) -> RunConfig:
    """The run on TE's kernels, or emulated; skipped where they are not to be had."""
    wanted = replace(config, precision=precision_of(config.precision, "te", recipe))
    lacks = list(hardware_rules(wanted, read_hardware(gpu())))
    if lacks:
        pytest.skip(f"needs what is not here: {lacks[0]}")
    return replace(config, precision=precision_of(config.precision, "emulated", recipe)) if emulated else wanted


@contextmanager
def one_process() -> Iterator[None]:
    """A world of one rank."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def engine_of(config: RunConfig) -> ReferenceEngine:
    mesh = ParallelMesh.single()
    backend = build_backend(config.precision, device=gpu(), mesh=mesh)
    return ReferenceEngine(build_model(config, mesh, backend=backend, device=gpu(), seed=3), config, mesh)


def train(engine: ReferenceEngine, *, first: int, steps: int) -> list[float]:
    """Losses; every step has tokens of its own."""
    losses = []
    for step in range(first, first + steps):
        tokens, labels = batch(engine.config, engine.mesh, seed=3, step=step, device=gpu())
        losses.append(engine.train_step(tokens, labels, lr=engine.config.optim.lr).loss)
    return losses


@pytest.mark.parametrize("words", [(), ("--data.attention", "document", "--train.recompute", "true")], ids=["plain", "documents"])
@pytest.mark.parametrize("recipe", [HIGH, *RECIPES])
def test_every_product_of_te_is_inside_its_band(recipe: str, words: tuple[str, ...]) -> None:
    """What `tools/doctor.py --backend te` does, on one GPU."""
    with_recipe(run(*words), recipe)
    config = parse(["--config", str(NANO), "--precision.dtype", "bf16", *words], prog="test")
    order = precision_order(config, world_size=1, gpu=True, examined="te", recipes=(recipe,))
    with one_process():
        found = examine_precision(order, device=gpu())
    assert found.causes == [], render_precision(order, found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_under_te_are_those_of_the_emulation(recipe: str) -> None:
    """Eight steps by SGD: rounding alike, sums in another order. The emulation runs on the same GPU."""
    real, emulated = (engine_of(with_recipe(run(), recipe, emulated=how)) for how in (False, True))
    for ours, theirs in zip(train(real, first=0, steps=8), train(emulated, first=0, steps=8), strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("recipe", [HIGH, *RECIPES])
def test_parameters_and_gradients_under_te_have_the_native_names_and_types(recipe: str) -> None:
    config = run()
    real, native = engine_of(with_recipe(config, recipe)), engine_of(config)
    train(real, first=0, steps=1)
    assert list(named_labels(real.model)) == list(named_labels(native.model))
    assert real.model.state_dict().keys() == native.model.state_dict().keys()
    assert all(master.dtype == torch.float32 and master.isfinite().all() for master in real.masters.values())
    assert all(parameter.dtype == torch.bfloat16 for parameter in real.model.parameters())


def test_delayed_scaling_keeps_a_history_that_moves() -> None:
    engine = engine_of(with_recipe(run(), "delayed"))
    sites = [module for module in engine.model.modules() if isinstance(module, KeepsState)]
    assert sites
    train(engine, first=0, steps=2)
    kept = {(i, one.name): one.tensor.clone() for i, site in enumerate(sites) for one in site.kept_state()}
    histories = {key: tensor for key, tensor in kept.items() if key[1].endswith("history")}
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in kept.values())
    assert all((tensor > 0).any() for tensor in histories.values()), "an amax of 0 after two steps: it was never recorded"
    scales = [tensor for (_, name), tensor in kept.items() if name.endswith("scale")]
    assert any((tensor != 1).any() for tensor in scales)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_evaluation_leaves_no_trace_in_training(recipe: str) -> None:
    """To the last bit but for atomics, of which none is in use here: the same losses with a validation in between."""
    straight, evaluated = (engine_of(with_recipe(run(), recipe)) for _ in range(2))
    expected = train(straight, first=0, steps=4)
    losses = train(evaluated, first=0, steps=2)
    evaluated.evaluate(zip(*batch(evaluated.config, evaluated.mesh, seed=9, step=0, device=gpu()), strict=True))
    assert losses + train(evaluated, first=2, steps=2) == pytest.approx(expected, rel=1e-3)
