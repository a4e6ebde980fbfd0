"""Under emulated FP8 masters stay fp32, the optimizer is given what the products made, and histories go through any layout's checkpoint."""

from pathlib import Path

import pytest
import ranks
import torch
from parity.engines import CLIP, Layout, Outcome, Run, assemble, batch, build_engine, load, outcome, save, train
from parity.test_parity_state import assert_same_bits, load_and_train, train_and_save
from torch import Tensor

from megagate.checkpoint import store
from megagate.checkpoint.saved_model import PRECISION_STATE
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.engine.base import Engine
from megagate.engine.optim import clipping
from megagate.parallel.comm import total
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

RECIPES = ("delayed", "current", "blockwise", "mxfp8")
DELAYED = Run(optimizer="adamw", fp8="delayed")
STEP = 2  # after which `train_and_save` saves


def made_gradients(engine: Engine) -> dict[str, Tensor]:
    """Filled, in the steps that follow, with the sum of what each weight's own products give it on this rank, in fp32."""
    sums: dict[str, Tensor] = {}

    def add(name: str, grad: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + grad.float()

    for name, parameter in engine.model.named_parameters():
        parameter.register_hook(lambda grad, name=name: add(name, grad))
    return sums


def boxed(pieces: list[Piece]) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    return {(piece.name.partition("/")[2], piece.offset): piece.tensor.clone() for piece in pieces}


def masters(engine: Engine) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    return boxed([piece for piece in engine.state_pieces() if piece.name.startswith("master/")])


def one_step(context: RankContext, run: Run, layout: Layout) -> float:
    """The largest difference, relative to the tensor's own largest number, of what the optimizer was given and made of it."""
    mesh = ParallelMesh.build(tp=layout.tp, ep=layout.ep)
    engine = build_engine(run, layout, mesh)
    train(engine, [0], lr=run.lr)  # so that scales are of something
    made, before = made_gradients(engine), masters(engine)
    with engine.recorded_gradients() as given:
        step = engine.train_step(*batch(1, mesh), lr=run.lr)
    divisor = mesh.dp.size * clipping(step.grad_norm, CLIP)
    shards = {name: label.shard for name, label in engine.labels.items()}
    sums = {name: total(made[name], mesh.edp if shard.axis == "ep" else mesh.dp) / divisor for name, shard in shards.items()}
    after, worst = masters(engine), 0.0
    for place, gradient in boxed(given).items():
        start = tuple(a - b for a, b in zip(place[1], shards[place[0]].offset, strict=True))
        expected = sums[place[0]][tuple(slice(a, a + n) for a, n in zip(start, gradient.shape, strict=True))]
        assert gradient.dtype == torch.float32
        worst = max(worst, distance(gradient, expected))
        if place in after:  # copies on other ranks are not written
            assert after[place].dtype == torch.float32
            decay = engine.config.optim.weight_decay if len(shards[place[0]].full_shape) > 1 else 0.0
            worst = max(worst, distance(after[place], before[place] - run.lr * (gradient + decay * before[place])))
    return worst


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("layout", [Layout(2, ep=2), Layout(2, tp=2, ep=2, zero_stage=2), Layout(2, zero_stage=2)], ids=str)
def test_masters_are_fp32_and_the_optimizer_sees_what_the_products_made(layout: Layout) -> None:
    """To rounding of fp32: a number that went through FP8 on its way would be off by up to 1/16."""
    for recipe in RECIPES:
        assert max(ranks.run_ranks(one_step, 2, Run(fp8=recipe), layout)) < 1e-6, recipe


def test_the_same_layout_goes_on_with_the_same_bits(saved: tuple[Path, list[Outcome]]) -> None:
    root, expected = saved
    assert_same_bits(ranks.run_ranks(load_and_train, 2, DELAYED, Layout(2, ep=2), root), expected)


def kept_after_loading(context: RankContext | None, layout: Layout, root: Path) -> Outcome:
    """What FP8 keeps, by all ranks, in an engine that loaded it and in a checkpoint of its own."""
    mesh = ParallelMesh.build(tp=layout.tp, ep=layout.ep) if context else ParallelMesh.single()
    engine = build_engine(DELAYED, layout, mesh, key="other weights")
    train(engine, [5], lr=DELAYED.lr)  # other histories
    load(engine, root, STEP)
    save(engine, root.parent / f"again {layout}", STEP)
    one = outcome(engine, [], next_step=0)
    one.pieces = [piece for piece in one.pieces if piece[0].startswith(PRECISION_STATE)]
    return one


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """Of dp2 tp1 ep2."""
    root = tmp_path_factory.mktemp("delayed") / "saved"
    return root, ranks.run_ranks(train_and_save, 2, DELAYED, Layout(2, ep=2), root)


@pytest.mark.parametrize("layout", [Layout(4, tp=2, ep=4, zero_stage=2), Layout(4, tp=2, ep=2), Layout(2, tp=2, ep=1), Layout()], ids=str)
def test_histories_are_the_same_under_any_layout(saved: tuple[Path, list[Outcome]], layout: Layout) -> None:
    root, _ = saved
    if layout == Layout():
        loaded = [kept_after_loading(None, layout, root)]
    else:
        loaded = ranks.run_ranks(kept_after_loading, layout.world_size, layout, root)
    there, again = stored(root), stored(root.parent / f"again {layout}")
    assert len(there) == 2 * 4 * 6 and any("experts" in name for name in there)
    assert there[f"{PRECISION_STATE}layers.1.moe.experts.out.grad.history"].shape == (8, DELAYED.amax_history)
    assert there[f"{PRECISION_STATE}layers.1.attention.out.weight.scale"].shape == (1,)
    for found in (assemble(loaded), again):
        assert found.keys() == there.keys()
        assert all(torch.equal(value, there[name]) for name, value in found.items())
    assert all(value.any() for name, value in there.items() if "experts" not in name)


def stored(root: Path) -> dict[str, Tensor]:
    with Checkpoint.open(store.step_path(root, STEP)) as checkpoint:
        checkpoint.verify()
        return {name: checkpoint.read_whole(name) for name in checkpoint.tensors if name.startswith(PRECISION_STATE)}
