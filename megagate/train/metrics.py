"""What a run records: one JSON object per optimizer step in metrics.jsonl, and the same record to Weights & Biases."""

import json
import math
import os
import resource
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from megagate.checkpoint.durable import create, write_all
from megagate.config.count import flops_per_token
from megagate.config.keys import to_dict
from megagate.config.run import RunConfig
from megagate.data.files import sync_folder
from megagate.engine.base import StepResult
from megagate.errors import RunError
from megagate.log import logger

PEAK_BF16_TFLOPS = {"H100 PCIe": 756.0, "H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 peak by a part of the GPU's name, the first that fits (NVIDIA's data sheets)."""

Record = dict[str, Any]


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Take one step's record."""

    def sync(self) -> None:
        """See that all that was written outlives a machine that goes down."""

    def close(self) -> None:
        """No more records come."""


class MetricsFile:
    """RUN/metrics.jsonl; each step stands in it once, also after a resume."""

    def __init__(self, path: Path, *, last_step: int):
        """See that it can be written.

        The first record drops those after `last_step`, of a run that went on past its last checkpoint. Not before: a resume that is
        refused must leave what that run did.
        """
        self.path, self._last_step = path, last_step
        self._file: TextIO | None = None
        try:
            path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, record: Record) -> None:
        """Append one line, flushed. A number that is not finite becomes null, which JSON can hold."""
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        try:
            if self._file is None:
                self._drop_later()
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _drop_later(self) -> None:
        """On the disk before it takes the place of the only copy; a file with nothing to drop is left alone."""
        content = self.path.read_bytes()
        lines = content.decode("utf-8", errors="replace").splitlines()
        kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= self._last_step).encode()
        if kept == content:
            return
        new = self.path.with_suffix(".jsonl.tmp")
        with create(new) as descriptor:
            write_all(descriptor, memoryview(kept))
        os.replace(new, self.path)
        sync_folder(self.path.parent)

    def _cannot_write(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: cannot be written ({error.strerror}); free space or choose another train.output_dir")


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line that a killed run left half written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class WandbSink:
    """A Weights & Biases run that goes on when the run is resumed."""

    def __init__(self, config: RunConfig, folder: Path):
        """Nothing is started before the first record, so that a resume that is refused leaves no trace there."""
        self.config, self.folder = config, folder
        self.run: Any = None
        self._started = False

    def _start(self) -> None:
        """Start it, or go on with the one that the folder knows.

        Raises:
            RunError: It cannot start: no key, no network.
        """
        import wandb  # noqa: PLC0415  slow to import, and only needed here

        mode, self._started, self._teardown = self.config.wandb.mode, True, wandb.teardown
        try:
            self.run = wandb.init(
                mode=mode,
                project=self.config.wandb.project,
                name=self.folder.name,
                dir=str(self.folder),
                id=_wandb_id(self.folder),
                resume="allow" if mode == "online" else None,  # offline, `wandb sync` joins what has one id
                config=to_dict(self.config),
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise RunError(
                f"wandb.mode is {mode}, and Weights & Biases does not start ({error}); use `wandb login`, or set "
                "--wandb.mode offline, which needs no key and no network"
            ) from error

    def write(self, record: Record) -> None:
        """Log one step.

        Raises:
            RunError: It is the first, and Weights & Biases cannot start.
        """
        if not self._started:
            self._start()
        self._try(lambda run: run.log(record, step=record["step"]))

    def sync(self) -> None:
        """Its service sees to that."""

    def close(self) -> None:
        """Finish the run."""
        self._try(lambda run: run.finish())

    def _try(self, action: Callable[[Any], None]) -> None:
        """A second sink ends no training: its service is a process of its own, which Ctrl-C and the launcher end before this one saves."""
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:
            self.run = None
            with suppress(Exception):
                self._teardown()  # else it tries, and says so at length, when this process ends
            logger.info("Weights & Biases takes no more records (%s); metrics.jsonl has them all", error)


def _wandb_id(folder: Path) -> str:
    """The name under which Weights & Biases knows the run of this folder."""
    path = folder / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


class Speed:
    """From seconds to tokens per second, FLOP/s and the share of the device's peak."""

    def __init__(self, config: RunConfig, *, world_size: int, device: torch.device):
        self.step_tokens = config.train.global_batch_size * config.train.seq_len
        self.tokens_per_device = self.step_tokens / world_size
        self.flops_of_weights = flops_per_token(config.model, 0)
        self.flops_per_context = flops_per_token(config.model, 1) - self.flops_of_weights
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)
        self.device = device

    def fields(self, seconds: float, *, context: float) -> Record:
        """The speed fields of a record.

        Args:
            seconds: Of the step.
            context: See `StepResult`: attention that documents do not need is not counted as work.
        """
        of_a_token = self.flops_of_weights + self.flops_per_context * context
        tflops = of_a_token * self.tokens_per_device / seconds / 1e12
        record = {"step_seconds": seconds, "tokens_per_second": self.step_tokens / seconds, "tflops_per_device": tflops}
        if self.peak is not None:
            record["mfu"] = tflops / self.peak
        return record | {"peak_memory_bytes": self._peak_memory()}

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_fields(step: int, result: StepResult, *, lr: float, tokens: int) -> Record:
    """The fields of a record that say what the step did; `tokens` counts from the start of the run."""
    record = {"step": step, "tokens": tokens, "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
    if result.aux is not None:
        record |= {"aux_loss": result.aux.balance, "z_loss": result.aux.z}
    return record if result.applied else record | {"skipped": True}
