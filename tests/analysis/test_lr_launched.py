"""One run by a command that starts its ranks. The commands here stand for a launcher: they write records and leave as one would.

The real ones: test_lr_slurm.py.
"""

import json
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commands import call
from lr_specs import write_spec
from processes import gone

from megagate.analysis.lr.launched import run_launched
from megagate.analysis.lr.slurm import queue
from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.study import Study
from megagate.checkpoint.folders import INDEX_NAME
from megagate.config.command import Stopped, stoppable
from megagate.errors import ConfigError, RunError

LIMIT_S = 120
KEY = RunKey("baseline", 4e-3, 0)

# Its first words are those of the command; the last two are `--config FILE`. It knows its folder by the config, as a rank does.
LAUNCHER = """
    import json, os, signal, sys, time, yaml
    from pathlib import Path

    settings = yaml.safe_load(Path(sys.argv[-1]).read_text())
    assert sys.argv[-2] == "--config" and os.getsid(0) == os.getpid()
    folder = Path(settings["train"]["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    records = folder / "metrics.jsonl"

    def there():
        return len(records.read_text().splitlines()) if records.exists() else 0

    def step(loss, **more):
        with records.open("a") as stream:
            stream.write(json.dumps({"step": there() + 1, "loss": loss, "step_seconds": 0.5, **more}) + "\\n")

    def on_term(act):
        signal.signal(signal.SIGTERM, act)
"""


def launcher(folder: Path, text: str) -> list[str]:
    path = folder / "launcher.py"
    path.write_text(textwrap.dedent(LAUNCHER) + textwrap.dedent(text))
    return [sys.executable, str(path)]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(read_spec(write_spec(tmp_path, steps=6)), tmp_path / "out")
    study.claim(study.spec.decides(), "")
    return study


def run(study: Study, text: str, **settings: Any) -> bool:
    return run_launched(study, KEY, study.configs([KEY])[KEY], launcher(study.folder.parent, text), **settings)


def wait_for(true: Any) -> None:
    until = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_run_is_over_once_and_writes_into_its_own_files_alone(study: Study) -> None:
    told: list[str] = []
    before = {path for path in study.folder.rglob("*") if path.is_file()}
    whole = "print('said'); [step(3.0) for _ in range(5)]; step(2.0, val_loss=2.5)"
    assert run(study, whole, tell=told.append)
    assert study.outcome(KEY).val_loss == 2.5 and told == ["baseline-lr0.004-s0: finished, held-out loss 2.5000, 3 s"]
    assert study.log(KEY).read_text() == "said\n"
    made = {str(path.relative_to(study.folder)) for path in study.folder.rglob("*") if path.is_file() and path not in before}
    of_run = {f"runs/{KEY}/metrics.jsonl", f"runs/{KEY}/outcome.json"}
    assert made == of_run | {f"configs/{KEY}.yaml", f"logs/{KEY}.log"}, "study.json belongs to who looks at the study"
    assert run(study, "raise SystemExit('started again')", tell=told.append) and len(told) == 1


def test_a_run_whose_end_nobody_noted_is_not_started_again(study: Study) -> None:
    study.run_folder(KEY).mkdir(parents=True)
    lines = [{"step": step, "loss": 3.0, "val_loss": 2.0} for step in range(1, 7)]
    (study.run_folder(KEY) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(study, "raise SystemExit('started again')") and study.outcome(KEY).val_loss == 2.0


def test_one_that_diverges_is_stopped_by_the_rule_and_its_checkpoints_go(study: Study) -> None:
    text = """
        on_term(lambda *_: (print("told to stop"), sys.exit(143)))
        (folder / "checkpoints").mkdir()
        [step(3.0) for _ in range(3)]
        [step(9.0) for _ in range(3)]
        time.sleep(60)
    """
    assert run(study, text)
    outcome = study.outcome(KEY)
    assert (outcome.status, outcome.steps) == ("diverged", outcome.step) and "nats above that of the first 3" in outcome.reason
    assert study.log(KEY).read_text() == "told to stop\n" and not (study.run_folder(KEY) / "checkpoints").exists()


def test_a_number_that_is_not_finite_is_known_by_the_exit_code(study: Study) -> None:
    assert run(study, "step(3.0); sys.exit(3)")
    outcome = study.outcome(KEY)
    assert (outcome.status, outcome.step, outcome.reason) == ("diverged", 2, "the loss or the gradient is not finite")


def test_ranks_that_somebody_else_stopped_go_on_with_the_next_call(study: Study) -> None:
    assert not run(study, "print('first'); step(3.0); step(3.0); sys.exit(143)") and study.outcome(KEY) is None
    assert not run(study, "os.kill(os.getpid(), signal.SIGTERM)")
    assert not run(study, "sys.exit(130)") and not run(study, "signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)")
    assert run(study, "print('last'); assert there() == 2; [step(3.0) for _ in range(3)]; step(3.0, val_loss=1.0)")
    assert study.outcome(KEY).steps == 6 and study.log(KEY).read_text() == "first\nlast\n"


@pytest.mark.parametrize("code", [0, 1, 137])
def test_a_failure_is_told_with_the_end_of_the_log(study: Study, code: int) -> None:
    text = f"[print('line', n) for n in range(40)]; step(3.0); sys.exit({code})"
    with pytest.raises(RunError, match=rf"(?s)baseline-lr0.004-s0 ended with exit code {code}; the end of .*log:\nline 25\n.*39"):
        run(study, text)
    assert study.outcome(KEY) is None


def test_a_command_that_is_not_there_is_told(study: Study) -> None:
    with pytest.raises(ConfigError, match="no-such-launcher: cannot be started .No such file"):
        run_launched(study, KEY, study.configs([KEY])[KEY], ["no-such-launcher"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_handed_on_and_waited_for(study: Study, number: signal.Signals) -> None:
    text = """
        def save(*_):
            time.sleep(0.5)
            step(3.0, saved=True)
            sys.exit(143)
        on_term(save)
        step(3.0)
        time.sleep(60)
    """

    def stop() -> None:
        wait_for(lambda: study.records(KEY))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as stopped, stoppable():
        run(study, text)
    thread.join()
    assert isinstance(stopped.value, Stopped) == (number == signal.SIGTERM)
    assert study.records(KEY)[-1].get("saved") and study.outcome(KEY) is None
    assert run(study, "[step(3.0) for _ in range(3)]; step(3.0, val_loss=1.0)")


def test_a_run_that_is_over_at_the_moment_of_a_stop_is_noted(study: Study) -> None:
    text = """
        def finish(*_):
            step(3.0, val_loss=2.0)
            sys.exit(0)
        on_term(finish)
        [step(3.0) for _ in range(5)]
        time.sleep(60)
    """

    def stop() -> None:
        wait_for(lambda: len(study.records(KEY)) == 5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped), stoppable():
        run(study, text)
    thread.join()
    assert study.outcome(KEY).val_loss == 2.0


def test_one_that_does_not_stop_is_killed_with_all_that_it_started(study: Study) -> None:
    text = """
        import subprocess
        on_term(signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60); open('{folder}/left', 'w')"])
        (folder / "child").write_text(str(child.pid))
        [step(3.0) for _ in range(3)]
        [step(9.0) for _ in range(3)]
        child.wait()
    """
    assert run(study, text, grace_s=0.5) and study.outcome(KEY).status == "diverged"
    child = int((study.run_folder(KEY) / "child").read_text())
    assert gone([child])
    assert not (study.run_folder(KEY) / "left").exists(), "it did not end by itself"


def test_a_signal_while_the_command_starts_leaves_nothing_behind(study: Study) -> None:
    """It comes at the first moment at which the command exists: from the command itself."""
    text = """
        on_term(lambda *_: (print("told to stop"), sys.exit(143)))
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    """
    with pytest.raises(Stopped), stoppable():
        run(study, text)
    assert study.log(KEY).read_text() == "told to stop\n"


def test_one_whose_records_end_before_its_checkpoint_is_not_started(study: Study) -> None:
    checkpoint = study.run_folder(KEY) / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / INDEX_NAME).write_text("{}")
    with pytest.raises(RunError, match="would go on from its checkpoint of step 3, but .* has the steps up to 0 only"):
        run(study, "step(3.0)")
    assert not study.records(KEY)


# ---- as a task of Slurm's array


def task(study: Study, index: int, text: str) -> int:
    """The exit code of the command that a task calls."""
    words = launcher(study.folder.parent, text)
    return call("lr_stability", "task", study.folder.parent / "spec.yaml", "--output", study.folder, "--index", index, "--", *words)


@pytest.fixture
def array(study: Study) -> Study:
    """A study whose runs have numbers, those of a spec that had one more among them."""
    (study.folder / "slurm.json").write_text(json.dumps({"runs": ["gone", *map(str, study.keys)], "jobs": []}))
    return study


def test_a_task_leaves_by_what_its_run_has_come_to(array: Study, capfd: pytest.CaptureFixture[str]) -> None:
    assert task(array, 1, "step(3.0); sys.exit(143)") == 143 and array.outcome(KEY) is None, "stopped: Slurm queues it again"
    assert task(array, 1, "sys.exit(1)") == 2 and "ended with exit code 1" in capfd.readouterr().err
    assert task(array, 1, "[step(3.0) for _ in range(4)]; step(3.0, val_loss=1.0)") == 0 and array.outcome(KEY).val_loss == 1.0
    assert task(array, 2, "step(3.0); sys.exit(3)") == 0 and array.outcome(array.keys[1]).status == "diverged"
    for number in (-1, 0, 9):
        assert task(array, number, "") == 2
        assert f"--index {number}: " in capfd.readouterr().err


@pytest.mark.parametrize(("last", "code"), [("step(3.0)", 143), ("step(3.0, val_loss=2.0)", 0)])
def test_a_task_that_is_stopped_says_whether_it_is_to_go_on(array: Study, last: str, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    text = f"""
        def finish(*_):
            {last}
            sys.exit(143)
        on_term(finish)
        [step(3.0) for _ in range(5)]
        time.sleep(60)
    """

    def stop() -> None:
        wait_for(lambda: len(array.records(KEY)) == 5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert task(array, 1, text) == code
    thread.join()
    assert ("the same command goes on from there" in capfd.readouterr().err) == (code == 143)


def test_numbers_of_runs_that_cannot_be_read_are_told(array: Study) -> None:
    (array.folder / "slurm.json").write_text("{")
    with pytest.raises(RunError, match="slurm.json: cannot be read .*; cancel the study's jobs in the queue, remove it, and run"):
        queue(array)
