"""Pretraining and a study on a Slurm of two nodes, by the scripts of examples/slurm: stopped, queued again, gone on to the end."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lr_specs import SMALL, write_spec
from slurm_cluster import Cluster, temporary_slurm

from megagate.analysis.lr.records import read_records
from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.study import Study

ROOT = Path(__file__).parents[2]
SIZE = ("--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=50")
OPTIONS = {"kind": "slurm", "gpus_per_node": 1, "script": "examples/slurm/h100.sbatch"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with temporary_slurm() as cluster:
        # Two nodes of one machine: their names stand for no address. Few cores: a thread for each rank.
        cluster.environment |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        yield cluster


def nested(settings: dict[str, Any]) -> str:
    """A config from dotted keys."""
    whole: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        place = whole
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return yaml.safe_dump(whole)


@pytest.mark.slow
def test_a_pretraining_job_is_stopped_saves_is_queued_again_and_ends_with_the_same_bits(cluster: Cluster, tmp_path: Path) -> None:
    steps, jobs = 400, {}
    config = SMALL["set"] | {"train.micro_batch_size": 1, "parallel.zero_stage": 1, "train.steps": steps, "checkpoint.every": 0}
    config |= {"data.cache_dir": str(tmp_path / "data"), "eval.min_gain_nats": 0.0, "schedule.warmup_steps": 5}
    for name in ("stopped", "whole"):
        (tmp_path / f"{name}.yaml").write_text(nested(config | {"train.output_dir": str(tmp_path / name)}))
        words = ["sbatch", "--parsable", "--nodes=2", *SIZE, f"--output={tmp_path}/{name}.txt", "examples/slurm/h100.sbatch"]
        jobs[name] = cluster.run(*words, "--config", tmp_path / f"{name}.yaml", cwd=ROOT)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    cluster.wait_running(jobs["stopped"], lambda: len(read_records(metrics)) >= 10, tmp_path / "stopped.txt")
    saved = "saved; the same command goes on from there"
    cluster.stop(jobs["stopped"], lambda: saved in (tmp_path / "stopped.txt").read_text())
    for name, job in jobs.items():
        assert cluster.wait_over(job) == {job: "COMPLETED"}, (tmp_path / f"{name}.txt").read_text()
    said = (tmp_path / "stopped.txt").read_text()
    assert saved in said and "resumed from the checkpoint of step" in said, said
    found = {name: read_records(tmp_path / name / "metrics.jsonl") for name in jobs}
    for records in found.values():
        assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert [one["loss"] for one in found["stopped"]] == [one["loss"] for one in found["whole"]], "the same bits"
    assert (cluster.restarts(jobs["stopped"]), cluster.restarts(jobs["whole"])) == (1, 0)


def tool(cluster: Cluster, *words: object) -> str:
    return cluster.run("python", "tools/lr_stability.py", *words, cwd=ROOT)


@pytest.mark.slow
def test_a_study_is_one_array_of_which_a_stopped_task_goes_on_alone(cluster: Cluster, tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path,
        learning_rates=[4e-3, 1e30],
        seeds=[0],
        steps=1500,
        set=SMALL["set"] | {"checkpoint.every": 0},
        executor=OPTIONS | {"nodes": 1, "sbatch": list(SIZE[2:])},
    )
    study = Study(read_spec(spec), tmp_path / "out")
    first = RunKey("baseline", 4e-3, 0)
    said = tool(cluster, "run", spec, "--output", study.folder, "--jobs", 2)
    job = json.loads((study.folder / "slurm.json").read_text())["jobs"][0]
    assert said.splitlines()[-1].startswith(f"submitted job {job}: 4 runs; 0 are over")
    cluster.wait_running(f"{job}_0", lambda: len(study.records(first)) >= 10, study.folder / "logs" / f"slurm-{job}_0.out")
    cluster.stop(f"{job}_0", lambda: "saved; the same command goes on from there" in study.log(first).read_text())
    assert "are in the queue: nothing to submit" in tool(cluster, "run", spec, "--output", study.folder)
    assert "in the queue: " in tool(cluster, "status", spec, "--output", study.folder)
    states = cluster.wait_over(job)
    logs = "\n".join(path.read_text() for path in sorted((study.folder / "logs").glob("slurm-*")))
    assert set(states.values()) == {"COMPLETED"} and len(states) == 4, logs
    assert [cluster.restarts(task) for task in sorted(states)] == [1, 0, 0, 0]
    assert "resumed from the checkpoint of step" in study.log(first).read_text()
    assert {str(key): (one.status, one.steps) for key, one in study.outcomes().items()} == {
        "baseline-lr0.004-s0": ("finished", 1500),
        "elementwise-lr0.004-s0": ("finished", 1500),
        **{f"{name}-lr1e+30-s0": ("diverged", study.outcome(RunKey(name, 1e30, 0)).steps) for name in ("baseline", "elementwise")},
    }
    shown = tool(cluster, "status", spec, "--output", study.folder)
    assert "4 of 4 runs are over (2 diverged)" in shown and f"in the queue: nothing (job {job})" in shown
    assert len(json.loads((study.folder / "study.json").read_text())["runs"]) == 4
    assert "4 of 4 runs are over, 0 are in the queue: nothing to submit" in tool(cluster, "run", spec, "--output", study.folder)
    tool(cluster, "report", spec, "--output", study.folder)
    assert [path.suffix for path in sorted((study.folder / "report").iterdir())].count(".html") == 1


def refused(cluster: Cluster, *words: object, **environment: str) -> str:
    """What the tool says on standard error, where it leaves with 2."""
    command, environment = [sys.executable, "tools/lr_stability.py", *map(str, words)], cluster.environment | environment
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def test_what_slurm_refuses_is_told_and_can_be_mended(cluster: Cluster, tmp_path: Path) -> None:
    out, rest = tmp_path / "out", {"seeds": [0], "learning_rates": [4e-3, 8e-3]}
    spec = write_spec(tmp_path, executor=OPTIONS | {"nodes": 1, "sbatch": [*SIZE[2:], "--partition=none"]}, **rest)
    said = refused(cluster, "run", spec, "--output", out)
    assert "--partition=none" in said and "nvalid partition name specified; nothing was submitted" in said
    assert json.loads((out / "slurm.json").read_text())["jobs"] == []
    assert "nothing was submitted yet" in tool(cluster, "status", spec, "--output", out)
    assert "sbatch, which is not on PATH; start this on a login node" in refused(cluster, "run", spec, "--output", out, PATH="/nowhere")

    # Mended; held in the queue, so that nothing of it runs here.
    held = OPTIONS | {"nodes": 1, "sbatch": [*SIZE[2:], "--hold"]}
    spec = write_spec(tmp_path, executor=held, **rest)
    tool(cluster, "run", spec, "--output", out, "--only", "*/8e-3/0")
    (job,) = json.loads((out / "slurm.json").read_text())["jobs"]
    assert cluster.states(job) == {f"{job}_2": "PENDING", f"{job}_3": "PENDING"}
    # Rungs and seeds that are added leave the numbers of what is in the queue alone.
    spec = write_spec(tmp_path, executor=held, **(rest | {"learning_rates": [2e-3, 4e-3, 8e-3]}))
    assert "2 PENDING" in tool(cluster, "status", spec, "--output", out)
    assert "submitted job " in (said := tool(cluster, "run", spec, "--output", out, "--jobs", 1)) and ": 4 runs; " in said
    other = json.loads((out / "slurm.json").read_text())["jobs"][1]
    assert list(cluster.states(other)) == [f"{other}_{number}" for number in (0, 1, 4, 5)]
    assert "ArrayTaskThrottle=1" in cluster.run("scontrol", "show", "job", f"{other}_0")

    (tmp_path / "damaged.conf").write_text("damaged\n")
    said = refused(cluster, "run", spec, "--output", out, SLURM_CONF=str(tmp_path / "damaged.conf"))
    assert "squeue --noheader" in said and "failed: squeue: error: Parse error" in said and "nothing was submitted" in said
    cluster.run("scancel", f"{job}_2", other)
    cluster.wait(lambda: set(cluster.states(other).values()) == {"CANCELLED"}, "the end of what was cancelled")
    shown = tool(cluster, "status", spec, "--output", out)
    assert "in the queue: 1 PENDING" in shown and "5 runs are neither over nor in the queue" in shown
    assert ": 5 runs; 0 are over, 1 in the queue before" in tool(cluster, "run", spec, "--output", out)
    cluster.run("scancel", "--user=root")


def test_a_task_alone_is_told_what_is_wrong(cluster: Cluster, tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path, executor=OPTIONS | {"nodes": 1}), tmp_path / "out"
    task = ("task", spec, "--output", out, "--index")
    assert "holds no study; `run` makes one, on a disk that all machines share" in refused(cluster, *task, 0, "--", "true")
    study = Study(read_spec(spec), out)
    study.claim(study.spec.decides(), "")
    assert "--index 0: " in (said := refused(cluster, *task, 0, "--", "true")) and "knows 0 runs" in said
    (out / "slurm.json").write_text(json.dumps({"runs": [str(key) for key in study.keys], "jobs": []}))
    assert "--index 8: " in refused(cluster, *task, 8, "--", "true")
    assert "the run elementwise-lr0.004-s0 ended with exit code 0; the end of" in refused(cluster, *task, 1, "--", "true")
