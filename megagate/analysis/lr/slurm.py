"""Runs of a study as tasks of one array of Slurm jobs: how they are numbered, submitted, and found in the queue.

A run keeps the number that it got first, also when rungs or seeds are added: tasks that wait in the queue know their run by it.
"""

import json
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.study import Study, replace_file
from megagate.errors import ConfigError, RunError

_OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT")
"""States of jobs that will not run again. PREEMPTED is none of them, since most clusters queue such a job again."""
_LIMIT_S = 120  # for an answer of Slurm's


def require_slurm() -> None:
    """Refuse a machine that cannot submit.

    Raises:
        ConfigError: It has no sbatch or no squeue.
    """
    for program in ("sbatch", "squeue"):
        if not shutil.which(program):
            raise ConfigError(f"executor.kind (slurm) needs {program}, which is not on PATH; start this on a login node of the cluster")


def array_command(study: Study, keys: Sequence[RunKey], *, spec: Path, jobs: int | None) -> list[str]:
    """What submits runs as one array; see `Executor` for what may be set.

    Args:
        study: Of the runs.
        keys: The runs.
        spec: Its file.
        jobs: At a time; None for as many as the cluster takes.
    """
    executor, numbers = study.spec.executor, _numbers(study)
    array = _ranges([numbers.index(str(key)) for key in keys]) + (f"%{jobs}" if jobs else "")
    size = [f"--nodes={executor.nodes}", f"--gpus-per-node={executor.gpus_per_node}", f"--ntasks-per-node={executor.gpus_per_node}"]
    log = f"--output={study.folder / 'logs' / 'slurm-%A_%a.out'}"
    own = ["--parsable", f"--job-name={study.spec.name}", f"--array={array}"]  # last, where they win
    job = ["--study", str(spec.absolute()), "--output", str(study.folder)]
    return ["sbatch", *size, log, *executor.sbatch, *own, executor.script, *job]


def submit(study: Study, keys: Sequence[RunKey], *, spec: Path, jobs: int | None) -> str:
    """Submit those of the runs that are neither over nor in the queue.

    Args:
        study: Claimed and locked by the caller, so that nobody else submits them.
        keys: The runs.
        spec: The study's file.
        jobs: See `array_command`.

    Returns:
        str: What was done, a line.

    Raises:
        RunError: Slurm refused, or did not tell what is in the queue; nothing was submitted.
    """
    waiting = queue(study)
    left = [key for key in keys if study.outcome(key) is None]
    new = [key for key in left if key not in waiting]
    if not new:
        return f"{len(keys) - len(left)} of {len(keys)} runs are over, {len(left)} are in the queue: nothing to submit"
    for key, config in study.configs(new).items():
        study.write_config(key, config)
    known = _read(study)
    replace_file(_file(study), json.dumps(known | {"runs": _numbers(study)}, indent=1) + "\n")  # before a task can ask for its own
    command = array_command(study, new, spec=spec, jobs=jobs)
    said = _ask(command)
    job = said.strip().partition(";")[0]
    if not job.isdigit():
        raise RunError(f"sbatch said {said!r}, which is no job's number; see squeue, and scancel what should not run")
    replace_file(_file(study), json.dumps({"runs": _numbers(study), "jobs": [*known["jobs"], job]}, indent=1) + "\n")
    others = f"; {len(keys) - len(left)} are over" + (f", {len(left) - len(new)} in the queue before" if len(left) > len(new) else "")
    return f"submitted job {job}: {len(new)} runs{others}; `status` shows how far they are, and `run` submits those that fail again"


def queue(study: Study) -> dict[RunKey, str]:
    """The runs whose tasks wait or run, each with Slurm's word for its state.

    Raises:
        RunError: squeue failed.
    """
    known = _read(study)
    keys, jobs = {str(key): key for key in study.keys}, set(known["jobs"])
    if not jobs:
        return {}
    said = _ask(["squeue", "--noheader", "--array", "--states=all", f"--name={study.spec.name}", "--format=%F %K %T"])
    found = {}
    for line in said.splitlines():
        job, number, state = line.split()
        if job in jobs and state not in _OVER and (key := keys.get(known["runs"][int(number)])):
            found[key] = state
    return found


def queue_lines(study: Study) -> list[str]:
    """What is in the queue, as lines of text; also where that cannot be asked."""
    known = _read(study)
    if not known["jobs"]:
        return ["nothing was submitted yet"]
    try:
        require_slurm()
        waiting = queue(study)
    except (ConfigError, RunError) as error:
        return [f"the queue is not known: {error}"]
    states = ", ".join(f"{count} {state}" for state, count in sorted(Counter(waiting.values()).items())) or "nothing"
    lines = [f"in the queue: {states} (job {', '.join(known['jobs'])})"]
    submitted = [key for key in study.keys if str(key) in known["runs"] and study.outcome(key) is None and key not in waiting]
    if submitted:
        logs = study.folder / "logs"
        lines.append(
            f"{len(submitted)} runs are neither over nor in the queue, {submitted[0]} first: `run` submits them again; why they ended: "
            f"{logs}/slurm-*.out (where there is none, the nodes do not share that folder) and {study.log(submitted[0])}"
        )
    return lines


def run_of(study: Study, number: int) -> RunKey:
    """The run of a task of the array.

    Raises:
        ConfigError: It has no such task.
    """
    runs, keys = _read(study)["runs"], {str(key): key for key in study.keys}
    if not (0 <= number < len(runs) and runs[number] in keys):
        raise ConfigError(f"--index {number}: {_file(study)} knows {len(runs)} runs, from 0 on; `run` makes it and submits them")
    return keys[runs[number]]


def _file(study: Study) -> Path:
    return study.folder / "slurm.json"


def _read(study: Study) -> dict[str, Any]:
    path = _file(study)
    if not path.exists():
        return {"runs": [], "jobs": []}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {"runs": list(known["runs"]), "jobs": list(known.get("jobs", []))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}); cancel the study's jobs in the queue, remove it, and run the study again"
        ) from None


def _numbers(study: Study) -> list[str]:
    """All runs, each in the place that is its number: those that had one first."""
    runs = _read(study)["runs"]
    return [*runs, *(str(key) for key in study.keys if str(key) not in runs)]


def _ranges(numbers: Sequence[int]) -> str:
    """As sbatch takes them: 0-3,7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _ask(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"{command[0]} failed ({error}); nothing was submitted; try again when Slurm answers") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise RunError(f"{shlex.join(command)} failed: {said}; nothing was submitted; mend the spec's executor, or ask your administrators")
    return done.stdout
