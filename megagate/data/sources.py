"""`data.path` and `data.valid` to what a run reads: one data set, or a blend, and validation sets by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagate.config.blend_text import parse_blend, parse_valid
from megagate.config.run import AttentionSpan
from megagate.data.blend import Blend
from megagate.data.dataset import DataSet, open_dataset, prepare
from megagate.data.hashing import canonical_sha256
from megagate.data.manifest import TokenizerIdentity
from megagate.data.split import Split
from megagate.data.tokenizer import AnyTokenizer
from megagate.errors import DataError


@dataclass(frozen=True)
class Sources:
    """All that a run reads.

    Attributes:
        name: The `data.path` that was opened.
        train: To learn from.
        valid: To measure on, by name; only splits with tokens. A data set's own split, where `data.valid` names none, has the name "".
        first: The data set named first, whose tokenizer is that of all.
        identity: Of that tokenizer.
        vocab_size: Ids are below this.
        fingerprint: Of all that is read for training and validation (hex).
    """

    name: str
    train: Blend
    valid: Mapping[str, Split]
    first: DataSet
    identity: TokenizerIdentity
    vocab_size: int
    fingerprint: str

    @property
    def tokenizer(self) -> AnyTokenizer | None:
        """The one of all data sets, loaded when it is first asked for; None where ids have no text."""
        return self.first.tokenizer

    def document_end(self, attention: AttentionSpan) -> int | None:
        """The id after which windows are cut into documents; None where `data.attention` does not cut them.

        Raises:
            DataError: They are to be cut, but documents have no end, or were written without it.
        """
        if attention == "causal":
            return None
        if self.identity.eod_id < 0:
            raise DataError(
                f"data.attention is {attention}, but data.path ({self.name}) has no token that ends a document (eod_id), at which to cut;"
                " set data.attention to causal, or give another data set"
            )
        for name, split in (*zip(self.train.names, self.train.members, strict=True), *self.valid.items()):
            if split.tokens and not split.ends_with(self.identity.eod_id):
                raise DataError(
                    f"data.attention is {attention}, but the {split.name} split of {name or self.name} does not end with the end of a"
                    f" document (eod_id {self.identity.eod_id}): documents written without ends cannot be told apart; set data.attention to"
                    " causal, or prepare the data again with ends"
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
        first=first,
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
    if listed := first.identity.difference(other.identity):
        raise DataError(
            f"{first.name} and {other.name} were made by different tokenizers ({listed}); one model has one vocabulary; prepare all data"
            " sets of data.path and data.valid with the same tokenizer"
        )
