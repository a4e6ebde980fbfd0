"""examples/pretrain_moe.sh is a shell script and a Python program at once; stand-ins show what each half starts."""

import ast
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_moe.sh"
TINY = str(SCRIPT.parent / "configs" / "tiny.yaml")
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder with a `deepspeed` and a `python3` that write their name and arguments, one a line."""
    for name in ("deepspeed", "python3"):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name}\nfor word in "$@"; do echo "$word"; done\n', encoding="utf-8")
        path.chmod(0o755)
    return tmp_path


def start(command: list[str], *, folder: Path, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    full = {"PATH": path, **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=full, check=False)


def words(command: list[str], stand_ins: Path, **environment: str) -> list[str]:
    result = start(command, folder=stand_ins, path=f"{stand_ins}:{os.environ['PATH']}", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_both_languages_can_read_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ast.parse(SCRIPT.read_text(encoding="utf-8"))
    assert os.access(SCRIPT, os.X_OK), "--no_python executes the file itself"


def test_by_hand_it_calls_the_launcher(stand_ins: Path) -> None:
    assert words(["bash", str(SCRIPT), "--train.steps", "5"], stand_ins) == ["deepspeed", str(SCRIPT), "--train.steps", "5"]
    called = words(["bash", str(SCRIPT)], stand_ins, NPROC="2", DS_LAUNCH_ARGS="--master_port 29511")
    assert called == ["deepspeed", "--num_gpus", "2", "--master_port", "29511", str(SCRIPT)]


def test_without_deepspeed_it_says_so(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    result = start(["bash", str(SCRIPT)], folder=tmp_path, path=str(tmp_path))
    assert result.returncode == 2
    assert "deepspeed is not on PATH" in result.stderr


def test_under_the_launcher_it_starts_the_trainer(stand_ins: Path) -> None:
    trainer = ["python3", "-u", "-m", "megagate.train.main"]
    assert words([str(SCRIPT)], stand_ins, **LAUNCHED) == [*trainer, "--config", TINY]
    argv = ["--local_rank=0", "--eval.prompt", "a b  'c'"]
    assert words(["bash", str(SCRIPT), *argv], stand_ins, **LAUNCHED) == [*trainer, "--config", TINY, *argv]


@pytest.mark.parametrize(
    "own", [["--config", "my.yaml"], ["--config=my.yaml"], ["--preset", "paper/table1/row10"], ["--preset=paper/table1/row10"]]
)
def test_a_config_or_preset_of_the_users_replaces_the_default(stand_ins: Path, own: list[str]) -> None:
    called = words(["bash", str(SCRIPT), "--local_rank=0", *own], stand_ins, **LAUNCHED)
    assert called == ["python3", "-u", "-m", "megagate.train.main", "--local_rank=0", *own]


def test_started_by_python_it_keeps_the_interpreter(stand_ins: Path) -> None:
    package = stand_ins / "megagate" / "train"
    package.mkdir(parents=True)
    (package / "main.py").write_text("import sys\nprint(sys.executable, *sys.argv[1:], sep='\\n')\n", encoding="utf-8")
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    called = words([sys.executable, "-u", str(SCRIPT), "--local_rank=0", "--eval.prompt=a b"], stand_ins, **LAUNCHED)
    assert called == [sys.executable, "--config", TINY, "--local_rank=0", "--eval.prompt=a b"]
