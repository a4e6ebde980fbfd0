"""gigatoken gives the ids of tokenizers, whatever the text, or is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.corpus import Corpus
from megagate.data.preprocess import backends
from megagate.data.preprocess.backends import Gigatoken, choose_backend, first_documents
from megagate.data.preprocess.plan import Plan, Settings, make_plan
from megagate.data.preprocess.units import write_unit
from megagate.data.tokenizer import EOD, Tokenizer
from megagate.errors import DataError

# Two letters that Unicode took in later than `tokenizers` and earlier than gigatoken know, and what may stand around them.
NEW_LETTERS = "\U000330d6\U00011dd2"
NEW_MARKS = "\u1715\u0c3c\u0d3b\u0eba\ua82c"  # of which one package knows their order among marks
PARTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from([*NEW_LETTERS, "'ll", "'s", " the", "ing", "123", "...", "\n", "\n\n", "  ", " ", "é", "e\u0301"]),
    st.sampled_from([EOD, "<|pad|>", "<tool>"]),
)

# What gigatoken 0.10 passes over without a word, and gets wrong.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORD = {"id": 2_000, "content": "gate", "single_word": True, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
QWEN2 = {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}
ODD = "a\n <b"  # a text of which BYTE_LEVEL makes other ids


@pytest.fixture(scope="module")
def texts(corpus: Corpus) -> list[str]:
    """Real English, some 400 kB."""
    return corpus.train[:800]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, vocab_size=2_000)


@pytest.fixture(scope="module")
def pair(tokenizer: Tokenizer) -> tuple[Gigatoken, Tokenizer]:
    """gigatoken and the package beside it, of a tokenizer with an added token that is not special."""
    tokens = json.loads(tokenizer.to_json())["added_tokens"]
    reference = changed(tokenizer, added_tokens=[*tokens, {**WORD, "content": "<tool>", "single_word": False}])
    return Gigatoken(reference), reference


def changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    """The tokenizer with other parts of its `tokenizer.json`; a dictionary is merged into the one there."""
    from tokenizers import Tokenizer as Model

    value = json.loads(tokenizer.to_json())
    for key, part in parts.items():
        value[key] = {**value[key], **part} if isinstance(part, dict) and isinstance(value[key], dict) else part
    return Tokenizer(Model.from_str(json.dumps(value)))


def whole(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids by the package itself, one text at a time and undivided."""
    return [tokenizer.encode(text) for text in texts]


def lists(arrays: Sequence[Any]) -> list[list[int]]:
    return [ids.tolist() for ids in arrays]


def test_ids_of_real_text_are_equal(tokenizer: Tokenizer, texts: list[str]) -> None:
    fast = Gigatoken(tokenizer)
    fast.check(texts[:5])
    assert lists(fast.encode_batch(texts)) == whole(tokenizer, texts)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.lists(PARTS, max_size=12).map("".join), max_size=4))
def test_ids_of_any_text_are_equal(pair: tuple[Gigatoken, Tokenizer], monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> None:
    monkeypatch.setattr(backends, "_EVERY", 1 << 40)  # the comparison is this test's
    fast, reference = pair
    assert lists(fast.encode_batch(documents)) == whole(reference, documents)


@pytest.mark.parametrize("pre_tokenizer", [None, QWEN2])
def test_marks_that_only_one_package_puts_in_order_are_found(tokenizer: Tokenizer, pre_tokenizer: dict[str, Any] | None) -> None:
    parts = {} if pre_tokenizer is None else {"pre_tokenizer": pre_tokenizer}
    normalized = changed(tokenizer, normalizer={"type": "NFC"}, **parts)
    documents = ["\U0001d169\U0001183a", "a\u0345\U0001183a b", "cafe\u0301 \u212b"]
    documents += [text for mark in NEW_MARKS for known in "\u1dc5\u0345\u0334" for text in (known + mark, f"a{known}{mark} {mark}{known}c")]
    assert lists(Gigatoken(normalized).encode_batch(documents[::-1])) == whole(normalized, documents[::-1])


def test_a_document_without_tokens_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stripped = changed(tokenizer, normalizer={"type": "Strip", "strip_left": True, "strip_right": True})
    plan = plan_of(tmp_path, stripped, ["  ", "word", " "])
    plan = replace(plan, settings=replace(plan.settings, append_eod=False, split=(1, 0, 0)))
    (tmp_path / "units").mkdir()
    record = write_unit(plan, 0, folder=tmp_path, encoder=stripped, on_error="stop", report=lambda _: None)
    assert record.shards["train"]["documents"] == 1 and record.shards["train"]["tokens"] == len(stripped.encode("word"))


def test_text_that_spells_a_special_token_does_not_become_it(tokenizer: Tokenizer) -> None:
    (ids,) = Gigatoken(tokenizer).encode_batch([f"a{EOD}b <|pad|>"])
    assert not {tokenizer.eod_id, tokenizer.pad_id} & set(ids.tolist()) and tokenizer.decode(ids) == f"a{EOD}b <|pad|>"


def plan_of(folder: Path, tokenizer: Tokenizer | ByteTokenizer, documents: Sequence[str] = ("some text",)) -> Plan:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return make_plan([str(folder / "a.jsonl")], Settings(tokenizer=tokenizer.identity()))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pre_tokenizer": BYTE_LEVEL}, r"gigatoken makes other ids than tokenizers: of a probe, at its token \d+, near "),
        ({"added_tokens": WORD}, "gigatoken makes other ids than tokenizers: of a spelled token"),
        ({"normalizer": {"type": "Lowercase"}}, r"gigatoken cannot read this tokenizer \(Unsupported normalizer type: Lowercase\)"),
    ],
)
def test_a_tokenizer_that_it_gets_wrong_is_refused(tmp_path: Path, tokenizer: Tokenizer, parts: dict[str, Any], message: str) -> None:
    if "added_tokens" in parts:
        parts = {"added_tokens": [*json.loads(tokenizer.to_json())["added_tokens"], parts["added_tokens"]]}
    wrong = changed(tokenizer, **parts)
    plan = plan_of(tmp_path, wrong)
    with pytest.raises(DataError, match=message + ".*choose --tokenizer-backend tokenizers"):
        choose_backend("gigatoken", wrong, plan)
    backend, reason = choose_backend("auto", wrong, plan)
    assert backend == "tokenizers" and reason.startswith("gigatoken ") and "choose" not in reason
    assert choose_backend("auto", tokenizer, plan) == choose_backend("gigatoken", tokenizer, plan) == ("gigatoken", "")
    assert choose_backend("tokenizers", tokenizer, plan) == ("tokenizers", "")


def test_a_difference_in_the_first_documents_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    wrong = changed(tokenizer, pre_tokenizer=BYTE_LEVEL)
    monkeypatch.setattr(backends, "_PROBES", ())
    monkeypatch.setattr(Tokenizer, "special_tokens", lambda _: [])
    assert choose_backend("gigatoken", wrong, plan_of(tmp_path, wrong, ["word"] * 31)) == ("gigatoken", "")
    with pytest.raises(DataError, match="of a document of the input, at its token"):
        choose_backend("gigatoken", wrong, plan_of(tmp_path, wrong, ["word"] * 31 + [ODD]))


def test_a_difference_that_comes_later_is_found_in_one_document_of_many(tokenizer: Tokenizer) -> None:
    for place, size in ((256, 300), (512, 100)):
        wrong = Gigatoken(changed(tokenizer, pre_tokenizer=BYTE_LEVEL))
        documents = ["word"] * 600
        documents[place - 1] = ODD  # not one that is compared
        for first in range(0, 600, size):
            wrong.encode_batch(documents[first : first + size])
        wrong = Gigatoken(changed(tokenizer, pre_tokenizer=BYTE_LEVEL))
        documents[place] = ODD
        with pytest.raises(DataError, match="gigatoken makes other ids.* and an empty --output if gigatoken has made units of this one"):
            for first in range(0, 600, size):
                wrong.encode_batch(documents[first : first + size])


def test_without_the_package_auto_takes_the_reference(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)  # what an import finds where a package is missing
    plan = plan_of(tmp_path, tokenizer)
    assert choose_backend("auto", tokenizer, plan) == ("tokenizers", "gigatoken is not installed")
    with pytest.raises(DataError, match="gigatoken is not installed; choose .* or pip install gigatoken"):
        choose_backend("gigatoken", tokenizer, plan)
    assert choose_backend("auto", ByteTokenizer(), plan) == ("tokenizers", "")
    with pytest.raises(DataError, match="gigatoken has no tokenizer `bytes`"):
        choose_backend("gigatoken", ByteTokenizer(), plan)


def test_first_documents_are_of_files_all_over_the_input(tmp_path: Path) -> None:
    for number in range(20):
        lines = [json.dumps({"text": f"{number}-{line} " + "x" * 400}) for line in range(100)]
        (tmp_path / f"{number:02}.jsonl").write_text("\n".join(["nonsense", *lines]))
    found = [text.split()[0] for text in first_documents(make_plan([str(tmp_path)], Settings(tokenizer=ByteTokenizer().identity())))]
    assert found == [f"{number}-{line}" for number in range(0, 20, 3) for line in range(32)]
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 200_000}))
    plan = make_plan([str(tmp_path / "long.jsonl")], Settings(tokenizer=ByteTokenizer().identity()))
    assert [len(text) for text in first_documents(plan)] == [1 << 15]


def test_memory_does_not_grow_with_the_words_seen(tokenizer: Tokenizer) -> None:
    fast, draw = Gigatoken(tokenizer), np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz       ", dtype=np.uint8)
    before = 0
    for _ in range(12):
        fast.encode_batch([letters[draw.integers(0, len(letters), 1 << 20)].tobytes().decode()])
        before = before or backends._resident_bytes()
    assert backends._resident_bytes() - before < 100 << 20  # 170 MiB where nothing is given back


def test_what_a_tokenizer_json_says_of_other_uses_is_switched_off(tokenizer: Tokenizer) -> None:
    short = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "x"}
    other = changed(tokenizer, truncation=short, padding=fill, model={"dropout": 0.9})
    text = ["What a tokenizer says of other uses, and drawn merges"]
    assert lists(other.encode_batch(text)) == whole(tokenizer, text) == lists(Gigatoken(other).encode_batch(text))
    assert other.identity() == tokenizer.identity()
