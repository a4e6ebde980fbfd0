"""Looks at a model in training: what they say in every layout, beside a dense reference, and that nothing of the training notices them."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import ranks
import torch
from parity.engines import Layout, Run, batch, build_engine, run_config
from test_train_parts import Steps, loop
from torch import Tensor
from torch.nn import functional as F
from train_jobs import NANO

from megagate.checkpoint.saved_model import PRECISION_STATE
from megagate.config.cli import parse
from megagate.config.run import ObserveConfig, RunConfig
from megagate.engine.base import Engine, StepResult
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.train.folder import RunFolder
from megagate.train.metrics import MetricsFile, Record
from megagate.train.observe import Observer, load_fields
from megagate.train.trainer import Position, Trainer

EXACT_TO = 1e-5
QUERIES, STEPS = 5, 2
EOD = 0


@dataclass(frozen=True)
class Case:
    """What is trained and looked at."""

    run: Run = Run()  # noqa: RUF009  frozen
    layout: Layout = Layout()  # noqa: RUF009
    documents: bool = False

    def __str__(self) -> str:
        words = [str(self.layout), self.run.dtype, self.run.fp8, "dense" if self.run.dense else ""]
        words += ["recompute" if self.run.recompute else "", "documents" if self.documents else ""]
        return " ".join(word for word in words if word not in ("", "none", "fp32"))

    @property
    def config(self) -> RunConfig:
        return replace(run_config(self.run, self.layout), observe=ObserveConfig(every=1, queries=QUERIES))


CASES = [
    Case(layout=Layout(4, tp=4, ep=2)),  # more tensor-parallel ranks than key/value heads
    Case(layout=Layout(4, tp=2, ep=4, zero_stage=2), documents=True),
    Case(layout=Layout(4, tp=2, ep=2, zero_stage=3), run=Run(recompute=True)),
    Case(layout=Layout(2, ep=2, zero_stage=3), documents=True),
    Case(layout=Layout(2, tp=2, zero_stage=0), run=Run(dense=True)),
]
NUMBERS_APART = [
    Case(layout=Layout(2, tp=2, ep=2), run=Run(dtype="bf16", recompute=True)),
    Case(layout=Layout(2, ep=2, zero_stage=3), run=Run(dtype="bf16")),
    Case(layout=Layout(2, tp=2, ep=2), run=Run(fp8="delayed", recompute=True)),
    Case(layout=Layout(2, ep=2), run=Run(fp8="delayed", dtype="bf16"), documents=True),
    Case(layout=Layout(1), run=Run(fp8="delayed")),
]
"""Whose rounding depends on the layout."""


class Watched(NamedTuple):
    """Some steps with looks, and without.

    Args:
        records: What was found at each.
        steps: Their results, without detail.
        silent: Of the same steps without looks and without detail.
        same: Whether all of this rank's state is the same in the end, bit for bit.
        kept: Tensors of that state that FP8's scaling keeps, where there are any on this rank.
    """

    records: list[Record]
    steps: list[StepResult]
    silent: list[StepResult]
    same: bool
    kept: int


def watched(context: RankContext | None, case: Case) -> Watched:
    mesh = ParallelMesh.build(tp=case.layout.tp, ep=case.layout.ep) if context else ParallelMesh.single()
    seeing, blind = made(case, mesh), made(case, mesh)
    observer = Observer(case.config, seeing)
    records, steps, silent = [], [], []
    for number in range(STEPS):
        tokens, labels = text(number, mesh, documents=case.documents)
        record = observer.look(tokens[0], labels[0])
        observer.look(tokens[-1], labels[-1])  # whose amaxes would not be those that the first micro-step has anyway
        step = seeing.train_step(tokens, labels, lr=case.run.lr, detailed=True)
        records.append(record | observer.detail_fields(step.detail))
        steps.append(step._replace(detail=None))
        silent.append(blind.train_step(tokens, labels, lr=case.run.lr))
    pairs = list(zip(seeing.state_pieces(), blind.state_pieces(), strict=True))
    same = all(a.name == b.name and torch.equal(a.tensor, b.tensor) for a, b in pairs)
    return Watched(records, steps, silent, same, sum(a.name.startswith(PRECISION_STATE) for a, _ in pairs))


def made(case: Case, mesh: ParallelMesh) -> Engine:
    engine = build_engine(case.run, case.layout, mesh)
    engine.model.eod_id = EOD if case.documents else None
    return engine


def text(number: int, mesh: ParallelMesh, *, documents: bool) -> tuple[Tensor, Tensor]:
    tokens, labels = batch(number, mesh)
    return (torch.where(tokens % 5 == 0, EOD, tokens) if documents else tokens), labels


@lru_cache
def alone(case: Case) -> Watched:
    return watched(None, replace(case, layout=Layout()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_records_are_those_of_one_process_and_steps_do_not_notice(case: Case) -> None:
    found, one = ranks.run_ranks(watched, case.layout.world_size, case), alone(replace(case, run=replace(case.run, recompute=False)))
    for rank in found:
        assert rank.steps == rank.silent and rank.same
        for record, expected in zip(rank.records, one.records, strict=True):
            assert list(record) == list(expected)
            assert without_clock(record) == pytest.approx(without_clock(expected), rel=EXACT_TO)
        assert without_clock(rank.records[0]) == without_clock(found[0].records[0]), "ranks tell different numbers"


@pytest.mark.parametrize("case", NUMBERS_APART, ids=str)
def test_steps_do_not_notice_in_low_precision(case: Case) -> None:
    """Bit for bit, FP8's histories and scales included, which the next steps would show."""
    found = ranks.run_ranks(watched, case.layout.world_size, case)
    for rank in found:
        assert rank.steps == rank.silent and rank.same
        assert all(math.isfinite(value) for record in rank.records for value in record.values())
    assert (case.run.fp8 == "delayed") == (sum(rank.kept for rank in found) > 0), "whether histories were compared"


def without_clock(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "observe_seconds"}


# ---- a dense reference


@pytest.mark.parametrize("case", [Case(), Case(documents=True), Case(run=Run(dense=True))], ids=str)
def test_one_process_says_what_a_dense_reference_says(case: Case) -> None:
    """Before the first step; layers apart and together."""
    record, engine = alone(case).records[0], made(case, ParallelMesh.single())
    layers = dense(engine, text(0, engine.mesh, documents=case.documents)[0][0])
    expected = {f"{key}/{number}": value for number, layer in enumerate(layers) for key, value in layer.items()}
    joined = {
        **dict.fromkeys(("gate_mean", "gate_below_0.1", "first_token_attention", "uniform_attention", "router_entropy"), fmean),
        **dict.fromkeys(("gate_dead_heads", "gate_saturated_heads"), sum),
        **dict.fromkeys(("attention_logit_max", "hidden_max"), max),
        "hidden_max_channel": lambda channels: channels[max((0, 1), key=lambda number: layers[number]["hidden_max"])],
    }
    expected |= {key: join([layer[key] for layer in layers]) for key, join in joined.items() if key in layers[0]}
    told = {key: value for key, value in record.items() if not key.startswith(("expert_load", "grad_norm", "observe_seconds"))}
    assert told == pytest.approx(expected, rel=1e-6)
    assert 0 < record["gate_below_0.1"] < 0.1 and record["hidden_max/0"] != record["hidden_max/1"]


def dense(engine: Engine, tokens: Tensor) -> list[dict[str, float]]:
    """By whole attention matrices in fp64."""
    layers: list[dict[str, float]] = []
    starts = [[max([0, *(i + 1 for i in range(t) if row[i] == EOD)]) for t in range(len(row))] for row in tokens.tolist()]
    starts = torch.tensor(starts) if engine.model.eod_id is not None else torch.zeros_like(tokens)
    with dense_hooks(engine) as seen:
        engine.model.eval()(tokens, tokens)
    for one in seen:
        q, k = one["q"].double(), one["k"].double()
        scores = torch.einsum("bqnd,bknd->bnqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * q.shape[-1] ** -0.5
        place = torch.arange(tokens.shape[1])
        visible = (place[None, None, :] <= place[None, :, None]) & (place[None, None, :] >= starts[:, :, None])  # [b, q, k]
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        rows = torch.tensor([(i + 1) * len(place) // QUERIES - 1 for i in range(QUERIES)])
        first = scores.softmax(-1).gather(-1, starts[:, None, :, None].expand(*scores.shape[:3], 1)).squeeze(-1)[:, :, rows]
        later = (rows > starts[:, rows])[:, None].expand_as(first)
        uniform = (1 / visible.sum(-1).double())[:, rows][:, None].expand_as(first)
        gate = one["gate"].double().sigmoid()
        of_heads = gate.mean((0, 1, 3))
        hidden = one["hidden"].double().abs()
        layer = {
            "gate_mean": gate.mean().item(),
            "gate_below_0.1": (gate < 0.1).double().mean().item(),
            "gate_dead_heads": int((of_heads < 0.01).sum()),
            "gate_saturated_heads": int((of_heads > 0.99).sum()),
            "first_token_attention": first[later].mean().item(),
            "uniform_attention": uniform[later].mean().item(),
            "attention_logit_max": scores[:, :, rows].max().item(),
            "hidden_max": hidden.max().item(),
            "hidden_max_channel": int(hidden.flatten(0, 1).amax(0).argmax()),
        }
        if "router" in one:
            share = one["router"].double()
            layer["router_entropy"] = -(share.softmax(-1) * share.log_softmax(-1)).sum(-1).mean().item()
        layers.append(layer)
    return layers


@contextmanager
def dense_hooks(engine: Engine) -> Iterator[list[dict[str, Tensor]]]:
    """What goes into attention, gate and router of each block, and what the block gives."""
    seen: list[dict[str, Tensor]] = [{} for _ in engine.model.layers]
    heads = engine.config.model.attention.num_heads
    handles = []
    for one, block in zip(seen, engine.model.layers, strict=True):

        def at_attention(_: Any, args: tuple[Any, ...], one: dict[str, Tensor] = one) -> None:
            one.update(q=args[0].detach(), k=args[1].detach())

        def at_gate(_: Any, args: tuple[Any, ...], one: dict[str, Tensor] = one) -> None:
            one["gate"] = args[1].detach().reshape(*args[1].shape[:2], heads, -1)

        def at_router(router: Any, args: tuple[Any, ...], one: dict[str, Tensor] = one) -> None:
            one["router"] = F.linear(args[0], router.weight).detach()

        def at_end(_: Any, __: Any, out: Any, one: dict[str, Tensor] = one) -> None:
            one["hidden"] = out[0].detach()

        handles += [block.attention.attend.register_forward_pre_hook(at_attention), block.register_forward_hook(at_end)]
        handles.append(block.attention.gate.register_forward_pre_hook(at_gate))
        if block.is_moe:
            handles.append(block.moe.router.register_forward_pre_hook(at_router))
    yield seen
    for handle in handles:
        handle.remove()


def test_a_look_is_one_pass_of_a_validation() -> None:
    case, modes = Case(run=Run(recompute=True)), []
    engine = made(case, ParallelMesh.single())
    tokens, labels = text(0, engine.mesh, documents=False)
    handle = engine.model.layers[1].register_forward_hook(lambda block, *_: modes.append((block.training, torch.is_grad_enabled())))
    Observer(case.config, engine).look(tokens[0], labels[0])
    handle.remove()
    assert modes == [(False, False)] and engine.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.model.modules()), "taps are taken away"


def test_a_look_takes_the_first_micro_batch_of_all_ranks() -> None:
    """Not the whole step's tokens, and not those of one rank."""
    case = Case(layout=Layout(2))
    both = [rank.records[0]["hidden_max"] for rank in ranks.run_ranks(watched, 2, case)]
    assert both[0] == both[1] == pytest.approx(alone(Case()).records[0]["hidden_max"], rel=EXACT_TO)


def test_loads_are_of_the_whole_step() -> None:
    """Of both its micro-steps: the share of rows of the fullest expert, beside a count of all routed rows."""
    case, mesh = Case(), ParallelMesh.single()
    engine = made(case, mesh)
    tokens, _ = text(0, mesh, documents=False)
    counts = torch.zeros(2, 8)
    for micro in tokens:
        for layer, stats in enumerate(engine.model.eval()(micro, micro).stats):
            counts[layer] += stats.counts.sum(0)
    record, share = alone(case).records[0], counts / counts.mean(1, keepdim=True)
    assert [record[f"expert_load_max/{layer}"] for layer in (0, 1)] == pytest.approx(share.amax(1).tolist(), rel=1e-6)
    assert (record["expert_load_max"], record["expert_load_min"]) == pytest.approx((share.max().item(), share.min().item()), rel=1e-6)
    assert load_fields({}) == {}


# ---- records


def test_a_model_that_is_not_finite_is_recorded_as_json_can(tmp_path: Path) -> None:
    case, mesh = Case(), ParallelMesh.single()
    engine = made(case, mesh)
    with torch.no_grad():
        engine.model.layers[1].attention.gate.weight.fill_(torch.nan)
    tokens, labels = text(0, mesh, documents=False)
    observer = Observer(case.config, engine)
    record = observer.look(tokens[0], labels[0])
    step = engine.train_step(tokens, labels, lr=0.1, detailed=True)
    assert not step.applied
    record |= observer.detail_fields(step.detail)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    metrics.write({"step": 1} | record)
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    read = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(read) == ["step", *alone(case).records[0]], "the same keys as of a sound model"
    assert read["gate_mean/0"] is not None and read["gate_mean/1"] is read["gate_mean"] is read["hidden_max"] is None
    assert read["grad_norm/gate"] is None


def test_what_a_model_does_not_have_is_not_recorded() -> None:
    dense_keys, moe_keys = (set(alone(Case(run=Run(dense=is_dense))).records[0]) for is_dense in (True, False))
    assert not any("router" in key or "expert" in key for key in dense_keys)
    assert {"router_entropy/1", "expert_load_max", "grad_norm/router", "grad_norm/experts"} <= moe_keys
    assert moe_keys - dense_keys == {key for key in moe_keys if "router" in key or "expert" in key} | {"grad_norm/head"}
    assert "grad_norm/ffn" in dense_keys


def test_steps_to_look_at() -> None:
    config = Case().config
    for every, expected in ((0, []), (1, list(range(1, 9))), (3, [3, 6])):
        observer = Observer(replace(config, observe=ObserveConfig(every)), made(Case(), ParallelMesh.single()))
        assert [step for step in range(1, 9) if observer.due(step)] == expected


# ---- the loop


class Looks(Observer):
    """Finds the tokens that it is shown, and the steps done by then, and says that it took -1000 s."""

    def look(self, tokens: Tensor, labels: Tensor) -> dict[str, Any]:
        assert torch.equal(tokens, labels)
        return {"tokens_seen": tokens.tolist(), "steps_done": self.engine.taken, "observe_seconds": -1000.0}


def test_looks_see_the_first_micro_batch_before_their_step_and_are_no_part_of_its_time() -> None:
    stand_in, found = Steps(), []
    stand_in.step = lambda index: SimpleNamespace(tokens=np.array([index, -1]), labels=np.array([index, -1]))
    stand_in.follow, stand_in.write = lambda engine, followed: None, found.append
    nano = parse(["--config", str(NANO)], prog="test")
    config = replace(loop(nano, steps=7), observe=ObserveConfig(every=3))
    parts = {"engine": stand_in, "train": stand_in, "valid": {}, "saver": stand_in, "sinks": [stand_in]}
    trainer = Trainer(config, folder=RunFolder(Path("nowhere")), **parts)
    trainer.observer = Looks(config, stand_in)
    trainer.run(Position())
    assert stand_in.told == [False, False, True, False, False, True, False]
    assert [(record.get("tokens_seen"), record.get("steps_done")) for record in found[2::3]] == [(2, 2), (5, 5)]
    for record in found:
        assert (record["step_seconds"] > 900) == ("grad_norm/gate" in record) == (record["step"] % 3 == 0) == ("tokens_seen" in record)
