"""The job's small parts on their own."""

import gc
import json
import logging
import math
import os
import signal
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import ranks
import torch
from torch import Tensor, nn

from megagate.backend.native import NativeBackend
from megagate.checkpoint import store
from megagate.config.cli import parse, to_yaml
from megagate.config.count import flops_per_token
from megagate.config.keys import to_dict
from megagate.config.model import GateConfig
from megagate.config.run import OptimConfig, RunConfig, ScheduleConfig, TrainConfig
from megagate.engine.base import StepDetail, StepResult
from megagate.engine.optim import parameter_groups
from megagate.errors import CheckpointError, ConfigError, RunError
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.train.agree import everywhere, on_first
from megagate.train.certify import Followed
from megagate.train.folder import RunFolder, other_step
from megagate.train.job import _best_so_far, _resolved
from megagate.train.metrics import MetricsFile, Speed, WandbSink
from megagate.train.report import tell_learning
from megagate.train.saver import Saver
from megagate.train.schedule import learning_rate
from megagate.train.stop import StopSignal
from megagate.train.trainer import Position, Trainer

NANO = Path(__file__).parents[2] / "examples" / "configs" / "nano.yaml"


@pytest.fixture
def nano() -> RunConfig:
    return parse(["--config", str(NANO)], prog="test")


# ---- schedule


def schedule(steps: int, **settings: object) -> list[float]:
    config = RunConfig(train=TrainConfig(steps=steps), optim=OptimConfig(lr=1.0), schedule=ScheduleConfig(**settings))
    return [learning_rate(config, step) for step in range(1, steps + 1)]


def test_cosine() -> None:
    half = math.sqrt(0.5)
    assert schedule(6, kind="cosine", warmup_steps=2) == pytest.approx([0.5, 1, (1 + half) / 2, 0.5, (1 - half) / 2, 0])
    assert schedule(4, kind="cosine", min_lr=0.2) == pytest.approx([0.2 + 0.4 * (1 + c) for c in (half, 0, -half, -1)])


def test_wsd() -> None:
    assert schedule(8, kind="wsd", warmup_steps=2, decay_steps=4, min_lr=0.2) == pytest.approx([0.5, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert schedule(4, kind="wsd", decay_steps=4) == pytest.approx([0.75, 0.5, 0.25, 0])


def test_constant() -> None:
    assert schedule(4, kind="constant", warmup_steps=2, min_lr=0.2) == pytest.approx([0.5, 1, 1, 1])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_may_fill_the_run(kind: str) -> None:
    assert schedule(4, kind=kind, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1])


# ---- weight decay


def test_norms_and_biases_have_no_weight_decay(nano: RunConfig) -> None:
    mesh = ParallelMesh.single()
    backend = NativeBackend(torch.device("cpu"))
    named = list(LanguageModel(nano.model, dtype=torch.float32, backend=backend, mesh=mesh, recompute=False).named_parameters())
    name_of = {id(parameter): name for name, parameter in named}
    groups = parameter_groups(named, nano.optim)
    by_decay = {group["weight_decay"]: [name_of[id(parameter)] for parameter in group["params"]] for group in groups}
    assert set(by_decay) == {nano.optim.weight_decay, 0.0}
    decayed, rest = by_decay[nano.optim.weight_decay], by_decay[0.0]
    assert sorted(decayed + rest) == sorted(name_of.values())
    assert all("norm" not in name and not name.endswith("bias") for name in decayed)
    assert all("norm" in name or name.endswith("bias") for name in rest)
    kinds = ("embedding", "head", "gate.weight", "router", "experts")
    assert all(any(kind in name for name in decayed) for kind in kinds), decayed


def test_a_group_without_parameters_is_left_out() -> None:
    matrix = nn.Parameter(torch.zeros(2, 2))
    assert [group["name"] for group in parameter_groups([("w", matrix)], OptimConfig())] == ["decayed"]


# ---- metrics.jsonl


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_are_lines_that_any_json_reader_takes(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "skipped": True})
    file.close()
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert line == '{"step": 1, "loss": null, "grad_norm": null, "skipped": true}\n'


def test_a_record_is_on_the_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    file.write({"step": 1})
    assert steps_of(file.path) == [1]
    file.close()


def test_records_are_waited_for_where_a_checkpoint_is_to_follow(tmp_path: Path) -> None:
    file, synced = MetricsFile(tmp_path / "metrics.jsonl", last_step=0), []
    with patch.object(os, "fsync", lambda descriptor: synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)):
        file.sync()
        assert synced == [], "there is nothing"
        file.write({"step": 1})
        file.sync()
    file.close()
    assert synced == ["metrics.jsonl", tmp_path.name]


@pytest.mark.parametrize("tail", ["", "\n", '{"step": 3, "lo', '{"step": 3}\n{"step": 4}\n{"st', "\x00\x00\x00", "[]\n", '{"loss": 1}\n'])
def test_each_step_stands_there_once(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}' + ("\n" + tail if tail else ""), encoding="utf-8")
    file = MetricsFile(path, last_step=2)
    file.write({"step": 3})
    file.close()
    assert steps_of(path) == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_bytes_that_are_no_text_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n')
    file = MetricsFile(path, last_step=1)
    file.write({"step": 2})
    file.close()
    assert steps_of(path) == [1, 2]


def test_records_are_dropped_by_the_first_that_takes_their_place(tmp_path: Path) -> None:
    """A resume that is refused before leaves them; and the only copy is replaced by one that is on the disk."""
    path, synced, fsync = tmp_path / "metrics.jsonl", [], os.fsync
    path.write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
    file = MetricsFile(path, last_step=1)
    file.close()
    assert steps_of(path) == [1, 2]

    def record(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, steps_of(path)))
        fsync(descriptor)

    with patch.object(os, "fsync", record):
        file.write({"step": 2, "loss": 1.0})
    file.close()
    assert synced == [("metrics.jsonl.tmp", [1, 2]), (tmp_path.name, [1])] and steps_of(path) == [1, 2]


def test_weights_and_biases_is_not_started_before_the_first_record(tmp_path: Path, nano: RunConfig) -> None:
    WandbSink(replace(nano, wandb=replace(nano.wandb, mode="offline")), tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written"):
        MetricsFile(tmp_path / "metrics.jsonl", last_step=0)


# ---- the folder


def test_a_folder_is_of_one_config(tmp_path: Path, nano: RunConfig) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    folder.require_same_run(nano)
    folder.claim(nano)
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]
    folder.require_same_run(nano)
    once = replace(nano, checkpoint=replace(nano.checkpoint, on_mismatch="continue", every=7))
    folder.claim(once)
    assert parse(["--config", str(folder.config)], prog="test") == replace(once, checkpoint=replace(nano.checkpoint, every=7))
    gated = replace(nano.model.attention, gate=GateConfig(position="none"))
    other = replace(nano, model=replace(nano.model, attention=gated), optim=replace(nano.optim, lr=1.0))
    folder.metrics.touch()
    folder.require_same_run(other)  # a first try that did no step binds nobody
    folder.metrics.write_text('{"step": 1}\n')
    folder.require_same_run(nano)
    with pytest.raises(RunError) as error:
        folder.require_same_run(other)
    assert "optim.lr: 0.002 there, 1.0 here" in str(error.value)
    assert "model.attention.gate.position: G1 there, none here" in str(error.value)


def test_where_the_work_is_done_may_change(tmp_path: Path, nano: RunConfig) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(nano)
    folder.metrics.write_text('{"step": 1}\n')
    changes = {"parallel.tp": "2", "train.micro_batch_size": "4", "checkpoint.every": "1", "eval.every": "3", "train.recompute": "true"}
    argv = [f"--{key}={value}" for key, value in changes.items()]
    folder.require_same_run(parse(["--config", str(NANO), *argv], prog="test"))


def test_a_damaged_config_of_the_folder_is_a_clean_error(tmp_path: Path, nano: RunConfig) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n')
    folder.config.write_text(to_yaml(nano)[:-30] + "\n  [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        folder.require_same_run(nano)


def test_where_a_run_starts(tmp_path: Path, nano: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path / "run")

    def start(resume: str) -> Path | None:
        return folder.starting_point(replace(nano, train=replace(nano.train, resume=resume)))

    def complete(root: Path, step: int) -> Path:
        place = root / f"step-{step:08d}"
        place.mkdir(parents=True)
        (place / "index.json").write_text("{}", encoding="utf-8")
        return place

    assert start("auto") is start("never") is None
    with pytest.raises(CheckpointError, match="does not exist"):
        start(str(tmp_path / "elsewhere"))
    elsewhere = complete(tmp_path / "elsewhere", 4)
    assert start(str(tmp_path / "elsewhere")) == start(str(elsewhere)) == elsewhere
    (folder.checkpoints / "step-00000009.tmp").mkdir(parents=True)
    assert start("auto") is None, "an unfinished save is none"
    own = complete(folder.checkpoints, 2)
    with caplog.at_level(logging.INFO, "megagate"):
        assert start("auto") == start(str(folder.path)) == start(str(folder.checkpoints)) == start(str(own)) == own
        assert not caplog.records, "they are what the run goes on from"
        assert start(str(elsewhere)) == own
    assert f"train.resume ({elsewhere}) is not read" in caplog.text and "from its own step-00000002" in caplog.text
    fresh = RunFolder(tmp_path / "fresh")
    named = replace(nano, train=replace(nano.train, resume=str(folder.path)))
    assert fresh.starting_point(named) == own, "a run is named by its folder too"
    with pytest.raises(RunError, match="train.resume is never"):
        start("never")
    newest = complete(folder.checkpoints, 3)
    (tmp_path / "link").symlink_to(folder.checkpoints)
    for older in (own, tmp_path / "link" / own.name):
        with pytest.raises(RunError, match=rf"goes on from its newest, {newest.name}; .* --train.output_dir ANOTHER --train.resume {own}"):
            start(str(older))
    with pytest.raises(CheckpointError, match="step-00000009 does not exist"):
        start(str(folder.checkpoints / "step-00000009"))
    assert fresh.starting_point(replace(nano, train=replace(nano.train, resume=str(own)))) == own, "the remedy"
    first = complete(folder.checkpoints, 1)
    assert other_step(newest, 3) == f"--train.output_dir ANOTHER --train.resume {own}"
    assert other_step(first, 1).endswith(own.name), "where there is none before it, the next"
    assert "has no other" in other_step(elsewhere, 4)


# ---- agreement


def fail_in(context: RankContext, failing: tuple[int, ...]) -> tuple[str, str]:
    """What a rank sees of an action that fails in some ranks; and that all are still together."""
    world = ParallelMesh.build(tp=1, ep=1).world

    def action() -> str:
        if context.rank in failing:
            raise RunError(f"rank {context.rank} is full")
        return f"value {context.rank}"

    try:
        first = everywhere(world, action)
    except RunError as error:
        first = str(error)
    return first, everywhere(world, lambda: f"again {context.rank}")


@pytest.mark.parametrize("failing", [(), (0,), (1,), (0, 1)])
def test_an_error_of_one_rank_is_known_to_all(failing: tuple[int, ...]) -> None:
    found = ranks.run_ranks(fail_in, 2, failing)
    first = [f"rank {failing[0]} is full"] * 2 if failing else ["value 0", "value 1"]
    assert found == [(first[rank], f"again {rank}") for rank in (0, 1)]


class _Group:
    """What a frame of a failed start-up holds, as process groups."""


def test_an_error_that_is_over_keeps_nothing_alive() -> None:
    """Process groups that live until Python ends abort it: the launcher then told exit code -6 instead of 2, one time in seven."""

    def start() -> weakref.ref[_Group]:
        group = _Group()
        with suppress(RunError):
            everywhere(Axis("world"), lambda: fail(f"no room for {group}"))
        return weakref.ref(group)

    gc.disable()
    try:
        assert start()() is None
    finally:
        gc.enable()


def full_disk_in(context: RankContext, failing: int) -> str:
    world = ParallelMesh.build(tp=1, ep=1).world

    def write() -> None:
        if context.rank == failing:
            raise OSError(5, "Input/output error", "/shared/file")

    try:
        everywhere(world, write)
    except RunError as error:
        return str(error)
    return "nothing"


def test_an_error_of_one_ranks_disk_is_known_to_all() -> None:
    found = ranks.run_ranks(full_disk_in, 2, 1)
    assert found[0] == found[1] and "Input/output error: '/shared/file' (rank 1)" in found[0]


@pytest.mark.parametrize(("given", "device", "numbers"), [("auto", "cpu", "fp32"), ("auto", "cuda", "bf16"), ("fp32", "cuda", "fp32")])
def test_precision_is_decided_once(given: str, device: str, numbers: str, nano: RunConfig) -> None:
    config = replace(nano, precision=replace(nano.precision, dtype=given))
    assert _resolved(config, torch.device(device)) == replace(nano, precision=replace(nano.precision, dtype=numbers))


@pytest.mark.parametrize(
    ("key", "value"), [("path", "/other"), ("valid", "other=/other"), ("attention", "document"), ("cache_dir", "/disk")]
)
def test_the_lowest_loss_is_of_the_same_text(key: str, value: str, nano: RunConfig) -> None:
    metadata = {"config": to_dict(nano), "best_val_loss": 2.5}
    assert _best_so_far(metadata, nano) == 2.5
    other = replace(nano, data=replace(nano.data, **{key: value}))
    assert _best_so_far(metadata, other) == (2.5 if key == "cache_dir" else None)


def only_the_first(context: RankContext) -> tuple[str | None, str]:
    world = ParallelMesh.build(tp=1, ep=1).world
    value = on_first(world, lambda: f"rank {context.rank}")
    try:
        on_first(world, lambda: fail(f"rank {context.rank} failed"))
    except RunError as error:
        return value, str(error)
    return value, "no error"


def fail(message: str) -> None:
    raise RunError(message)


def test_the_first_rank_acts_for_all() -> None:
    assert ranks.run_ranks(only_the_first, 2) == [("rank 0", "rank 0 failed"), (None, "rank 0 failed")]


def test_a_bug_is_no_error_of_the_users() -> None:
    with pytest.raises(KeyError):
        everywhere(Axis("world"), lambda: {}["missing"])


def failing_save(context: RankContext, root: str, config: RunConfig, what: str, failing: int, beside: bool) -> tuple[str, list[str]]:
    """A save of which a part fails in one rank: what each is told, and what is left on the disk. `beside`: written while steps go on."""
    mesh = ParallelMesh.build(tp=1, ep=1)
    saver = Saver(Path(root), config=config, mesh=mesh, order=lambda samples: {"order": "it", "samples": samples})
    weight = torch.zeros(1)
    model, optimizer = SimpleNamespace(embedding=SimpleNamespace(weight=weight)), torch.optim.SGD([weight])
    engine = SimpleNamespace(
        state_pieces=lambda: iter(()), state_names=[], kinds=(), applied_steps=1, mesh=mesh, model=model, optimizer=optimizer
    )
    saver.save(engine, step=3, best_val_loss=None, last=True)
    part = getattr(store, what)

    def act(*arguments: Any, **settings: Any) -> Any:
        if context.rank == failing:
            raise RunError(f"no space in rank {failing}")
        return part(*arguments, **settings)

    with patch.object(store, what, act):
        try:
            saver.save(engine, step=5, best_val_loss=None, last=not beside)
            assert beside, "a save that is waited for tells its error at once"
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                saver.poll()
        except RunError as error:
            on_first(mesh.world, lambda: None)  # all are still together
            assert not optimizer._optimizer_step_pre_hooks, "nothing waits for the fingerprint any more"
            return str(error), sorted(path.name for path in Path(root).iterdir())
    return "saved", []


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(("what", "failing", "left"), [("write_rank", 0, []), ("write_rank", 1, []), ("publish", 0, ["step-00000005.tmp"])])
def test_a_save_that_fails_in_one_rank_fails_in_all(
    tmp_path: Path, nano: RunConfig, what: str, failing: int, left: list[str], beside: bool
) -> None:
    """And the only complete checkpoint stays, though `checkpoint.keep` is 1."""
    config = replace(nano, checkpoint=replace(nano.checkpoint, keep=1))
    found = ranks.run_ranks(failing_save, 2, str(tmp_path), config, what, failing, beside)
    assert found == [(f"no space in rank {failing}", ["latest", "step-00000003", *left])] * 2


def signalled(context: RankContext) -> tuple[int, int]:
    """SIGTERM in rank 1 alone, then a second signal; handlers are given back."""
    world = ParallelMesh.build(tp=1, ep=1).world
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        nothing = stop.agreed(world, torch.device("cpu"))
        if context.rank == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        asked = stop.agreed(world, torch.device("cpu"))
    assert signal.getsignal(signal.SIGTERM) is before
    return nothing, asked


def test_a_signal_to_one_rank_is_known_to_all() -> None:
    assert ranks.run_ranks(signalled, 2) == [(0, signal.SIGTERM)] * 2


# ---- speed


def test_work_is_counted_by_the_length_that_attention_needs(nano: RunConfig) -> None:
    """A step of two ranks in 4 s: whole windows as the count of the model says, documents of half that mean length that much less."""
    speed, length = Speed(nano, world_size=2, device=torch.device("cpu")), nano.train.seq_len
    tokens = nano.train.global_batch_size * length
    for context in (length, length / 2, 10.25):
        record = speed.fields(4.0, context=context)
        rest = 6 * nano.model.num_layers * nano.model.attention.num_heads * nano.model.attention.head_dim * (length - context)
        assert record["tflops_per_device"] * 1e12 * 2 * 4 == pytest.approx((flops_per_token(nano.model, length) - rest) * tokens, rel=1e-12)
        assert record["tokens_per_second"] == tokens / 4


# ---- the loop


class Steps:
    """Stands in for engine, loader, saver and sink of a loop: counts, and raises SIGTERM within one step, validation batch or save."""

    def __init__(
        self, *, signal_at: int = 0, signal_in_batch: int = 0, signal_in_save: int = 0, bug_at: int = 0, val_losses: tuple[float, ...] = ()
    ):
        self.signal_at, self.val_losses, self.bug_at = signal_at, list(val_losses), bug_at
        self.signal_in_batch, self.signal_in_save, self.batches, self.finished, self.abandoned = signal_in_batch, signal_in_save, 0, 0, 0
        self.mesh, self.model = ParallelMesh.single(), SimpleNamespace(embedding=SimpleNamespace(weight=torch.zeros(1)))
        self.taken, self.saved, self.records, self.waited_for, self.on_disk = 0, [], [], [], 0
        self.told: list[bool] = []  # whether each step was to tell more

    def step(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(tokens=np.array([index]), labels=np.array([index]))

    def train_step(self, tokens: Tensor, labels: Tensor, *, lr: float, detailed: bool) -> StepResult:
        self.told.append(detailed)
        self.taken += 1
        if self.taken == self.bug_at:
            raise ZeroDivisionError
        if self.taken == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        detail = StepDetail({"gate": 0.5}, ((1.0, 3.0),) * 2) if detailed else None
        return StepResult(loss=float(tokens[0]), targets=1, context=8.0, grad_norm=1.0, applied=True, aux=None, detail=detail)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.step(0)] * 3)

    def evaluate(self, batches: Iterable[object]) -> float:
        for _ in batches:
            self.batches += 1
            if self.batches == self.signal_in_batch:
                signal.raise_signal(signal.SIGTERM)
        return self.val_losses.pop(0) if self.val_losses else 9.0

    def samples(self, index: int) -> np.ndarray:
        return np.array([[index]])

    def follow(self, engine: object, followed: Followed) -> None:
        assert followed.samples == followed.step - 1 == followed.batch.tokens

    def poll(self) -> None:
        """No save of a stand-in is ever in flight."""

    def finish(self) -> None:
        self.finished += 1

    def abandon(self) -> None:
        self.abandoned += 1

    def stall(self) -> dict[str, float]:
        return {}

    def save(self, engine: object, *, step: int, best_val_loss: float | None, best: bool, last: bool) -> None:
        assert self.on_disk == len(self.records), "the records of a checkpoint's steps are on the disk before it"
        self.saved.append((step, best_val_loss, best))
        self.waited_for.append(last)
        if len(self.saved) == self.signal_in_save:
            signal.raise_signal(signal.SIGTERM)

    def write(self, record: dict[str, Any]) -> None:
        self.records.append((record["step"], record["loss"], record.get("val_loss")))

    def sync(self) -> None:
        self.on_disk = len(self.records)

    def run(self, config: RunConfig, first: Position = Position()) -> tuple[Position, int]:  # noqa: B008
        folder = RunFolder(Path("nowhere"))
        return Trainer(config, engine=self, train=self, valid={"": self}, saver=self, folder=folder, sinks=[self]).run(first)


class Batches:
    """A validation set of so many targets, and of no batches."""

    def __init__(self, targets: int):
        self.targets = targets

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def loop(nano: RunConfig, *, steps: int, checkpoint: int = 0, evaluate: int = 0) -> RunConfig:
    train, every = replace(nano.train, steps=steps), replace(nano.checkpoint, every=checkpoint)
    return replace(nano, train=train, checkpoint=every, eval=replace(nano.eval, every=evaluate))


def test_when_the_loop_validates_and_saves(nano: RunConfig) -> None:
    stand_in = Steps(val_losses=(3.0, 2.0, 2.5, 2.2))
    position, asked = stand_in.run(loop(nano, steps=7, checkpoint=3, evaluate=2))
    assert (position.step, position.best_val_loss, asked) == (7, 2.0, 0)
    assert stand_in.saved == [(2, 3.0, True), (3, 3.0, False), (4, 2.0, True), (6, 2.0, False), (7, 2.0, False)]
    assert stand_in.waited_for == [False] * 4 + [True], "only the last save may not run on beside training"
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 7: 2.2}
    assert stand_in.records == [(step, step - 1.0, losses.get(step)) for step in range(1, 8)]


def test_a_validation_that_is_not_a_number_is_never_the_best(nano: RunConfig) -> None:
    nan = float("nan")
    stand_in = Steps(val_losses=(nan, 3.0, nan, 4.0))
    position, _ = stand_in.run(loop(nano, steps=4, evaluate=1))
    assert stand_in.saved == [(2, 3.0, True), (4, 3.0, False)]
    assert (position.best_val_loss, position.is_best) == (3.0, False)
    valid = {"": SimpleNamespace(target_counts=lambda size: np.ones(size, dtype=np.int64))}
    strict = replace(nano, eval=replace(nano.eval, min_gain_nats=1.0))
    assert [tell_learning(strict, val_loss=loss, valid=valid) for loss in (nan, 6.0, 5.0)] == [False, False, True]


def test_validation_sets_are_told_by_name_and_together(nano: RunConfig) -> None:
    stand_in = Steps(val_losses=(2.0, 3.0))
    valid = {"old": Batches(100), "new": Batches(300)}
    config = loop(nano, steps=1)
    trainer = Trainer(config, engine=stand_in, train=stand_in, valid=valid, saver=stand_in, folder=RunFolder(Path("nowhere")), sinks=[])
    assert trainer.validate() == {"val_loss": 2.75, "val_loss/old": 2.0, "val_loss/new": 3.0}
    stand_in.val_losses = [2.5]
    trainer.valid = {"only": Batches(7)}
    assert trainer.validate() == {"val_loss": 2.5, "val_loss/only": 2.5}


def test_the_loop_goes_on_where_it_was(nano: RunConfig) -> None:
    stand_in = Steps(val_losses=(2.5, 2.0))
    position, _ = stand_in.run(loop(nano, steps=6, evaluate=2), Position(3, best_val_loss=2.2))
    assert stand_in.records == [(4, 3.0, 2.5), (5, 4.0, None), (6, 5.0, 2.0)]
    assert stand_in.saved == [(6, 2.0, True)] and position.step == 6


def test_a_signal_saves_after_the_step_without_its_validation(nano: RunConfig) -> None:
    stand_in = Steps(signal_at=4, val_losses=(3.0, 4.0))
    position, asked = stand_in.run(loop(nano, steps=7, evaluate=2))
    assert (position.step, asked) == (4, signal.SIGTERM)
    assert stand_in.records[-1] == (4, 3.0, None) and stand_in.saved[-1] == (4, 3.0, False) and stand_in.waited_for[-1]


@pytest.mark.parametrize("batch", [7, 8, 9])
def test_a_signal_in_a_validation_ends_it(nano: RunConfig, batch: int) -> None:
    """The third, of three batches, at step 6: after the batch under way the state is saved, without another step."""
    stand_in = Steps(signal_in_batch=batch, val_losses=(3.0, 4.0, 2.0))
    position, asked = stand_in.run(loop(nano, steps=9, evaluate=2))
    assert (position.step, asked, stand_in.batches) == (6, signal.SIGTERM, batch)
    assert stand_in.records[-1] == (6, 5.0, None) and stand_in.saved == [(2, 3.0, True), (6, 3.0, False)]
    assert stand_in.waited_for == [False, True]


def test_a_signal_during_a_copy_waits_for_that_save_alone(nano: RunConfig) -> None:
    stand_in = Steps(signal_in_save=2)
    position, asked = stand_in.run(loop(nano, steps=9, checkpoint=3))
    assert (position.step, asked) == (6, signal.SIGTERM)
    assert [step for step, _, _ in stand_in.saved] == [3, 6] and stand_in.waited_for == [False, False] and stand_in.finished == 1


def test_a_bug_lets_the_threads_of_its_rank_come_to_their_end(nano: RunConfig) -> None:
    stand_in = Steps(bug_at=3)
    with pytest.raises(ZeroDivisionError):
        stand_in.run(loop(nano, steps=9))
    assert (stand_in.abandoned, stand_in.finished) == (1, 0), "finishing takes all ranks"


def test_a_signal_in_the_last_step_changes_nothing(nano: RunConfig) -> None:
    stand_in = Steps(signal_at=3)
    assert stand_in.run(loop(nano, steps=3)) == (Position(3, 9.0, 9.0), 0)
    assert stand_in.saved == [(3, 9.0, True)]


def test_the_best_position() -> None:
    assert not Position().is_best
    assert Position(step=3, best_val_loss=2.0, val_loss=2.0).is_best
    assert not Position(step=3, best_val_loss=1.5, val_loss=2.0).is_best
    assert not Position(step=3, best_val_loss=1.5).is_best
