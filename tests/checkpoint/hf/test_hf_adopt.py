"""From a Hugging Face directory to a checkpoint: exact for every variant and class, other number types, shards, fused experts."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from hf_dirs import USE, differing, export_of, near, random_state, require_verified, tensors_of, theirs_of, write_directory
from parity.variants import DENSE, MOE, VARIANTS, with_gate, with_moe

from megagate.checkpoint.hf.adopt import Adopted, adopt
from megagate.checkpoint.hf.hf_config import hf_config
from megagate.checkpoint.hf.table import Target
from megagate.checkpoint.hf.targets import REMOTE, reasons
from megagate.checkpoint.store import Checkpoint
from megagate.config.cli import parse
from megagate.config.model import GateConfig, ModelConfig

CASES = [(name, target) for name, model in VARIANTS.items() for target in get_args(Target) if not reasons(model, target)]
HEADWISE = GateConfig("G1", "headwise")
FURTHER: dict[str, tuple[ModelConfig, Target]] = {
    "no gate, mixture, qwen3_next": (replace(MOE, attention=replace(MOE.attention, gate=GateConfig())), "qwen3_next"),
    "no gate, no shared expert": (replace(with_moe(shared_ffn_size=0), attention=replace(MOE.attention, gate=GateConfig())), "qwen3_moe"),
    "headwise, mixture": (replace(MOE, attention=replace(MOE.attention, gate=HEADWISE)), "qwen3_next"),
    "headwise, dense, sandwich": (replace(with_gate(HEADWISE), sandwich_norm=True), "lfm3"),
    "elementwise, dense, sandwich": (replace(DENSE, sandwich_norm=True), "afmoe"),
    "tied": (replace(DENSE, tie_embeddings=True), "qwen3_5_text"),
}


def round_trip(folder: Path, model: ModelConfig, target: Target) -> Adopted:
    state = random_state(model)
    source = export_of(folder / "hf", model, target, state)
    done = adopt(source, folder / "out")
    assert (done.config.model, done.layout, done.exported) == (model, target, True)
    found = tensors_of(folder / "out")
    different = differing(found, state)
    if target in ("qwen3_next", "qwen3_5_text"):
        assert near(found, state, different)
        assert done.below_half and done.rounding == 0.0
    else:
        assert not different
        assert (done.below_half, done.rounding) == (0, 0.0)
    assert require_verified(done)
    return done


@pytest.mark.parametrize(("name", "target"), CASES)
def test_every_variant_comes_back(tmp_path: Path, name: str, target: Target) -> None:
    round_trip(tmp_path, VARIANTS[name], target)


@pytest.mark.parametrize("name", FURTHER)
def test_every_class_comes_back(tmp_path: Path, name: str) -> None:
    round_trip(tmp_path, *FURTHER[name])


def test_every_class_is_tried() -> None:
    assert {target for _, target in CASES} | {target for _, target in FURTHER.values()} == set(get_args(Target))
    assert all(not reasons(model, target) for model, target in FURTHER.values())


def test_what_is_written_is_a_checkpoint_of_step_0_with_a_config_to_train(tmp_path: Path) -> None:
    done = round_trip(tmp_path, MOE, "qwen3_next")
    assert done.folder == tmp_path / "out" / "step-00000000"
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        metadata = checkpoint.metadata
    assert (metadata["applied_steps"], metadata["data"], metadata["imported_from"]) == (0, None, str(tmp_path / "hf"))
    config = parse(["--config", str(tmp_path / "out" / "config.yaml")], prog="test")
    assert config == done.config
    assert config.train.seq_len == USE.max_positions


def test_padding_is_kept_where_the_file_has_it(tmp_path: Path) -> None:
    state = random_state(MOE, padding=0.7)
    export_of(tmp_path / "hf", MOE, "qwen3_next", state, keep_padding=True)
    assert adopt(tmp_path / "hf", tmp_path / "out").config.model == MOE
    found = tensors_of(tmp_path / "out")
    assert near(found, state, differing(found, state))
    export_of(tmp_path / "trimmed", MOE, "qwen3_next", state)
    adopt(tmp_path / "trimmed", tmp_path / "out2")
    assert not tensors_of(tmp_path / "out2")["master/embedding.weight"][MOE.vocab_size :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    state = random_state(MOE)
    theirs = {name: tensor.to(dtype) for name, tensor in theirs_of(MOE, REMOTE, state).items()}
    write_directory(tmp_path / "hf", hf_config(MOE, REMOTE, USE), theirs, shards=3)
    done = adopt(tmp_path / "hf", tmp_path / "out")
    assert done.dtypes == (str(dtype).removeprefix("torch."),)
    expected = {name: tensor.to(dtype).float() for name, tensor in state.items()}
    assert not differing(tensors_of(tmp_path / "out"), expected)
    assert require_verified(done) == len(theirs)


def test_shards_and_fused_experts_are_the_same_model(tmp_path: Path) -> None:
    state = random_state(MOE)
    theirs = theirs_of(MOE, "qwen3_next", state)
    config = hf_config(MOE, "qwen3_next", USE)
    write_directory(tmp_path / "one", config, theirs)
    write_directory(tmp_path / "many", config, theirs, shards=5)
    fused = {name: tensor for name, tensor in theirs.items() if ".experts." not in name}
    for layer in range(MOE.num_layers):
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = state[f"master/layers.{layer}.moe.experts.gate_up"]
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = state[f"master/layers.{layer}.moe.experts.down"]
    write_directory(tmp_path / "fused", config, fused)
    expected = None
    for kind in ("one", "many", "fused"):
        done = adopt(tmp_path / kind, tmp_path / f"out-{kind}")
        assert require_verified(done)
        found = tensors_of(tmp_path / f"out-{kind}")
        expected = expected or found
        assert not differing(found, expected)
    assert near(expected, state, differing(expected, state))


def test_a_large_tensor_goes_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagate.checkpoint.hf.adopt._BLOCK_BYTES", 1000)
    monkeypatch.setattr("megagate.checkpoint.hf.adopt._FILE_BYTES", 5000)
    monkeypatch.setattr("megagate.checkpoint.hf.adopt._COMPUTED_BYTES", 2000)
    done = round_trip(tmp_path, MOE, "qwen3_next")
    assert len(list(done.folder.glob("*.safetensors"))) > 20


def test_a_tied_output_projection_in_the_file_is_left_out(tmp_path: Path) -> None:
    model = replace(DENSE, tie_embeddings=True)
    theirs = theirs_of(model, REMOTE, random_state(model))
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    write_directory(tmp_path / "hf", hf_config(model, REMOTE, USE), theirs)
    done = adopt(tmp_path / "hf", tmp_path / "out")
    assert done.left_out == ("lm_head.weight",) and done.config.model == model


def test_what_was_changed_meanwhile_is_found(tmp_path: Path) -> None:
    state = random_state(MOE)
    done = adopt(export_of(tmp_path / "hf", MOE, "qwen3_next", state), tmp_path / "out")
    for name, change in (("layers.1.attention.q.weight", 1e-6), ("final_norm.weight", 1e-5), ("layers.0.moe.experts.down", 1e-6)):
        other = {key: tensor.clone() for key, tensor in state.items()}
        other[f"master/{name}"].view(-1)[-1] += change
        folder = tmp_path / name
        export_of(folder, MOE, "qwen3_next", other)
        with pytest.raises(Exception, match="is not what it should be"):
            require_verified(replace(done, source=folder))
