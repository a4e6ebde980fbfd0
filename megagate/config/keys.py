"""The dotted keys of `RunConfig` (`optim.lr`): every key with its type, default and help, and configs as dicts by key."""

import difflib
import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any

from megagate.config.run import RunConfig
from megagate.errors import ConfigError

_NEAR_ENOUGH = 0.6
"""The similarity (difflib, 0 to 1) from which another key or choice is offered as the one that was meant."""

_TYPE_RULES = {
    int: "a whole number; write digits only, as in 1000",
    float: "a number; write it as in 0.002 or 2e-3",
    str: "text; put quotes around it in YAML",
    bool: "true or false; write one of the two words",
}
"""What each type demands, with the remedy, as a message ends."""


@dataclass(frozen=True)
class Key:
    """One setting of a run.

    Args:
        name: The dotted name, as in `optim.lr`.
        type: `int`, `float`, `str`, `bool`, a `Literal`, or a tuple of any number of values of a `Literal`.
        default: The value where no config names one.
        help: The field's line in the docstring of its dataclass.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def is_list(self) -> bool:
        """Whether the key takes several values."""
        return typing.get_origin(self.type) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`, or of a list of them; empty for other types."""
        return typing.get_args(typing.get_args(self.type)[0] if self.is_list else self.type)

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of this type; a whole number is a number, a truth value is none."""
        if self.is_list:
            return isinstance(value, (list, tuple)) and all(one in self.choices for one in value) and len(set(value)) == len(value)
        if self.choices:
            return value in self.choices
        kinds = (int, float) if self.type is float else (self.type,)
        return isinstance(value, kinds) and (self.type is bool or not isinstance(value, bool))


@functools.cache
def all_keys() -> Mapping[str, Key]:
    """Every key of `RunConfig` by its dotted name, in the order of the dataclasses."""
    return {key.name: key for key in _keys_of(RunConfig, prefix="")}


def _keys_of(cls: type, *, prefix: str) -> Iterator[Key]:
    helps = _argument_help(cls)
    for item in fields(cls):
        name = prefix + item.name
        if is_dataclass(item.type):
            yield from _keys_of(typing.cast(type, item.type), prefix=f"{name}.")
        else:
            assert item.default is not MISSING, f"{name} has no default"
            yield Key(name=name, type=item.type, default=item.default, help=helps.get(item.name, ""))


def _argument_help(cls: type) -> dict[str, str]:
    """The lines of `Args:` in the docstring of `cls`, by field."""
    _, _, arguments = (cls.__doc__ or "").partition("Args:\n")
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", arguments, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).strip() for name, text in found}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as nested dicts of plain values, complete, in the order of the dataclasses."""
    return asdict(config, dict_factory=lambda items: {name: list(value) if isinstance(value, tuple) else value for name, value in items})


def flatten(config: RunConfig) -> dict[str, Any]:
    """The config as one dict by dotted key."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in all_keys()}


def from_dict(settings: Mapping[str, Any], *, places: Mapping[str, str] = MappingProxyType({})) -> RunConfig:
    """The config that nested (or dotted) settings describe; what they leave out has its default.

    Args:
        settings: The values.
        places: Where keys were written, for messages.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type.
    """
    return typing.cast(RunConfig, _build(RunConfig, dict(_leaves(settings, prefix="", places=places)), prefix=""))


def _leaves(settings: Mapping[str, Any], *, prefix: str, places: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for part, value in settings.items():
        name = f"{prefix}{part}"
        if isinstance(value, Mapping):
            yield from _leaves(value, prefix=f"{name}.", places=places)
        elif (key := all_keys().get(name)) is None:
            raise ConfigError(unknown_key(name))
        elif not key.accepts(value):
            raise ConfigError(wrong_type(key, value, where=places.get(name, "")))
        else:
            yield name, value


def _build(cls: type, leaves: Mapping[str, Any], *, prefix: str) -> Any:
    values = {}
    for item in fields(cls):
        name = prefix + item.name
        if is_dataclass(item.type):
            values[item.name] = _build(typing.cast(type, item.type), leaves, prefix=f"{name}.")
        elif name in leaves:
            values[item.name] = _plain(all_keys()[name], leaves[name])
    return cls(**values)


def _plain(key: Key, value: Any) -> Any:
    """An accepted value, in the type of its key."""
    if key.is_list:
        return tuple(value)
    return float(value) if key.type is float else value


def differences(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """The keys in which two configs differ, each as (dotted key, value in `a`, value in `b`)."""
    other = flatten(b)
    return [(name, value, other[name]) for name, value in flatten(a).items() if value != other[name]]


def unknown_key(name: str, *, where: str = "", mark: str = "") -> str:
    """The message about a key that does not exist, with the one that was probably meant.

    Args:
        name: The key as it was written.
        where: Where it was written, for example `my.yaml line 3`.
        mark: What precedes a key there: `--` on a command line.
    """
    place = f" ({where})" if where else ""
    members = [known for known in all_keys() if known.startswith(f"{name}.")]
    if members:
        listed = ", ".join(mark + member for member in members)
        return f"{mark}{name}{place} is a group of keys and takes no value of its own; set one of {listed}"
    meant = _nearest_key(name)
    remedy = f"did you mean {mark}{meant}?" if meant else "--help lists every key"
    return f"{mark}{name}{place} is not a known key; {remedy}"


def wrong_type(key: Key, value: Any, *, where: str = "") -> str:
    """The message about a value that its key does not accept."""
    place = f", {where}" if where else ""
    if not key.choices:
        return f"{key.name} ({value!r}{place}) must be {_TYPE_RULES[key.type]}"
    listed = ", ".join(key.choices)
    if key.is_list:
        shown = _as_list(value) if isinstance(value, (list, tuple)) else repr(value)
        return f"{key.name} ({shown}{place}) must be a list of some of {listed}, each once; {_list_remedy(key, value)}"
    near = _nearest_choice(key, value)
    remedy = f"did you mean {near}?" if near else f"its default is {key.default}"
    return f"{key.name} ({value!r}{place}) must be one of {listed}; {remedy}"


def _list_remedy(key: Key, value: Any) -> str:
    """What to write instead of a list, or of one element of it, that its key does not accept."""
    elements = list(value) if isinstance(value, (list, tuple)) else [value]
    unknown = [one for one in elements if one not in key.choices]
    for one in unknown:
        if near := _nearest_choice(key, one):
            return f"did you mean {near}?"
    if unknown:
        return f"its default is {_as_list(key.default)}"
    twice = [one for place, one in enumerate(elements) if one in elements[:place]]
    return f"name {', '.join(dict.fromkeys(twice))} once" if twice else f"write {_as_list(elements)}"


def _as_list(values: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, values))}]"


def _nearest_choice(key: Key, value: Any) -> str | None:
    return next(iter(difflib.get_close_matches(str(value), key.choices, n=1, cutoff=_NEAR_ENOUGH)), None)


def _nearest_key(name: str) -> str | None:
    """The key most like `name`, by its whole name or by its last part (`train.lr` means `optim.lr`)."""

    def likeness(known: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(a=name, b=known).ratio()
        last = difflib.SequenceMatcher(a=name.rpartition(".")[2], b=known.rpartition(".")[2]).ratio()
        return max(whole, last), whole

    best = max(all_keys(), key=likeness)
    return best if likeness(best)[0] >= _NEAR_ENOUGH else None
