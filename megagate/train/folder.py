"""The folder of a run: one config, its metrics, its checkpoints."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from megagate.checkpoint.folders import ROOT_NAME, is_step_name
from megagate.checkpoint.store import Checkpoint, complete_steps, resolve, step_path
from megagate.config.cli import parse, to_yaml
from megagate.config.keys import from_dict
from megagate.config.rules import changed_keys
from megagate.config.run import CheckpointConfig, RunConfig
from megagate.errors import CheckpointError, RunError
from megagate.log import logger


@dataclass(frozen=True)
class RunFolder:
    """RUN/config.yaml, RUN/metrics.jsonl, RUN/checkpoints, and RUN/data where the run prepares its own."""

    path: Path

    @property
    def config(self) -> Path:
        """The merged config, itself a valid --config; `checkpoint.on_mismatch` is as by default, since it was meant for one start."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """step-NNNNNNNN folders, `latest`, `best`."""
        return self.path / ROOT_NAME

    @property
    def profile(self) -> Path:
        """Profiler traces."""
        return self.path / "profile"

    def claim(self, config: RunConfig) -> None:
        """Make the folder this config's own.

        Raises:
            RunError: It cannot be written.
        """
        kept = replace(config, checkpoint=replace(config.checkpoint, on_mismatch=CheckpointConfig().on_mismatch))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            new = self.config.with_suffix(".yaml.tmp")
            new.write_text(to_yaml(kept), encoding="utf-8")
            os.replace(new, self.config)
        except OSError as error:
            raise RunError(
                f"train.output_dir ({self.path}) cannot be written ({error.strerror}); free space or choose another folder"
            ) from error

    def require_same_run(self, config: RunConfig) -> None:
        """Refuse a folder that belongs to another config; one whose run has not done a step belongs to none.

        Raises:
            RunError: With the keys that differ.
        """
        if not (self.config.exists() and self._has_begun()):
            return
        changes = changed_keys(parse(["--config", str(self.config)], prog="megagate"), config)
        if changes:
            listed = "\n".join(f"  {key}: {old} there, {new} here" for key, old, new in changes)
            raise RunError(
                f"train.output_dir ({self.path}) holds a run of another config:\n{listed}\n"
                "a folder belongs to one config; choose another --train.output_dir (add --train.resume "
                f"{self.checkpoints} to start there from this run's newest checkpoint), or undo the change"
            )

    def _has_begun(self) -> bool:
        return bool(complete_steps(self.checkpoints)) or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def starting_point(self, config: RunConfig) -> Path | None:
        """The checkpoint to start from by `train.resume`; None starts from initial weights. Reads only.

        A run that began from another checkpoint goes on from its own, and says so.

        Raises:
            RunError: `never`, but there are checkpoints; or a step of this folder that is not its newest.
            CheckpointError: The path holds no complete checkpoint.
        """
        own = complete_steps(self.checkpoints)
        if config.train.resume == "never":
            if own:
                raise RunError(
                    f"train.resume is never, but {self.checkpoints} holds checkpoints up to step {own[-1]}; "
                    "use --train.resume auto to go on, or another --train.output_dir"
                )
            return None
        if own:
            newest = resolve(self.checkpoints)
            if config.train.resume != "auto":
                self._require_newest(Path(config.train.resume), newest)
            return newest
        if config.train.resume == "auto":
            return None
        return resolve(Path(config.train.resume))

    def _require_newest(self, named: Path, newest: Path) -> None:
        if not named.resolve().is_relative_to(self.path.resolve()):
            logger.info(
                "train.resume (%s) is not read: %s has checkpoints already, and goes on from its own %s", named, self.path, newest.name
            )
            return
        step = resolve(named)
        if step.resolve() != newest.resolve():
            raise RunError(
                f"train.resume ({named}) is another step of train.output_dir ({self.path}), which goes on from its newest, "
                f"{newest.name}; leave out --train.resume for that, or go on from the one you named in a folder of its own: "
                f"--train.output_dir ANOTHER --train.resume {step.resolve()}"
            )


def other_step(folder: Path, step: int) -> str:
    """The arguments that start from another step than `step` in `folder`: the newest before it, else the next; or that there is none."""
    others = [other for other in complete_steps(folder.parent) if other != step] if is_step_name(folder.name.removesuffix(".old")) else []
    if not others:
        return f"none: {folder.parent} has no other complete one"
    best = max((other for other in others if other < step), default=others[0])
    return f"--train.output_dir ANOTHER --train.resume {step_path(folder.parent, best)}"


def require_same_model(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse a checkpoint of another model or optimizer.

    Raises:
        CheckpointError: With the keys that differ.
    """
    changes = changed_keys(from_dict(checkpoint.metadata["config"]), config)
    fatal = [change for change in changes if change[0].startswith("model.") or change[0] == "optim.name"]
    if fatal:
        listed = "\n".join(f"  {key}: {old} there, {new} here" for key, old, new in fatal)
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} holds another model:\n{listed}\n"
            "a checkpoint continues only the model it was saved from; use its config, or start without --train.resume"
        )
