"""The file of a study: YAML, read into a `Spec`, every key and value of it checked."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megagate.analysis.lr.executor import read_executor
from megagate.analysis.lr.spec import Spec, Stop, Variant
from megagate.config.cli import explain_yaml
from megagate.config.keys import all_keys, unknown_key, wrong_type
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
_OWN = ("configs", "preset", "set")


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
