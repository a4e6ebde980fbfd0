"""The command that finds loss spikes: what it prints, what files it takes, and how it refuses the others."""

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import TOOLS, call, load
from hypothesis import given, settings
from hypothesis import strategies as st

from megagate.train.curve import read_curve

TOOL = TOOLS / "find_spikes.py"
COUNT, AT = 300, 200  # records, and the index of the spike among them


def run(*arguments: object, expect: int = 0) -> tuple[str, str]:
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complained:
        code = call("find_spikes", *arguments)
    assert code == expect, complained.getvalue()
    return said.getvalue(), complained.getvalue()


def told(path: Path) -> tuple[dict[str, Any], str]:
    out, err = run("--input", path, "--json")
    return json.loads(out), err


def records(steps: Iterable[int] = range(1, COUNT + 1)) -> list[dict[str, Any]]:
    losses = 2 + 3 * np.exp(-np.arange(COUNT) / 100) + 0.05 * np.random.default_rng(0).standard_normal(COUNT)
    losses[AT] += 1
    return [{"step": step, "loss": loss, "lr": 1e-3} for step, loss in zip(steps, losses.tolist(), strict=False)]


def write(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_it_prints_the_events_and_the_rule(file: Path) -> None:
    lines = records()
    value, err = told(write(file, lines))
    (event,) = value["events"]
    assert set(value) == {"events", "steps"} and set(event) == {"step", "loss", "excess"}
    assert value["steps"] == COUNT and (event["step"], event["loss"]) == (AT + 1, lines[AT]["loss"])
    assert 0.8 < event["excess"] < 1.2
    assert "1.4826 times the median absolute deviation" in err and "note" not in err
    out, err = run("--input", file)
    assert "1.4826 times the median absolute deviation" in out and err == ""
    assert f"\nstep 201: loss {event['loss']:.6g}, {event['excess']:.4g} nats above the line (" in out
    assert out.endswith("1 loss spike in 300 steps\n")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=COUNT, max_size=COUNT))
def test_the_spacing_of_steps_does_not_matter(tmp_path_factory: pytest.TempPathFactory, gaps: list[int]) -> None:
    file = tmp_path_factory.mktemp("spaced") / "metrics.jsonl"
    steps = np.cumsum(gaps).tolist()
    even, _ = told(write(file, records()))
    value, err = told(write(file, records(steps)))
    assert value == {"events": [even["events"][0] | {"step": steps[AT]}], "steps": COUNT} and "note" not in err


def test_steps_that_a_resume_did_again_are_replaced(file: Path) -> None:
    lines = records()
    wild = [{"step": step, "loss": 9.0} for step in range(151, 170)]
    value, err = told(write(file, [*lines[:150], *wild, *lines[150:]]))
    assert (value, value["steps"]) == (told(write(file, lines))[0], COUNT)
    assert "note: 1 record that went back to an earlier step (first: step 151 in line 170 replaces 19; 19 replaced in all)" in err
    value, err = told(write(file, [*lines, lines[-1], lines[-1]]))
    assert value["steps"] == COUNT and "2 records that went back" in err and "WARNING" not in err
    curve = read_curve(write(file, [*lines[:150], *wild]), last_step=155)
    assert curve.steps == list(range(1, 156)) and curve.losses[-1] == 9


def test_steps_that_are_lost_are_said_aloud(file: Path) -> None:
    """Unless a run that went back has done them again."""
    lines = records()
    back = [{"step": 2, "loss": 2.0}, {"step": 3, "loss": 2.0}]
    value, err = told(write(file, [*lines, *back]))
    assert value == {"events": [], "steps": 3, "lost": 297}
    assert "WARNING: 297 steps that the file has were replaced and not done again: 3 are left; steps must rise" in err
    assert "step 2 in line 301 replaces 299; 299 replaced in all" in err
    assert run("--input", file)[0].endswith("0 loss spikes in 3 steps (297 steps that the file has were replaced and not done again)\n")
    value, err = told(write(file, lines[::-1]))
    assert (value["steps"], value["lost"]) == (1, 299) and "299 records that went back" in err and "299 replaced in all" in err
    assert "lost" not in told(write(file, [*lines, *back, *lines[3:]]))[0]


@pytest.mark.parametrize("text", ["null", "NaN", "Infinity", "-Infinity", "1e999", f"1{'0' * 400}"])
def test_losses_that_are_not_finite_are_left_out(file: Path, text: str) -> None:
    lines: list[object] = list(records())
    for index in (50, AT - 1, AT + 1):
        lines[index] = f'{{"step": {index + 1}, "loss": {text}}}'
    value, err = told(write(file, lines))
    assert [event["step"] for event in value["events"]] == [AT + 1] and value["steps"] == COUNT
    assert "note: 3 records whose loss is not finite (first: step 51)" in err


def test_a_half_written_last_line_and_records_of_another_kind(file: Path) -> None:
    lines: list[object] = [*records(), {"step": 300, "val_loss": 2.0}, {"done": True}, "", "  "]
    file = write(file, lines)
    with file.open("ab") as more:
        more.write('{"step": 301, "loss": 2.1, "name": "größ'.encode()[:-1])
    value, err = told(file)
    assert value["steps"] == COUNT and len(value["events"]) == 1
    assert "note: 2 records without `step` or `loss` (first: line 301)" in err
    assert "note: 1 record that was half written when its run ended, left out (first: line 305, the last)" in err
    whole = json.dumps({"step": 301, "loss": 2.1})
    file.write_text("\n".join([*map(json.dumps, records()), whole]))  # whole, without its newline
    assert told(file)[0]["steps"] == 301


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 12, "loss": 2.0', "line 12 is no JSON; each line must be a JSON object; only the last may be half written"),
        ("\udcff", "line 12 is no JSON"),
        ("[" * 100_000, "line 12 is no JSON"),
        ("[12, 2.0]", "line 12 holds [12, 2.0]; each line must be a JSON object"),
        ('{"step": 12, "loss": "2.0"}', 'line 12 has the loss "2.0"; a loss must be a number, or null'),
        ('{"step": 12, "loss": true}', "line 12 has the loss true"),
        ('{"step": true, "loss": 2.0}', "line 12 has the step true; a step must be a whole number of 0 or more"),
        ('{"step": 12.5, "loss": 2.0}', "line 12 has the step 12.5"),
        ('{"step": -1, "loss": 2.0}', "line 12 has the step -1"),
        ('{"step": null, "loss": 2.0}', "line 12 has the step null"),
        ('{"step": Infinity, "loss": 2.0}', "line 12 has the step Infinity"),
        ('{"step": "12", "loss": 2.0}', 'line 12 has the step "12"'),
    ],
)
def test_damage_is_refused_by_its_line(file: Path, line: str, complaint: str) -> None:
    lines: list[object] = list(records())
    lines[11] = line
    file.write_bytes("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines).encode(errors="surrogateescape"))
    out, err = run("--input", file, expect=2)
    assert out == "" and err.startswith(f"DataError: {file}: {complaint}") and err.count("\n") == 1, err


def test_a_whole_last_line_that_is_damaged_is_refused(file: Path) -> None:
    _, err = run("--input", write(file, [*records(), '{"step": 301, "lo']), expect=2)
    assert err.startswith(f"DataError: {file}: line 301 is no JSON") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["packed", "pretty", "utf-16"])
def test_a_file_of_another_kind_is_told_what_to_be(file: Path, name: str) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records())
    pretty = json.dumps(records(), indent=1)
    file.write_bytes({"packed": gzip.compress(lines.encode()), "pretty": pretty.encode(), "utf-16": lines.encode("utf-16")}[name])
    _, err = run("--input", file, expect=2)
    assert err.startswith(f"DataError: {file}: line 1 is no JSON") and err.endswith("name a file of JSON lines, unpacked and in UTF-8\n")


def test_no_name_is_no_file() -> None:
    with redirect_stderr(io.StringIO()) as complained, pytest.raises(SystemExit, match="2"):
        load("find_spikes").main(["--input", ""])
    assert "it is empty; name a run's metrics.jsonl" in complained.getvalue()


def test_files_without_a_curve(file: Path, tmp_path: Path) -> None:
    for lines in ([], [{"step": 1}], [{"loss": 1.0}], ['{"step": 1, "lo']):
        _, err = run("--input", write(file, lines), expect=2)
        assert err.count("\n") == 1 and err.startswith(f"DataError: {file}"), err
    assert "holds no record with both `step` and `loss`" in run("--input", write(file, []), expect=2)[1]
    assert "cannot be read (No such file or directory)" in run("--input", tmp_path / "none", expect=2)[1]
    assert "cannot be read (Is a directory)" in run("--input", tmp_path, expect=2)[1]


def test_a_short_run_is_told_to_be_one(file: Path) -> None:
    value, err = told(write(file, records()[:48]))
    assert value == {"events": [], "steps": 48} and "note: none could be judged: 48 finite losses, and the rule needs 48 before" in err
    assert "none could be judged" not in told(write(file, records()[:49]))[1]
    lines = [{"step": step, "loss": 2 + 0.01 * (step % 2)} for step in range(1, 49)] + [{"step": 49.0, "loss": 3}]
    assert [event["step"] for event in told(write(file, lines))[0]["events"]] == [49]


def test_it_starts_without_torch(file: Path) -> None:
    start = f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import find_spikes; "
    code = start + "find_spikes.main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--input", str(write(file, records()))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1], check=True)
    assert done.stdout.splitlines()[-1] == "False"
