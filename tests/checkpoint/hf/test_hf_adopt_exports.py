"""There and back: checkpoint -> to-hf -> from-hf; and how much memory from-hf takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_dirs import USE, differing, near, random_state, require_verified, tensors_of
from hf_exports import run_config, save
from own_memory import growth, in_fresh_process
from parity.variants import DENSE, MOE, with_moe
from safetensors.torch import save_file

from megagate.checkpoint.hf.adopt import adopt
from megagate.checkpoint.hf.export import export
from megagate.checkpoint.hf.hf_config import hf_config
from megagate.checkpoint.hf.table import mapping
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig

LARGE_VOCABULARY = replace(MOE, vocab_size=50_257, num_layers=1)  # padded to 50,304
CASES = {
    "stock": (MOE, {}),
    "stock, in shards": (MOE, {"max_shard_size": "20KB"}),
    "remote code, a router with bias": (with_moe(bias_update_rate=0.02, score="sigmoid", z_loss_coef=0.0), {"max_shard_size": "30KB"}),
    "tied": (replace(DENSE, tie_embeddings=True), {}),
    "50,257 words": (LARGE_VOCABULARY, {}),
    "50,257 words, padded": (LARGE_VOCABULARY, {"keep_padding": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    model, options = CASES[name]
    state = random_state(model, padding=0.25 if options.get("keep_padding") else 0.0)
    export(save(tmp_path / "run", state, run_config(model)), tmp_path / "hf", tokenizer="none", **options)
    assert ("shards" in name or "bias" in name) == (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1)
    done = adopt(tmp_path / "hf", tmp_path / "out")
    assert done.config.model == model and done.exported
    assert require_verified(done)
    found = tensors_of(tmp_path / "out")
    assert near(found, state, differing(found, state))


def test_a_bf16_export_comes_back_as_its_rounded_weights(tmp_path: Path) -> None:
    state = random_state(MOE)
    export(save(tmp_path / "run", state, run_config(MOE)), tmp_path / "hf", tokenizer="none", dtype="bf16")
    done = adopt(tmp_path / "hf", tmp_path / "out")
    assert done.dtypes == ("bfloat16", "float32"), "norms below 1/2 stay wide"
    rounded = {key: tensor.bfloat16().float() for key, tensor in state.items()}
    found = tensors_of(tmp_path / "out")
    assert near(found, rounded, differing(found, rounded))


def test_fp32_files_are_not_held(tmp_path: Path) -> None:
    """Memory of the process's own while 100 MB pass, of which 94 MB are experts."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, gate=GateConfig("G1"))
    moe = MoEConfig(num_experts=16, top_k=2, ffn_size=480)
    model = ModelConfig(vocab_size=1024, hidden_size=512, num_layers=2, attention=attention, moe=moe)
    shapes = {name: shape for row in mapping(model, "qwen3_next") for name, shape in row.shapes().items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf_config(model, "qwen3_next", USE)))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "hf" / "model.safetensors")
    assert in_fresh_process(growth_of_one, tmp_path) < 24e6, "projections with a gate, and what is on its way to the disk"


def growth_of_one(folder: str) -> int:
    """While it adopts."""
    adopt(Path(folder) / "hf", Path(folder) / "warm")
    return growth(lambda: require_verified(adopt(Path(folder) / "hf", Path(folder) / "out")))
