"""Which class is chosen, and what is refused: one message that names value, rule and remedy, and nothing is left behind."""

import ctypes
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from checkpoint_helpers import contents
from hf_exports import CASES, DENSE, ELEMENTWISE, FORCED, HEADWISE, MOE, STEP, gated, language_model, masters, moe, run_config, save
from parity.variants import VARIANTS
from safetensors.torch import load_file

from megagate.checkpoint import store
from megagate.checkpoint.hf import export as export_module
from megagate.checkpoint.hf.export import Export, export
from megagate.checkpoint.hf.table import Target
from megagate.checkpoint.hf.targets import REMOTE, TRANSFORMERS, Format, choose, explain, reasons, remarks, select
from megagate.config.model import GateConfig, ModelConfig, SwitchConfig
from megagate.errors import CheckpointError, ConfigError, MegagateError, RunError

SANDWICH = replace(DENSE, sandwich_norm=True)


# ---- the choice


def test_formats_are_the_targets_and_two_words() -> None:
    assert get_args(Format) == ("auto", "stock", *get_args(Target)) and set(TRANSFORMERS) == set(get_args(Target))


@pytest.mark.parametrize("name", CASES)
def test_auto_and_stock_take_the_preferred_class(name: str) -> None:
    model, target = CASES[name]
    assert select(model, "auto", installed="5.23.0") == select(model, "stock", installed=None) == choose(model) == target
    assert select(model, REMOTE, installed="4.53.0") == REMOTE
    assert explain(model, target).startswith(f"the class {target}, which holds the model exactly; transformers {TRANSFORMERS[target]}")
    assert f"(asked for, though {target} holds the model too)" in explain(model, REMOTE)


@pytest.mark.parametrize(
    ("model", "target", "why"),
    [
        (MOE, "qwen3", ["model.moe.num_experts (8): the class is dense"]),
        (gated(DENSE, HEADWISE), "qwen3", ["model.attention.gate.position (G1): the class has no gate"]),
        (SANDWICH, "qwen3", ["model.sandwich_norm (true): the class has no norms behind"]),
        (DENSE, "qwen3_moe", ["model.moe.num_experts (0): the class is of mixtures"]),
        (moe(shared_ffn_size=8), "qwen3_moe", ["model.moe.shared_ffn_size (8): the class has no shared expert"]),
        (gated(MOE, ELEMENTWISE), "qwen3_moe", ["position (G1)"]),
        (replace(MOE, sandwich_norm=True), "qwen3_moe", ["sandwich_norm"]),
        (gated(DENSE, ELEMENTWISE), "qwen3_next", ["num_experts (0): the class could hold a dense model, but that is not offered"]),
        (replace(MOE, sandwich_norm=True), "qwen3_next", ["sandwich_norm"]),
        (moe(score="sigmoid", bias_update_rate=0.1), "qwen3_next", ["model.moe.score (sigmoid)", "model.moe.bias_update_rate (0.1)"]),
        (MOE, "qwen3_5_text", ["num_experts (8)"]),
        (SANDWICH, "qwen3_5_text", ["sandwich_norm"]),
        (MOE, "lfm3", ["num_experts (8)"]),
        (gated(SANDWICH, ELEMENTWISE), "lfm3", ["granularity (elementwise): the class's gate has one score per head"]),
        (gated(DENSE, ELEMENTWISE), "afmoe", ["model.sandwich_norm (false): the class always has norms"]),
        (gated(SANDWICH, HEADWISE), "afmoe", ["granularity (headwise): the class's gate has one score per channel"]),
        (SANDWICH, "afmoe", ["position (none): the class always gates"]),
        (gated(replace(MOE, sandwich_norm=True), ELEMENTWISE), "afmoe", ["num_experts (8)"]),
        (gated(DENSE, GateConfig("G2")), "qwen3_5_text", ["model.attention.gate.position (G2)"]),
        (gated(DENSE, replace(ELEMENTWISE, head_shared=True)), "qwen3_5_text", ["model.attention.gate.head_shared (true)"]),
        (gated(DENSE, replace(ELEMENTWISE, score="parameter")), "qwen3_5_text", ["model.attention.gate.score (parameter)"]),
        (gated(DENSE, replace(ELEMENTWISE, activation="silu")), "qwen3_5_text", ["model.attention.gate.activation (silu)"]),
        (gated(DENSE, replace(ELEMENTWISE, combine="add")), "qwen3_5_text", ["model.attention.gate.combine (add)"]),
        (replace(DENSE, residual_clip=0.5), "qwen3", ["model.residual_clip (0.5)"]),
        (replace(DENSE, attention=replace(DENSE.attention, qk_norm=False)), "qwen3", ["model.attention.qk_norm (false)"]),
        (replace(DENSE, attention=replace(DENSE.attention, switch=SwitchConfig("v", 2, 2))), "qwen3", ["switch.projections (v)"]),
    ],
)
def test_a_class_that_cannot_hold_a_model_says_why_and_which_can(model: ModelConfig, target: Target, why: list[str]) -> None:
    found = reasons(model, target)
    assert len(found) == len(why) and all(expected in reason for expected, reason in zip(why, found, strict=True))
    with pytest.raises(ConfigError, match=re.escape(f"--format ({target}) is not for this model: {found[0]}")) as caught:
        select(model, target, installed="5.23.0")
    assert str(caught.value).endswith(f"; use --format {choose(model)}, which can") and choose(model) != target


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_stock_class_takes_what_it_does_not_compute(variant: str) -> None:
    """Of the variants, stock classes hold the plain sigmoid gate at G1, the plain softmax router, and sandwich norms of dense models."""
    model = VARIANTS[variant]
    gate, attention = model.attention.gate, model.attention
    plain = (gate.score, gate.activation, gate.combine, gate.head_shared) == ("input", "sigmoid", "multiply", False)
    known = gate.position == "none" or gate.position == "G1" and plain
    known &= attention.switch.projections == "none" and not model.residual_clip
    known &= not model.is_moe or (model.moe.score == "softmax" and not model.moe.bias_update_rate and not model.sandwich_norm)
    assert (choose(model) != REMOTE) == known


def test_what_no_class_holds_needs_remote_code() -> None:
    model = gated(DENSE, GateConfig("G2"))
    with pytest.raises(ConfigError, match=r"--format \(stock\): no class .* nearest, .* because of model\.attention\.gate\.position"):
        select(model, "stock", installed="5.23.0")
    assert "no class of transformers holds this model" in explain(model, REMOTE)


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [
        ("dense", "auto", None),
        ("mixture", "auto", None),
        ("mixture, elementwise, shared expert", REMOTE, None),
        ("dense, elementwise", "auto", None),
        ("mixture, elementwise", "auto", "shared experts of zeros, 128 wide"),
        ("dense, headwise, tied", "auto", "each head's gate row 8 times"),
        ("mixture, elementwise, shared expert", "auto", "gates of zeros of shared experts that are doubled"),
        ("mixture, headwise, gated shared expert", "auto", "each head's gate row 8 times"),
        ("dense", "qwen3_5_text", "gates of zeros, whose scores are 1/2, before output projections that are doubled"),
        (
            "mixture, shared expert, no gate",
            "auto",
            "gates of zeros, whose scores are 1/2, before output projections that are doubled and gates of zeros of shared experts that "
            "are doubled",
        ),
    ],
)
def test_what_stands_in_for_what_a_model_has_not_is_said(tmp_path: Path, name: str, format: str, words: str | None) -> None:
    """In words, and as what the files hold beyond the model."""
    model, _ = CASES[name]
    state = masters(language_model(model))
    done = export(save(tmp_path / "run", state, run_config(model)), tmp_path / "hf", format=format)
    written = sum(tensor.numel() for tensor in load_file(tmp_path / "hf" / "model.safetensors").values())
    more = written - sum(tensor.numel() for tensor in state.values()) + done.padding * model.hidden_size
    told = f"what the class has and the model has not is made up for, exactly: by {words}; {more:,} parameters more"
    assert remarks(model, done.target) == ([told] if words else []) and (more > 0) == bool(words)


def test_layers_that_a_server_misreads_are_named() -> None:
    first_dense = replace(moe(first_dense_layers=1, shared_ffn_size=24, shared_gate=True), ffn_size=48)
    assert remarks(gated(first_dense, ELEMENTWISE), "qwen3_next") == [
        "SGLang takes every layer of this class for a mixture, and does not read mlp_only_layers: do not serve this with it"
    ]
    assert remarks(first_dense, REMOTE) == remarks(replace(MOE, ffn_size=48), "qwen3_moe") == []


@pytest.mark.parametrize(
    ("target", "installed"), [("lfm3", "5.22.2"), ("qwen3_next", "5.14.0"), ("afmoe", "4.57.6"), ("qwen3_5_text", "5.14.0")]
)
def test_a_class_that_is_newer_than_the_installed_transformers(target: Target, installed: str) -> None:
    model = next(model for model, of in CASES.values() if of == target)
    for wanted in ("auto", "stock", target):
        with pytest.raises(ConfigError, match=rf"needs transformers {TRANSFORMERS[target]} or newer, {installed} is installed; .*{REMOTE}"):
            select(model, wanted, installed=installed)
    assert select(model, target, installed=TRANSFORMERS[target]) == select(model, target, installed="10.0.0.dev0") == target


# ---- an export that is refused


def refused(tmp_path: Path, kind: type[MegagateError], told: str, **options: Any) -> None:
    """The error, in one line; no file is made or changed."""
    before = contents(tmp_path)
    output = options.pop("output", tmp_path / "hf")
    source = options.pop("source", tmp_path / "run")
    with pytest.raises(kind, match=told) as caught:
        export(source, output, **options)
    assert "\n" not in str(caught.value) and contents(tmp_path) == before


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save(tmp_path / "run", masters(language_model(MOE)), run_config(MOE))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "gpt2"}, r"--format \(gpt2\) must be one of auto, stock, qwen3, .*remote-code; choose one"),
        ({"format": "qwen3"}, r"model\.moe\.num_experts \(8\): the class is dense; use --format qwen3_moe, which can"),
        ({"dtype": "fp8"}, r"--dtype \(fp8\) must be fp32 or bf16"),
        ({"max_shard_size": "much"}, r"--max-shard-size \(much\) must be a whole number of KB, MB, GB or TB, such as 5GB"),
        ({"max_shard_size": "-1GB"}, r"--max-shard-size \(-1GB\) must be a whole number of KB, MB, GB or TB, such as 5GB"),
        ({"max_shard_size": "2.5GB"}, r"--max-shard-size \(2\.5GB\) must be a whole number"),
    ],
)
def test_options(tmp_path: Path, run: Path, options: dict[str, str], told: str) -> None:
    refused(tmp_path, ConfigError, told, **options)


def test_places(tmp_path: Path, run: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(run)
    refused(tmp_path, ConfigError, r"OUT \(.*there\) must be a new folder, and it exists", output=tmp_path / "there")
    refused(tmp_path, ConfigError, r"OUT \(.*dangling\) must be a new folder", output=tmp_path / "dangling")
    refused(tmp_path, ConfigError, r"there is no folder .*/no to write it in; make it", output=tmp_path / "no" / "hf")
    inside = store.resolve(run) / "hf"
    refused(tmp_path, ConfigError, r"OUT \(.*\) must not lie in the run that is read \(.*/run\); choose", output=inside)
    for output in (run / "hf", run / "checkpoints" / "step-00000009", tmp_path / "link" / "checkpoints" / "step-00000009"):
        refused(tmp_path, ConfigError, r"must not lie in the run that is read", output=output)
    shutil.copytree(run, tmp_path / "bare")  # not named as a run's are
    alone = (tmp_path / "bare" / "checkpoints").rename(tmp_path / "alone") / "step-00000007"
    refused(tmp_path, ConfigError, r"must not lie in the run that is read \(.*alone/step-00000007\)", source=alone, output=alone / "hf")
    refused(tmp_path, ConfigError, r"OUT \(.*\) is a folder of checkpoints, and step-\*", output=tmp_path / "step-00000009")
    unwritable = Path("/proc/hf")  # by anyone
    refused(tmp_path, RunError, r"OUT \(/proc/hf\), 0\.\d MB, cannot be written \(.*\); nothing was left there; mend", output=unwritable)
    refused(tmp_path, CheckpointError, r"/nowhere does not exist; name a step-", source=tmp_path / "nowhere")


def test_exports_lie_beside_a_checkpoint_that_is_in_no_run(tmp_path: Path, run: Path) -> None:
    step = store.resolve(run).rename(tmp_path / "step-00000007")
    assert export(step, tmp_path / "hf").folder == tmp_path / "hf"


def without_config(run: Path) -> None:
    state = {"master/w": torch.zeros(2)}
    pieces = [store.Piece(name, tensor.shape, (0,), tensor) for name, tensor in state.items()]
    store.write_rank(store.begin(run / "checkpoints", STEP + 1), 0, pieces)
    store.publish(run / "checkpoints", STEP + 1, world_size=1, metadata={})


def other_model(run: Path) -> None:
    state = masters(language_model(MOE))
    state["master/more"] = state.pop("master/final_norm.weight")
    save(run, state, run_config(MOE))


def other_shape(run: Path) -> None:
    save(run, masters(language_model(MOE)), run_config(replace(MOE, vocab_size=999)))


def other_state(run: Path) -> None:
    save(run, masters(language_model(MOE)) | {"state/more": torch.zeros(2, dtype=torch.int32)}, run_config(MOE))


def without_state(run: Path) -> None:
    model = moe(score="sigmoid", bias_update_rate=0.1)
    state = {name: tensor for name, tensor in masters(language_model(model)).items() if name.startswith("master/")}
    save(run, state, run_config(model))


def undecided_dtype(run: Path) -> None:
    save(run, masters(language_model(MOE)), run_config(MOE, dtype="auto"))


def flipped_bit(run: Path) -> None:
    path = next(store.resolve(run).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def truncated(run: Path) -> None:
    path = next(store.resolve(run).glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 8)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_config, r"step-\d+ holds no config, so no run saved it"),
        (other_model, r"2 of its tensors are not those .*: master/final_norm\.weight is missing, master/more \[32\] is not in that model"),
        (other_shape, r"master/embedding\.weight has the shape \[256, 32\], not \[1024, 32\]"),
        (other_state, r"1 of its tensors are not those .*: state/more \[2\] is not in that model"),
        (without_state, r"2 of its tensors are not those .*: state/layers\.0\.moe\.router\.bias_steps is missing, state/layers\.1\."),
        (undecided_dtype, r"the run's precision\.dtype \(auto\) must be fp32 or bf16; give --dtype"),
        (flipped_bit, r"master/.*: its bytes have the digest .* was recorded when it was saved; the file is damaged, load another step"),
        (truncated, r"bytes are recorded|are recorded: it was cut"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_checkpoints(tmp_path: Path, run: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(run)
    kind = ConfigError if damage is undecided_dtype else CheckpointError
    refused(tmp_path, kind, told)


def test_a_disk_that_fails_half_way_leaves_nothing(tmp_path: Path, run: Path) -> None:
    """A limit on the size of files takes the disk's part."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = contents(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, most))
        with pytest.raises(RunError, match=r"OUT \(.*hf\), 0\.\d MB, cannot be written \(File too large\); nothing was left there; mend"):
            export(run, tmp_path / "hf", max_shard_size="60KB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert contents(tmp_path) == before


def test_too_little_space_is_told_before_anything_is_written(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says that it is full takes the disk's part; what a killed export left on it is named."""
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1_000))
    told = r"OUT \(.*hf\) needs 0\.\d MB, and 0\.0 MB are free there; nothing was left there; free space, choose"
    refused(tmp_path, RunError, told)
    left = leftover(tmp_path)
    refused(tmp_path, RunError, rf"left there; remove {re.escape(str(left))} unless an export is at work there, free space, choose")


def leftover(folder: Path) -> Path:
    left = folder / ".hf.0123456789ab.megagate-export"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    return left


def test_what_a_killed_export_left_is_not_touched_and_named(tmp_path: Path, run: Path) -> None:
    left = leftover(tmp_path)
    (tmp_path / ".other.0123456789ab.megagate-export").mkdir()
    done = export(run, tmp_path / "hf")
    assert done.unfinished == (left,) and contents(left) == {"model-00001-of-00009.safetensors": b"half"}
    assert json.loads((done.folder / "config.json").read_text())["model_type"] == "qwen3_moe"
    assert sorted(done.files) == ["config.json", "generation_config.json", "model.safetensors"] == sorted(contents(done.folder))


def while_a_file_is_written(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[Path], object]) -> None:
    """Once, before the `number`-th file of weights is written, `act` in its folder."""
    write, calls = export_module.write_shard, []

    def write_and_act(path: Path, *rest: Any) -> int:
        calls.append(path)
        if len(calls) == number:
            act(path.parent)
        return write(path, *rest)

    monkeypatch.setattr(export_module, "write_shard", write_and_act)


def test_of_two_exports_to_one_place_the_first_to_end_has_it(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second runs, from begin to end, while the first is at its third file."""
    second: list[Export] = []
    while_a_file_is_written(monkeypatch, 3, lambda _: second.append(export(run, tmp_path / "hf", max_shard_size="30KB")))
    with pytest.raises(RunError, match=r"OUT \(.*hf\), 0\.\d MB, cannot be written \(Directory not empty\); nothing"):
        export(run, tmp_path / "hf", max_shard_size="60KB")
    (done,) = second
    assert {path.name: path.stat().st_size for path in done.folder.iterdir()} == done.files and len(done.unfinished) == 1
    weights = json.loads((done.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weights.values()) == {name for name in done.files if name.endswith(".safetensors")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.parametrize("act", [Path.unlink, lambda path: os.truncate(path, 100)], ids=["removed", "cut"])
def test_a_file_that_somebody_takes_away_meanwhile(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], object]
) -> None:
    while_a_file_is_written(monkeypatch, 3, lambda staging: act(min(staging.iterdir())))
    refused(tmp_path, RunError, r"megagate-export: model-00001-of-\d+\.safetensors went away or changed", max_shard_size="60KB")


def test_a_checkpoint_that_cannot_be_read_on_is_not_the_fault_of_the_output(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file for each tensor; the last is gone when writing has begun."""
    state = masters(language_model(MOE))
    store.begin(run / "checkpoints", STEP)
    staging = store.staging_path(run / "checkpoints", STEP)
    for rank, (name, tensor) in enumerate(state.items()):
        store.write_rank(staging, rank, [store.Piece(name, tensor.shape, (0,) * tensor.dim(), tensor)])
    with store.Checkpoint.open(run) as opened:
        metadata = opened.metadata
    folder = store.publish(run / "checkpoints", STEP, world_size=len(state), metadata=metadata)
    last = max(folder.glob("*.safetensors"))
    while_a_file_is_written(monkeypatch, 1, lambda _: last.unlink())
    before = contents(tmp_path).keys() - {str(last.relative_to(tmp_path))}
    with pytest.raises(CheckpointError, match=rf"{last.name} cannot be read \(.*No such file.*\); mend that, or load another step"):
        export(run, tmp_path / "hf", max_shard_size="30KB")
    assert contents(tmp_path).keys() == before


def without_rights(call: Callable[[], object]) -> object:
    """What `call` returns or raises in a thread of its own, which has given up what lets root read every file."""

    def inside() -> object:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3 of Linux's capset, this thread
        assert ctypes.CDLL(None).capset(header, none) == 0
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(inside).result()


def test_a_file_that_may_not_be_read(tmp_path: Path, run: Path) -> None:
    path = next(store.resolve(run).glob("*.safetensors"))
    path.chmod(0)
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be read \(.*Permission denied.*\); mend that, or load another step"):
        without_rights(lambda: export(run, tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == [run]
    path.parent.chmod(0)
    try:
        with pytest.raises(CheckpointError, match=r"cannot be (read|reached) \(Permission denied\)"):
            without_rights(lambda: export(path.parent, tmp_path / "hf"))
    finally:
        path.parent.chmod(0o700)


def test_forced_formats_are_the_ones_tried() -> None:
    assert all(reasons(model, target) == [] and choose(model) != target for model, target in FORCED.values())
