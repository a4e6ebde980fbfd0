"""Whatever happens to a state between the memory it is saved from and the memory it is loaded to is refused, with the tensor's name."""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ranks
import torch
from certified import RUN, SAVED, Change, resume, saver_of, step, write
from parity.engines import Layout, Run, build_engine
from test_train_certificate import (
    DP2_EP2,
    EXPERTS,
    TP2_EP4,
    WEIGHT,
    flip_a_bit_of_next_to_nothing,
    flip_a_low_bit,
    flip_one_bit,
    keep_a_moment_stale,
    name_the_first_moment_of_another,
    swap_moments_of_two_experts,
    swap_two_experts,
)
from torch import Tensor

from megagate.checkpoint import store
from megagate.checkpoint.fingerprint import digits, piece_sum
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.engine import base
from megagate.errors import CheckpointError
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.train import fingerprints

BF16 = Run(optimizer="adamw", dtype="bf16")
BIASED = Run(optimizer="adamw", bias_update_rate=0.1)
ZERO_3 = Layout(2, tp=2, ep=2, zero_stage=3)
EXPERTS_DOWN = EXPERTS[1]
SUMS, READ_FLAT, WRITE_RANK = fingerprints.sums, base.read_flat, store.write_rank


def flip_the_generator(tensors: dict[str, Tensor]) -> None:
    tensors["rng/cpu"][1000] ^= 1


DAMAGE: dict[Change, tuple[str, int]] = {
    flip_one_bit: (f"master/{WEIGHT}", 0),
    flip_a_low_bit: (f"master/{WEIGHT}", 0),
    flip_a_bit_of_next_to_nothing: ("exp_avg_sq/embedding.weight", 0),
    swap_two_experts: (f"exp_avg/{EXPERTS_DOWN}", 5),
    swap_moments_of_two_experts: (f"exp_avg/{EXPERTS_DOWN}", 3),
    keep_a_moment_stale: (f"exp_avg_sq/{WEIGHT}", 0),
    name_the_first_moment_of_another: (f"exp_avg/{WEIGHT}", 0),
    flip_the_generator: ("rng/cpu", 0),
}
"""What is done to the copy of a state, the tensor that a refusal names, and how many others differ."""


def refused(error: str, name: str, others: int = 0) -> bool:
    """Whether the refusal names just that tensor, tells how many others differ, and ends with the remedies."""
    begins = error.startswith(f"{name}, as loaded from ") and "is not what was saved: its fingerprint is " in error
    return begins and (f"; {others} other tensors differ too" in error) == bool(others) and error.endswith("on_mismatch continue")


def why(root: Path, layout: Layout = Layout(), run: Run = RUN, **settings: Any) -> str:  # noqa: B008
    try:
        resume(root, layout, run=run, **settings)
    except CheckpointError as error:
        return str(error)
    return ""


def why_in_ranks(context: RankContext, root: Path, layout: Layout, run: Run) -> str:
    return why(root, layout, run)


def fingerprint_of(root: Path) -> dict[str, str]:
    with Checkpoint.open(store.step_path(root, SAVED)) as checkpoint:
        return checkpoint.metadata["fingerprint"]


@pytest.mark.parametrize("run", [RUN, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_in_the_copy_is_named(tmp_path: Path, damage: Change, run: Run) -> None:
    write(tmp_path, run=run, change=damage)
    with Checkpoint.open(store.step_path(tmp_path, SAVED)) as checkpoint:
        assert checkpoint.verify(), "its digests are sound"
    assert refused(why(tmp_path, run=run), *DAMAGE[damage])


@pytest.mark.parametrize(("run", "layout"), [(RUN, TP2_EP4), (BF16, DP2_EP2), (BF16, ZERO_3)], ids=["fp32", "bf16", "bf16-zero3"])
def test_at_another_layout_as_well(tmp_path: Path, run: Run, layout: Layout) -> None:
    """In bf16 the step itself shows neither."""
    for damage in (keep_a_moment_stale, swap_moments_of_two_experts):
        root = tmp_path / damage.__name__
        write(root, run=run, change=damage)
        found = ranks.run_ranks(why_in_ranks, layout.world_size, root, layout, run)
        assert len(set(found)) == 1 and refused(found[0], *DAMAGE[damage])


def of_all_elements(root: Path) -> dict[str, str]:
    """By one process, of the whole tensors in the files."""
    with Checkpoint.open(store.step_path(root, SAVED)) as checkpoint:
        whole = {name: checkpoint.read_whole(name) for name in checkpoint.tensors}
    return {name: digits(int(piece_sum(tensor, (0,) * tensor.dim()))) for name, tensor in whole.items()}


def flip_in_the_second_rank(tensors: dict[str, Tensor]) -> None:
    if torch.distributed.get_rank() == 1:
        tensors[f"exp_avg/{EXPERTS_DOWN}"].view(torch.int32).view(-1)[5] ^= 1


def write_late(context: RankContext, root: Path, layout: Layout, run: Run) -> None:
    """The thread begins when the next forward and backward passes are over."""
    with patch.object(fingerprints, "sums", late_sums):
        write(root, layout, run=run)


def late_sums(pieces: Iterable[Piece], names: list[str]) -> Tensor:
    pieces = list(pieces)
    time.sleep(0.3)
    return SUMS(pieces, names)


def write_damaged(context: RankContext, root: Path, layout: Layout, run: Run) -> None:
    write(root, layout, run=run, change=flip_in_the_second_rank)


@pytest.mark.parametrize("layout", [DP2_EP2, ZERO_3], ids=str)
def test_ranks_take_that_of_the_whole_tensors_before_the_optimizer_moves_them(tmp_path: Path, layout: Layout) -> None:
    run = replace(BIASED, dtype="bf16")
    ranks.run_ranks(write_late, 2, tmp_path / "sound", layout, run)
    assert fingerprint_of(tmp_path / "sound") == of_all_elements(tmp_path / "sound")
    assert any(name.startswith("state/") for name in fingerprint_of(tmp_path / "sound"))
    assert why(tmp_path / "sound", run=run) == ""
    ranks.run_ranks(write_damaged, 2, tmp_path / "damaged", layout, run)
    assert refused(why(tmp_path / "damaged", run=run), f"exp_avg/{EXPERTS_DOWN}")


def test_the_optimizer_of_one_process_waits_too(tmp_path: Path) -> None:
    with patch.object(fingerprints, "sums", late_sums):
        write(tmp_path, run=BIASED)
    assert fingerprint_of(tmp_path) == of_all_elements(tmp_path)
    assert why(tmp_path, run=BIASED) == ""


def test_a_rank_that_ends_by_a_bug_lets_it_come_to_its_end(tmp_path: Path) -> None:
    engine = build_engine(RUN, Layout(), ParallelMesh.single())
    saver = saver_of(engine, tmp_path)
    step(engine, saver, 1)
    with patch.object(fingerprints, "sums", late_sums):
        saver.save(engine, step=1, best_val_loss=None)
        assert saver._flight is not None and not saver._flight.fingerprint.task.done
        saver.abandon()
        assert saver._flight.fingerprint.task.done


def test_a_save_at_a_signal_is_held_to_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No step followed it: all that can tell what the writer loses."""

    def lossy(directory: Path, rank: int, pieces: Iterable[Piece]) -> None:
        held = [replace(piece, tensor=piece.tensor.clone()) for piece in pieces]
        flip_a_low_bit({piece.name: piece.tensor for piece in held})
        WRITE_RANK(directory, rank, held)

    with patch.object(store, "write_rank", lossy):
        write(tmp_path / "a", last=True, further=0)
    assert refused(why(tmp_path / "a"), f"master/{WEIGHT}")
    write(tmp_path / "b", last=True, further=0)
    with caplog.at_level(logging.INFO, "megagate"):
        assert why(tmp_path / "b") == ""
    assert "the loaded state is the one that was saved" in caplog.text and "NOT CHECKED by doing the next step again" in caplog.text


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    write(root)
    return root


def read_permuted(checkpoint: Checkpoint, name: str, *, flat: Tensor, **where: Any) -> None:
    READ_FLAT(checkpoint, name, **where, flat=flat)
    if name == f"exp_avg_sq/{WEIGHT}":
        flat.copy_(flat.roll(1))


def test_a_permutation_within_a_tensor_is_named(sound: Path) -> None:
    with patch.object(base, "read_flat", read_permuted):
        assert refused(why(sound), f"exp_avg_sq/{WEIGHT}")


def read_beside(checkpoint: Checkpoint, name: str, *, start: int, **where: Any) -> None:
    """One element too early, where there is one."""
    READ_FLAT(checkpoint, name, start=max(0, start - (name == f"master/{WEIGHT}")), **where)


def why_read_beside(context: RankContext, root: Path, layout: Layout) -> str:
    with patch.object(base, "read_flat", read_beside):
        return why(root, layout)


def test_a_wrong_offset_is_named(sound: Path) -> None:
    """Of a rank that begins inside the tensor."""
    found = ranks.run_ranks(why_read_beside, 2, sound, Layout(2, zero_stage=3))
    assert len(set(found)) == 1 and refused(found[0], f"master/{WEIGHT}")


def test_without_one_it_is_said_aloud(sound: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megagate"):
        assert why(sound, without="fingerprint") == ""
    assert "the loaded state is NOT COMPARED with the one that was saved: step-00000004 has no fingerprint" in caplog.text
