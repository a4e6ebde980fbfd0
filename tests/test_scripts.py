"""What shells read: every script of the repository, and the settings of clusters."""

import re
import subprocess
from pathlib import Path

import debian
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "examples", "tools", "tests", "megagate")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
SCRIPTS = sorted(path for path in FILES if path.suffix in (".sh", ".sbatch") or path == ROOT / ".ci" / "run")
SETTINGS = sorted((ROOT / "examples" / "cluster").glob("*.env"))
SETTING = re.compile(r"#?([A-Z][A-Z0-9_]*)=([\w.,:=/-]+)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_scripts_and_settings() -> None:
    found = [name_of(path) for path in [*SCRIPTS, *SETTINGS]]
    assert {"examples/pretrain_moe.sh", "examples/cluster/hosts.sh", "examples/slurm/preprocess_array.sbatch"} < set(found)
    assert {"examples/cluster/a100.env", "examples/cluster/h100.env"} <= set(found)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_bash_reads_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    debian.require({"shellcheck": "shellcheck"})
    done = subprocess.run(["shellcheck", "--shell=bash", *map(str, SCRIPTS)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", SETTINGS, ids=name_of)
def test_every_setting_is_explained_and_stands_once(path: Path) -> None:
    lines, seen = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines):
        if not line or line.startswith("# "):
            continue
        found = SETTING.fullmatch(line)
        assert found, f"{line}: a KEY=VALUE line, or one behind #, of which a shell, Python and DeepSpeed read the same"
        assert number and lines[number - 1].startswith("# ") and not lines[number - 1].startswith("# --"), f"{line}: nothing explains it"
        seen.append(found[1])
    assert len(seen) == len(set(seen)) > 10
    assert "tried on no GPU" in path.read_text(encoding="utf-8").replace("\n# ", " ")


def test_a_shell_reads_the_settings_as_they_stand() -> None:
    for path in SETTINGS:
        plain = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        shell = ["env", "-i", "bash", "-c", f"set -a; source {path}; env"]
        read = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
        assert set(plain) <= set(read) and len(plain) >= 3
