"""What a merge does: data sets and bare Megatron prefixes to the shards of one data set, each linked, copied or written anew.

A shard that is taken whole, in the type of the merged set, is linked; it is written anew where `--split` cuts it, where it is joined with
neighbours, or where its type differs. A data set's splits are kept; a bare prefix goes to one split, or is cut as Megatron cuts it.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megagate.data.claim import PLAN_NAME, claim_folder
from megagate.data.concatenate import document_offsets, small_runs
from megagate.data.files import AtomicFile, clean_errors, sampled_sha256
from megagate.data.hashing import canonical_sha256
from megagate.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    ShardEntry,
    SplitName,
    TokenizerIdentity,
    open_shards,
    read_manifest,
)
from megagate.data.preprocess.tokenizer_source import find_tokenizer
from megagate.data.shards import Shard, bin_path, find_prefix, idx_path, token_dtype
from megagate.data.tokenizer import TOKENIZER_NAME, AnyTokenizer, load_tokenizer
from megagate.errors import DataError

MERGE_VERSION = 1  # raise it when the same plan would give other tokens
ALL_TRAIN = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class TokenizerFile:
    """The tokenizer's file of a data set, to be copied as it is."""

    source: Path
    own: TokenizerIdentity

    def identity(self) -> TokenizerIdentity:
        """Of the copy."""
        return self.own

    def save(self, path: Path) -> None:
        """Writes the copy.

        Raises:
            DataError: The file changed since it was looked at.
        """
        with clean_errors("read", self.source):
            content = self.source.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.own.sha256:
            raise DataError(f"{self.source} changed while it was read; begin again")
        with clean_errors("write", path), AtomicFile(path) as file:
            file.write(content)


@dataclass(frozen=True)
class Maker:
    """Who made the ids: the identity that the manifest will have, and what writes the tokenizer's file.

    Args:
        name: For messages.
        identity: Of the tokenizer.
        tokenizer: To write the file; None where there is none.
    """

    name: str
    identity: TokenizerIdentity
    tokenizer: AnyTokenizer | TokenizerFile | None = None


@dataclass(frozen=True)
class Member:
    """A shard that is merged: where it lies, its counts and type, and what a manifest says of it (None for a bare prefix)."""

    prefix: Path
    documents: int
    tokens: int
    dtype: str
    entry: ShardEntry | None


@dataclass(frozen=True)
class Piece:
    """Documents [first, last) of a member, for a split; `tokens` of them."""

    member: Member
    split: SplitName
    first: int
    last: int
    tokens: int

    @property
    def whole(self) -> bool:
        """Whether it is all of the member."""
        return self.last - self.first == self.member.documents


@dataclass(frozen=True)
class Target:
    """A shard of the merged data set and what it is made of."""

    name: str
    split: SplitName
    pieces: tuple[Piece, ...]
    rewritten: bool

    @property
    def tokens(self) -> int:
        """Of all pieces."""
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True)
class MergePlan:
    """All of a merge. `inputs` tells them apart wherever they lie: fingerprints of data sets; names, sizes, hashed ends of prefixes."""

    maker: Maker
    dtype: str
    targets: tuple[Target, ...]
    inputs: tuple[dict[str, Any], ...]
    split: tuple[float, ...]
    shard_tokens: int

    def body(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "merge_version": MERGE_VERSION,
            "tokenizer": asdict(self.maker.identity),
            "inputs": list(self.inputs),
            "split": list(self.split),
            "shard_tokens": self.shard_tokens,
        }

    @property
    def sha256(self) -> str:
        """Of its body (hex)."""
        return canonical_sha256(self.body())


def named_maker(name: str | None, *, eod: str | None = None, vocab_size: int = 0, eod_id: int = -1) -> Maker | None:
    """The tokenizer of bare prefixes.

    Args:
        name: Of a tokenizer, see `find_tokenizer`, or a prepared data set, whose tokenizer is meant.
        eod: Token that ends documents, see `find_tokenizer`.
        vocab_size: Of ids that have no text, where there is no tokenizer; 0 for none.
        eod_id: Of these the one that ends documents; -1 for none.

    Raises:
        DataError: There is no such tokenizer, or the values do not go together.
    """
    if name is None:
        if not vocab_size:
            return None
        if vocab_size < 1 or not -1 <= eod_id < vocab_size or eod is not None:
            raise DataError(
                f"--vocab-size {vocab_size} and --eod-id {eod_id}: ids must be in [0, vocab size), and --eod-token needs --tokenizer; give"
                " numbers that go together"
            )
        identity = TokenizerIdentity(kind="none", file="", sha256="", vocab_size=vocab_size, eod_id=eod_id, pad_id=-1)
        return Maker(f"--vocab-size {vocab_size}", identity)
    if vocab_size or eod_id != -1:
        raise DataError("--tokenizer knows its vocabulary and its end of document; leave out --vocab-size and --eod-id")
    if os.path.isfile(Path(name) / MANIFEST_NAME):
        return _maker_of_set(Path(name), read_manifest(Path(name)))
    tokenizer = find_tokenizer(name, eod=eod)
    return Maker(f"--tokenizer {name}", tokenizer.identity(), tokenizer=tokenizer)


def make_merge(
    inputs: Sequence[tuple[str, SplitName | None]], *, maker: Maker | None, split: tuple[float, ...] = ALL_TRAIN, shard_tokens: int = 0
) -> MergePlan:
    """Looks at the inputs, opens every shard once, and says what becomes of it; reads no tokens.

    Args:
        inputs: Folders with a manifest and prefixes of shards, each with the split that all of it is for; None for a data set's own
            splits, or for `split`.
        maker: The tokenizer of bare prefixes, which must be that of the data sets too; None if there are only data sets.
        split: Weights of train, valid and test, by which each bare prefix is cut into ranges of documents, see `cuts`.
        shard_tokens: Neighbours are joined to shards of at least so many tokens; 0 leaves all as they are.

    Raises:
        DataError: An input is missing, damaged, given twice, or made by another tokenizer; or there are no documents.
    """
    _check_numbers(split, shard_tokens)
    pieces: list[Piece] = []
    found: list[dict[str, Any]] = []
    seen: dict[object, str] = {}
    given, bare = maker is not None, False
    for name, wish in inputs:
        if os.path.isdir(name):
            manifest = read_manifest(Path(name))
            maker = _agree(maker, _maker_of_set(Path(name), manifest))
            _once(seen, manifest.fingerprint, name)
            found.append({"fingerprint": manifest.fingerprint, "split": wish or ""})
            added = _pieces_of_set(Path(name), manifest, wish)
        else:
            prefix = _bare_prefix(name)
            found.append({"name": prefix.name, **_ends(prefix), "split": wish or ""})
            added, bare = _pieces_of_prefix(prefix, wish, split), True
        for member in dict.fromkeys(piece.member for piece in added):
            _once(seen, _inode(member), str(member.prefix))
        pieces += added
    if bare and not given:
        raise DataError(
            "bare prefixes do not say which tokenizer made them; give it: --tokenizer NAME_OR_PATH (a data set's folder is one), or"
            " --vocab-size and --eod-id for ids without a text"
        )
    if split != ALL_TRAIN and not bare:
        raise DataError("--split cuts bare prefixes, and there are none; data sets keep their own splits: leave it out")
    if maker is None or not any(piece.tokens for piece in pieces):
        raise DataError("--input has no tokens; nothing can be merged; check the paths")
    dtype = _dtype(pieces, maker.identity.vocab_size)
    targets = tuple(target for one in SPLITS for target in _targets(one, pieces, dtype, shard_tokens))
    return MergePlan(maker=maker, dtype=dtype, targets=targets, inputs=tuple(found), split=split, shard_tokens=shard_tokens)


def publish_merge(folder: Path, plan: MergePlan) -> None:
    """Makes the folder this merge's own, see `claim_folder`.

    Raises:
        DataError: It holds something else.
    """
    if folder.exists():
        with clean_errors("read", folder):
            names = {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")}
        if names and PLAN_NAME not in names:
            raise DataError(f"{folder} is not empty, and holds no merge ({sorted(names)[0]} is there); choose an empty folder for --output")
    claim_folder(folder, plan.body(), difference=_difference)


def cuts(split: Sequence[float], documents: int) -> list[tuple[int, int]]:
    """The range of documents of each split, as Megatron-LM cuts a data set of one sequence to a document.

    Source: `blended_megatron_dataset_config.py` (the split, normalised) and `..._builder.py` (rounded) of megatron-core 0.16.1.
    """
    total = sum(split)
    ends = [0.0]
    for weight in split:
        ends.append(ends[-1] + weight / total)
    borders = [int(round(end * float(documents))) for end in ends]
    return list(zip(borders, borders[1:], strict=False))


def _maker_of_set(folder: Path, manifest: Manifest) -> Maker:
    identity = manifest.tokenizer
    load_tokenizer(folder, identity)  # which checks its file
    if not identity.file:
        return Maker(f"the data set {folder}", identity)
    copied = replace(identity, file=TOKENIZER_NAME)
    return Maker(f"the data set {folder}", copied, tokenizer=TokenizerFile(folder / identity.file, copied))


def _agree(first: Maker | None, other: Maker) -> Maker:
    if first is None:
        return other
    if listed := first.identity.difference(other.identity):
        raise DataError(
            f"{first.name} and {other.name} are different tokenizers ({listed}); one data set has one vocabulary; prepare all inputs with"
            " the same tokenizer"
        )
    return first


def _inode(member: Member) -> object:
    """The same for two names of one file, links included."""
    path = bin_path(member.prefix)
    with clean_errors("read", path):
        found = path.stat()
    return found.st_dev, found.st_ino


def _once(seen: dict[object, str], key: object, name: str) -> None:
    if key in seen:
        raise DataError(f"--input names the same data twice, as {seen[key]} and as {name}; each document must come once; leave one out")
    seen[key] = name


def _bare_prefix(name: str) -> Path:
    prefix = find_prefix(name)
    if prefix is None:
        raise DataError(f"--input {name}: neither a folder nor a shard ({name}.bin and .idx do not exist); check the path")
    return prefix


def _ends(prefix: Path) -> dict[str, list[Any]]:
    found = {}
    for key, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        with clean_errors("read", path):
            found[key] = list(sampled_sha256(path))
    return found


def _pieces_of_set(folder: Path, manifest: Manifest, wish: SplitName | None) -> list[Piece]:
    for split in SPLITS:
        open_shards(folder, manifest, split=split)  # sizes and types are the manifest's
    pieces = []
    for split in SPLITS:
        for entry in manifest.of_split(split):
            member = Member(folder / entry.prefix, entry.documents, entry.tokens, manifest.dtype, entry)
            pieces.append(Piece(member, wish or split, 0, entry.documents, entry.tokens))
    return pieces


def _pieces_of_prefix(prefix: Path, wish: SplitName | None, split: tuple[float, ...]) -> list[Piece]:
    shard = Shard(prefix)
    member = Member(prefix, shard.documents, shard.tokens, shard.dtype.name, None)
    if wish is not None:
        return [Piece(member, wish, 0, shard.documents, shard.tokens)]
    ranges = [(one, *span) for one, span in zip(SPLITS, cuts(split, shard.documents), strict=True)]
    if (wanted := [one for one, first, last in ranges if last > first]) and len(wanted) == 1:
        return [Piece(member, wanted[0], 0, shard.documents, shard.tokens)]
    shard.check_index()
    offsets = {border: int(document_offsets(shard, border, border)[0]) for _, *span in ranges for border in span}
    return [Piece(member, one, first, last, offsets[last] - offsets[first]) for one, first, last in ranges if last > first]


def _dtype(pieces: Sequence[Piece], vocab_size: int) -> str:
    """The common type of the inputs, if it is one of token shards, so that none has to be written anew; else the vocabulary's."""
    kinds = {piece.member.dtype for piece in pieces}
    if kinds == {"int32"} or (kinds == {"uint16"} and vocab_size <= 1 << 16):
        return kinds.pop()
    return token_dtype(vocab_size).name


def _targets(split: SplitName, pieces: Sequence[Piece], dtype: str, shard_tokens: int) -> list[Target]:
    own = [piece for piece in pieces if piece.split == split]
    runs = small_runs([piece.tokens for piece in own], shard_tokens)
    groups = [tuple(own[run.start : run.stop]) for run in runs]
    return [
        Target(f"{split}-{number:05d}", split, group, len(group) > 1 or not group[0].whole or group[0].member.dtype != dtype)
        for number, group in enumerate(groups)
    ]


def _check_numbers(split: tuple[float, ...], shard_tokens: int) -> None:
    if len(split) != len(SPLITS) or not all(math.isfinite(one) and one >= 0 for one in split) or not sum(split):
        raise DataError(f"--split is {split}; it must be three weights ({', '.join(SPLITS)}), 0 or more, as 949,50,1")
    if shard_tokens < 0:
        raise DataError(f"--shard-tokens is {shard_tokens}; it must be 0 (leave shards as they are) or more")


def _difference(stored: Any, body: dict[str, Any]) -> str:
    if not isinstance(stored, dict) or "merge_version" not in stored:
        return f"{PLAN_NAME} is not one of a merge"
    different = [key for key in body if stored.get(key) != body[key]]
    return f"its {' and '.join(different)} differ" if different else "it has more values"
