"""The doctor's command: its words and exit codes, with and without a launcher, and that it always ends and leaves no process behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import ranks  # noqa: F401 - its server starts the ranks of `main` in this process
from commands import load

import megagate.engine.zero  # noqa: F401 - so that the server loads DeepSpeed's parts too
from megagate.parallel.spawn import RankError
from megagate.verify.faults import FAULTS

ROOT = Path(__file__).parents[2]
TOOL, CONFIGS = ROOT / "tools" / "doctor.py", ROOT / "examples" / "configs"
DEEPSPEED = Path(sysconfig.get_path("scripts")) / "deepspeed"
NANO = ("--config", str(CONFIGS / "nano.yaml"))
TP2_EP4 = ("--parallel.tp", "2", "--parallel.ep", "4")
CURRENT = ("--precision.fp8.recipe", "current", "--precision.fp8.emulate", "true")
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MARK = "TEST_TOOLS_DOCTOR"
LIMIT_S = 120.0
GONE_WITHIN_S = 20.0
"""For the server of the ranks, which may be in the middle of its imports when its parent ends."""


# ---- in this process: `main` itself, its ranks from the tests' warm server


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """The command as a module."""
    return load("doctor")


@pytest.fixture
def main(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`main(*arguments)` without a launcher; argparse's way out counts as an exit code too."""
    for name in LAUNCHER_SETS:
        monkeypatch.delenv(name, raising=False)
    for name, value in CPU.items():
        monkeypatch.setenv(name, value)

    def call(*arguments: object) -> int:
        try:
            return command.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            return leaving.code

    return call


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--world", 4, *NANO, "--parallel.tp", 3], "model.attention.num_heads (4) must be divisible by parallel.tp (3)"),
        (["--world", 4, *NANO, "--parallel.tp", 16], "model.attention.num_heads (4) must be divisible by parallel.tp (16)"),
        (["--world", 4, *NANO, "--parallel.ep", 3], "model.moe.num_experts (8) must be divisible by parallel.ep (3)"),
        (["--world", 4, *NANO, "--parallel.tp", -8], "parallel.tp (-8) must be at least 1"),
        (["--world", 4, *NANO, "--train.global_batch_size", 6], "train.global_batch_size (6) must be divisible by"),
        (["--world", 16, *NANO], "train.global_batch_size (8) must be divisible by"),
        (["--world", 3, *NANO, "--parallel.tp", 2], "the number of ranks (3) must be divisible by parallel.tp (2)"),
        (["--world", 2, *NANO, "--parallel.zero_stage", 0], "parallel.zero_stage (0) must be at least 1 for a mixture of experts"),
        (["--world", 2], "model.vocab_size (0) must be at least 1; give a base config first"),
        (["--world", 2, *NANO, "--model.no_such_key", 3], "--model.no_such_key (on the command line) is not a known key"),
        (["--world", 2, "--config", "no_such.yaml"], "--config no_such.yaml cannot be read"),
        (["--world", 2, *NANO, "--train.steps", "many"], "train.steps"),
        (["--preset", "paper/table1/row03", "--world", 5, "--parallel.tp", 5], "num_heads (48) must be divisible by parallel.tp (5)"),
        (["--world", 2, "--preset=paper/table1/row5"], "--preset paper/table1/row5 is unknown; the nearest are paper/table"),
        ([*NANO], "--world (0) must be at least 1 without a launcher; add --world 4, or start with deepspeed"),
        (["--world", 0, *NANO], "--world (0) must be at least 1"),
        (["--world", -1, *NANO], "--world (-1) must be at least 1"),
        (["--world", "all", *NANO], "argument --world: invalid int value: 'all'"),
        (["--world", 2, *NANO, "--timeout", 0], "--timeout (0) must be a number of seconds above 0"),
        (["--world", 2, *NANO, "--timeout", "nan"], "--timeout (nan) must be a number of seconds above 0"),
        (["--world", 2, *NANO, "--json", "/no/such/folder/found.json"], "--json /no/such/folder/found.json cannot be written"),
        (["--world", 2, *NANO, "--json", "/"], "--json / cannot be written"),
        (["--world", 2, *NANO, "--backend", "te"], "precision.backend (te) needs a CUDA GPU"),
        (["--world", 2, *NANO, "--backend", "apex"], "argument --backend: invalid choice: 'apex'"),
        (["--world", 2, *NANO, "--recipe", "current"], "--recipe (current) is of kernels to compare; add --backend te or emulated"),
        (["--world", 2, *NANO, "--backend", "emulated", "--recipe", "fp4"], "--recipe fp4 is not one of delayed, current, blockwise"),
        (["--world", 2, *NANO, "--backend", "emulated", "--recipe", " , "], "--recipe ( , ) names no recipe; name some, or leave it out"),
        (["--world", 2, *NANO, "--recipe", ""], "--recipe () is of kernels to compare"),
        (["--world", 2, "--backend", "emulated"], "model.vocab_size (0) must be at least 1; give a base config first"),
        (["--world", 1, *NANO, "--backend", "emulated", "--model.attention.num_heads", 5], "num_heads (5) must be divisible by"),
        (["--world", 2, *NANO, "--backend", "emulated", *CURRENT, "--model.hidden_size", 200], "hidden_size (200) must be a multiple of"),
        (["--world", 2, *NANO, "--backend", "emulated", "--fault", "aux-over-dp"], "--fault aux-over-dp is not one of weight-scale-off"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.split(";")[0][:40],
)
def test_bad_input_is_one_clean_message(main: Callable[..., int], capfd: pytest.CaptureFixture[str], words: list, told: str) -> None:
    assert main(*words) == 2
    out, err = capfd.readouterr()
    assert told in err and "Traceback" not in err
    assert out == "", "nothing is said to be found"
    if "usage" not in err:
        assert err.startswith("ConfigError: ") and err.count("Error: ") == 1


def test_a_number_of_ranks_is_the_launcher_s(main: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main("--world", 2, *NANO) == 2
    assert capfd.readouterr().err == "ConfigError: --world (2) is for a start without a launcher; leave it out under deepspeed\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main("--world", 2, *NANO) == 2
    assert capfd.readouterr().err == "", "one rank of a machine speaks for all"


def test_every_rank_refuses_a_bad_time_out(main: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Else the others would end by it, and the launcher with the exit code of a failure."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(*NANO, "--timeout", 0) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("fault", "told"), [("gremlins", f"is not one of {', '.join(FAULTS)}; "), ("wrong-vocabulary-shard", "needs more than one rank on the")]
)
def test_a_fault_that_cannot_show_is_refused(main: Callable[..., int], capfd: pytest.CaptureFixture[str], fault: str, told: str) -> None:
    assert main("--world", 1, *NANO, "--fault", fault) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"ConfigError: --fault {fault} ") and told in err and err.count("\n") == 1 and out == ""


def test_a_fault_fails_the_command(main: Callable[..., int], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    code = main("--world", 4, *NANO, *TP2_EP4, "--parallel.zero_stage", 2, "--fault", "expert-gradients-times-ep", "--json", found)
    lines = capfd.readouterr().out.splitlines()
    assert code == 1
    assert lines[-1] == "FAIL: experts: gradients are 4.00 x the reference = ep = world"
    assert any(line.startswith("experts ") and line.endswith(" WRONG 4.00 x the reference = ep = world") for line in lines)
    record = json.loads(found.read_text())
    assert (record["passed"], record["verdict"], record["fault"]) == (False, lines[-1], "expert-gradients-times-ep")
    assert {row["what"] for row in record["gradients"] if not row["ok"]} == {"experts"}


def test_a_layout_for_more_ranks_is_reduced_and_both_ends_say_so(main: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert main("--world", 4, "--config", CONFIGS / "moe_15a2b.yaml", "--parallel.ep", 8) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "reduced layout: tp 1, ep 8 need more than 4 ranks; checked with 4 ranks as dp 4 x tp 1, ep 4"
    assert lines[-1] == "PASS (reduced layout)"
    assert "bf16" in lines[1] and "recompute" in lines[1] and "top-3" in lines[1]


def test_a_reduced_layout_that_fails_fails(main: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert main("--world", 2, *NANO, "--parallel.ep", 4, "--fault", "aux-over-dp") == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("reduced layout: ") and lines[-1].startswith("FAIL: auxiliary losses: gradients are 0.50 x the reference")


def test_kernels_are_compared_layer_by_layer(main: Callable[..., int], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    how = ("--world", 2, *NANO, "--parallel.tp", 2, "--backend", "emulated", "--recipe", " current,current ", "--json", found)
    assert main(*how) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "layout: 2 ranks as dp 1 x tp 2, ep 1" and lines[-1] == "PASS"
    (line,) = (line for line in lines if line.startswith("layers.0.attention.out "))
    assert re.fullmatch(r"layers\.0\.attention\.out( +[\d.]+ \[[\d.]+, [\d.]+\]){3}  ok", line)
    record = json.loads(found.read_text())
    assert record["passed"] and record["backend"] == "emulated" and [one["recipe"] for one in record["recipes"]] == ["current"]
    assert main(*how, "--fault", "wgrad-of-stale-input") == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("FAIL: current: layers.1.attention.out: weight gradient differs by ")
    assert json.loads(found.read_text())["causes"][0] in last


def test_a_recipe_is_left_out_aloud(main: Callable[..., int], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    fp8 = ("--precision.fp8.recipe", "delayed", "--precision.fp8.emulate", "true")
    assert main("--world", 2, "--config", CONFIGS / "tiny.yaml", "--parallel.ep", 2, *fp8, "--json", found) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2] == "precision.fp8 (delayed) is not part of this: `--backend emulated` looks at it, product by product"
    assert lines[-1] == "PASS (without FP8)"
    assert json.loads(found.read_text())["left_out"] == {"precision.fp8.recipe": "delayed"}


RAISED = "rank 1 of 2 failed in f\n\nTraceback (most recent call last):\n  ...\nOdd: no\n\nits last output:\nhm"


@pytest.mark.parametrize(
    ("story", "cause", "reason"),
    [
        (RAISED, ValueError("no\nnot at all"), "ValueError: no"),
        (RAISED, None, "Odd: no"),
        ("rank 1 of 2 failed in f\n\nthe process was killed by SIGKILL\nat g", None, "the process was killed by SIGKILL"),
    ],
    ids=["an exception", "one that could not be sent", "a death"],
)
def test_the_reason_is_one_line(command: ModuleType, story: str, cause: Exception | None, reason: str) -> None:
    error = RankError(story, [1])
    error.__cause__ = cause
    assert command._reason(error) == reason


# ---- processes of their own


class Started:
    """A command in a session of its own; every process that it starts, and that these start, carries a mark in its environment."""

    def __init__(self, command: list[object], output: Path):
        self.mark, self.output = uuid.uuid4().hex, output
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_SETS} | CPU | {MARK: self.mark}
        environment["PATH"] = f"{DEEPSPEED.parent}:{environment['PATH']}"
        with output.open("wb") as file:
            words = [str(word) for word in command]
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def left(self) -> list[psutil.Process]:
        """Its processes, the oldest first, whoever their parent is now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def ranks(self) -> list[psutil.Process]:
        """Under a launcher what has `--local_rank`, else the children of the server that ranks are forked from."""
        words = {process: " ".join(process.cmdline()) for process in self.left()}
        launched = [process for process, line in words.items() if "--local_rank" in line and str(TOOL) in line and "launch" not in line]
        servers = {process.pid for process, line in words.items() if "forkserver" in line and process.ppid() == self.process.pid}
        return launched or [process for process in words if process.ppid() in servers]

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, f"it did not come:\n{self.text}"
            time.sleep(0.05)

    def wait(self, seconds: float = LIMIT_S) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.text}") from None

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + GONE_WITHIN_S
        while left := self.left():
            assert time.monotonic() < deadline, f"left behind: {[process.cmdline() for process in left]}"
            time.sleep(0.1)

    def kill(self) -> None:
        for process in self.left():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """`start(*arguments)` runs the command plainly, `start(*arguments, launch=2)` under `deepspeed --num_gpus 2`."""
    started = []

    def begin(*arguments: object, launch: int = 0) -> Started:
        by = [DEEPSPEED, "--num_gpus", launch, "--master_port", free_port()] if launch else [sys.executable]
        started.append(Started([*by, TOOL, *arguments], tmp_path / f"output-{len(started)}"))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_help_is_instant_and_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    command = [sys.executable, str(TOOL), "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in ("--world", "--json", "--timeout", "--fault", "--config"))


@pytest.mark.slow
def test_a_good_layout_passes(start: Callable[..., Started], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    job = start("--world", 4, *NANO, *TP2_EP4, "--json", found)
    assert job.wait() == 0, job.text
    lines = job.text.splitlines()
    assert lines[0] == "layout: 4 ranks as dp 2 x tp 2, ep 4" and lines[-1] == "PASS"
    groups = ["embedding", "norms", "attention", "gate", "router", "experts", "head", "auxiliary losses"]
    titles = [*groups, "all, step 2", "all, step 3", "initial weights", "updates"]
    assert [line.split("  ")[0] for line in lines if line.endswith(" ok")][: len(titles)] == titles
    record = json.loads(found.read_text())
    assert (record["verdict"], record["passed"], record["reduced"], record["fault"]) == ("PASS", True, False, "")
    assert record["layout"] == {"world": 4, "tp": 2, "ep": 4, "zero_stage": 1} and record["precision"] == "fp32" and record["causes"] == []
    assert [row["what"] for row in record["gradients"]] == groups
    assert all(row["bytes"] == row["minimum"] for row in record["sent"] if row["sender"] == "model")
    assert {"sender", "axis", "kind", "calls", "bytes", "minimum"} == set(record["sent"][0])
    assert all(number["ok"] and number["ours"] == pytest.approx(number["reference"], rel=1e-5) for number in record["numbers"])
    job.assert_nothing_is_left()


@pytest.mark.slow
def test_it_passes_under_the_launcher(start: Callable[..., Started], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    job = start(*NANO, "--parallel.tp", 2, "--json", found, launch=2)
    assert job.wait() == 0, job.text
    lines = job.text.splitlines()
    assert lines.count("PASS") == 1 and lines.count("layout: 2 ranks as dp 1 x tp 2, ep 1") == 1, "one rank speaks"
    assert json.loads(found.read_text())["passed"]
    job.assert_nothing_is_left()


@pytest.mark.slow
def test_bad_input_under_the_launcher_is_told_once(start: Callable[..., Started]) -> None:
    job = start(*NANO, "--parallel.tp", 3, launch=2)
    assert job.wait() == 2, job.text
    assert job.text.count("ConfigError: ") == 1 and "Traceback" not in job.text
    job.assert_nothing_is_left()


TIMEOUT_S, START_S = 12, 15
"""`START_S`: what may come on top of the time-out on a busy machine; imports, and the end of the launcher."""


def end_of(job: Started, started: float) -> list[str]:
    assert job.wait(TIMEOUT_S + START_S + 20) == 1, job.text
    assert time.monotonic() - started < TIMEOUT_S + START_S + 20
    job.assert_nothing_is_left()
    return job.text.strip().splitlines()


@pytest.mark.slow
def test_a_hang_ends_at_its_time_out(start: Callable[..., Started]) -> None:
    job, started = start("--world", 2, *NANO, "--fault", "hang", "--timeout", TIMEOUT_S), time.monotonic()
    lines = end_of(job, started)
    assert lines[-1] == f"FAIL: ranks 0, 1 did not finish within --timeout {TIMEOUT_S} s"
    assert time.monotonic() - started > TIMEOUT_S, "not before"


@pytest.mark.slow
def test_a_hang_under_the_launcher_ends_at_its_time_out(start: Callable[..., Started]) -> None:
    job, started = start(*NANO, "--fault", "hang", "--timeout", TIMEOUT_S, launch=2), time.monotonic()
    lines = end_of(job, started)
    fails = [line for line in lines if line.startswith("FAIL: ")]
    assert fails and all(line.endswith(f"did not finish within --timeout {TIMEOUT_S} s") for line in fails)
    assert "Traceback" not in job.text, "what the end of one rank does to the others is not told"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stands_still_ends_all(start: Callable[..., Started], number: int) -> None:
    job, started = start("--world", 2, *NANO, "--fault", "hang", "--timeout", TIMEOUT_S), time.monotonic()
    job.until(lambda: len(job.ranks()) == 2)
    job.ranks()[1].send_signal(number)
    lines = end_of(job, started)
    died = f"FAIL: rank 1: the process was killed by {signal.Signals(number).name}"
    assert lines[-1] == (died if number == signal.SIGKILL else f"FAIL: ranks 0, 1 did not finish within --timeout {TIMEOUT_S} s")


@pytest.mark.slow
def test_a_rank_that_dies_under_the_launcher_ends_all(start: Callable[..., Started]) -> None:
    job = start(*NANO, "--fault", "hang", "--timeout", 60, launch=2)
    job.until(lambda: len(job.ranks()) == 2)
    job.ranks()[1].kill()
    assert job.wait(40) != 0, job.text
    job.assert_nothing_is_left()


@pytest.mark.slow
def test_ctrl_c_ends_all(start: Callable[..., Started]) -> None:
    job = start("--world", 2, *NANO, "--fault", "hang", "--timeout", 60)
    job.until(lambda: len(job.ranks()) == 2)
    os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does: to all processes of the session that have not left its group
    assert job.wait(20) == 130, job.text
    job.assert_nothing_is_left()
