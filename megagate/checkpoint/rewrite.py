"""A folder that a command makes: a new checkpoint written from other files, whole or not at all.

What it holds of a model is its weights, not an optimizer's moments; `config.yaml` beside it is the run to go on with.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megagate.checkpoint.fingerprint import FINGERPRINT
from megagate.checkpoint.folders import is_step_name
from megagate.checkpoint.store import begin, publish, write_file
from megagate.config.cli import to_yaml
from megagate.config.keys import to_dict
from megagate.config.run import RunConfig
from megagate.errors import ConfigError, RunError

CONFIG_NAME = "config.yaml"


def require_free(output: Path, *, name: str) -> None:
    """Refuse an output that is in use.

    Args:
        output: The folder.
        name: Of the argument, for the message.

    Raises:
        ConfigError: It is a file, holds something, or cannot be the name of a folder.
    """
    try:
        taken = os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir()))
        output.stat()
    except (FileNotFoundError, NotADirectoryError):  # a part of it is missing; making it says the rest
        taken = os.path.lexists(output)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name} ({str(output)!r:.80}) cannot be used as a folder ({reason}); choose another") from error
    if taken:
        raise ConfigError(f"{name} ({output}) must be a new or an empty folder, and it exists; choose another, or remove it")


def require_outside(output: Path, source: Path, *, name: str, what: str = "run") -> None:
    """Refuse an output that lies in `source`, which is read, a `what`.

    Raises:
        ConfigError: It does.
    """
    if output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{name} ({output}) must not lie in the {what} that is read ({source}); choose a folder outside")


def require_root(output: Path, *, name: str) -> None:
    """Refuse an output whose name is one of a step's folder in it.

    Raises:
        ConfigError: It is.
    """
    if is_step_name(output.name):
        raise ConfigError(f"{name} ({output}) is a folder of checkpoints, and step-* names one of them; choose another name")


@contextmanager
def all_or_nothing(output: Path, *, name: str, source: Path) -> Iterator[None]:
    """Fill the free folder `output` in the block; when that fails, all in it goes, and so does every folder that had to be made.

    Args:
        output: The folder, after `require_free`.
        name: Of the argument, for the message.
        source: What is read, for the message.

    Raises:
        RunError: A file cannot be written or read.
    """
    made_here = [folder for folder in (output, *output.parents) if not os.path.lexists(folder)]
    try:
        yield
    except BaseException as error:
        _clear(output, made_here)
        if isinstance(error, OSError):
            raise RunError(
                f"{name} ({output}) cannot be written, or {source} not be read ({error.strerror}); nothing was left there: "
                "mend that, or choose another folder"
            ) from error
        raise


def write_checkpoint(
    output: Path, step: int, write: Callable[[Path], int], *, config: RunConfig, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint without moments into `output`, inside `all_or_nothing`, and `config.yaml` beside it.

    Args:
        output: The folder of checkpoints.
        step: Optimizer steps done.
        write: Writes every rank's file into the folder that it is given (`write_rank`); returns how many ranks there are.
        config: The run to go on with.
        metadata: What else the checkpoint keeps; `config` and `applied_steps` are given here.

    Returns:
        The step folder.
    """
    ranks = write(begin(output, step))
    write_file(output / CONFIG_NAME, to_yaml(config).encode())
    # Without moments there are no steps for Adam's bias correction to count: an engine that loads this begins like a new one.
    kept = {key: value for key, value in (metadata or {}).items() if key != FINGERPRINT}  # which is of the tensors as they were
    given = {**kept, "config": to_dict(config), "applied_steps": 0}
    return publish(output, step, world_size=ranks, metadata=given)


def _clear(output: Path, made_here: Iterable[Path]) -> None:
    """Give up: the folder was empty, so all in it is ours; of the folders that were made, innermost first, those that are empty go."""
    for path in output.iterdir() if output.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for folder in made_here:
        with suppress(OSError):
            folder.rmdir()
