"""The spec of a study: base configs, variants, a ladder of learning rates, seeds, and the rules that are fixed before the first run."""

import difflib
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megagate.analysis.lr.cluster import layout_fits, other_sizes
from megagate.analysis.lr.executor import Executor, read_executor
from megagate.config.cli import explain_yaml, parse
from megagate.config.keys import all_keys, flatten, unknown_key, wrong_type
from megagate.config.rules import check
from megagate.config.run import DataConfig, RunConfig
from megagate.errors import ConfigError

_NO_GATE = {"model.attention.gate.position": "none"}
_GATE = {"model.attention.gate.position": "G1", "model.attention.gate.score": "input", "model.attention.gate.activation": "sigmoid"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "baseline": _NO_GATE,
    "headwise": _GATE | {"model.attention.gate.granularity": "headwise"},
    "elementwise": _GATE | {"model.attention.gate.granularity": "elementwise"},
    "sandwich": _NO_GATE | {"model.sandwich_norm": True},
    # The start of a sigmoid gate without what it learns: an effect of initial scale would else be credited to the gate.
    "half": {"model.attention.gate.position": "G1", "model.attention.gate.score": "constant", "model.attention.gate.constant": 0.5},
}
"""What the names of variants set."""

_NAME = re.compile(r"[a-z0-9_]+(-[a-z0-9_]+)*")
_RESERVED = ("train.output_dir", "train.resume", "train.steps", "train.seed", "optim.lr", "schedule.min_lr", "wandb.mode", "eval.every")
_ENDLESS = 1e300  # YAML reads whole numbers of any length, of which no float can be made
_PAIRED = ("train.global_batch_size", "train.seq_len", "eval.batches")
_OWN = ("configs", "preset", "set")


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
    """A study, see `read_spec`. `learning_rates` ascend; the first variant is the baseline of all pairs.

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
        with tempfile.TemporaryDirectory(prefix="megagate-spec-") as folder:
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

    def configs_of(self, keys: Sequence[RunKey], output: Path) -> dict[RunKey, RunConfig]:
        """Of many runs."""
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
            try:
                check(configs[key], world_size=self.executor.world_size)
            except ConfigError as error:
                near = other_sizes(self.executor, layout_fits([configs[key]])) if self.executor.kind != "local" else ""
                raise ConfigError(f"{self.name}: the run {key} on {self.executor.world_size} ranks: {error}{near}") from None
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


class _OnceEach(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((number for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"{keys[twice]!r} stands twice", problem_mark=node.value[twice][0].start_mark)
        return super().construct_mapping(node, deep)


def read_spec(path: Path) -> Spec:
    """Read and check a spec; the fields stand at `Spec`, `Variant`, `Stop` and `Executor`.

    Raises:
        ConfigError: It cannot be read, or a key or value is not one of a spec.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_OnceEach)  # noqa: S506 - a safe loader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a spec") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text in UTF-8; give the path of a spec") from None
    except yaml.YAMLError as error:
        raise ConfigError(explain_yaml(error, where=f"{path}:")) from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: holds no settings; write keys such as `steps: 800`")
    known = list(Spec.__dataclass_fields__)
    _only(settings, known, where=str(path))
    for key in ("name", "variants", "learning_rates", "seeds", "steps"):
        if key not in settings:
            raise ConfigError(f"{path}: lacks {key}; add it")
    where, given = str(path), dict(settings)
    variants = _list(given, "variants", where)
    read = {
        "name": _named(given["name"], f"{where}: name"),
        "configs": _files(given.get("configs", []), path, where),
        "set": _settings(given.get("set", {}), f"{where}: set"),
        "variants": tuple(_variant(one, path, where) for one in variants),
        "learning_rates": _ladder(_list(given, "learning_rates", where), where),
        "seeds": tuple(_list(given, "seeds", where)),
        "steps": _whole(given["steps"], 1, f"{where}: steps"),
        "stop": _stop(given.get("stop", {}), where),
        "min_lr_share": _number(given.get("min_lr_share", 0.1), f"{where}: min_lr_share", most=1.0),
        "collapsed_above": _bar(given.get("collapsed_above"), where),
        "top_rungs": _whole(given.get("top_rungs", 1), 1, f"{where}: top_rungs"),
        "executor": read_executor(_mapping(given.get("executor", {}), f"{where}: executor"), where=where),
    }
    spec = Spec(**read)
    _check_lists(spec, where)
    return spec


def _check_lists(spec: Spec, where: str) -> None:
    for seed in spec.seeds:
        _whole(seed, 0, f"{where}: seeds")
    names = [one.name for one in spec.variants]
    for key, values in (("variants", names), ("seeds", spec.seeds)):
        twice = [str(one) for one in dict.fromkeys(values) if list(values).count(one) > 1]
        if twice:
            raise ConfigError(f"{where}: {key} names {', '.join(twice)} twice; keep one")
    if "baseline" in names[1:]:
        raise ConfigError(f"{where}: variants: baseline must be the first, since that is what all others are compared with; move it")
    if 2 * spec.stop.window > spec.steps:
        raise ConfigError(
            f"{where}: stop.window ({spec.stop.window}) must be at most half of steps ({spec.steps}), else the rule for divergence never "
            "looks; lower it"
        )
    if spec.top_rungs >= max(len(spec.learning_rates), 2):
        raise ConfigError(
            f"{where}: top_rungs ({spec.top_rungs}) must leave one of the {len(spec.learning_rates)} rungs below; lower it, or add rungs"
        )


def _variant(item: Any, path: Path, where: str) -> Variant:
    if isinstance(item, str):
        if item in VARIANTS:
            return Variant(item, set=VARIANTS[item])
        near = difflib.get_close_matches(item, VARIANTS, n=1)
        remedy = f"did you mean {near[0]}?" if near else "write NAME: {set: {...}} for one of your own"
        raise ConfigError(f"{where}: variants: {item!r} is none of {', '.join(VARIANTS)}; {remedy}")
    if not (isinstance(item, dict) and len(item) == 1):
        raise ConfigError(f"{where}: variants: {item!r} must be a name or NAME: {{set: ..., configs: ..., preset: ...}}; write it so")
    ((name, given),) = item.items()
    place = f"{where}: variants: {name}"
    given = _mapping(given, place)
    _only(given, _OWN, where=place)
    _named(name, place, hyphen=False)
    preset = given.get("preset", "")
    if not isinstance(preset, str):
        raise ConfigError(f"{place}: preset ({preset!r}) must be text, as in paper/table1/row05; write it so")
    over = _settings(given.get("set", {}), f"{place}: set")
    return Variant(name, _files(given.get("configs", []), path, place), preset, {**VARIANTS.get(name, {}), **over})


def _settings(given: Any, where: str) -> dict[str, Any]:
    """Settings by dotted key, checked one by one so that a message names the spec."""
    for name, value in _mapping(given, where).items():
        key = all_keys().get(name)
        if key is None:
            raise ConfigError(unknown_key(str(name), where=where))
        if not key.accepts(value):
            raise ConfigError(wrong_type(key, value, where=where))
        if name in _RESERVED:
            raise ConfigError(f"{where}: {name} ({value!r}) is the study's own to set; leave it out")
    return dict(given)


def _as_file(settings: Mapping[str, Any], path: Path) -> list[str]:
    if not settings:
        return []
    path.write_text(yaml.safe_dump(dict(settings)))
    return [f"--config={path}"]


def _files(given: Any, path: Path, where: str) -> tuple[Path, ...]:
    if not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        raise ConfigError(f"{where}: configs ({given!r}) must be a list of files; write [FILE]")
    return tuple(path.parent / one for one in given)


def _ladder(rates: Sequence[Any], where: str) -> tuple[float, ...]:
    for rate in rates:
        remedy = " (YAML reads 4e-3 as text: write 4.0e-3)" if isinstance(rate, str) else ""
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < _ENDLESS:
            raise ConfigError(f"{where}: learning_rates: {rate!r} must be a number above 0{remedy}; write it so")
    for lower, upper in zip(rates, rates[1:], strict=False):
        if not lower < upper:
            raise ConfigError(f"{where}: learning_rates must ascend, but {upper:g} follows {lower:g}; sort them, each once")
    return tuple(float(rate) for rate in rates)


def _stop(given: Any, where: str) -> Stop:
    settings = _mapping(given, f"{where}: stop")
    _only(settings, ("above_initial", "window"), where=f"{where}: stop")
    above = _number(settings.get("above_initial", Stop.above_initial), f"{where}: stop.above_initial")
    return Stop(above, _whole(settings.get("window", Stop.window), 1, f"{where}: stop.window"))


def _bar(given: Any, where: str) -> float | None:
    return None if given is None else _number(given, f"{where}: collapsed_above")


def _list(given: Mapping[str, Any], key: str, where: str) -> list[Any]:
    if not (isinstance(given[key], list) and given[key]):
        raise ConfigError(f"{where}: {key} ({given[key]!r}) must be a list of at least one; write [...]")
    return given[key]


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"{where} ({given!r}) must be settings; write KEY: VALUE lines")
    return given


def _only(given: Mapping[str, Any], known: Sequence[str], *, where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{where}: {key!r} is not a known key; {remedy}")


def _named(name: Any, where: str, *, hyphen: bool = True) -> str:
    if not (isinstance(name, str) and _NAME.fullmatch(name) and (hyphen or "-" not in name)):
        raise ConfigError(f"{where} ({name!r}) must be of a-z, 0-9 and _{', and - between' if hyphen else ''}; rename it")
    return name


def _whole(value: Any, least: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where} ({value!r}) must be a whole number from {least} on; write it so")
    return value


def _number(value: Any, where: str, *, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value <= most and value < _ENDLESS):
        limit = f" and at most {most:g}" if most < math.inf else ""
        raise ConfigError(f"{where} ({value!r}) must be a number of at least 0{limit}; mend it")
    return float(value)
