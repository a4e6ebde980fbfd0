"""The command that analyzes checkpoints: its words, files and exit codes. What it measures: `tests/analysis`."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from math import exp
from pathlib import Path

import pytest
from commands import TOOLS, call
from parity.variants import DENSE, MOE
from test_tools_convert import checkpoint

from megagate.analysis.gate.result import Analysis
from megagate.analysis.gate.table import table_text
from megagate.config.model import ModelConfig

TOOL = TOOLS / "analyze.py"
main = partial(call, "analyze")
TEXT = "The gate decides what a head says; a head that says nothing need not look at the first token.\n" * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def of_bytes(model: ModelConfig) -> ModelConfig:
    return replace(model, vocab_size=260)


def test_it_prints_the_table_and_writes_all(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [f"{name}={checkpoint(tmp_path / name, of_bytes(model))}" for name, model in (("dense", DENSE), ("mixture", MOE))]
    output = tmp_path / "out"
    options = ["--data", text, "--tokenizer", "bytes", "--seq-len", 16, "--num-samples", 2, "--map-tokens", 8, "--layers", 2]
    assert main("--models", *runs, *options, "--output", output) == 0
    shown = capsys.readouterr()
    analysis = Analysis.from_json(json.loads((output / "analysis.json").read_text()))
    assert shown.out == table_text(analysis) + "\n"
    assert [model.name for model in analysis.models] == ["dense", "mixture"]
    for model in analysis.models:
        assert (model.ppl, model.targets) == (exp(model.loss), 32)
        assert (tuple(model.maps), len(model.map_tokens)) == ((1,), 8)
        assert f" {model.ppl:.3f}" in shown.out
    files = {path.name for path in output.iterdir()}
    assert {"dense_selected_layer_attention_maps.png", "mixture_selected_layer_attention_maps.png", "page.png"} <= files
    for name in files:
        assert str(output / name) in shown.err
    assert "note:" not in shown.err
    (output / "mine_selected_layer_attention_maps.png").touch()
    options[options.index(16)] = 40
    assert main("--models", runs[0], *options, "--output", output, "--json") == 0
    again = capsys.readouterr()
    (model,) = Analysis.from_json(json.loads(again.out)).models
    assert (model.name, model.targets) == ("dense", 80)
    assert "note: dense was trained on 32 tokens, and reads 40\n" in again.err
    # Of the models that were analyzed before and are not now nothing is left; what is no analysis's stays.
    kept = {path.name for path in output.iterdir()}
    assert kept == files - {"mixture_selected_layer_attention_maps.png"} | {"mine_selected_layer_attention_maps.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "it={run}", "--data", "{text}", "--output", "{text}"], "text.txt) is a file; name a folder"),
        (["--models", "it={run}", "--data", "{text}", "--output", "{run}"], "RunError: --output ("),
        (["--models", "it={run}", "--data", "{text}", "--output", "{out}"], "its tokenizer is needed"),
        (["--models", "it={run}", "--data", "{out}.txt", "--output", "{out}", "--tokenizer", "bytes"], "there is no such file"),
        (["--models", "it={out}/gone", "--data", "{text}", "--output", "{out}"], "CheckpointError: --models it:"),
        (["--models", "it={run}", "--data", "{text}", "--output", "{out}", "--num-samples", "0"], "must be a whole number from 1 on"),
        (["--models", "it={run}", "--data", "{text}", "--output", "{out}", "--layers", "0"], "must be a whole number from 1 on"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"run": checkpoint(tmp_path / "run", of_bytes(DENSE)), "text": text, "out": tmp_path / "out"}
    assert main(*(argument.format(**places) for argument in arguments)) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_no_part_of_a_file(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        """A bar during which somebody presses Ctrl-C: at the third of its passes."""

        def __init__(self, **options: object) -> None:
            self.left = 3

        def __enter__(self) -> "Interrupted":
            return self

        def __exit__(self, *raised: object) -> None:
            pass

        def update(self, passed: int) -> None:
            self.left -= passed
            if not self.left:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("tqdm.tqdm", Interrupted)
    run, output = checkpoint(tmp_path / "run", of_bytes(DENSE)), tmp_path / "out"
    arguments = ["--models", f"it={run}", "--data", text, "--tokenizer", "bytes", "--seq-len", 16, "--output", output]
    assert main(*arguments) == 128 + signal.SIGINT
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()[-1].partition(";")[0]) == ("", "stopped")
    assert not output.exists()
    output.mkdir()
    (output / "analysis.json").write_text("earlier")
    assert main(*arguments) == 128 + signal.SIGINT
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [("analysis.json", "earlier")]


def test_help_is_instant_and_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(TOOL.parents[1])])}
    done = subprocess.run([sys.executable, str(TOOL), "--help"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--num-samples" in done.stdout
