"""How much memory a process may still take: of the machine, and of the control groups that hold it."""

from pathlib import Path

_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Names of a group's files with its limit and its use, and the line of `memory.stat` that tells which of that are files' pages that the
kernel gives up first."""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a process may still take, None where the system does not tell.

    Args:
        root: Of the file system in which `proc` and `sys` lie.
    """
    found = [size for size in (_of_machine(root), *_of_groups(root)) if size is not None]
    return max(0, min(found)) if found else None


def _of_machine(root: Path) -> int | None:
    line = next((line for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")), None)
    return int(line.split()[1]) * 1024 if line else None


def _of_groups(root: Path) -> list[int | None]:
    """What the process's group and those around it leave, in both versions of the kernel's interface."""
    groups = root / "sys/fs/cgroup"
    # In a container the group's path may be the host's, and the group itself be mounted at the top: both are looked at.
    left = [_left(groups, _V2), _left(groups / "memory", _V1)]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        top, names = (groups, _V2) if not controllers else (groups / "memory", _V1)
        if not controllers or "memory" in controllers.split(","):
            own = top / path.strip("/")
            left += [_left(group, names) for group in (own, *own.parents) if group.is_relative_to(top)]
    return left


def _left(group: Path, names: tuple[str, str, str]) -> int | None:
    limit, used = (next(iter(_lines(group / name)), "").strip() for name in names[:2])
    if not limit.isdigit() or not used.isdigit():
        return None
    pages = next((line.split()[1] for line in _lines(group / "memory.stat") if line.split()[0] == names[2]), "0")
    return int(limit) - int(used) + int(pages)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
