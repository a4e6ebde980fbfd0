r"""Where a long text may be cut, so that the ids of its pieces, put together, are those of the whole.

Encoding takes some hundred times the size of a text in memory, and makes a text of added tokens, of what the normalizer makes of the
stretches between them, of the pieces that each step of the pre-tokenizer makes of these (pre-tokens), and of each pre-token's ids, which
depend on nothing else. So a cut is exact if a pre-token ends there, and all others come out as in the whole. Looking at the ids around a
place does not show that: what a regular expression or a merge makes of `a a a a` depends on where the first one began. It is shown here
from the parts of a tokenizer, and a tokenizer of other parts has no cuts. Places of a cut, `p` the index of the character behind it:

a. before a blank (space, tab, U+3000) that follows a sign: an alphanumeric character or a visible one of ASCII;
b. behind a line feed that follows a sign, and before an alphanumeric character;
c. before an ASCII or Chinese punctuation mark or symbol that follows an ASCII letter or digit or a Chinese one; not before an apostrophe
   (contractions), nor before one of `>_|`, which stand so in added tokens;
d. before an ASCII digit that follows an ASCII letter.

**Regular expressions.** All in `_WHOLE` and `_PARTIAL` have alternatives of these kinds only, and neither lookbehind nor anchors: what is
matched from a place on does not depend on the text before it. No alternative matches across `p`:

- the apostrophe of a contraction is its first character, and letters follow;
- `[^\r\n\p{L}\p{N}]?\p{L}+` and ` ?\p{N}+` and their like have a blank, and the first one a punctuation mark or symbol, only as their
  first character, and no line feed; in a run of letters (with marks) there is no digit, in a run of digits no letter;
- ` ?[^\s\p{L}\p{N}]+[\r\n/]*` has a blank only as its first character, no letter, no digit; line feeds only at its end, where no
  alphanumeric character follows them within the match;
- `\s*[\r\n]+`, `\s+(?!\S)`, `\s+` have no sign, and those that begin with the line feed of (b) end with it.

So each match that begins before `p` ends there or before. It is also the one that is found in the text that ends at `p`: runs are greedy
and end at `p` either way, for `p` or the end of the text; and `(?!\S)` is only asked before `p` where there is a sign between (a, c, d); in
(b) it refuses the line feed in the whole, where `\s+` then takes it, and accepts it at the end of a text: the same match. Those in `_WHOLE`
match at least one character wherever they are tried on the characters named above, so a match ends or begins at `p`. Those in `_PARTIAL`
(digits; Chinese and kana) match one kind of character only, and cut either at `p` or not near it. They may come before, as a step that cuts
at `p` or leaves a stretch around it to the next; behind a step of `_WHOLE` every step sees each side alone. ByteLevel's own expression is
GPT-2's, and what else it does is done to each character.

**Normalizers.** None, or NFC: no character of ASCII or of those of (a), (c) and (d) behind `p` composes with one before it, none is
reordered, and no line feed composes with what follows; so the two sides are normalized apart (Unicode Standard Annex 15, 9.1). And what
NFC makes of an alphanumeric character neither begins nor ends with white space, and begins with an alphanumeric one.

**Added tokens.** Special ones are not looked for (`encode_special_tokens`). Another cannot lie across (a) or (b) if it is free of white
space or nothing but that, nor across (c) or (d) if it has no such place within itself, decomposed as a text may be; so what is found
(leftmost, then longest) is found on either side alone. Where one has, (c) and (d) are not used; and one that looks at what surrounds it
(`lstrip`, `rstrip`, `single_word`) rules cuts out.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Model

_SIGN, _INERT = r"(?<=[^\W_]|[!-~])", "A-Za-z0-9\u4e00-\u9fa5"
_WHITE = rf"{_SIGN}(?=[ \t\u3000])|{_SIGN}\n(?=[^\W_])"
_SIGNS = rf"(?<=[{_INERT}])(?=[!-&(-/:-=?-@\[-^`{{}}~，。！？；：、])|(?<=[A-Za-z])(?=[0-9])"
_CUT_WHITE, _CUT_SIGNS, _CUT = re.compile(_WHITE), re.compile(_SIGNS), re.compile(f"{_WHITE}|{_SIGNS}")

# The regular expressions of pre-tokenizers, by their alternatives.
_ENDS_GPT2 = r"|\s+(?!\S)|\s+"
_ENDS = r"|\s*[\r\n]+" + _ENDS_GPT2
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + _ENDS_GPT2


def _o200k(contractions: str, digits: str) -> str:
    first = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{first}{_UPPER}*{_LOWER}+{contractions}|{first}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDS}"


_WHOLE = frozenset(
    (
        r"'s|'t|'re|'ve|'m|'ll|'d|" + _GPT2,
        r"'(?:[sdmt]|ll|ve|re)|" + _GPT2,
        # cl100k and Llama 3, Qwen 2, Qwen 3.5
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _ENDS,
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _ENDS,
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _ENDS,
        _o200k(_CONTRACTIONS + "?", r"\p{N}{1,3}"),
        _o200k("", r"\p{N}{1,3}"),
        _o200k("", r"\p{N}"),  # Tekken
        # DeepSeek-V3, behind two of _PARTIAL
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*""" + _ENDS,
    )
)
_PARTIAL = frozenset((r"\p{N}", r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+"))


def exact_cuts(model: "_Model") -> re.Pattern[str] | None:
    """What finds the places at which a text may be cut: each match ends at one. None if none is known to be exact.

    Args:
        model: Of the `tokenizers` package, with `encode_special_tokens` set.
    """
    if not (_keeps_apart(_state(model.normalizer)) and _splits(_state(model.pre_tokenizer))):
        return None
    tokens = model.get_added_tokens_decoder().values()
    if all(token.special for token in tokens):
        return _CUT
    for token in tokens:  # the special ones too: one that is passed over may hide another
        white = [character.isspace() for character in token.content]
        if token.lstrip or token.rstrip or token.single_word or any(white) != all(white):
            return None
    across = any(_CUT_SIGNS.search(unicodedata.normalize("NFD", token.content)) for token in tokens)
    return _CUT_WHITE if across else _CUT


def _state(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer, as in a `tokenizer.json`."""
    return None if part is None else json.loads(part.__getstate__())


def _keeps_apart(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(map(_keeps_apart, normalizer["normalizers"]))


def _splits(pre_tokenizer: dict[str, Any] | None) -> bool:
    steps = [] if pre_tokenizer is None else _steps(pre_tokenizer)
    whole = False
    for step in steps:
        kind = _kind(step)
        # ByteLevel without its expression writes characters otherwise, of which no expression behind it is known to cut.
        if kind == "unknown" or (kind == "bytes" and not whole):
            return False
        whole |= kind == "whole"
    return whole


def _steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if part["type"] == "Sequence":
        for step in part["pretokenizers"]:
            yield from _steps(step)
    else:
        yield part


def _kind(step: dict[str, Any]) -> str:
    """`whole` cuts a text at every place named above, `partial` at some, `bytes` at none; `unknown` may do anything."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "whole" if step["use_regex"] else "bytes"
    if step["type"] == "Digits":
        return "partial"
    if step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
        pattern = step["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        # What a partial one does not match would be removed.
        return "whole" if pattern in _WHOLE else "partial" if pattern in _PARTIAL and not step["invert"] else "unknown"
    return "unknown"
