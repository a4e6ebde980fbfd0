"""The spec of a study: base configs, variants, a ladder of learning rates, seeds, and the rules that are fixed before the first run."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megagate.analysis.lr.cluster import Require, check_size
from megagate.analysis.lr.executor import Executor
from megagate.config.cli import parse
from megagate.config.keys import flatten
from megagate.config.run import DataConfig, RunConfig
from megagate.errors import ConfigError

_PAIRED = ("train.global_batch_size", "train.seq_len", "eval.batches")


class RunKey(NamedTuple):
    """One run of a study.

    Args:
        variant: By name.
        lr: Peak learning rate.
        seed: Of initial weights and order of the data.
    """

    variant: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}-lr{self.lr!r}-s{self.seed}"


@dataclass(frozen=True)
class Variant:
    """What a variant lays over the base.

    Args:
        name: In tables and folders.
        configs: YAML files.
        preset: Of `megagate.config.paper`; empty for none.
        set: Settings by dotted key, over all else.
    """

    name: str
    configs: tuple[Path, ...] = ()
    preset: str = ""
    set: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """When a run counts as diverged and is stopped, beside a loss that is not finite.

    Args:
        above_initial: Nats: after warm-up the mean loss over `window` steps is so far above that of the first steps.
        window: Steps; the first steps are as many.
    """

    above_initial: float = 0.5
    window: int = 50


@dataclass(frozen=True)
class Spec:
    """A study, see `spec_file.read_spec`. `learning_rates` ascend; the first variant is the baseline of all pairs.

    Args:
        name: Of the study.
        variants: Each once.
        learning_rates: Peaks, ascending.
        seeds: Each once.
        steps: Of a run.
        configs: YAML files of the base, in their order.
        set: Settings by dotted key over those.
        min_lr_share: The schedule's floor as a share of the peak.
        stop: When a run has diverged.
        collapsed_above: Held-out loss, nats, above which a finished run counts as collapsed; None for no bar.
        top_rungs: How many of the highest rungs the interaction is about.
        executor: Where runs are done.
    """

    name: str
    variants: tuple[Variant, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    configs: tuple[Path, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    min_lr_share: float = 0.1
    stop: Stop = field(default_factory=Stop)
    collapsed_above: float | None = None
    top_rungs: int = 1
    executor: Executor = field(default_factory=Executor)

    def runs(self) -> list[RunKey]:
        """All runs, seed by seed and rung by rung: what is there after each seed is a smaller study."""
        return [RunKey(variant.name, lr, seed) for seed in self.seeds for lr in self.learning_rates for variant in self.variants]

    def base(self, name: str) -> RunConfig:
        """The config of a variant without a run's learning rate, seed and folder.

        Raises:
            ConfigError: A file is missing or broken, or a setting is unknown or of the wrong type.
        """
        variant = next(one for one in self.variants if one.name == name)
        with _naming(f"{self.name}: variants: {name}"), tempfile.TemporaryDirectory(prefix="megagate-spec-") as folder:
            arguments = [f"--config={path}" for path in self.configs]
            arguments += _as_file(self.set, Path(folder) / "set.yaml")
            arguments += [f"--preset={variant.preset}"] if variant.preset else []
            arguments += [f"--config={path}" for path in variant.configs]
            arguments += _as_file(variant.set, Path(folder) / f"variant-{name}.yaml")
            return parse(arguments, prog="lr_stability.py")

    def config(self, key: RunKey, output: Path) -> RunConfig:
        """Of one run: complete, checked for the executor's number of ranks. Shared weights and order depend on the seed alone.

        Raises:
            ConfigError: As `base`, or values do not go together.
        """
        return self.configs_of([key], output)[key]

    def configs_of(self, keys: Sequence[RunKey], output: Path, *, require: Require = lambda config, ranks: None) -> dict[RunKey, RunConfig]:
        """Of many runs. `require`: what else, of which this floor knows nothing, a run needs of the executor's ranks."""
        bases = {name: self.base(name) for name in dict.fromkeys(key.variant for key in keys)}
        self._check_pairs(bases)
        self._check_stop(bases)
        self._check_data(bases)
        configs = {}
        for key in keys:
            base = bases[key.variant]
            train = replace(base.train, steps=self.steps, seed=key.seed, output_dir=str(output / "runs" / str(key)), resume="auto")
            configs[key] = replace(
                base,
                train=train,
                data=replace(base.data, cache_dir=base.data.cache_dir or str(output / "data")),
                optim=replace(base.optim, lr=key.lr),
                schedule=replace(base.schedule, min_lr=self.min_lr_share * key.lr),
                wandb=replace(base.wandb, mode="disabled"),
                # No run learns in its own validations which of its checkpoints is best: the held-out loss is that of the end.
                eval=replace(base.eval, every=0, min_gain_nats=0.0, prompt=""),
            )
        with _naming(self.name):
            check_size(self.executor, {str(key): config for key, config in configs.items()}, require=require)
        return configs

    def _check_pairs(self, bases: Mapping[str, RunConfig]) -> None:
        """Runs of a pair read the same tokens in the same order, whatever else a variant changes."""
        baseline = self.variants[0].name
        wanted = flatten(bases.get(baseline) or self.base(baseline))
        for name, base in bases.items():
            for key, value in flatten(base).items():
                if (key.startswith("data.") or key in _PAIRED) and value != wanted[key]:
                    raise ConfigError(
                        f"{self.name}: variants: {name}: {key} ({value!r}) must be the baseline's ({wanted[key]!r}), so that both read the "
                        "same tokens in the same order; leave it out, or set it for all"
                    )

    def _check_stop(self, bases: Mapping[str, RunConfig]) -> None:
        """The rule for divergence looks at least once: a window behind warm-up ends before the run does."""
        for name, base in bases.items():
            warmup = base.schedule.warmup_steps
            if self.steps - self.stop.window < warmup <= self.steps:
                raise ConfigError(
                    f"{self.name}: variants: {name}: schedule.warmup_steps ({warmup}) and stop.window ({self.stop.window}) must be at most "
                    f"steps ({self.steps}) together, else the rule for divergence never looks; lower one of them"
                )

    def _check_data(self, bases: Mapping[str, RunConfig]) -> None:
        """The pretraining job's own default is a small text to begin with: a study says it where it means that."""
        told = {name for one in self.variants for name in (*self.set, *one.set)}
        for name, base in bases.items():
            if base.data.path == DataConfig.path and "data.path" not in told:
                raise ConfigError(
                    f"{self.name}: variants: {name}: no data: data.path is set nowhere; set it, to {DataConfig.path} where the text that "
                    "Python carries will do"
                )

    def decides(self) -> dict[str, Any]:
        """All that decides what runs compute and how they are judged, as plain values; not where they are done."""
        lr, seed = self.learning_rates[0], self.seeds[0]
        configs = self.configs_of([RunKey(one.name, lr, seed) for one in self.variants], Path("OUT"))
        left = ("train.output_dir", "data.cache_dir", "optim.lr", "schedule.min_lr", "train.seed", "train.resume", "log.every")
        found = {
            f"variants.{key.variant}.{name}": list(value) if isinstance(value, tuple) else value
            for key, config in configs.items()
            for name, value in flatten(config).items()
            if name not in left
        }
        rest = {"name": self.name, "baseline": self.variants[0].name, "min_lr_share": self.min_lr_share, "steps": self.steps}
        rules = {"stop.above_initial": self.stop.above_initial, "stop.window": self.stop.window}
        judged = {"collapsed_above": self.collapsed_above, "top_rungs": self.top_rungs}
        ladder = {"learning_rates": list(self.learning_rates), "seeds": list(self.seeds)}
        return {**rest, **rules, **judged, **ladder, **found}


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says of an error where it stands."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _as_file(settings: Mapping[str, Any], path: Path) -> list[str]:
    if not settings:
        return []
    path.write_text(yaml.safe_dump(dict(settings)))
    return [f"--config={path}"]
