"""The command that converts checkpoints: its words and exit codes, and that `--help` is instant. What it writes: `tests/checkpoint/hf`."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import TOOLS, call
from parity.engines import MOE, TIED_DENSE
from parity.sharded import random
from safetensors.torch import load_file

from megagate.checkpoint import store
from megagate.checkpoint.hf import export as export_module
from megagate.checkpoint.hf import targets
from megagate.config.count import parameter_shapes
from megagate.config.keys import to_dict
from megagate.config.model import GateConfig, ModelConfig
from megagate.config.run import DataConfig, PrecisionConfig, RunConfig, TrainConfig
from megagate.data.tokenizer import Tokenizer

TOOL = TOOLS / "convert_checkpoint.py"
main = partial(call, "convert_checkpoint")
STEP = 7


def checkpoint(run: Path, model: ModelConfig, *, dtype: str = "fp32", spoiled: str = "") -> Path:
    """A run's folder with one checkpoint of arbitrary weights; norms around 1; a number of the tensor that is spoiled is NaN."""
    pieces = []
    for name, shape in parameter_shapes(model).items():
        values = random(name, *shape)
        values = values / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.3 * values
        if name == spoiled:
            values.view(-1)[0] = float("nan")
        pieces.append(store.Piece(f"master/{name}", shape, (0,) * len(shape), values))
    store.write_rank(store.begin(run / "checkpoints", STEP), 0, pieces)
    config = RunConfig(
        model=model, train=TrainConfig(seq_len=32), data=DataConfig(path="synthetic"), precision=PrecisionConfig(dtype=dtype)
    )
    store.publish(run / "checkpoints", STEP, world_size=1, metadata={"config": to_dict(config)})
    return run


def test_to_hf_says_what_it_wrote_for_which_class_and_how_to_load_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    run, out = checkpoint(tmp_path / "run", MOE, dtype="bf16"), tmp_path / "hf"
    assert main("to-hf", run, out) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{run}/checkpoints/step-00000007, step 7 -> {out}: 3 files, ")
    for words in (
        "written for the class qwen3_next, which holds the model exactly; transformers 5.15.0 or newer\n",
        " tensors in bf16\n",
        "left out: 12 rows that pad the vocabulary to 256\n",
        "norms are in fp32, since bf16 would round w - 1, and w with it by up to ",
        "dtype='auto' rounds them when it loads: load it in fp32, as below, or use --format remote-code, whose norms are w itself\n",
        "exactly: by shared experts of zeros, 128 wide; ",
        "tokenizer: none: data.path synthetic has ids without text\n",
        "compared bit by bit\n",
        "logits: largest error ",
        "greedy continuation with cache: ",
    ):
        assert words in said
    line = said.splitlines()[-1].removeprefix("load it with: ")
    assert line == f"AutoModelForCausalLM.from_pretrained('{out}', dtype=torch.float32)"
    model = eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM, "torch": torch})
    assert type(model).__name__ == "Qwen3NextForCausalLM"
    held = {name: tensor for name, tensor in load_file(out / "model.safetensors").items() if "norm" in name}
    assert any(tensor.dtype == torch.float32 for tensor in held.values())
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in held.items())


def test_to_hf_of_what_bf16_holds_is_loaded_in_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms that are w itself, and numbers that are not finite, which are said aloud."""
    from transformers import AutoModelForCausalLM

    ungated = replace(TIED_DENSE, attention=replace(TIED_DENSE.attention, gate=GateConfig("none")))
    run = checkpoint(tmp_path / "run", ungated, dtype="bf16", spoiled="layers.0.ffn.up.weight")
    assert main("to-hf", run, tmp_path / "hf", "--no-verify") == 0
    said = capsys.readouterr().out
    assert "norms" not in said and "made up for" not in said
    assert "NOT FINITE: 1 numbers are NaN or infinite, in 1 tensors (model.layers.0.mlp.up_proj.weight): train on from an earlier" in said
    line = said.splitlines()[-1].removeprefix("load it with: ")
    assert line.endswith(", dtype='auto')")
    theirs = eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM})
    assert theirs.dtype == theirs.model.norm.weight.dtype == torch.bfloat16 and type(theirs).__name__ == "Qwen3ForCausalLM"


def test_to_hf_with_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = replace(TIED_DENSE, attention=replace(TIED_DENSE.attention, gate=GateConfig("G2")))
    run = checkpoint(tmp_path / "run", model)
    assert main("to-hf", run, tmp_path / "hf", "--no-verify", "--keep-padding") == 0
    said = capsys.readouterr().out
    assert "written for remote-code, which is loaded with trust_remote_code=True (no class of transformers holds this model; the" in said
    assert "the vocabulary is padded to 256: a sampler must not choose ids from the padding" in said
    assert "compared" not in said and "left out" not in said
    assert said.splitlines()[-1].endswith("dtype='auto', trust_remote_code=True)")
    assert main("to-hf", run, tmp_path / "stock", "--format", "stock") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ConfigError: --format (stock): no class") and err.count("\n") == 1
    assert not (tmp_path / "stock").exists()


def test_norms_that_fp32_rounds_are_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = checkpoint(tmp_path / "run", MOE)
    with store.Checkpoint.open(run) as opened:
        config = opened.metadata
        state = {name: opened.read_whole(name) for name in opened.tensors}
    state["master/final_norm.weight"].fill_(0.1)
    pieces = [store.Piece(name, tensor.shape, (0,) * tensor.dim(), tensor) for name, tensor in state.items()]
    store.write_rank(store.begin(run / "checkpoints", STEP), 0, pieces)
    store.publish(run / "checkpoints", STEP, world_size=1, metadata=config)
    assert main("to-hf", run, tmp_path / "hf", "--no-verify") == 0
    said = capsys.readouterr().out
    assert "NOT EXACT: 1 norms are stored as w - 1, which fp32 rounds, by up to 2.2e-07 of w (model.norm.weight)" in said


@pytest.mark.parametrize(
    ("number", "said", "code"),
    [
        (signal.SIGINT, "interrupted; nothing was written\n", 130),
        (signal.SIGTERM, "stopped by SIGTERM; nothing was written\n", 143),
        (signal.SIGHUP, "stopped by SIGHUP; nothing was written\n", 129),
    ],
)
def test_a_command_that_is_stopped_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    said: str,
    code: int,
) -> None:
    """When it writes its third file."""
    run, written = checkpoint(tmp_path / "run", MOE), []
    write_shard = export_module.write_shard

    def write(path: Path, *rest: object) -> int:
        written.append(path)
        if len(written) == 3:
            assert len(list(path.parent.iterdir())) == 2
            os.kill(os.getpid(), number)
        return write_shard(path, *rest)

    monkeypatch.setattr(export_module, "write_shard", write)
    before = signal.signal(number, lambda *_: None) if number != signal.SIGINT else None  # rather than end the tests
    try:
        assert main("to-hf", run, tmp_path / "hf", "--max-shard-size", "60KB", "--no-verify") == code
    finally:
        if before is not None:
            signal.signal(number, before)
    assert capsys.readouterr() == ("", said) and len(written) == 3
    assert list(tmp_path.iterdir()) == [run]


def test_a_command_that_is_stopped_when_it_has_written_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = checkpoint(tmp_path / "run", MOE), tmp_path / "hf"
    monkeypatch.setattr(targets, "explain", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main("to-hf", run, out, "--no-verify") == 1
    assert capsys.readouterr().err == f"interrupted; {out} stands, whole, and was not verified\n"
    assert (out / "config.json").exists()


def test_what_a_killed_command_left_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, left = checkpoint(tmp_path / "run", MOE), tmp_path / ".hf.0123456789ab.megagate-export"
    left.mkdir()
    assert main("to-hf", run, tmp_path / "hf", "--no-verify") == 0
    assert f"{left} is of another export to the same place; unless that is at work, remove it\n" in capsys.readouterr().out


def test_a_length_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("to-hf", tmp_path, tmp_path / "hf", "--max-position-embeddings", "0") == 2
    assert capsys.readouterr().err.endswith("argument --max-position-embeddings: 0 must be a whole number from 1 on\n")


def test_nobody_reads_what_it_says(tmp_path: Path) -> None:
    run, out = checkpoint(tmp_path / "run", MOE), tmp_path / "hf"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(TOOL), "to-hf", str(run), str(out), "--no-verify"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # so that something is kept back
    environment["PYTHONPATH"] = str(TOOL.parents[1])
    try:
        done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "") and (out / "config.json").exists()


def test_there_and_back_keeps_the_tokenizer_and_the_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, back = tmp_path / "first", tmp_path / "back"
    assert main("to-hf", checkpoint(tmp_path / "run", replace(MOE, vocab_size=300), dtype="bf16"), first, "--no-verify") == 0
    Tokenizer.train(["a text to learn from, and another text"], vocab_size=270).save(first / "tokenizer.json")
    capsys.readouterr()
    assert main("from-hf", first, tmp_path / "native", "--no-verify") == 0
    said = capsys.readouterr().out
    assert f"prepare data to train on with its tokenizer: --tokenizer {first}/tokenizer.json\n" in said
    assert "norms are stored as w - 1 in 16 bits" in said and "when an fp32 file took them" in said, "some are kept in fp32"
    assert main("to-hf", tmp_path / "native", back, "--no-verify") == 0
    said = capsys.readouterr().out
    assert " tensors in bf16\n" in said and f"tokenizer: {first}/tokenizer.json\n" in said
    for name in ("tokenizer.json", "model.safetensors"):
        assert (back / name).read_bytes() == (first / name).read_bytes()
    first.rename(tmp_path / "away")
    assert main("to-hf", tmp_path / "native", tmp_path / "other", "--no-verify") == 2
    assert f"{first}, from which this checkpoint was adopted" in (error := capsys.readouterr().err) and "is gone; --tokenizer PATH" in error
    assert main("to-hf", tmp_path / "native", tmp_path / "other", "--no-verify", "--tokenizer", "none", "--dtype", "fp32") == 0
    assert " tensors in fp32\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["--help"], ["to-hf", "--help"], ["from-hf", "--help"]], ids=" ".join)
def test_help_is_instant_and_needs_no_torch(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(TOOL.parents[1])])}
    done = subprocess.run([sys.executable, str(TOOL), *command], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "CHECKPOINT" in done.stdout or "DIR" in done.stdout or "to-hf" in done.stdout
