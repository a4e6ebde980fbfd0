"""Pieces of many ranks against whole tensors: what counts as agreement, and what must not go unnoticed."""

import math

import pytest
import torch
from torch import Tensor

from megagate.checkpoint.store import Piece
from megagate.verify.compare import Agreement, compare, whole_tensors

A = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -8.0]])
B = torch.tensor([0.5, 0.25, -1.0])


def piece(name: str, whole: Tensor, rows: slice = slice(None), *, add: float = 0.0, times: float = 1.0) -> Piece:
    """Rows of a tensor, as a rank holds them."""
    return Piece(f"kind/{name}", tuple(whole.shape), (rows.start or 0, *[0] * (whole.dim() - 1)), whole[rows] * times + add)


def one(actual: Tensor, expected: Tensor) -> Agreement:
    return compare([piece("a", actual)], {"a": expected})["a"]


# ---- one tensor


def test_equal_tensors_agree() -> None:
    found = one(A, A)
    assert (found.ratio, found.distance, found.worst) == (1.0, 0.0, 0.0)
    assert found.is_multiple(1e-9)


@pytest.mark.parametrize("factor", [0.25, 2.0, 4.0, -1.0])
def test_a_constant_factor_is_found(factor: float) -> None:
    found = one(factor * A, A)
    assert found.ratio == pytest.approx(factor)
    assert found.is_multiple(1e-6)
    assert found.distance == pytest.approx(abs(factor - 1))
    assert found.worst == pytest.approx(abs(factor - 1)), "the largest element differs the most"


def test_one_wrong_element_is_no_factor() -> None:
    wrong = A.clone()
    wrong[0, 0] += 2.0
    found = one(wrong, A)
    assert found.worst == pytest.approx(2.0 / 8.0), "as a share of the largest expected element"
    assert found.distance == pytest.approx(2.0 / A.norm().item())
    assert not found.is_multiple(1e-2)
    assert found.is_multiple(0.5), "coarsely it is"


def test_the_part_that_is_no_multiple_is_measured_by_its_length() -> None:
    across = torch.zeros_like(A)
    across[0] = torch.tensor([2.0, 1.0, 0.0])  # orthogonal to A
    rest = 0.1 * A.norm() * across / across.norm()
    found = one(2 * A + rest, A)
    assert found.ratio == pytest.approx(2.0)
    share = 0.1 / math.hypot(2.0, 0.1)
    assert found.is_multiple(1.01 * share) and not found.is_multiple(0.99 * share)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_agrees(value: float) -> None:
    wrong = A.clone()
    wrong[1, 1] = value
    found = one(wrong, A)
    assert not found.worst <= 1e9 and not found.distance <= 1e9
    assert not found.is_multiple(1e9)


def test_nothing_expected() -> None:
    zero = torch.zeros_like(A)
    same, other = one(zero, zero), one(A, zero)
    assert math.isnan(same.ratio) and (same.distance, same.worst) == (0.0, 0.0)
    assert math.isnan(other.ratio) and (other.distance, other.worst) == (math.inf, math.inf)
    assert not same.is_multiple(1.0) and not other.is_multiple(1.0)
    missing = one(zero, A)
    assert (missing.ratio, missing.distance, missing.worst) == (0.0, 1.0, 1.0)
    assert not missing.is_multiple(1.0), "nothing at all is not called 0 x"


def test_a_scale_from_outside_counts_where_it_is_larger() -> None:
    off = [piece("a", A, add=0.08)]
    assert compare(off, {"a": A})["a"].worst == pytest.approx(0.01)
    assert compare(off, {"a": A}, scales={"a": 80.0})["a"].worst == pytest.approx(0.001)
    assert compare(off, {"a": A}, scales={"a": 1.0, "b": 9.0})["a"].worst == pytest.approx(0.01), "only where it is larger"
    assert compare([piece("a", B)], {"a": 0 * B}, scales={"a": 10.0})["a"].worst == pytest.approx(0.1), "also of nothing"


def test_bf16_is_compared_with_fp32() -> None:
    exact = torch.tensor([1.0, 1.0 + 2**-10])
    found = compare([Piece("kind/a", (2,), (0,), exact.bfloat16())], {"a": exact})["a"]
    assert found.worst == pytest.approx(2**-10, rel=1e-2)


# ---- groups


def test_a_group_keeps_sums_and_the_worst() -> None:
    group = Agreement()
    for agreement in compare([piece("b", B, times=1.5), piece("a", A)], {"a": A, "b": B}).values():
        group.add(agreement)
    assert group.worst == pytest.approx(0.5) and group.where == "b"
    a, b = A.square().sum().item(), B.square().sum().item()
    assert group.ratio == pytest.approx((a + 1.5 * b) / (a + b))
    assert group.distance == pytest.approx(math.sqrt(0.25 * b / (a + b)))
    assert not group.is_multiple(1e-3)


def test_scales_are_each_tensor_s_own() -> None:
    small = {"a": 1000 * A, "b": 1e-3 * B}
    found = compare([piece("a", small["a"]), piece("b", small["b"], times=1.01)], small)
    assert found["b"].worst == pytest.approx(0.01, rel=1e-4) and found["a"].worst == 0.0


@pytest.mark.parametrize("first", [True, False])
def test_nan_is_the_worst_whatever_comes_before_or_after(first: bool) -> None:
    bad, large = Agreement(worst=math.nan, where="bad"), Agreement(worst=1e9, where="large")
    group = Agreement()
    for agreement in (bad, large) if first else (large, bad):
        group.add(agreement)
    assert math.isnan(group.worst) and group.where == "bad"


# ---- pieces of ranks


def test_pieces_are_compared_at_their_places() -> None:
    halves = [piece("a", A, slice(1, 2)), piece("a", A, slice(0, 1))]
    assert compare(halves, {"a": A})["a"].worst == 0.0
    swapped = [Piece("kind/a", (2, 3), (0, 0), A[1:]), Piece("kind/a", (2, 3), (1, 0), A[:1])]
    assert compare(swapped, {"a": A})["a"].worst == pytest.approx(11.0 / 8.0)


def test_columns_have_places_too() -> None:
    columns = [Piece("kind/a", (2, 3), (0, start), A[:, start : start + 1]) for start in range(3)]
    assert compare(columns, {"a": A})["a"].worst == 0.0
    assert compare(columns[:2], {"a": A})["a"].worst == math.inf


@pytest.mark.parametrize("wrong", range(3))
def test_every_copy_counts(wrong: int) -> None:
    copies = [piece("a", A, add=1.0 if number == wrong else 0.0) for number in range(3)]
    found = compare(copies, {"a": A})["a"]
    assert found.worst == pytest.approx(1.0 / 8.0)
    assert found.distance == pytest.approx(math.sqrt(A.numel() / (3 * A.square().sum().item())))


def test_elements_that_no_rank_has_do_not_agree() -> None:
    found = compare([piece("a", A, slice(0, 1)), piece("b", B)], {"a": A, "b": B, "c": B})
    assert found["a"].worst == math.inf and found["a"].where == "a"
    assert found["b"].worst == 0.0
    assert found["c"].worst == math.inf, "nor does a tensor that no rank has"


def test_a_tensor_that_is_not_expected_is_an_error() -> None:
    with pytest.raises(KeyError):
        compare([piece("b", B)], {"a": A})


def test_wholes_are_put_together() -> None:
    wholes = whole_tensors([piece("a", A, slice(1, 2)), piece("b", B), piece("a", A, slice(0, 1)), piece("a", A, slice(0, 1))])
    assert list(wholes) == ["a", "b"]
    assert torch.equal(wholes["a"], A) and torch.equal(wholes["b"], B)


def test_a_hole_in_a_whole_is_nan() -> None:
    whole = whole_tensors([piece("a", A, slice(1, 2))])["a"]
    assert whole[0].isnan().all() and torch.equal(whole[1], A[1])
