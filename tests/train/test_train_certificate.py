"""A resume is held to the step that followed: what was damaged after its digest is named by the digest, what before by that step."""

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import ranks
import torch
from certified import RUN, SAVED, Change, resume, stale, write
from parity.engines import Layout, Run
from torch import Tensor

from megagate.checkpoint import store
from megagate.checkpoint.certificate import NEXT_STEP_NAME, read_next_step, write_next_step
from megagate.checkpoint.store import Checkpoint
from megagate.data.loader import Batch
from megagate.errors import CheckpointError
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.train import certify
from megagate.train.certify import tokens_digest

WEIGHT = "layers.0.attention.k.weight"
EXPERTS = ("layers.1.moe.experts.gate_up", "layers.1.moe.experts.down")
OWN_SUMS = certify._own_sums
DP2_EP2, TP2_EP4 = Layout(2, ep=2), Layout(4, tp=2, ep=4)


def flip_one_bit(tensors: dict[str, Tensor]) -> None:
    """Of the exponent of a master: its value squared, about."""
    tensors[f"master/{WEIGHT}"].view(torch.int32).view(-1)[7] ^= 1 << 24


def flip_a_low_bit(tensors: dict[str, Tensor]) -> None:
    """2e-7 of a master's value: what follows from it is rounding, elsewhere as much as here."""
    tensors[f"master/{WEIGHT}"].view(torch.int32).view(-1)[7] ^= 2


def flip_a_bit_of_next_to_nothing(tensors: dict[str, Tensor]) -> None:
    """A second moment that is still 0, of a token that was never seen, becomes 3e-45: too little for any sum."""
    bits = tensors["exp_avg_sq/embedding.weight"].view(torch.int32).view(-1)
    place = (bits == 0).nonzero()[0]
    bits[place] = 2


def swap_two_experts(tensors: dict[str, Tensor]) -> None:
    """Masters and moments of experts 1 and 2, as a loader does that numbers them wrongly."""
    for name, tensor in tensors.items():
        if name.partition("/")[2] in EXPERTS:
            tensor[[1, 2]] = tensor[[2, 1]]


def swap_moments_of_two_experts(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("exp_avg") and name.partition("/")[2] in EXPERTS:
            tensor[[1, 2]] = tensor[[2, 1]]


def keep_a_moment_stale(tensors: dict[str, Tensor]) -> None:
    name = f"exp_avg_sq/{WEIGHT}"
    tensors[name].copy_(stale()[name])


def name_the_first_moment_of_another(tensors: dict[str, Tensor]) -> None:
    tensors[f"exp_avg/{WEIGHT}"].copy_(tensors[f"exp_avg/{WEIGHT.replace('0', '1')}"].clone())


DAMAGE: dict[Change, str] = {
    flip_one_bit: WEIGHT,
    flip_a_low_bit: "",
    flip_a_bit_of_next_to_nothing: "exp_avg_sq/embedding.weight",
    swap_two_experts: "layers.1.moe.experts",
    swap_moments_of_two_experts: "layers.1.moe.experts",
    keep_a_moment_stale: f"exp_avg_sq/{WEIGHT}",
    name_the_first_moment_of_another: f"exp_avg/{WEIGHT}",
}
"""What is done to a state, and a part of the name of the tensor that a digest, or the step after, then tells."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process, certified."""
    root = tmp_path_factory.mktemp("sound")
    write(root)
    return root


def test_a_sound_checkpoint_is_resumed_bit_for_bit(sound: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = read_next_step(store.step_path(sound, SAVED))
    assert recorded is not None and recorded.step == SAVED + 1 and recorded.applied
    with caplog.at_level(logging.INFO, "megagate"):
        resume(sound)
    assert f"step {SAVED + 1}, done again, is the one that followed step-0000000{SAVED} when it was saved" in caplog.text
    assert "to rounding" not in caplog.text and "NOT CHECKED" not in caplog.text


def test_written_without_a_copy_the_certificate_has_the_same_bits(sound: Path, tmp_path: Path) -> None:
    """Measured against the files instead of the copy in host memory."""
    write(tmp_path, beside=False)
    folders = [store.step_path(root, SAVED) for root in (sound, tmp_path)]
    assert read_next_step(folders[0]) == read_next_step(folders[1])
    resume(tmp_path)


def late_sums(*arguments: Any) -> certify.Sums:
    """Begins when the next forward and backward pass are over."""
    time.sleep(0.3)
    return OWN_SUMS(*arguments)


def test_the_optimizer_waits_until_the_step_before_is_measured(sound: Path, tmp_path: Path) -> None:
    with patch.object(certify, "_own_sums", late_sums):
        write(tmp_path, further=2)
    assert read_next_step(store.step_path(tmp_path, SAVED)) == read_next_step(store.step_path(sound, SAVED))


def test_in_several_chunks_too(tmp_path: Path) -> None:
    with patch.object(certify, "CHUNK_ELEMENTS", 100):
        write(tmp_path / "a")
        write(tmp_path / "b", beside=False)
        resume(tmp_path / "a")
    found = [read_next_step(store.step_path(tmp_path / name, SAVED)) for name in ("a", "b")]
    assert found[0] == found[1] is not None


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_the_engine_gives_for_its_state_is_held_to_the_next_step(tmp_path: Path, damage: Change) -> None:
    """Damaged before the fingerprint is taken."""
    write(tmp_path, beside=False, change=damage)
    with Checkpoint.open(store.step_path(tmp_path, SAVED)) as checkpoint:
        assert checkpoint.verify(), "its digests are sound"
    told = rf"step {SAVED + 1}, done again from .*: the step differs, though it began with the very state .* bits.*on_mismatch continue"
    with pytest.raises(CheckpointError, match=told) as caught:
        resume(tmp_path)
    assert DAMAGE[damage] in str(caught.value)


@pytest.mark.parametrize(("damage", "named"), DAMAGE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_damage_after_the_digest_is_found_by_the_digest(sound: Path, tmp_path: Path, damage: Change, named: str) -> None:
    folder = store.step_path(tmp_path, SAVED)
    folder.mkdir()
    for path in store.step_path(sound, SAVED).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with Checkpoint.open(folder) as checkpoint:
        before = {name: checkpoint.read_whole(name) for name in checkpoint.tensors}
    after = {name: tensor.clone() for name, tensor in before.items()}
    damage(after)
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    for name, tensor in after.items():
        was, now = (one.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for one in (before[name], tensor))
        if was != now:
            assert content.count(was) == 1
            content = content.replace(was, now)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="its bytes have the digest") as caught:
        resume(tmp_path)
    assert named in str(caught.value)


def test_told_to_go_on_it_goes_on_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, change=flip_one_bit)
    resume(tmp_path, on_mismatch="continue")
    assert caplog.text.count("going on all the same, as checkpoint.on_mismatch is continue") == 2, "of the state, and of the step"
    assert f"master/{WEIGHT}, as loaded from" in caplog.text and "done again from" in caplog.text
    assert "the step differs" not in caplog.text, "the state did"


def test_other_tokens_are_refused(sound: Path) -> None:
    with pytest.raises(CheckpointError, match="its tokens have the digest"):
        resume(sound, moved=1)


def test_the_digest_of_tokens_sees_samples_their_numbers_and_targets() -> None:
    numbers, alone = np.arange(6).reshape(3, 2), ParallelMesh.single().dp
    tokens = np.random.default_rng(0).integers(0, 500, (3, 2, 16))
    batch = Batch(tokens, np.roll(tokens, -1, 2))
    digest = tokens_digest(numbers, batch, alone)
    back = Batch(batch.tokens[::-1], batch.labels[::-1])
    assert tokens_digest(numbers[::-1], back, alone) == digest, "whichever order they come in"
    unmasked = batch.labels.copy()
    unmasked[1, 1, 3] = -100
    others = [(numbers, back), (numbers + 1, batch), (numbers, Batch(tokens, unmasked)), (numbers, Batch(tokens + 1, batch.labels))]
    assert digest not in {tokens_digest(*other, alone) for other in others}


def test_another_learning_rate_leaves_out_the_updates_aloud(sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megagate"):
        resume(sound, lr=0.5)
    assert "NOT CHECKED" in caplog.text and "the updates of the masters: the learning rate of step 5 is" in caplog.text
    for damage, told in (  # and what can be compared is
        (swap_two_experts, "the loss is"),
        (swap_moments_of_two_experts, "the update of exp_avg.*/layers.1.moe.experts"),
        (keep_a_moment_stale, f"the update of exp_avg_sq/{WEIGHT}"),
        (name_the_first_moment_of_another, f"the update of exp_avg/{WEIGHT}"),
    ):
        write(tmp_path / damage.__name__, change=damage, beside=False)
        with pytest.raises(CheckpointError, match=told):
            resume(tmp_path / damage.__name__, lr=0.5)


def test_without_a_record_it_is_said_aloud(sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = store.step_path(tmp_path, SAVED)
    folder.mkdir()
    for path in store.step_path(sound, SAVED).iterdir():
        if path.name != NEXT_STEP_NAME:
            (folder / path.name).write_bytes(path.read_bytes())
    with caplog.at_level(logging.INFO, "megagate"):
        resume(tmp_path)
    assert f"NOT CHECKED by doing the next step again: {folder.name} has no {NEXT_STEP_NAME}" in caplog.text


def test_a_record_of_another_step_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    folder = store.step_path(tmp_path, SAVED)
    recorded = read_next_step(folder)
    assert recorded is not None
    write_next_step(folder, replace(recorded, step=SAVED + 2))
    with pytest.raises(CheckpointError, match=f"is of step {SAVED + 2}, that of step {SAVED + 1} belongs there"):
        resume(tmp_path)


# ---- in a world of ranks


def write_in_ranks(context: RankContext, root: Path, run: Run, layout: Layout, late: bool = False) -> None:
    with patch.object(certify, "_own_sums", late_sums) if late else nullcontext():
        write(root, layout, run=run, further=1 + late)


def resume_in_ranks(context: RankContext, root: Path, run: Run, layout: Layout) -> str:
    try:
        resume(root, layout, run=run)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("run", [RUN, Run(optimizer="adamw", dtype="bf16")], ids=["fp32", "bf16"])
def test_under_the_same_and_other_layouts(tmp_path: Path, run: Run) -> None:
    ranks.run_ranks(write_in_ranks, 2, tmp_path, run, DP2_EP2)
    recorded = read_next_step(store.step_path(tmp_path, SAVED))
    assert recorded is not None and (recorded.circumstances.dp, recorded.circumstances.ep) == (2, 2)
    for layout in (DP2_EP2, TP2_EP4, Layout(2, tp=2, ep=2, zero_stage=3), Layout(1)):
        assert ranks.run_ranks(resume_in_ranks, layout.world_size, tmp_path, run, layout) == [""] * layout.world_size, str(layout)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_of_zero_waits_until_the_step_before_is_measured(tmp_path: Path, stage: int) -> None:
    run, layout = Run(optimizer="adamw", dense=not stage), Layout(2, ep=2 if stage else 1, zero_stage=stage)
    ranks.run_ranks(write_in_ranks, 2, tmp_path, run, layout, True)
    assert ranks.run_ranks(resume_in_ranks, 2, tmp_path, run, layout) == [""] * 2


@pytest.mark.parametrize("damage", [swap_moments_of_two_experts, keep_a_moment_stale])
def test_another_layout_finds_damage_too(tmp_path: Path, damage: Change) -> None:
    write(tmp_path, beside=False, change=damage)
    found = ranks.run_ranks(resume_in_ranks, 4, tmp_path, RUN, TP2_EP4)
    assert len(set(found)) == 1 and DAMAGE[damage] in found[0] and "they must agree to 0.0001" in found[0]
