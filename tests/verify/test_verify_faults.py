"""Every fault that can be put in is found, by the name of the part that is wrong and the factor; what is right is not accused."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
from verify_runs import config, diagnose, groups, prepare

from megagate.errors import ConfigError
from megagate.verify.faults import FAULTS, check_fault
from megagate.verify.report import render, verdict

TP2_EP4, TP1_EP4, TP1_EP2, TP4_EP2, TP2_EP2 = (
    f"--parallel.tp {tp} --parallel.ep {ep}" for tp, ep in ((2, 4), (1, 4), (1, 2), (4, 2), (2, 2))
)
DENSE = "--model.moe.num_experts 0 --model.ffn_size 48"
DOCUMENTS = "--data.attention document"
AUX = "auxiliary losses"
ALL = frozenset({"embedding", "norms", "attention", "gate", "router", "experts", "head", AUX})


@dataclass(frozen=True)
class Case:
    """What the doctor has to say about a fault under a layout of 4 ranks.

    Args:
        fault: Its name.
        words: The layout.
        causes: Regular expressions, one for each cause.
        groups: Groups of parameters whose gradients are called wrong, and no others.
        outputs: The first part of the forward pass that is wrong; empty where none is.
        more: Other settings.
    """

    fault: str
    words: str
    causes: tuple[str, ...]
    groups: frozenset[str] = frozenset()
    outputs: str = ""
    more: str = ""

    def __str__(self) -> str:
        return f"{self.fault} {self.words} {self.more}".replace("--parallel.", "").replace("--precision.", "").strip()


def factor(ratio: str, *names: str, of: Iterable[str]) -> tuple[str, ...]:
    """`experts: gradients are 4.00 x the reference = ep = world`, all names in their order; for each group."""
    return tuple(re.escape(f"{what}: gradients are {ratio} x the reference{''.join(f' = {name}' for name in names)}") for what in of)


def differ(what: str, where: str) -> tuple[str, ...]:
    return (rf"{what}: gradients differ by \d\.\de[+-]\d\d (of its scale|x bf16's own rounding) in {re.escape(where)}",)


ROUTED = ("router", "experts", "auxiliary losses")
CASES = {
    "ep": Case("expert-gradients-times-ep", TP2_EP4, factor("4.00", "ep", "world", of=["experts"]), frozenset({"experts"})),
    "ep that is not dp": Case("expert-gradients-times-ep", TP1_EP2, factor("2.00", "ep", "edp", of=["experts"]), frozenset({"experts"})),
    "norm": Case("norm-without-sum", TP2_EP4, differ("norms", "layers.0.ffn_norm.weight"), frozenset({"norms"})),
    "aux": Case("aux-over-dp", TP1_EP4, factor("0.25", "1/dp", "1/ep", "1/world", of=[AUX]), frozenset({AUX})),
    "aux under tp": Case("aux-over-dp", TP2_EP4, factor("0.50", "1/tp", "1/dp", of=[AUX]), frozenset({AUX})),
    "tokens": Case("tokens-on-every-tp-rank", TP2_EP4, factor("2.00", "tp", "dp", of=ROUTED), frozenset(ROUTED)),
    "tokens, shared expert": Case(
        "tokens-on-every-tp-rank",
        f"{TP4_EP2} --model.moe.shared_ffn_size 48",
        factor("4.00", "tp", "world", of=ROUTED),
        frozenset(ROUTED),
    ),
    "vocabulary": Case(
        "wrong-vocabulary-shard", TP2_EP4, ("embedding: its output differs by .*, and all that follows with it",), ALL, "embedding"
    ),
    "in place": Case("in-place-collective", TP2_EP4, differ("attention", "layers.1.attention.o.weight"), frozenset({"attention"})),
    "clip norm": Case("norm-forgets-experts", TP2_EP4, (r"gradient norm, step 1: [\d.]+, expected [\d.]+ \(0\.99\d\d x\)",)),
    "borders": Case(
        "borders-missed", TP2_EP4, (r"layers\.0\.attention: its output differs by .*",), ALL, "layers.0.attention", DOCUMENTS
    ),
    "stale": Case("stale-weights", TP2_EP4, (r"weights in use: not its master in layers\.0\.ffn_norm\.weight .*",)),
    "dp": Case("gradients-over-dp", TP1_EP4, factor("0.25", "1/dp", "1/ep", "1/world", of=["all parameters"]), ALL),
    "dp under tp": Case("gradients-over-dp", TP2_EP2, factor("0.50", "1/tp", "1/dp", "1/ep", "1/edp", of=["all parameters"]), ALL),
}
OTHERWISE = [
    ("ep", "--parallel.zero_stage 3"),
    ("ep", "--parallel.zero_stage 2 --precision.dtype bf16"),
    ("norm", "--parallel.zero_stage 2"),
    ("norm", "--precision.dtype bf16"),
    ("aux", "--parallel.zero_stage 3 --precision.dtype bf16"),
    ("tokens", "--parallel.zero_stage 3"),
    ("tokens", "--precision.dtype bf16"),
    ("vocabulary", "--parallel.zero_stage 2 --precision.dtype bf16"),
    ("in place", "--parallel.zero_stage 2 --precision.dtype bf16 --train.recompute true"),
    ("clip norm", "--parallel.zero_stage 2"),
    ("borders", f"{DOCUMENTS} --parallel.zero_stage 3"),
    ("borders", f"{DOCUMENTS} --precision.dtype bf16 --train.recompute true"),
    ("dp", "--parallel.zero_stage 3 --precision.dtype bf16"),
    ("stale", "--parallel.zero_stage 3"),
]
"""Faults under other stages and in bf16: the same is found."""
ALL_CASES = [*CASES.values(), *(replace(CASES[name], more=more) for name, more in OTHERWISE)]


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_a_fault_is_found_by_its_part_and_its_factor(case: Case) -> None:
    words = f"nano {case.words} {case.more}"
    told = prepare(words, 4, fault=case.fault)
    found = diagnose(words, 4, fault=case.fault)
    text = render(told, found)
    assert len(found.causes) == len(case.causes), text
    for cause, pattern in zip(found.causes, case.causes, strict=True):
        assert re.fullmatch(pattern, cause), f"{cause}\nshould be\n{pattern}\n{text}"
    assert groups(found, ok=False) == case.groups, text
    assert [row.what for row in found.outputs if not row.ok][:1] == [case.outputs] * bool(case.outputs), text
    assert found.initial.ok
    assert verdict(told, found) == f"FAIL: {'; '.join(found.causes)}" == text.splitlines()[-1]
    assert f"with the fault {case.fault}" in text


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "hang"])
def test_every_fault_is_expected(name: str) -> None:
    """Under more than one layout, stage or precision."""
    assert len({case.words + case.more for case in ALL_CASES if case.fault == name}) > 1, "a new fault needs its cases"


def test_the_gradient_norm_in_bf16_is_held_against_the_very_gradients() -> None:
    """bf16's own rounding of the norm hides a few thousandths: what was clipped by is exact, whatever the precision."""
    found = diagnose(f"nano {TP2_EP4} --precision.dtype bf16 --parallel.zero_stage 2", 4, fault="norm-forgets-experts")
    (cause,) = found.causes
    assert re.fullmatch(r"norm of the gradients, step 1: [\d.]+, expected [\d.]+ \(0\.99\d\d x\)", cause)
    assert groups(found, ok=True) == ALL


# ---- faults that cannot show


@pytest.mark.parametrize("more", ["--parallel.zero_stage 3", "--precision.dtype bf16"])
def test_a_fault_without_effect_is_refused(more: str) -> None:
    """ZeRO-3 and DeepSpeed's bf16 optimizer sum the norm themselves: the mark that the fault takes away has no effect there."""
    with pytest.raises(ConfigError, match="--fault norm-forgets-experts changes nothing"):
        prepare(f"nano {TP2_EP4} {more}", 4, fault="norm-forgets-experts")


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_needs_more_than_one_rank(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--fault {name} needs more than one rank on the axis {FAULTS[name].axis}; "):
        check_fault(name, config("nano"), world_size=1)


@pytest.mark.parametrize("name", ["expert-gradients-times-ep", "aux-over-dp", "tokens-on-every-tp-rank", "norm-forgets-experts"])
def test_a_fault_of_experts_needs_experts(name: str) -> None:
    dense = config(f"nano {DENSE} --parallel.tp 2")
    sharded = replace(dense, parallel=replace(dense.parallel, ep=2))  # so that it is not for want of ranks
    with pytest.raises(ConfigError, match=f"--fault {name} needs a mixture of experts"):
        check_fault(name, sharded, world_size=4)


def test_a_fault_of_documents_needs_windows_cut_into_them() -> None:
    with pytest.raises(ConfigError, match="--fault borders-missed needs data.attention document, it is causal; set it"):
        prepare("nano --parallel.tp 2", 2, fault="borders-missed")


def test_an_unknown_fault_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        check_fault("gremlins", config("nano"), world_size=2)
    assert all(name in str(caught.value) for name in FAULTS)


def test_what_cannot_show_is_refused_before_any_rank_starts() -> None:
    """Rather than called found, or not found."""
    with pytest.raises(ConfigError, match="--fault norm-without-sum needs"):
        prepare("nano", 2, fault="norm-without-sum")
