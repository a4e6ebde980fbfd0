"""Long texts are encoded in pieces only where the pieces have the ids of the whole, and then at enough places."""

import base64
import random
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest

from megagate.data import pieces
from megagate.data import tokenizer as tokenizer_module
from megagate.data.corpus import Corpus
from megagate.data.tokenizer import Tokenizer

DIGITS, CHINESE = r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK = next(pattern for pattern in pieces._WHOLE if r"\p{P}" in pattern)
PATTERNS = sorted(pieces._WHOLE - {DEEPSEEK})
# What stands around places of a cut, and what makes them hard: repetition, marks, white space of other kinds, contractions.
PARTS = (
    *("a", "b", "Z", "aa", "s", "ll", "é", "e\u0301", "\u0301", "ß", "ſ", "\u0958", "\u212b", "中", "文", "か"),
    *("1", "12", "1234", "٣", "½", "Ⅷ", "'", "'s", "'ll", "'S", "'ſ", "’", ".", "...", ",", "/", "//", "-", "_", "<", "=\u0338", "\u0338"),
    *("，", "。", "、", "：", "…", " ", " ", "  ", "    ", "\t", "\n", "\n", "\n\n", "\r\n", "\r", "\u3000", "\u00a0", "\u2028"),
    *("\u1100", "\u1161", "\u093f", "\x1c", "\x00", "\u200b", "😀", "👍🏽", "\U000330d6", "\U0010ffff", "€", "\x85"),
)


def built(
    *,
    pre_tokenizer: Any = None,
    normalizer: Any = None,
    merges: Sequence[tuple[str, str]] = ((" a", " a"),),
    tokens: Sequence[Any] = (),
    unigram: bool = False,
) -> Tokenizer:
    """A tokenizer of a few tokens and merges; every byte is one where `pre_tokenizer` writes bytes."""
    from tokenizers import Tokenizer as Model
    from tokenizers import models, pre_tokenizers

    words = ["<end>", " ", "▁", *sorted(pre_tokenizers.ByteLevel.alphabet()), " a", "Ġa", "▁a", "bb", "aa", *map("".join, merges)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    paths = [(" ", "a"), ("Ġ", "a"), ("▁", "a"), *merges, ("b", "b")]
    model = Model(models.BPE(vocab=vocabulary, merges=paths, unk_token="<end>"))
    if unigram:
        model = Model(models.Unigram([(word, -1.0 - 9 / len(word)) for word in vocabulary], unk_id=0))
    if pre_tokenizer is not None:
        model.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        model.normalizer = normalizer
    model.add_special_tokens(["<end>"])
    model.add_tokens(list(tokens))
    return Tokenizer(model, eod="<end>", pad=None)


def split(*patterns: str, inverted: bool = False) -> Any:
    """As files of models have it: expressions, then bytes."""
    from tokenizers import Regex, pre_tokenizers

    behaviour = ("removed", True) if inverted else ("isolated", False)
    steps = [pre_tokenizers.Split(Regex(pattern), behaviour[0], invert=behaviour[1]) for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def not_exact() -> dict[str, Tokenizer]:
    """Tokenizers of which what is around a place does not say whether it may be cut."""
    from tokenizers import AddedToken, Regex, normalizers
    from tokenizers import pre_tokenizers as pre

    byte_level = pre.ByteLevel(add_prefix_space=False)
    return {
        "no pre-tokenizer": built(),
        "bytes alone": built(pre_tokenizer=pre.ByteLevel(add_prefix_space=False, use_regex=False), merges=[("Ġa", "Ġa")]),
        "a space before it": built(pre_tokenizer=pre.ByteLevel(add_prefix_space=True)),
        "spaces replaced": built(normalizer=normalizers.Replace(" ", "▁"), merges=[("▁a", "▁a")]),
        "metaspace, BPE": built(pre_tokenizer=pre.Metaspace(split=False), merges=[("▁a", "▁a")]),
        "metaspace, unigram": built(pre_tokenizer=pre.Metaspace(split=False), merges=[("▁a", "▁a")], unigram=True),
        "spaces in a token": built(pre_tokenizer=byte_level, tokens=[" a a"]),
        "stripping": built(pre_tokenizer=byte_level, tokens=[AddedToken("bb", rstrip=True)]),
        "single word": built(pre_tokenizer=byte_level, tokens=[AddedToken("bb", single_word=True)]),
        "fixed length": built(pre_tokenizer=pre.FixedLength(4), merges=[("a", " a")]),
        "quotes": built(pre_tokenizer=pre.Split(Regex('"[^"]*"'), "isolated"), merges=[(" a", " a")]),
        "a partial step": built(pre_tokenizer=split(DIGITS, CHINESE), merges=[("Ġa", "Ġa")]),
        "bytes before": built(pre_tokenizer=pre.Sequence([pre.ByteLevel(False, use_regex=False), byte_level]), merges=[("Ġa", "Ġa")]),
        "an unknown step": built(pre_tokenizer=pre.Sequence([pre.Split(Regex('"[^"]*"'), "isolated"), byte_level])),
        "merged": built(pre_tokenizer=pre.Split(Regex(PATTERNS[0]), "merged_with_next")),
        "gaps removed": built(pre_tokenizer=split(DIGITS, PATTERNS[0], inverted=True)),
        "lower case": built(pre_tokenizer=byte_level, normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
        "compatible": built(pre_tokenizer=byte_level, normalizer=normalizers.NFKC()),
    }


@pytest.mark.parametrize("name", not_exact())
def test_what_is_not_known_to_be_exact_is_encoded_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_PIECE", 1_000)
    tokenizer = not_exact()[name]
    for text in ("bbb" + " a" * 4_000, '"' + " a" * 3_001 + "\n b", "bb  a1 bb\n" * 500):
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)
        assert list(tokenizer._pieces(text)) == [text]


def exact() -> dict[str, Tokenizer]:
    """The pre-tokenizers of models, with a normalizer of each kind."""
    from tokenizers import normalizers
    from tokenizers import pre_tokenizers as pre

    byte_level = pre.ByteLevel(add_prefix_space=False)
    parts = {
        "GPT-2": byte_level,
        "StarCoder": pre.Sequence([pre.Digits(individual_digits=True), byte_level]),
        "digits": pre.Sequence([pre.Digits(individual_digits=False), split(DEEPSEEK)]),
        "DeepSeek": split(DIGITS, CHINESE, DEEPSEEK.replace(r"\r\n", "\r\n")),
        "DeepSeek, without digits": split(DEEPSEEK),
        **{f"pattern {index}": split(pattern, inverted=index % 2 == 1) for index, pattern in enumerate(PATTERNS)},
    }
    found = {name: built(pre_tokenizer=part, normalizer=normalizers.NFC()) for name, part in parts.items()}
    found["GPT-2, as it is"] = built(pre_tokenizer=byte_level)
    found["two normalizers"] = built(pre_tokenizer=byte_level, normalizer=normalizers.Sequence([normalizers.NFC()]))
    return found


def pre_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """More than ids would show: a pre-token that is cut may have the same ids."""
    model = tokenizer._model
    text = text if model.normalizer is None else model.normalizer.normalize_str(text)
    return [word for word, _ in model.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", exact())
def test_pieces_have_the_pre_tokens_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_PIECE", 1)  # cut wherever it is possible
    tokenizer, draw = exact()[name], random.Random(name)
    texts = ["".join(draw.choices(draw.choices(PARTS, k=draw.choice([2, 3, 6, 40])), k=200)) for _ in range(80)]
    texts += ["bbb" + " a" * 300, "it's 1/2.\na" * 100, " \n\n a" * 100, "a\n" * 300, "1 1" * 300, "a,1.b" * 100, "中，文。" * 100]
    cuts = 0
    for text in texts:
        parts = list(tokenizer._pieces(text))
        assert "".join(parts) == text
        assert [word for part in parts for word in pre_tokens(tokenizer, part)] == pre_tokens(tokenizer, text), repr(text)
        cuts += len(parts) - 1
    assert cuts > 1_500


@pytest.mark.parametrize(
    ("tokens", "cuts"),
    [
        (["<a.a>", "a1", "  ", "\n", "\n\n", "b,b", "a,中"], pieces._CUT_WHITE),
        (["a1"], pieces._CUT_WHITE),
        (["b≠b"], pieces._CUT_WHITE),  # in a text, = may begin it
        (["<a>", "</a>", "<a_b>", "<|b|>", "  ", "\n", "\n\n", "1a", ".b", "中"], pieces._CUT),
    ],
    ids=["across signs", "across digits", "across what composes", "across nothing"],
)
def test_pieces_do_not_cut_added_tokens(tokens: list[str], cuts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import normalizers
    from tokenizers import pre_tokenizers as pre

    monkeypatch.setattr(tokenizer_module, "_PIECE", 1)
    tokenizer = built(pre_tokenizer=pre.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC(), tokens=tokens)
    assert tokenizer._cuts is cuts
    draw = random.Random(0)
    parts = [*tokens, " ", "  ", "\n", "b=\u0338b", "b", "<a", "a>", "a", "1", "<end>", "<", ".", ",", "|", "_"]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=100))
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text), repr(text)


def test_normalized_signs_stay_signs() -> None:
    for code in range(sys.maxunicode + 1):
        if (character := chr(code)).isalnum():
            normal = unicodedata.normalize("NFC", character)
            assert normal[0].isalnum() and not normal[-1].isspace() and not unicodedata.combining(normal[0]), hex(code)


@pytest.mark.parametrize("piece", [100, 3_000])
def test_pieces_of_a_long_text_have_the_ids_of_the_whole(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    texts = corpus.train[:300]
    tokenizer = Tokenizer.train(texts, vocab_size=1_000)
    spaces = "a\n \n b'll don't\n\n\n  c " * 200
    documents = ["\n".join(texts[:30]), "word " * 2_000, "x" * 5_000, "中文。日本語、" * 500, "", spaces, *texts[:50]]
    monkeypatch.setattr(tokenizer_module, "_PIECE", piece)
    assert [ids.tolist() for ids in tokenizer.encode_batch(documents)] == [tokenizer.encode(document) for document in documents]
    parts = list(tokenizer._pieces(documents[0]))
    assert len(parts) > len(documents[0]) / piece / 3 and "".join(parts) == documents[0]


def test_texts_of_many_kinds_have_places_to_cut(corpus: Corpus) -> None:
    tokenizer = built(pre_tokenizer=split(PATTERNS[0]))
    draw = random.Random(0)
    code = base64.b64encode(draw.randbytes(150_000)).decode()
    rows = "\t".join("word" for _ in range(40_000))
    numbers = ",".join(str(draw.random()) for _ in range(10_000))
    chinese = "\n".join("\u3000\u3000中文，没有空格。" * 3 for _ in range(5_000))
    unbroken = "x" * 200_000 + " a" * 20_000  # what has no place at first, is cut where it has one
    for text in (code, code.lower(), rows, numbers, chinese, "中文，没有空格。" * 20_000, "\n".join(corpus.train[:200]), unbroken):
        sizes = [len(part) for part in tokenizer._pieces(text)]
        assert len(sizes) > 1 and sorted(sizes)[-2] < tokenizer_module._PIECE + 1_000
        assert max(sizes) < tokenizer_module._PIECE + (1_000 if text is not unbroken else 200_000)
