"""Where the runs of a study are done, and the exact command of one: on this machine, by Slurm, or on the machines of a host file."""

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagate.errors import ConfigError

_KEYS = {
    "local": {"jobs": int, "threads": int},
    "slurm": {"nodes": int, "gpus_per_node": int, "script": str, "sbatch": list, "jobs": int, "gpu": str},
    "hosts": {"nodes": int, "gpus_per_node": int, "hostfile": str, "script": str, "env": str, "gpu": str},
}
"""The keys of each kind with their types."""
_OPTIONAL = {"local": tuple(_KEYS["local"]), "slurm": ("sbatch", "jobs", "gpu"), "hosts": ("script", "env", "gpu")}
_OWN = ("--array", "-a", "--job-name", "-J", "--parsable", "--wait", "-W", "--wrap", "--clusters", "-M", "--test-only")
"""Options of sbatch that are not a spec's to set: by them runs are numbered, submitted, and found in the queue."""
_HOSTS_SCRIPT = "examples/cluster/hosts.sh"


@dataclass(frozen=True)
class Executor:
    """How runs are started.

    Args:
        kind: `local`: processes of this machine, one rank each, `jobs` at a time; `slurm`: each run a task of an array of jobs; `hosts`:
            one run after another over the machines of `hostfile`.
        jobs: Runs at a time; None for as many as Slurm gives.
        threads: Of each run.
        nodes: Machines of one run.
        gpus_per_node: Ranks on each of them.
        script: What sbatch is given, which gets `--study SPEC --output OUT` and does its task's run; of `hosts` what starts a job on the
            machines, by default examples/cluster/hosts.sh.
        sbatch: Options of sbatch, over those of the script and of the size.
        hostfile: As the deepspeed launcher reads it.
        env: Settings of the ranks of `hosts`, a file as those in examples/cluster; empty for none.
        gpu: What a rank computes on, a name that `tools/count_params.py --gpu list` shows, or GB; runs that do not fit are refused.
    """

    kind: str = "local"
    jobs: int | None = 1
    threads: int = 1
    nodes: int = 1
    gpus_per_node: int = 1
    script: str = ""
    sbatch: tuple[str, ...] = ()
    hostfile: str = ""
    env: str = ""
    gpu: str = ""

    @property
    def world_size(self) -> int:
        """Ranks of one run."""
        return 1 if self.kind == "local" else self.nodes * self.gpus_per_node

    @property
    def hosts_command(self) -> list[str]:
        """What starts the ranks of one run of `hosts`, without the run's config."""
        size = ["--nodes", str(self.nodes), "--gpus", str(self.gpus_per_node)]
        env = ["--env", self.env] if self.env else []
        return ["bash", self.script or _HOSTS_SCRIPT, "--hostfile", self.hostfile, *size, *env, "--stop-with-parent", "--"]

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """The files that a command names, each with its key."""
        script = self.script or (_HOSTS_SCRIPT if self.kind == "hosts" else "")
        named = (("script", script), ("hostfile", self.hostfile), ("env", self.env))
        return tuple((key, path) for key, path in named if path)

    def command(self, config: Path) -> str:
        """What starts one run, as a shell takes it; with Slurm, what a task of the array starts inside its allocation. The local executor
        runs the same job without a new Python for each.

        Args:
            config: Its YAML file.
        """
        job = ["--config", str(config)]
        if self.kind == "slurm":
            return shlex.join(["bash", "examples/slurm/ranks.sh", *job])
        if self.kind == "hosts":
            return shlex.join([*self.hosts_command, *job])
        return f"OMP_NUM_THREADS={self.threads} {shlex.join(['python', '-m', 'megagate.train.main', *job])}"


def read_executor(settings: Mapping[str, Any], *, where: str) -> Executor:
    """From the key `executor` of a spec.

    Args:
        settings: What stands there.
        where: The spec's file, for messages.

    Raises:
        ConfigError: The kind or a key is unknown, missing or of another type.
    """
    kind = settings.get("kind", "local")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ConfigError(f"{where}: executor.kind ({kind!r}) must be one of {', '.join(_KEYS)}; write one of them")
    known = _KEYS[kind]
    values = {}
    for key, value in settings.items():
        if key == "kind":
            continue
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{where}: executor.{key} is not a key of the {kind} executor; {remedy}")
        if known[key] is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{where}: executor.{key} ({value!r}) must be a whole number from 1 on; write it so")
        if known[key] is str and not (isinstance(value, str) and value):
            raise ConfigError(f"{where}: executor.{key} ({value!r}) must be text; write the path of a file")
        if known[key] is list and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise ConfigError(f"{where}: executor.{key} ({value!r}) must be a list of texts, as in [--time=10:00:00]; write it so")
        if key == "sbatch" and (own := [one for one in value if one.partition("=")[0] in _OWN]):
            raise ConfigError(f"{where}: executor.sbatch: {own[0]} is the tool's own to set; leave it out")
        values[key] = tuple(value) if known[key] is list else value
    missing = [key for key in known if key not in values and key not in _OPTIONAL[kind]]
    if missing:
        raise ConfigError(f"{where}: executor (kind {kind}) lacks {', '.join(missing)}; add it")
    return Executor(kind=kind, **({"jobs": None} if kind == "slurm" else {}) | values)
