"""What a cluster cannot do is refused before anything is made, with the nearest that it can."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lr_specs import SMALL, write_spec
from test_lr_command import command

from megagate.analysis.lr.cluster import other_sizes, read_hosts
from megagate.analysis.lr.executor import Executor

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "cluster" / "hosts.sh"
MOE = {"model.moe.num_experts": 16, "model.moe.top_k": 2, "model.moe.ffn_size": 16, "parallel.zero_stage": 1, "parallel.ep": 16}
SIX = {"train.global_batch_size": 6, "train.micro_batch_size": 1}
LARGE = {"train.global_batch_size": 64, "train.micro_batch_size": 2}
HOSTS = "# ours\na slots=2\n\nb slots=2\n  c slots=1  # an old one\n"


# Files are looked for last: a layout that fits nothing is told on a laptop without them, too.
FITTING = {"train.micro_batch_size": 1}


def spec_of(folder: Path, executor: dict[str, Any], **settings: Any) -> Path:
    """SMALL on a cluster whose files are all there."""
    (folder / "hosts").write_text(HOSTS)
    (folder / "script").touch()
    whole = {"kind": "hosts", "nodes": 2, "gpus_per_node": 1, "hostfile": str(folder / "hosts"), "script": str(folder / "script")}
    if executor.get("kind") == "slurm":
        del whole["hostfile"]
    return write_spec(folder, executor=whole | executor, set=SMALL["set"] | FITTING | settings)


@pytest.mark.parametrize(
    ("executor", "settings", "words"),
    [
        ({"hostfile": "nowhere/hosts"}, {}, "executor.hostfile (nowhere/hosts) is no file, seen from /"),
        ({"script": "nowhere.sh"}, {}, "executor.script (nowhere.sh) is no file"),
        ({"env": "h100.env"}, {}, "executor.env (h100.env) is no file"),
        ({"kind": "slurm", "script": "nowhere.sbatch"}, {}, "executor.script (nowhere.sbatch) is no file"),
        ({"nodes": 4}, LARGE, "executor.nodes (4) must be at most the 3 machines of"),
        ({"nodes": 3, "gpus_per_node": 2}, SIX, "executor.gpus_per_node (2) must be at most the slots of each machine in"),
        ({"nodes": 3, "gpus_per_node": 2}, SIX, "which has c 1; lower it"),
        ({"hostfile": "FOLDER/twice"}, {}, "line 2: a stands there twice; keep one line"),
        ({"hostfile": "FOLDER/bad"}, {}, "line 1 (a) must be as in `node1 slots=8`; mend it"),
        ({"gpu": "h100"}, {}, "executor.gpu h100 is unknown; give its memory in GB, such as 80, or one of"),
        ({"gpus": 8}, {}, "executor.gpus is not a key of the hosts executor; did you mean gpu?"),
        ({"kind": "slurm", "nodes": 3, "gpus_per_node": 8}, MOE | LARGE, "x executor.gpus_per_node the nearest that fit: 2 x 8 and 4 x 8"),
        ({"kind": "slurm", "nodes": 8, "gpus_per_node": 8}, LARGE, "the nearest that fit: 4 x 8"),
        ({"kind": "slurm", "nodes": 1, "gpus_per_node": 6}, LARGE, "the nearest that fit: 1 x 4"),
        ({"kind": "slurm", "nodes": 1, "gpus_per_node": 1, "gpu": "1.1"}, {"model.vocab_size": 4_000_000, "precision.dtype": "bf16",
          "parallel.zero_stage": 3}, "executor.gpu 1.1 (1.1 GB) must hold the run in 90% of its memory"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [True, False])
def test_bad_clusters_are_refused_and_nothing_is_made(
    executor: dict[str, Any], settings: Any, words: str, dry: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "twice").write_text("a slots=2\na slots=2\n")
    (tmp_path / "bad").write_text("a\n")
    executor = {key: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value for key, value in executor.items()}
    spec = spec_of(tmp_path, executor, **settings)
    assert command("run", spec, "--output", tmp_path / "out", *["--dry-run"] * dry) == 2
    assert words in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_machine_with_few_slots_counts_where_a_run_needs_it(tmp_path: Path) -> None:
    """The launcher takes the first machines of the file; the third one, which has one slot, is left alone."""
    spec = spec_of(tmp_path, {"nodes": 2, "gpus_per_node": 2}, **LARGE)
    assert command("run", spec, "--output", tmp_path / "out", "--dry-run") == 0


def test_a_host_file_is_read_as_the_launcher_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    (tmp_path / "hosts").write_text(HOSTS)
    assert read_hosts(tmp_path / "hosts") == dict(fetch_hostfile(str(tmp_path / "hosts"))) == {"a": 2, "b": 2, "c": 1}


def test_ranks_that_were_left_behind_are_not_joined_by_others(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    config = str(tmp_path / "c.yaml")
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    left = subprocess.Popen([*sleep, "megagate.train.main", "--local_rank=0", "--config", config])
    try:
        size = ["--hostfile", str(tmp_path / "hosts"), "--nodes", "1", "--gpus", "1"]
        start = ["bash", str(SCRIPT), *size, "--stop-s", "1", "--", "--config", config]
        done = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    finally:
        left.kill()
        left.wait()
    assert done.returncode == 2 and "this job's ranks run already" in done.stderr and f"{left.pid} " in done.stderr


def test_memory_that_more_machines_bring_is_told() -> None:
    executor = Executor(kind="slurm", nodes=2, gpus_per_node=8)
    assert other_sizes(executor, lambda world_size: world_size >= 24).endswith("the nearest that fit: 3 x 8")
    assert other_sizes(executor, lambda world_size: False) == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "1", "--gpus", "1", "--", "x"], "--hostfile () is no file"),
        (["--hostfile", "HOSTS", "--nodes", "4", "--gpus", "1", "--", "x"], "--nodes (4) must be at most the 3 machines of"),
        (["--hostfile", "HOSTS", "--nodes", "two", "--gpus", "1", "--", "x"], "--nodes (two) must be a whole number from 1 on"),
        (["--hostfile", "HOSTS", "--nodes", "1"], "there is no job; name its config behind --"),
        (["--hostfile", "HOSTS", "--nodes"], "--nodes needs a value"),
        (["--config", "x"], "--config is not an option of this script; those of the job stand behind --"),
        (["--hostfile", "HOSTS", "--nodes", "1", "--gpus", "1", "--env", "no.env", "--", "x"], "--env (no.env) is no file"),
    ],
)
def test_the_launch_script_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(HOSTS)
    filled = [str(tmp_path / "hosts") if word == "HOSTS" else word for word in arguments]
    done = subprocess.run(["bash", str(SCRIPT), *filled], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and words in done.stderr and done.stderr.startswith("hosts.sh: ")
