"""Whether a cluster can do what a spec asks: the files that its commands name, machines of a host file, and other sizes that fit."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from megagate.analysis.lr.executor import Executor
from megagate.config.rules import check
from megagate.config.run import RunConfig
from megagate.errors import ConfigError

_HOST = re.compile(r"(\S+)\s+slots=(\d+)")

Fits = Callable[[int], bool]
"""Whether all runs fit that many ranks."""
Require = Callable[[RunConfig, int], None]
"""Raises ConfigError where a run cannot be done on that many ranks."""


def check_files(executor: Executor) -> None:
    """Refuse an executor whose files are missing, or whose host file has too few machines.

    Raises:
        ConfigError: With the key, what stands there, and what is needed.
    """
    for key, path in executor.files:
        if not Path(path).is_file():
            raise ConfigError(f"executor.{key} ({path}) is no file, seen from {Path.cwd()}; give the path of one, or start elsewhere")
    if executor.hostfile:
        _check_hosts(executor)


def read_hosts(path: Path) -> dict[str, int]:
    """The slots of each machine of a host file, in its order, as DeepSpeed 0.19.8 reads it: `NAME slots=N` lines, and those behind #.

    Raises:
        ConfigError: It cannot be read, a line is none of these, or a machine is named twice.
    """
    hosts: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"executor.hostfile ({path}) cannot be read ({error}); write `NAME slots=N` lines") from None
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        found = _HOST.match(line)
        if found is None:
            raise ConfigError(f"executor.hostfile ({path}), line {number} ({line}) must be as in `node1 slots=8`; mend it")
        if found[1] in hosts:
            raise ConfigError(f"executor.hostfile ({path}), line {number}: {found[1]} stands there twice; keep one line with all its slots")
        hosts[found[1]] = int(found[2])
    return hosts


def _check_hosts(executor: Executor) -> None:
    path, hosts = executor.hostfile, read_hosts(Path(executor.hostfile))
    if len(hosts) < executor.nodes:
        raise ConfigError(f"executor.nodes ({executor.nodes}) must be at most the {len(hosts)} machines of {path}; lower it, or add some")
    few = [f"{host} {slots}" for host, slots in list(hosts.items())[: executor.nodes] if slots < executor.gpus_per_node]
    if few:
        size = f"executor.gpus_per_node ({executor.gpus_per_node})"
        raise ConfigError(f"{size} must be at most the slots of each machine in {path}, which has {', '.join(few)}; lower it")


def check_size(executor: Executor, runs: Mapping[str, RunConfig], *, require: Require) -> None:
    """Refuse a number of ranks on which one of these runs cannot be done.

    Args:
        executor: Says how many ranks there are.
        runs: By name.
        require: What else they need.

    Raises:
        ConfigError: With the run, and the nearest sizes on which all of them can.
    """

    def require_one(config: RunConfig, world_size: int) -> None:
        check(config, world_size=world_size)
        require(config, world_size)

    def fits(world_size: int) -> bool:
        try:
            for config in runs.values():
                require_one(config, world_size)
        except ConfigError:
            return False
        return True

    for name, config in runs.items():
        try:
            require_one(config, executor.world_size)
        except ConfigError as error:
            near = other_sizes(executor, fits) if executor.kind != "local" else ""
            raise ConfigError(f"the run {name} on {executor.world_size} ranks: {error}{near}") from None


def other_sizes(executor: Executor, fits: Fits) -> str:
    """The remedy of another size: the nearest numbers of machines below and above that fit, or fewer GPUs of each; empty where none.

    Args:
        executor: Whose own size does not fit.
        fits: What does.
    """
    gpus, nodes = executor.gpus_per_node, executor.nodes
    below = next((f"{one} x {gpus}" for one in range(nodes - 1, 0, -1) if fits(one * gpus)), "")
    # Twice as many, and a few more for the smallest: layouts and batches are powers of two, or nearly.
    above = next((f"{one} x {gpus}" for one in range(nodes + 1, 2 * nodes + 8) if fits(one * gpus)), "")
    sizes = [size for size in (below, above) if size]
    if not sizes:
        sizes = [f"{nodes} x {fewer}" for fewer in range(gpus - 1, 0, -1) if fits(nodes * fewer)][:1]
    return f"; of executor.nodes x executor.gpus_per_node the nearest that fit: {' and '.join(sizes)}" if sizes else ""
