"""The texts of `data.path` and `data.valid`: what they say, and what is refused before anything starts."""

import contextlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagate.config.blend_text import (
    MOST_MEMBERS,
    PERIOD,
    BlendText,
    Weights,
    parse_blend,
    parse_valid,
    quotas_of,
    require_rising,
)
from megagate.config.cli import parse
from megagate.config.rules import check
from megagate.config.run import DataConfig, LogConfig
from megagate.errors import ConfigError

NANO = Path(__file__).parents[2] / "examples" / "configs" / "nano.yaml"


def fractions(*weights: float | str) -> tuple[Fraction, ...]:
    return tuple(Fraction(weight) for weight in weights)


def test_a_path_is_one_data_set_and_numbers_make_a_blend() -> None:
    for path in ("embedded", "/data/my set", "0123", "/data/it's here", "a 0.5 b", "0.7", "nan /a", "1/2 /a", "-1 /a"):
        assert parse_blend(path) == BlendText((path,), (Weights(0, (Fraction(1),)),))
    found = parse_blend("0.7 /data/a\n .3 '/data/b b'  from 1000 1e-1 /data/c 5 /data/a")
    assert found.paths == ("/data/a", "/data/b b", "/data/c")
    assert found.weights == (Weights(0, fractions("0.7", "0.3", 0)), Weights(1000, fractions(5, 0, "0.1")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.7 /a 0.3", r"`0.3` \(word 3\) is no weight with its folder; write WEIGHT FOLDER"),
        ("0.7 /a /b 0.3", r"`/b 0.3` \(word 3\) is no weight"),
        ("0.7 /a -0.3 /b", r"`-0.3 /b` \(word 3\) is no weight"),
        ("0.7 /a 1e999999999 /b", r"`1e999999999 /b` \(word 3\) is no weight"),
        ("0.7 /a 0.3 /a", "/a is named twice under one set of weights"),
        ("0.7 /a from 10", "no weights follow `from 10`"),
        ("0.7 /a from x 1 /b", r"`from x` \(word 3\) must name a number of samples"),
        ("0.7 /a from 5 from 6 1 /b", r"`from 6` \(word 5\) must name a number of samples, after weights"),
        ("0.7 /a from 1" + "0" * 5_000 + " 1 /b", r"`from 10*` \(word 3\) must name a number of samples"),
        ("0.7 '/a", "cannot be cut into words .*; close the quotes"),
        ("0 /a 0 /b", r"weights \(0 0\) must be 0 or more, and one above 0"),
        ("1 /a from 5 1 /b from 5 1 /c", r"weights count from samples \[0, 5, 5\]"),
        ("1 /a 0.00001 /b", "weight 1e-05 of 1.00001 in all is too small"),
    ],
)
def test_a_blend_of_another_form_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"data.path: .*{message}"):
        parse_blend(text)


@pytest.mark.parametrize("text", ["/data/a", "a=", "=/data/a", "a/b=/data/a"])
def test_a_validation_set_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="data.valid: .* must be NAME=FOLDER"):
        parse_valid(text)
    assert parse_valid("a=/x b='/y z=1'") == {"a": "/x", "b": "/y z=1"}
    with pytest.raises(ConfigError, match="data.valid: a names two validation sets"):
        parse_valid("a=/x a=/y")


def test_quotas_are_rounded_by_largest_remainder() -> None:
    assert quotas_of(fractions("0.7", "0.3")) == [11469, 4915]  # 11468.8 and 4915.2
    assert quotas_of(fractions(1, 1, 1)) == [5462, 5461, 5461]
    assert quotas_of(fractions(70, 0, 30)) == [11469, 0, 4915]
    weights = [Fraction(member**2, 7) for member in range(1, 41)]
    quotas, total = quotas_of(weights), sum(weights)
    assert sum(quotas) == PERIOD
    assert max(abs(quota - weight * PERIOD / total) for quota, weight in zip(quotas, weights, strict=True)) < 1


def test_weights_that_make_no_period_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.path: weights \(0 0\) must be 0 or more, and one above 0; change them"):
        quotas_of(fractions(0, 0))
    with pytest.raises(ConfigError, match=r"weights \(-0.1 1\) must be 0 or more"):
        quotas_of(fractions("-0.1", 1))
    with pytest.raises(ConfigError, match=r"weight 1e-05 of 1 in all is too small: it must be at least 1/16384 of the sum .*; raise it"):
        quotas_of(fractions("0.99999", "0.00001"))


def test_as_many_data_sets_as_the_proof_covers() -> None:
    assert len(quotas_of([Fraction(1)] * MOST_MEMBERS)) == MOST_MEMBERS
    with pytest.raises(ConfigError, match="data.path: 2001 data sets under one set of weights must be at most 2000, .*; merge some"):
        quotas_of([Fraction(0), *[Fraction(1)] * (MOST_MEMBERS + 1)])


@pytest.mark.parametrize("firsts", [(1,), (0, 0), (0, 9, 5), (0, 1 << 61)])
def test_samples_that_do_not_rise_are_refused(firsts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"data.path: weights count from samples \[.*\]; these must begin with 0, rise"):
        require_rising(firsts)


WORDS = ["from", "1", "0.5", "1e-5", "0", "/a", "/b", "'", "-1", "9" * 5_000, "1e99", "=", "a=/b", "embedded", " "]


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join) | st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (parse_blend, parse_valid):
        with contextlib.suppress(ConfigError):
            read(text)


def test_the_rules_refuse_what_cannot_be_read_with_all_else() -> None:
    nano = parse(["--config", str(NANO)], prog="test")
    bad = replace(nano, data=DataConfig(path="0.5 /a 0.5", valid="/b"), log=LogConfig(every=0))
    with pytest.raises(ConfigError) as caught:
        check(bad, world_size=1)
    found = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in found] == ["log.every", "data.path:", "data.valid:"]
