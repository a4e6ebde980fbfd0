"""What of a recorded step is compared, to what tolerance, and what is said of the rest; the file it is in; the copy in host memory."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from megagate.checkpoint import staging
from megagate.checkpoint.certificate import (
    BF16,
    EXACT,
    FP32,
    NEXT_STEP_NAME,
    Circumstances,
    NextStep,
    Scope,
    compare,
    read_next_step,
    scope,
    tolerance,
    write_next_step,
)
from megagate.checkpoint.staging import HostCopy
from megagate.checkpoint.store import Piece
from megagate.config.keys import from_dict
from megagate.config.rules import changed_keys
from megagate.config.run import RunConfig
from megagate.errors import CheckpointError

HERE = Circumstances(
    dp=2,
    tp=1,
    ep=2,
    zero_stage=1,
    micro_step_samples=4,
    device="cpu",
    device_name="a CPU",
    dtype="fp32",
    grad_dtype="fp32",
    torch="2.13.0",
    threads=1,
)
MOVED = {"master/a.weight": 3.0, "master/b.weight": 4.0, "exp_avg/a.weight": 0.25}
STEP = NextStep(
    step=11,
    tokens="0123456789abcdef",
    loss=2.5,
    grad_norm=1.5,
    lr=1e-3,
    applied=True,
    updates=MOVED,
    bits=dict.fromkeys(MOVED, "0" * 16),
    circumstances=HERE,
)
ELSEWHERE = replace(HERE, tp=2, dp=1)
MOE = {"model": {"moe": {"num_experts": 8, "balance_coef": 0.01, "balance_scope": "global_batch"}}}


def differing(change: dict[str, object], *, there: NextStep = STEP, what: Scope = Scope()) -> str | None:  # noqa: B008
    return compare(there, replace(there, **change), what)[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": "f" * 16}, "its tokens"),
        ({"loss": math.nextafter(2.5, 3)}, "the loss is"),
        ({"loss": math.nan}, "the loss is nan"),
        ({"grad_norm": math.nextafter(1.5, 2)}, "the gradient norm is"),
        ({"updates": MOVED | {"exp_avg/a.weight": math.nextafter(0.25, 1)}}, "the update of exp_avg/a.weight is"),
        ({"updates": {"master/a.weight": 3.0, "master/b.weight": 4.0}}, "the update of exp_avg/a.weight is nan"),
        ({"bits": dict.fromkeys(MOVED, "0" * 16) | {"exp_avg/a.weight": "1"}}, "exp_avg/a.weight ends with other bits"),
        ({"loss": 9.0, "grad_norm": 9.0, "updates": MOVED | {"master/b.weight": 5.0}}, "the loss is 9.0, 2.5 was recorded"),
    ],
)
def test_in_the_same_circumstances_every_bit_counts(change: dict[str, object], named: str) -> None:
    assert differing({}) is None
    difference = differing(change)
    assert difference is not None and difference.startswith(named)


def test_the_worst_update_is_named_behind_what_differs_first() -> None:
    difference = differing({"loss": 2.6, "updates": {"master/a.weight": 3.1, "master/b.weight": 8.0, "exp_avg/a.weight": 0.25}})
    assert difference is not None and difference.endswith("; it is most visible in the update of master/b.weight, by 50 %")
    gone = differing({"loss": 2.6, "updates": {}})
    assert gone is not None and gone.endswith("; it is most visible in the update of exp_avg/a.weight")
    alike = differing({"loss": 2.6})
    assert alike is not None and alike.endswith("; the updates of all tensors agree")


def test_of_the_very_state_that_was_saved_the_step_is_said_to_differ() -> None:
    difference, _ = compare(STEP, replace(STEP, loss=2.6), Scope(), same_state=True)
    assert difference is not None
    assert difference.startswith("the step differs, though it began with the very state that was saved: the loss is 2.6, 2.5 was recorded")
    assert compare(STEP, STEP, Scope(), same_state=True) == (None, [])


def test_another_learning_rate_leaves_moments_compared() -> None:
    what = scoped({}, lr=2e-3)
    moved = {name: 2 * norm if name.startswith("master/") else norm for name, norm in MOVED.items()}
    bits = {name: "1" if name.startswith("master/") else "0" * 16 for name in MOVED}
    assert differing({"updates": moved, "bits": bits}, what=what) is None
    stale = differing({"updates": moved | {"exp_avg/a.weight": 0.3}, "bits": bits}, what=what)
    assert stale is not None and stale.startswith("the update of exp_avg/a.weight is 0.3, 0.25 was recorded")
    other = differing({"updates": moved, "bits": bits | {"exp_avg/a.weight": "1"}}, what=what)
    assert other is not None and other.startswith("exp_avg/a.weight ends with other bits")


@pytest.mark.parametrize(
    ("key", "other"),
    [
        *[("dp", 4), ("tp", 2), ("ep", 1), ("zero_stage", 2), ("micro_step_samples", 2)],
        *[("device_name", "another"), ("torch", "2.14.0"), ("threads", 2), ("optimizer", "apex"), ("norm", "apex")],
    ],
)
def test_elsewhere_numbers_agree_to_rounding(key: str, other: object) -> None:
    assert tolerance(HERE, HERE) == EXACT and tolerance(HERE, replace(HERE, **{key: other})) == FP32
    there = replace(STEP, circumstances=replace(HERE, **{key: other}))
    for name, limit in (("loss", FP32.loss), ("grad_norm", FP32.grad_norm)):
        value = getattr(STEP, name)
        assert compare(there, replace(STEP, **{name: value * (1 + 0.9 * limit)}), Scope())[0] is None
        assert compare(there, replace(STEP, **{name: value * (1 + 1.1 * limit)}), Scope())[0] is not None
    assert compare(there, replace(STEP, bits=dict.fromkeys(MOVED, "f" * 16)), Scope())[0] is None
    for share, agrees in ((0.9, True), (1.1, False)):  # of the smaller of two masters: the norm of both is not the first to differ
        updates = MOVED | {"exp_avg/a.weight": 0.25 * (1 + share * FP32.update)}
        assert (compare(there, replace(STEP, updates=updates), Scope())[0] is None) == agrees


def test_other_kernels_are_the_same_run_and_leave_everything_compared() -> None:
    changes = {"optim": {"implementation": "te"}, "precision": {"norm": "apex"}}
    assert changed_keys(from_dict(MOE), from_dict({**MOE, **changes})) == []
    assert scoped(changes) == Scope()


def test_the_whole_update_is_held_to_more_than_each() -> None:
    there = replace(STEP, circumstances=ELSEWHERE)
    updates = {name: norm * (1 + 5 * FP32.update_norm) for name, norm in MOVED.items()}
    difference, _ = compare(there, replace(STEP, updates=updates), Scope())
    assert difference is not None and difference.startswith("the norm of the whole update is 5.000")


def test_gpus_and_bf16_are_never_held_to_bits() -> None:
    gpu = replace(HERE, device="cuda", device_name="a GPU")
    assert tolerance(gpu, gpu) == FP32
    bf16 = replace(HERE, dtype="bf16")
    fp8 = replace(HERE, fp8="current")  # whose scales are of a rank's part: the gradient norm of nano differs by 7e-4 between layouts
    assert tolerance(fp8, fp8) == EXACT and tolerance(fp8, replace(fp8, tp=2)) == BF16
    assert tolerance(bf16, bf16) == EXACT and tolerance(bf16, ELSEWHERE) == tolerance(bf16, replace(bf16, tp=2)) == BF16


def scoped(changes: dict[str, object], *, recorded: NextStep = STEP, now: Circumstances = HERE, lr: float = 1e-3) -> Scope:
    return scope(recorded, now, there=from_dict(MOE), here=from_dict({**MOE, **changes}), lr=lr)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 7),
        ("schedule.kind", "constant"),
        ("optim.lr", 0.5),
        ("parallel.tp", 2),
        ("checkpoint.every", 3),
        ("checkpoint.on_mismatch", "continue"),
        ("eval.every", 5),
        ("log.every", 5),
        ("observe.every", 7),
        ("wandb.mode", "offline"),
        ("profile.steps", 2),
        ("train.output_dir", "elsewhere"),
        ("train.resume", "path"),
        ("train.recompute", True),
    ],
)
def test_keys_that_change_no_number_leave_nothing_out(key: str, value: object) -> None:
    assert scoped({key: value}) == Scope()


def test_what_cannot_be_compared_is_named_with_its_reason() -> None:
    assert scoped({}, lr=2e-3).unchecked == ["the updates of the masters: the learning rate of step 11 is 0.002 now and was 0.001"]
    assert scoped({"optim.beta2": 0.5}).unchecked == ["the updates: the config changed (optim.beta2)"]
    (all_of_it,) = scoped({"data.attention": "document"}).unchecked
    assert all_of_it == "the loss and the gradient norm and the updates: the config changed (data.attention)"
    (skipped,) = scoped({}, recorded=replace(STEP, applied=False)).unchecked
    assert "step 11 was skipped there" in skipped
    (overflown,) = scoped({}, recorded=replace(STEP, loss=math.nan)).unchecked
    assert "step 11 was skipped there" in overflown


def test_other_micro_steps_change_the_gradients_of_a_balanced_mixture_alone() -> None:
    other = replace(HERE, micro_step_samples=2)
    (sentence,) = scoped({}, now=other).unchecked
    assert sentence.startswith("the gradient norm and the updates: the balance loss counts experts over micro-steps of 2 samples")
    unbalanced = from_dict({"model": {"moe": {"num_experts": 8, "balance_coef": 0.0}}})
    for config in (unbalanced, from_dict({"model": {"moe": MOE["model"]["moe"] | {"balance_scope": "sequence"}}}), RunConfig()):
        assert scope(STEP, other, there=config, here=config, lr=1e-3) == Scope()


def test_other_tokens_are_an_error_unless_the_data_changed() -> None:
    found = replace(STEP, tokens="f" * 16, loss=9.0)
    assert compare(STEP, found, scoped({"data.path": "elsewhere"})) == (None, ["nothing of it: it has other tokens, as data.path changed"])
    difference, _ = compare(STEP, replace(STEP, loss=9.0), scoped({"data.path": "moved"}))
    assert difference is not None and "the loss is" in difference, "the same tokens in another place are compared"


def test_the_file_and_back(tmp_path: Path) -> None:
    assert read_next_step(tmp_path) is None
    write_next_step(tmp_path, STEP)
    assert read_next_step(tmp_path) == STEP
    write_next_step(tmp_path, replace(STEP, loss=math.nan, grad_norm=math.inf, applied=False, updates={}))
    content = json.loads((tmp_path / NEXT_STEP_NAME).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["content"]["loss"] is None
    found = read_next_step(tmp_path)
    assert found is not None and math.isnan(found.loss) and not found.applied


@pytest.mark.parametrize("damage", ["2.5", '"step"', '"digest"', "}"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    write_next_step(tmp_path, STEP)
    path = tmp_path / NEXT_STEP_NAME
    content = path.read_text()
    assert damage in content
    path.write_text(content.replace(damage, damage[:-1] + "7", 1))
    with pytest.raises(CheckpointError, match="is damaged or was edited"):
        read_next_step(tmp_path)


def sealed(values: dict[str, object]) -> bytes:
    return json.dumps({"digest": blake3(json.dumps(values, sort_keys=True).encode()).hexdigest(), "content": values}).encode()


def test_a_sound_file_of_another_version_is_not_called_damaged(tmp_path: Path) -> None:
    write_next_step(tmp_path, STEP)
    path = tmp_path / NEXT_STEP_NAME
    values = json.loads(path.read_text())["content"]
    around = values["circumstances"]
    path.write_bytes(sealed({**values, "router_entropy": 1.0, "circumstances": {**around, "cuda": "13"}}))
    assert read_next_step(tmp_path) == STEP, "a later one may record more"
    for key in ("optimizer", "norm"):  # an earlier one had but PyTorch's
        del around[key]
    path.write_bytes(sealed(values))
    assert read_next_step(tmp_path) == STEP
    del around["threads"]
    for changed, missing in (
        (values, "circumstances.threads"),
        ({key: one for key, one in values.items() if key not in ("lr", "circumstances")}, "lr, circumstances"),
    ):
        path.write_bytes(sealed(changed))
        with pytest.raises(CheckpointError, match=f"does not record {missing}, so another version of megagate wrote it"):
            read_next_step(tmp_path)


def test_the_copy_reuses_its_memory() -> None:
    """Of tensors of several dtypes, and of strided and empty ones; a later copy may be larger."""
    base = torch.arange(24.0).view(4, 6)
    pieces = [Piece("a", (4, 6), (0, 0), base[:, ::2]), Piece("a", (4, 6), (0, 3), base[:, 1::2]), Piece("n", (), (), torch.tensor(7))]
    pieces.append(Piece("none", (0, 2), (0, 0), torch.zeros(0, 2)))
    copy = HostCopy()
    copy.take(pieces)
    first = copy.find("a", (0, 0))
    assert [(piece.name, piece.offset, piece.tensor.tolist()) for piece in copy.pieces] == [
        (piece.name, piece.offset, piece.tensor.tolist()) for piece in pieces
    ]
    assert first is not None and first.data_ptr() != base.data_ptr()
    base += 100
    assert copy.pieces[0].tensor.tolist() == (base[:, ::2] - 100).tolist(), "training goes on"
    copy.take(pieces)
    again = copy.find("a", (0, 0))
    assert again is not None and again.data_ptr() == first.data_ptr() and again.tolist() == base[:, ::2].tolist()
    copy.take([*pieces, Piece("b", (8, 8), (0, 0), torch.ones(8, 8))])
    assert copy.find("b", (0, 0)) is not None and copy.find("b", (4, 0)) is None


def test_the_copy_takes_what_is_copied_in_buffers_that_are_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that is larger than a buffer has one of its own, whose end others use; and all bytes arrive, wherever they lie."""
    monkeypatch.setattr(staging, "BLOCK_BYTES", 1024)
    sizes = [700, 4, 0, 5000, 300, 1, 64, 3000, 1024]
    places, used = staging.place(sizes)
    assert used == [8192, 1024, 1024, 64]
    taken = sorted((block, start, start + size) for (block, start), size in zip(places, sizes, strict=True))
    assert all(start % 64 == 0 and end <= used[block] for block, start, end in taken)
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(taken)), "none lies in another"
    assert staging.place([10_000, 9_000, 8_000, 384] + [1024] * 5)[1] == [15_552, 9_024, 8_000]
    copy, dtypes = HostCopy(), (torch.float32, torch.uint8, torch.bfloat16, torch.int64)
    for factor in (1, 3, 2):  # buffers grow, and are kept when less is copied
        pieces = [Piece(f"{i}", (40 * i * factor,), (0,), torch.arange(40 * i * factor).to(dtypes[i % 4])) for i in range(9)]
        copy.take(pieces)
        assert len(copy.pieces) == 9 and all(torch.equal(piece.tensor, copy.find(piece.name, (0,))) for piece in pieces)
