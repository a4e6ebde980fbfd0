"""The scripts of examples/slurm in a real Slurm of two nodes. Their ranks are a few lines of bash here; real ones: test_lr_slurm.py."""

import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, temporary_slurm

ROOT = Path(__file__).parents[2]
SIZE = ("--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=50")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with temporary_slurm() as cluster:
        yield cluster


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The repository's scripts, with settings and a job that a test writes."""
    shutil.copytree(ROOT / "examples" / "slurm", tmp_path / "examples" / "slurm")
    (tmp_path / "examples" / "cluster").mkdir()
    (tmp_path / "examples" / "cluster" / "h100.env").write_text("SETTING=1\n")
    return tmp_path


def write_rank(root: Path, text: str) -> None:
    (root / "examples" / "pretrain_moe.sh").write_text("set -u\n" + textwrap.dedent(text))


def submit(cluster: Cluster, root: Path, *words: object, options: tuple[str, ...] = ()) -> str:
    command = ["sbatch", "--parsable", *SIZE, f"--output={root}/out.txt", *options, "examples/slurm/h100.sbatch", *words]
    return cluster.run(*command, cwd=root)


def test_ranks_know_each_other_and_a_failure_wins_over_a_stop(cluster: Cluster, root: Path) -> None:
    write_rank(
        root,
        """
        echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_SIZE $LOCAL_WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT, setting $SETTING: $*"
        case "$1" in
          each) # both leave by themselves: the one that is first has the other signalled
            trap '' TERM
            touch "there-$SLURM_STEP_ID-$RANK"
            while [[ $(ls there-"$SLURM_STEP_ID"-* | wc -l) -lt 2 ]]; do sleep 0.05; done
            exit "${@:2 + RANK:1}" ;;
          waits) # one leaves by itself: the other, which is there, is signalled; exec, so that no sleep is left to hold the output open
            if (( RANK == 1 )); then touch "waits-$SLURM_STEP_ID"; exec sleep 60; fi
            until [[ -e "waits-$SLURM_STEP_ID" ]]; do sleep 0.05; done
            exit "$2" ;;
        esac
        """,
    )
    script = root / "several.sbatch"
    script.write_text(
        """#!/bin/bash
        export SETTING=1
        for words in "each 0 0" "each 143 143" "each 3 3" "each 143 3" "each 0 1" "each 2 143" "each 139 3" \\
          "waits 3" "waits 1" "waits 143" "waits 139"; do
          bash examples/slurm/ranks.sh $words; echo "code of $words: $?"
        done
        unset MASTER_ADDR MASTER_PORT
        bash examples/slurm/ranks.sh each 0 0
        SLURM_NTASKS_PER_NODE=2 bash examples/slurm/ranks.sh each 0 0; echo "code of two ranks on a GPU: $?"
        """
    )
    preset = "--export=ALL,MASTER_ADDR=127.0.0.1,MASTER_PORT=12345"
    job = cluster.run("sbatch", "--parsable", *SIZE, preset, f"--output={root}/out.txt", script, cwd=root)
    assert cluster.wait_over(job) == {job: "COMPLETED"}
    said = (root / "out.txt").read_text()
    codes = dict(line.removeprefix("code of ").rsplit(": ", 1) for line in said.splitlines() if line.startswith("code of "))
    assert codes == {
        "each 0 0": "0",
        "each 143 143": "143",
        "each 3 3": "3",
        "each 143 3": "3",
        "each 0 1": "1",
        "each 2 143": "2",
        "each 139 3": "139",
        "waits 3": "3",
        "waits 1": "1",
        "waits 143": "143",
        "waits 139": "139",
        "two ranks on a GPU": "2",
    }, said
    for rank in (0, 1):
        assert f"rank {rank} of 2, 0 of 1 1 at 127.0.0.1:12345, setting 1: each 0 0" in said
        assert f"rank {rank} of 2, 0 of 1 1 at n0:{10000 + int(job) % 20000}, setting 1: each 0 0" in said
    assert "--ntasks-per-node (2) must be the number of GPUs of a node (1)" in said


def test_several_ranks_of_a_node_are_told_apart(cluster: Cluster, root: Path) -> None:
    write_rank(root, 'echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_SIZE $LOCAL_WORLD_SIZE on $SLURMD_NODENAME"')
    (root / "four.sbatch").write_text("#!/bin/bash\nbash examples/slurm/ranks.sh\n")
    size = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=50")
    job = cluster.run("sbatch", "--parsable", *size, f"--output={root}/out.txt", root / "four.sbatch", cwd=root)
    assert cluster.wait_over(job) == {job: "COMPLETED"}
    said = sorted((root / "out.txt").read_text().splitlines())
    assert said == [f"rank {rank} of 4, {rank % 2} of 2 2 on n{rank // 2}" for rank in range(4)]


# Slurm's signal ends the sleep, too, and sometimes before bash has it: hence the loop. A second one comes when another rank has left. No
# sleep in the background: one that was begun between the two would be left, and hold the output open, for whose end Slurm waits.
SAVING = """
    trap 'trap "" TERM; sleep 0.3; echo "saved" >> saved-$RANK; exit 143' TERM
    echo "begun" >> begun-$RANK
    if (( ${SLURM_RESTART_COUNT:-0} > 0 )); then echo "went on" >> went-on-$RANK; exit 0; fi
    while true; do sleep 0.1; done
"""


def lines(root: Path, name: str) -> list[int]:
    """Of that name of each rank's."""
    return [len(path.read_text().splitlines()) if (path := root / f"{name}-{rank}").exists() else 0 for rank in (0, 1)]


def started(cluster: Cluster, root: Path) -> None:
    cluster.wait(lambda: lines(root, "begun") == [1, 1], "both ranks")


def test_a_stopped_job_saves_and_is_queued_again_and_one_that_is_over_is_not(cluster: Cluster, root: Path) -> None:
    write_rank(root, SAVING)
    job = submit(cluster, root)
    started(cluster, root)
    cluster.stop(job, lambda: lines(root, "saved") == [1, 1])
    assert cluster.wait_over(job) == {job: "COMPLETED"}
    assert (lines(root, "begun"), lines(root, "saved"), lines(root, "went-on")) == ([2, 2], [1, 1], [1, 1])
    assert cluster.restarts(job) == 1
    write_rank(root, "exit 2")
    job = submit(cluster, root)
    assert cluster.wait_over(job) == {job: "FAILED"} and cluster.restarts(job) == 0


def test_a_preempted_job_is_queued_again(cluster: Cluster, root: Path) -> None:
    write_rank(root, SAVING)
    job = submit(cluster, root)
    started(cluster, root)
    other = cluster.run("sbatch", "--parsable", "--partition=high", "-N2", "--exclusive", f"--output={root}/high.txt", "--wrap=true")
    assert cluster.wait_over(other) == {other: "COMPLETED"}
    assert cluster.wait_over(job) == {job: "COMPLETED"} and cluster.restarts(job) == 1
    assert (lines(root, "saved"), lines(root, "went-on")) == ([1, 1], [1, 1])


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster: Cluster, root: Path) -> None:
    write_rank(root, SAVING)
    job = submit(cluster, root)
    started(cluster, root)
    cluster.run("scancel", job)
    assert cluster.wait_over(job) == {job: "CANCELLED"}
    assert (lines(root, "saved"), lines(root, "went-on"), cluster.restarts(job)) == ([1, 1], [0, 0], 0)


def test_one_task_of_an_array_is_queued_again_alone(cluster: Cluster, root: Path) -> None:
    """The last task has the array's own number as its job's."""
    write_rank(root, SAVING.replace("-$RANK", "-$SLURM_ARRAY_TASK_ID"))
    job = submit(cluster, root, options=("--array=0-1", "--nodes=1", f"--output={root}/out-%a.txt"))
    started(cluster, root)
    cluster.stop(f"{job}_1", lambda: lines(root, "saved")[1])
    cluster.wait(lambda: cluster.states(job).get(f"{job}_1") == "COMPLETED", "the end of the one task")
    assert cluster.states(job)[f"{job}_0"] == "RUNNING" and (lines(root, "begun"), lines(root, "went-on")) == ([1, 2], [0, 1])
    assert cluster.restarts(f"{job}_0") == 0
    cluster.run("scancel", job)
    assert cluster.wait_over(job) == {f"{job}_0": "CANCELLED", f"{job}_1": "COMPLETED"}


def test_elsewhere_than_in_the_root_is_refused(cluster: Cluster, root: Path) -> None:
    (root / "elsewhere" / "examples" / "slurm").mkdir(parents=True)
    shutil.copy(root / "examples" / "slurm" / "job.sh", root / "elsewhere" / "examples" / "slurm")
    script = root / "examples" / "slurm" / "h100.sbatch"
    job = cluster.run("sbatch", "--parsable", *SIZE, f"--output={root}/out.txt", script, cwd=root / "elsewhere")
    assert cluster.wait_over(job) == {job: "FAILED"}
    assert "elsewhere is not the root of megagate's repository; submit from there" in (root / "out.txt").read_text()
