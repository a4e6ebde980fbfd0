"""The folder of a study: which study it holds, what its runs came to, and how a run's records are judged."""

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from megagate.analysis.lr.records import diverged_at, read_records
from megagate.analysis.lr.spec import RunKey, Spec
from megagate.checkpoint.folders import newest_step
from megagate.config.cli import to_yaml
from megagate.config.count import count_parameters
from megagate.config.keys import flatten
from megagate.config.run import RunConfig
from megagate.data.files import AtomicFile
from megagate.data.loader import TrainLoader, ValidLoader
from megagate.data.sources import open_sources, prepare_sources
from megagate.errors import DataError, RunError

_GROWS = ("learning_rates", "seeds")  # more of them is the same study, grown
_SHOWN = 12  # differing keys of a refusal
_RESTORE = "its digest, began_with and decides stand in study.json, too: restore it from there, or choose another folder"
_LOG_LINES = 15  # of a failed run's log, shown with the error


@dataclass(frozen=True)
class Outcome:
    """What a run came to, an entry of `runs` in study.json; None for what it does not tell.

    Args:
        variant, lr, seed: Which run.
        status: `finished` or `diverged`.
        reason: Why it diverged.
        step: The last one that counts: of a diverged run that at which it did.
        val_loss: Held-out, at the end, nats.
        train_loss: Mean of the last `stop.window` steps, nats.
        peak_hidden: Largest absolute hidden state of all looks.
        attention_logit_max: Largest of all looks.
        gate_mean: Mean score of the gate at the last look.
        first_token_attention: Share of attention on the first token, at the last look.
        uniform_attention: What that share is where a query attends alike to all it sees.
        spikes: Loss spikes (`megagate/train/spikes.py`).
        steps: That it has records of.
        seconds: In steps.
        parameters: Of the model, without the rows that pad the vocabulary.
    """

    variant: str
    lr: float
    seed: int
    status: str
    reason: str | None
    step: int
    val_loss: float | None
    train_loss: float | None
    peak_hidden: float | None
    attention_logit_max: float | None
    gate_mean: float | None
    first_token_attention: float | None
    uniform_attention: float | None
    spikes: int
    steps: int
    seconds: float
    parameters: int


class Study:
    """A study's folder. One process writes to it at a time (`locked`).

    Args:
        spec: Of the study.
        folder: Its folder, which may not exist yet.
    """

    def __init__(self, spec: Spec, folder: Path):
        self.spec, self.folder = spec, folder.absolute()
        self.keys = spec.runs()

    def configs(self, keys: Sequence[RunKey], **settings: Any) -> dict[RunKey, RunConfig]:
        """The complete config of each run, see `Spec.configs_of`."""
        return self.spec.configs_of(keys, self.folder, **settings)

    def run_folder(self, key: RunKey) -> Path:
        """Of one run."""
        return self.folder / "runs" / str(key)

    def config_file(self, key: RunKey) -> Path:
        """What the run is started with."""
        return self.folder / "configs" / f"{key}.yaml"

    def log(self, key: RunKey) -> Path:
        """What the run said."""
        return self.folder / "logs" / f"{key}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For as long as the block lasts nobody else runs this study.

        Raises:
            RunError: Somebody does, or the folder cannot be written, at first or later.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunError(f"--output {self.folder}: another process runs this study; wait for it, or stop it") from None
                yield
        except OSError as error:
            # Also of the block: a full disk. Everything is written beside what it replaces, so what was there is kept.
            place = error.filename or self.folder
            raise RunError(
                f"--output {self.folder}: cannot be written ({place}: {error.strerror}); mend that, and the same command goes on, "
                "or choose another folder"
            ) from error

    def require_same(self, decides: Mapping[str, Any]) -> None:
        """Refuse the folder of another study, which is left as it is. Rungs and seeds may be added.

        Raises:
            RunError: With the keys that differ.
        """
        path = self.folder / "spec.json"
        if not path.exists():
            if (self.folder / "runs").exists():
                raise RunError(f"--output {self.folder}: holds runs but no spec.json, so no study; {_RESTORE}")
            return
        there = held(self.folder)
        names = [sorted({key.split(".")[1] for key in told if key.startswith("variants.")}) for told in (there, decides)]
        # A setting that megagate got after that: what was there before is what its default does.
        there = {key: _default(key) for key in decides if key not in there} | there
        differing = [key for key in {**there, **decides} if not _agrees(key, there.get(key), decides.get(key))]
        if names[0] != names[1]:  # and not each setting of a variant that is missing
            differing = ["variants", *(key for key in differing if not key.startswith(("variants.", "data/")))]
            there, decides = ({"variants": names[side], **told} for side, told in enumerate((there, decides)))
        if differing:
            lines = [f"  {key}: {there.get(key)} there, {decides.get(key)} here" for key in differing[:_SHOWN]]
            more = [f"  and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
            listed = "\n".join([*lines, *more])
            raise RunError(
                f"--output {self.folder}: holds another study:\n{listed}\na folder belongs to one study (rungs and seeds may be added); "
                "choose another folder, or undo the change"
            )

    def claim(self, decides: Mapping[str, Any], source: str) -> None:
        """Write which study this is, and with which rungs and seeds it began.

        Args:
            decides: See `Spec.decides`, with the data.
            source: The spec's text.
        """
        replace_file(self.folder / "spec.yaml", source)
        began = {key: decides[key] for key in _GROWS}
        if any((self.folder / "runs").glob("*")):
            began = _held_file(self.folder).get("began_with", {key: held(self.folder)[key] for key in _GROWS})
        content = {"digest": digest(decides), "began_with": began, "decides": decides}
        replace_file(self.folder / "spec.json", json.dumps(content, indent=1) + "\n")
        for name in ("runs", "configs", "logs"):  # behind it: runs whose study nobody knows are refused
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def outcome(self, key: RunKey) -> Outcome | None:
        """Of a run that is over.

        Raises:
            RunError: Its file is damaged.
        """
        path = self.run_folder(key) / "outcome.json"
        if not path.exists():
            return None
        content = _read_json(path)
        missing = sorted({field.name for field in fields(Outcome)} ^ set(content))
        unfit = [field.name for field in fields(Outcome) if not missing and not _is_a(field.type, content[field.name])]
        if missing:
            wrong = f"it should have {', '.join(field.name for field in fields(Outcome))}, and these differ: {', '.join(missing)}"
        elif tuple(content[name] for name in key._fields) != tuple(key):
            wrong = "it is that of " + "/".join(str(content[name]) for name in key._fields)
        elif (content["status"], content["val_loss"]) == ("finished", None) or content["status"] not in ("finished", "diverged"):
            wrong = f"status {content['status']!r} with val_loss {content['val_loss']!r}"
        elif unfit:
            wrong = f"{unfit[0]} {content[unfit[0]]!r}"
        else:
            return Outcome(**content)
        raise RunError(f"{path}: is no outcome of this run ({wrong}); remove it, and run the study again")

    def outcomes(self) -> dict[RunKey, Outcome]:
        """Of all runs that are over, in the study's order."""
        found = {key: self.outcome(key) for key in self.keys}
        return {key: outcome for key, outcome in found.items() if outcome is not None}

    def records(self, key: RunKey) -> list[dict[str, Any]]:
        """Of a run, as far as it is."""
        return read_records(self.run_folder(key) / "metrics.jsonl")

    def judge(self, key: RunKey, config: RunConfig, *, not_finite: bool = False) -> Outcome | None:
        """What a run has come to by its records; None where it has to go on.

        Args:
            key: The run.
            config: Its config.
            not_finite: It stopped since a number of the step behind its last record was not finite.
        """
        records = self.records(key)
        losses = [record.get("loss") for record in records] + [None] * (not_finite and len(records) < self.spec.steps)
        found = diverged_at(losses, self.spec.stop, warmup=config.schedule.warmup_steps)
        done = len(records) == self.spec.steps and records[-1].get("val_loss") is not None
        if found is None and len(records) == self.spec.steps and "val_loss" in records[-1] and not done:
            found = (self.spec.steps, "the held-out loss is not finite")
        if found is None and not done:
            return None
        step, reason = found or (self.spec.steps, None)
        return self._outcome(key, config, records[:step], status="diverged" if found else "finished", reason=reason, step=step)

    def _outcome(self, key: RunKey, config: RunConfig, records: Sequence[Mapping[str, Any]], **fate: Any) -> Outcome:
        def seen(name: str) -> list[float]:
            return [record[name] for record in records if record.get(name) is not None]

        losses = seen("loss")[-self.spec.stop.window :]
        last = {name: seen(name)[-1] if seen(name) else None for name in ("gate_mean", "first_token_attention", "uniform_attention")}
        return Outcome(
            **key._asdict(),
            **fate,
            **last,
            val_loss=records[-1].get("val_loss") if records and fate["status"] == "finished" else None,
            train_loss=fmean(losses) if losses else None,
            peak_hidden=max(seen("hidden_max"), default=None),
            attention_logit_max=max(seen("attention_logit_max"), default=None),
            spikes=len(seen("loss_spike")),
            steps=len(records),
            seconds=round(sum(seen("step_seconds")), 3),
            parameters=count_parameters(config.model).total,
        )

    def settle(self, outcome: Outcome) -> None:
        """Record what a run came to, in its own folder, and let its checkpoints go."""
        folder = self.run_folder(RunKey(outcome.variant, outcome.lr, outcome.seed))
        replace_file(folder / "outcome.json", json.dumps(asdict(outcome), indent=1) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def settle_if_over(self, key: RunKey, config: RunConfig, *, tell: Callable[[str], None], not_finite: bool = False) -> bool:
        """Judge a run that has ended, and settle it where it is over.

        Args:
            key: The run.
            config: Its config.
            tell: Gets a line where it is.
            not_finite: See `judge`.
        """
        outcome = self.judge(key, config, not_finite=not_finite)
        if outcome is None:
            return False
        self.settle(outcome)
        held = f"held-out loss {outcome.val_loss:.4f}" if outcome.val_loss is not None else f"at step {outcome.step}: {outcome.reason}"
        tell(f"{key}: {outcome.status}, {held}, {outcome.seconds:.0f} s")
        return True

    def has_diverged(self, key: RunKey, config: RunConfig) -> bool:
        """Whether a run has by the rule; one that is finished still has to save, and to end by itself."""
        outcome = self.judge(key, config)
        return outcome is not None and outcome.status == "diverged"

    def write_config(self, key: RunKey, config: RunConfig) -> Path:
        """What a run is started with."""
        replace_file(self.config_file(key), to_yaml(config))
        return self.config_file(key)

    def gap(self, key: RunKey) -> str:
        """Why a run that was begun cannot go on, a sentence; empty where it can.

        Its records end before its checkpoint: what it came to could never be told.
        """
        folder = self.run_folder(key)
        # Before the records, which its process, where one still saves, has written by then.
        step = newest_step(folder / "checkpoints") or 0
        there = len(self.records(key))
        if step <= there:
            return ""
        return (
            f"the run {key} would go on from its checkpoint of step {step}, but {folder / 'metrics.jsonl'} has the steps up to {there} "
            f"only, so that nobody could tell what it came to; restore that file, or remove {folder}, and it begins again"
        )

    def log_tail(self, key: RunKey) -> str:
        """The end of what a run said."""
        path = self.log(key)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-_LOG_LINES:])

    def write_record(self) -> None:
        """study.json, of all runs that are over."""
        spec = _read_json(self.folder / "spec.json")
        runs = [asdict(outcome) for outcome in self.outcomes().values()]
        replace_file(self.folder / "study.json", json.dumps({"name": self.spec.name, **spec, "runs": runs}, indent=1) + "\n")

    def refresh_record(self) -> None:
        """study.json again, where runs were settled by others than who writes it; left alone where somebody runs the study, who does."""
        self.outcomes()  # a damaged one is told: what is suppressed is another's lock
        with suppress(RunError), self.locked():
            self.write_record()


def prepare_data(config: RunConfig) -> str:
    """Prepare what all runs read; its fingerprint.

    Raises:
        DataError: It cannot be opened, has no validation set, or is too short for what the runs read.
    """
    place = {"vocab_size": config.model.vocab_size, "directory": Path(config.data.cache_dir)}
    prepare_sources(config.data.path, config.data.valid, **place)
    sources = open_sources(config.data.path, config.data.valid, **place)
    if not sources.valid:
        raise DataError(f"data.path ({config.data.path}) has no held-out tokens, which a study of losses needs; give another data set")
    sources.document_end(config.data.attention)
    read = {"seq_len": config.train.seq_len, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1}
    TrainLoader(sources.train, **read, global_batch_size=config.train.global_batch_size, seed=config.train.seed)
    for split in sources.valid.values():
        ValidLoader(split, **read, batches=config.eval.batches)
    return sources.fingerprint


def held(folder: Path) -> dict[str, Any]:
    """What decides the study of a folder, see `Spec.decides`; nothing where there is none.

    Raises:
        RunError: Its spec.json is damaged.
    """
    path = folder / "spec.json"
    if not path.exists():
        return {}
    found = _held_file(folder).get("decides")
    if not isinstance(found, dict):
        raise RunError(f"{path}: holds no decides, so nobody knows whose runs these are; {_RESTORE}")
    return found


def _held_file(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "spec.json", remedy=_RESTORE)


def digest(decides: Mapping[str, Any]) -> str:
    """Of what decides what runs compute, hex."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _agrees(key: str, there: Any, here: Any) -> bool:
    if key in _GROWS and isinstance(there, list) and isinstance(here, list):
        return set(there) <= set(here)
    return there == here


def _default(key: str) -> Any:
    """Of the setting of a variant that a key of `Spec.decides` tells; None for another key."""
    kind, _, rest = key.partition(".")
    value = flatten(RunConfig()).get(rest.partition(".")[2]) if kind == "variants" else None
    return list(value) if isinstance(value, tuple) else value


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value of a file is of a field's type, and finite."""
    if isinstance(value, int):  # which also stands for a float
        return not isinstance(value, bool) and (isinstance(value, kind) or isinstance(0.0, kind))
    return isinstance(value, kind) and (not isinstance(value, float) or math.isfinite(value))


def _read_json(path: Path, *, remedy: str = "remove it, and run the study again") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: holds no object; {remedy}")
    return content


def replace_file(path: Path, text: str) -> None:
    """At once: a stop leaves the last complete one. Several may do so at the same time, on several machines: the last one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with AtomicFile(path) as file:
        file.write(text.encode())
