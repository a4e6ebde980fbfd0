"""`data.path` and `data.valid` as text: data sets, their weights, and names of validation sets."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megagate.errors import ConfigError

PERIOD = 16_384
"""Slots of a blend's period (P). A data set has a whole number of them, so its share is off by less than 1 / P: less than 0.62 samples in
10,000. A power of two: the quotas over P, and all that Megatron's rule computes of them in double precision, are exact."""
MOST_MEMBERS = 2_000
"""Data sets under one set of weights: as many as `megagate.data.blend.greedy_order` is proven to keep within 10 samples of their shares."""
LAST_SAMPLE = 1 << 60  # no run comes that far, and sums of samples stay in 64 bits

_CHANGE = "from"
_NUMBER = re.compile(r"(\d{1,30}\.?\d{0,30}|\.\d{1,30})([eE][+-]?\d{1,2})?", flags=re.ASCII)
_SAMPLE = re.compile(r"\d{1,19}", flags=re.ASCII)
_FORM = 'write WEIGHT FOLDER WEIGHT FOLDER ..., as in "0.7 /data/a 0.3 /data/b", and `from SAMPLE` before weights that begin there'


@dataclass(frozen=True)
class Weights:
    """The weights from a sample on.

    Args:
        first: The sample of the run, counted from 0, from which they count.
        values: One for each member, 0 or more, of any sum; 0 leaves the member out.
    """

    first: int
    values: tuple[Fraction, ...]


@dataclass(frozen=True)
class BlendText:
    """What `data.path` says.

    Args:
        paths: The data sets, each once, in the order of their first weight.
        weights: Of these, see `megagate.data.blend.BlendSchedule`.
    """

    paths: tuple[str, ...]
    weights: tuple[Weights, ...]


def parse_blend(path: str) -> BlendText:
    """Reads a `data.path`: a folder (or `embedded`, `synthetic`), or weights and folders as Megatron's `--data-path` takes them.

    `0.7 /data/a 0.3 /data/b from 1000000 0.5 /data/a 0.5 /data/c`: from sample 1,000,000 of the run on /data/b rests and /data/c begins.
    It is a blend where the first of several words is a number; any other text is one path, spaces included. In a blend, paths with
    spaces stand in quotes.

    Raises:
        ConfigError: A blend is not of this form, names a data set twice under one set of weights, or its weights cannot be used.
    """
    plain = path.split(maxsplit=1)
    if len(plain) < 2 or _number(plain[0]) is None:
        return BlendText((path,), (Weights(0, (Fraction(1),)),))
    words = _words(path, key="data.path")
    parts: list[tuple[int, dict[str, Fraction]]] = [(0, {})]
    index = 0
    while index < len(words):
        word, value = words[index], words[index + 1] if index + 1 < len(words) else ""
        if word == _CHANGE:
            if not _SAMPLE.fullmatch(value) or not parts[-1][1]:
                raise ConfigError(f"data.path: `{word} {value}` (word {index + 1}) must name a number of samples, after weights; {_FORM}")
            parts.append((int(value), {}))
        elif (weight := _number(word)) is None or not value:
            raise ConfigError(f"data.path: `{f'{word} {value}'.strip()}` (word {index + 1}) is no weight with its folder; {_FORM}")
        elif value in parts[-1][1]:
            raise ConfigError(f"data.path: {value} is named twice under one set of weights; name it once, with their sum")
        else:
            parts[-1][1][value] = weight
        index += 2
    if not parts[-1][1]:
        raise ConfigError(f"data.path: no weights follow `{_CHANGE} {parts[-1][0]}`; {_FORM}")
    paths = tuple(dict.fromkeys(name for _, named in parts for name in named))
    require_rising([first for first, _ in parts])
    for _, named in parts:
        quotas_of(list(named.values()))
    return BlendText(paths, tuple(Weights(first, tuple(named.get(name, Fraction(0)) for name in paths)) for first, named in parts))


def parse_valid(text: str) -> dict[str, str]:
    """Reads a `data.valid`: `NAME=FOLDER NAME=FOLDER ...`, the folder of each validation set by its name.

    Raises:
        ConfigError: A word is not of this form, or a name comes twice.
    """
    found: dict[str, str] = {}
    for word in _words(text, key="data.valid"):
        name, equals, path = word.partition("=")
        if not (name and equals and path) or "/" in name:
            raise ConfigError(f"data.valid: `{word}` must be NAME=FOLDER, as in wiki=/data/wiki; write it so")
        if name in found:
            raise ConfigError(f"data.valid: {name} names two validation sets; give each a name of its own")
        found[name] = path
    return found


def quotas_of(weights: Sequence[Fraction]) -> list[int]:
    """Slots of a period for each data set, by largest remainder (the first wins ties); exact, whatever the platform.

    Raises:
        ConfigError: A weight is negative, all are 0, one is too small for a slot, or there are more than `MOST_MEMBERS`.
    """
    total = sum(weights)
    if min(weights) < 0 or not total:
        listed = " ".join(f"{float(weight):g}" for weight in weights)
        raise ConfigError(f"data.path: weights ({listed}) must be 0 or more, and one above 0; change them")
    if (members := sum(weight > 0 for weight in weights)) > MOST_MEMBERS:
        raise ConfigError(
            f"data.path: {members} data sets under one set of weights must be at most {MOST_MEMBERS}, whose shares any 10,000 samples are"
            " sure to hold; merge some of them"
        )
    shares = [weight * PERIOD / total for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])  # sorting is stable
    for index in by_remainder[: PERIOD - sum(quotas)]:
        quotas[index] += 1
    for weight, quota in zip(weights, quotas, strict=True):
        if weight and not quota:
            raise ConfigError(
                f"data.path: weight {float(weight):g} of {float(total):g} in all is too small: it must be at least 1/{PERIOD} of the sum to"
                " be sure of a slot; raise it, or leave that data set out"
            )
    return quotas


def require_rising(firsts: Sequence[int]) -> None:
    """Refuses samples from which weights count, unless they rise from 0.

    Raises:
        ConfigError: They do not.
    """
    if firsts[0] or firsts[-1] > LAST_SAMPLE or any(one >= other for one, other in zip(firsts, firsts[1:], strict=False)):
        raise ConfigError(
            f"data.path: weights count from samples {list(firsts)}; these must begin with 0, rise, and be at most {LAST_SAMPLE}; put them"
            " in order"
        )


def _number(word: str) -> Fraction | None:
    return Fraction(word) if _NUMBER.fullmatch(word) else None


def _words(text: str, *, key: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {text!r} cannot be cut into words ({error}); close the quotes") from None
