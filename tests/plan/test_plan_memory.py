"""Bytes per GPU from the config alone, against what the built model and DeepSpeed really hold; what does not fit is refused."""

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import ranks
import torch
from parity.engines import Layout, Run, build_engine, run_config, train
from parity.sharded import BACKEND
from torch import Tensor

from megagate.backend import native
from megagate.config.count import count_parameters
from megagate.config.keys import from_dict
from megagate.config.paper import presets
from megagate.config.run import RunConfig
from megagate.engine import zero_config
from megagate.errors import ConfigError
from megagate.model.lm import LanguageModel
from megagate.nn import loss
from megagate.nn.base import named_labels
from megagate.parallel.mesh import Axis, ParallelMesh, grid
from megagate.parallel.spawn import RankContext
from megagate.plan import activations
from megagate.plan import memory as memory_module
from megagate.plan.activations import Micro
from megagate.plan.hardware import GPU_BYTES
from megagate.plan.memory import Memory, check_fits, estimate, held

# ---- what ranks hold


def pretended(tp: int, ep: int, world_size: int) -> ParallelMesh:
    """The mesh of rank 0 without process groups: enough to build a model on the meta device."""
    table = grid(world_size, tp=tp, ep=ep)
    return ParallelMesh(**{name: Axis(name, tuple(ranks[0])) for name, ranks in table.items()})


@pytest.mark.parametrize(("tp", "ep", "world_size"), [(1, 4, 8), (2, 4, 16), (8, 4, 8)])
@pytest.mark.parametrize("name", presets())
def test_a_rank_holds_what_the_built_model_holds(name, tp, ep, world_size):
    """Eight tensor-parallel ranks are more than the key/value heads of the 15A2B. Two layers: the others are alike."""
    model = replace(presets()[name].config.model, num_layers=2)
    mesh = pretended(tp, ep if model.is_moe else 1, world_size)
    built = LanguageModel(model, dtype=torch.bfloat16, backend=BACKEND, mesh=mesh)
    sizes = Counter()
    for parameter_name, parameter in built.named_parameters():
        sizes[named_labels(built)[parameter_name].shard.axis == "ep"] += parameter.numel()
    dense, experts = held(model, tp=tp, ep=mesh.ep.size, world_size=world_size)
    assert (dense.whole, experts.whole) == (sizes[False], sizes[True])
    assert (dense.shard, experts.shard) == (-(-dense.whole // mesh.dp.size), -(-experts.whole // mesh.edp.size))


def storages(things: Iterable[object]) -> int:
    """Bytes of the distinct storages of tensors, in lists and dictionaries too."""
    found: dict[int, int] = {}
    todo = list(things)
    while todo:
        thing = todo.pop()
        if isinstance(thing, Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, (list, tuple)):
            todo += thing
        elif isinstance(thing, dict):
            todo += thing.values()
    return sum(found.values())


def states_of(context: RankContext, run: Run, layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of an engine's states, the largest that were seen after a backward pass of the second step, and what the formula says."""
    engine = build_engine(run, layout, ParallelMesh.build(tp=layout.tp, ep=layout.ep))
    zero, real_backward, seen = engine.zero, engine._backward, Counter()
    where = ("averaged_gradients", "all_grad_tensors", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer")

    def backward(loss: Tensor, *, last: bool) -> None:
        real_backward(loss, last=last)
        groups = [group["params"] for group in engine.optimizer.param_groups]
        flats = zero.fp32_partitioned_groups_flat if layout.zero_stage == 3 else [flat for group in groups for flat in group]
        parameters = list(engine.model.parameters())
        now = {
            "weights": storages(getattr(p, "ds_tensor", p.data) for p in parameters),
            "gradients": storages([*(p.grad for p in parameters), *(getattr(zero, name, None) for name in where)]),
            "masters": storages(flats) if layout.zero_stage else 0,
            "moments": storages(moment for flat in flats for moment in engine.optimizer.state[flat].values() if moment.ndim),
        }
        seen.update({what: max(0, size - seen[what]) for what, size in now.items()})

    engine._backward = backward
    train(engine, range(2), lr=run.lr)
    told = vars(estimate(run_config(run, layout), world_size=context.world_size))
    return dict(seen), {what: told[what] for what in seen}


@pytest.mark.parametrize(
    ("stage", "dtype", "grad_dtype"),
    [(0, "fp32", "fp32"), *((stage, *kind) for stage in (1, 2, 3) for kind in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "model")))],
)
def test_an_engine_keeps_the_states_that_the_formula_says(stage, dtype, grad_dtype):
    run = Run(optimizer="adamw", dtype=dtype, grad_dtype=grad_dtype, dense=stage == 0)
    layout = Layout(4, tp=2, ep=1 if stage == 0 else 2, zero_stage=stage)
    for seen, told in ranks.run_ranks(states_of, 4, run, layout):
        assert seen == pytest.approx(told, rel=0.03), "ZeRO rounds its shards up"


# ---- does it fit


def row5(**settings) -> RunConfig:
    """The paper's gated 15A2B."""
    return from_dict({**presets()["paper/table1/row05"].settings, **settings})


def test_a_run_that_needs_over_90_percent_is_refused():
    config = row5(**{"parallel.ep": 8})
    memory = estimate(config, world_size=8)
    needed = memory.total(recompute=True)
    check_fits(config, memory, world_size=8, gpu="h100-80gb")
    with pytest.raises(
        ConfigError, match=r"--gpu a100-40gb \(40 GB\) must hold the run in 90% .*\(36\.0 GB\).*needs \d+\.\d GB.*; spread it over"
    ):
        check_fits(config, memory, world_size=8, gpu="a100-40gb")
    for gpu, size in GPU_BYTES.items():
        fits = needed <= 0.9 * size
        with nullcontext() if fits else pytest.raises(ConfigError):
            check_fits(config, memory, world_size=8, gpu=gpu)
    assert 0.9 * 48e9 < needed < 48e9, "the l40s-48gb shows that it is 90 % and not all"


def test_the_remedy_is_recomputation_where_that_suffices():
    config = row5(**{"parallel.ep": 8, "train.recompute": False, "train.micro_batch_size": 2})
    memory = estimate(config, world_size=8)
    with pytest.raises(ConfigError, match=r"; set train\.recompute to true$"):
        check_fits(config, memory, world_size=8, gpu="h100-80gb")
    check_fits(replace(config, train=replace(config.train, recompute=True)), memory, world_size=8, gpu="h100-80gb")


SPREAD = r"spread it over more ranks \(parallel\.ep, parallel\.tp, parallel\.zero_stage\)"


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"train.recompute": True}, SPREAD),
        ({"train.recompute": True, "train.micro_batch_size": 2}, f"{SPREAD}, or lower train.micro_batch_size"),
        ({"train.recompute": True, "train.micro_batch_size": 0}, f"{SPREAD}, or set train.micro_batch_size to 1"),
        ({"train.recompute": True, "train.micro_batch_size": 0, "train.global_batch_size": 8}, SPREAD),
        ({"train.recompute": False}, f"set train.recompute to true and {SPREAD}"),
        ({"train.recompute": False, "train.micro_batch_size": 2}, f"set train.recompute to true and {SPREAD}, or lower .*"),
        ({"train.recompute": False, "train.seq_len": 16, "model.vocab_size": 1000}, SPREAD),
    ],
    ids=str,
)
def test_a_remedy_is_what_can_help(settings, remedy):
    """With 16 tokens to a sequence and few in the vocabulary the optimizer's step is the fullest moment, recomputed or not."""
    config = row5(**{"parallel.ep": 8, **settings})
    with pytest.raises(ConfigError, match=f"; {remedy}$"):
        check_fits(config, estimate(config, world_size=8), world_size=8, gpu="24")


def test_the_fullest_moment_is_not_the_sum_of_all_moments():
    memory = Memory(1, 2, 4, 8, buffers=16, step=100, kept=64, recomputed=32, kept_if_twice=0, recomputed_if_twice=0)
    assert (memory.total(recompute=False), memory.total(recompute=True)) == (15 + 100, 15 + 100)
    memory = replace(memory, step=50)
    assert (memory.total(recompute=False), memory.total(recompute=True)) == (15 + 80, 15 + 50)


def test_the_constants_are_those_of_the_code():
    """`plan` needs no torch, so it cannot import them."""
    assert (memory_module.LARGEST_BUCKET, activations.CHUNK_TOKENS) == (zero_config.LARGEST_BUCKET, loss.CHUNK_TOKENS)
    assert Micro(1, 1).row_multiple == native.NativeBackend(torch.device("cuda")).row_multiple


def test_shards_of_all_ranks_are_the_model():
    model = row5().model
    dense, experts = held(model, tp=1, ep=8, world_size=16)
    parts = count_parameters(model, padded=True).parts
    assert 16 * experts.shard == parts["experts"]
    assert 16 * dense.shard == sum(parts.values()) - parts["experts"]
