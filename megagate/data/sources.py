"""`data.path` and `data.valid` to what a run reads: one data set, or a blend, and validation sets by name."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

from megagate.config.run import AttentionSpan
from megagate.data.blend import Blend, Weights
from megagate.data.dataset import DataSet, open_dataset, prepare
from megagate.data.hashing import canonical_sha256
from megagate.data.manifest import TokenizerIdentity
from megagate.data.split import Split
from megagate.data.tokenizer import AnyTokenizer
from megagate.errors import ConfigError, DataError

_CHANGE = "from"
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", flags=re.ASCII)
_FORM = 'write WEIGHT FOLDER WEIGHT FOLDER ..., as in "0.7 /data/a 0.3 /data/b", and `from SAMPLE` before weights that begin there'


@dataclass(frozen=True)
class BlendText:
    """What `data.path` says.

    Args:
        paths: The data sets, each once, in the order of their first weight.
        weights: Of these, see `BlendSchedule`.
    """

    paths: tuple[str, ...]
    weights: tuple[Weights, ...]


@dataclass(frozen=True)
class Sources:
    """All that a run reads.

    Attributes:
        name: The `data.path` that was opened.
        train: To learn from.
        valid: To measure on, by name; only splits with tokens. A data set's own split, where `data.valid` names none, has the name "".
        tokenizer: The one of all data sets; None where ids have no text.
        identity: Of that tokenizer.
        vocab_size: Ids are below this.
        fingerprint: Of all that is read for training and validation (hex).
    """

    name: str
    train: Blend
    valid: Mapping[str, Split]
    tokenizer: AnyTokenizer | None
    identity: TokenizerIdentity
    vocab_size: int
    fingerprint: str

    def document_end(self, attention: AttentionSpan) -> int | None:
        """The id after which windows are cut into documents; None where `data.attention` does not cut them.

        Raises:
            DataError: They are to be cut, but documents have no end.
        """
        if attention == "causal":
            return None
        if self.identity.eod_id < 0:
            raise DataError(
                f"data.attention is {attention}, but data.path ({self.name}) has no token that ends a document (eod_id), at which to cut;"
                " set data.attention to causal, or give another data set"
            )
        return self.identity.eod_id

    def describe(self) -> str:
        """One line for a log."""
        tokens = sum(split.tokens for split in self.valid.values())
        sets = "" if list(self.valid) in ([], [""]) else f" ({', '.join(self.valid)})"
        return (
            f"{self.name}: {self.train.tokens:,} training and {tokens:,} validation tokens{sets}, vocabulary {self.vocab_size:,},"
            f" fingerprint {self.fingerprint[:12]}"
        )


def parse_blend(path: str) -> BlendText:
    """Reads a `data.path`: a folder (or `embedded`, `synthetic`), or weights and folders as Megatron's `--data-path` takes them.

    `0.7 /data/a 0.3 /data/b from 1000000 0.5 /data/a 0.5 /data/c`: from sample 1,000,000 of the run on /data/b rests and /data/c begins.
    It is a blend where the first of several words is a number; any other text is one path, spaces included. In a blend, paths with
    spaces stand in quotes.

    Raises:
        ConfigError: A blend is not of this form, or names a data set twice under one set of weights.
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
            if not value.isascii() or not value.isdigit() or not parts[-1][1]:
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


def prepare_sources(path: str, valid: str, *, vocab_size: int, directory: Path) -> None:
    """Writes what `open_sources` will read, see `prepare`; one process per machine calls it first.

    Raises:
        ConfigError: `path` or `valid` is not of its form.
        DataError: See `prepare`.
    """
    for one in dict.fromkeys((*parse_blend(path).paths, *parse_valid(valid).values())):
        prepare(one, vocab_size=vocab_size, directory=directory)


def open_sources(path: str, valid: str, *, vocab_size: int, directory: Path) -> Sources:
    """Opens all that a run reads, without reading or writing its tokens.

    Args:
        path: `data.path`, see `parse_blend`.
        valid: `data.valid`, see `parse_valid`; empty for the validation splits of the training data: of several data sets under the last
            parts of their paths.
        vocab_size: The model's.
        directory: Where `prepare_sources` put `embedded`.

    Raises:
        ConfigError: `path` or `valid` is not of its form, or the weights cannot be used.
        DataError: A data set cannot be opened, or was made by another tokenizer than the first.
    """
    text, named = parse_blend(path), parse_valid(valid)
    opened = {
        one: open_dataset(one, vocab_size=vocab_size, directory=directory) for one in dict.fromkeys((*text.paths, *named.values()))
    }
    members = [opened[one] for one in text.paths]
    first = members[0]
    for other in opened.values():
        _require_same_tokenizer(first, other)
    for name, one in named.items():
        if not opened[one].valid.tokens:
            raise DataError(f"data.valid: {name} ({one}) has no validation tokens; prepare it with a validation split, or leave it out")
    train = Blend([member.train for member in members], text.weights, names=text.paths if len(members) > 1 else [""])
    sets = {name: opened[one] for name, one in named.items()} or _own_names(text.paths, members)
    valid = {name: data for name, data in sets.items() if data.valid.tokens}
    prints = {name: data.fingerprint for name, data in valid.items()}
    alone = set(prints.values()) <= {train.fingerprint}  # one data set is what its manifest says it is
    return Sources(
        name=path,
        train=train,
        valid={name: data.valid for name, data in valid.items()},
        tokenizer=first.tokenizer,
        identity=first.identity,
        vocab_size=first.vocab_size,
        fingerprint=train.fingerprint if alone else canonical_sha256({"train": train.fingerprint, "valid": prints}),
    )


def _own_names(paths: tuple[str, ...], members: list[DataSet]) -> dict[str, DataSet]:
    """The validation sets of the training data; the only one needs no name."""
    if len(members) == 1:
        return {"": members[0]}
    found: dict[str, DataSet] = {}
    for path, data in zip(paths, members, strict=True):
        name = Path(path).name or path.replace("/", "")
        if name in found:
            raise DataError(
                f"data.path: {found[name].name} and {path} would both name their validation set {name}; name them in data.valid, as in"
                f" first={found[name].name} second={path}"
            )
        found[name] = data
    return found


def _require_same_tokenizer(first: DataSet, other: DataSet) -> None:
    a, b = (replace(data.identity, file="") for data in (first, other))
    if a != b:
        differing = [field for field in asdict(a) if field != "file" and getattr(a, field) != getattr(b, field)]
        listed = ", ".join(f"{field} {str(getattr(a, field))[:12]!r} and {str(getattr(b, field))[:12]!r}" for field in differing)
        raise DataError(
            f"{first.name} and {other.name} were made by different tokenizers ({listed}); one model has one vocabulary; prepare all data"
            " sets of data.path and data.valid with the same tokenizer"
        )


def _number(word: str) -> Fraction | None:
    return Fraction(word) if _NUMBER.fullmatch(word) else None


def _words(text: str, *, key: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {text!r} cannot be cut into words ({error}); close the quotes") from None
