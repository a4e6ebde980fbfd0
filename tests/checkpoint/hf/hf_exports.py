"""Models of every target, their checkpoints, and what transformers makes of their exports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from parity.sharded import BACKEND, clear_routes, fill
from torch import Tensor

from megagate.checkpoint import store
from megagate.checkpoint.hf.table import Target
from megagate.config.keys import to_dict
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig, RopeConfig
from megagate.config.run import DataConfig, PrecisionConfig, RunConfig, TrainConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

STEP = 7
# Three query heads per kv head: with one or two, wrong groupings can go unseen.
ATTENTION = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8, rope=RopeConfig(base=1000.0))
DENSE = ModelConfig(vocab_size=200, hidden_size=32, num_layers=2, ffn_size=48, norm_eps=1e-5, attention=ATTENTION)
MOE = replace(DENSE, ffn_size=0, moe=MoEConfig(num_experts=8, top_k=3, ffn_size=16))
ELEMENTWISE, HEADWISE = GateConfig("G1", "elementwise"), GateConfig("G1", "headwise")


def gated(model: ModelConfig, gate: GateConfig) -> ModelConfig:
    return replace(model, attention=replace(model.attention, gate=gate))


def moe(**changes: Any) -> ModelConfig:
    return replace(MOE, moe=replace(MOE.moe, **changes))


CASES: dict[str, tuple[ModelConfig, Target]] = {
    "dense": (DENSE, "qwen3"),
    "dense, tied": (replace(DENSE, tie_embeddings=True), "qwen3"),
    "mixture": (MOE, "qwen3_moe"),
    "mixture, not renormalised, first layer dense": (replace(moe(renormalize=False, first_dense_layers=1), ffn_size=48), "qwen3_moe"),
    "mixture, elementwise": (gated(MOE, ELEMENTWISE), "qwen3_next"),
    "mixture, headwise, tied": (gated(replace(MOE, tie_embeddings=True), HEADWISE), "qwen3_next"),
    "mixture, shared expert, no gate": (moe(shared_ffn_size=24), "qwen3_next"),
    "mixture, elementwise, shared expert": (gated(moe(shared_ffn_size=24), ELEMENTWISE), "qwen3_next"),
    "mixture, headwise, gated shared expert": (gated(moe(shared_ffn_size=24, shared_gate=True), HEADWISE), "qwen3_next"),
    "mixture, elementwise, all": (
        gated(replace(moe(shared_ffn_size=24, renormalize=False, first_dense_layers=1), ffn_size=48), ELEMENTWISE),
        "qwen3_next",
    ),
    "dense, elementwise": (gated(DENSE, ELEMENTWISE), "qwen3_5_text"),
    "dense, headwise, tied": (gated(replace(DENSE, tie_embeddings=True), HEADWISE), "qwen3_5_text"),
    "dense, sandwich": (replace(DENSE, sandwich_norm=True), "lfm3"),
    "dense, sandwich, headwise": (gated(replace(DENSE, sandwich_norm=True), HEADWISE), "lfm3"),
    "dense, sandwich, elementwise, tied": (gated(replace(DENSE, sandwich_norm=True, tie_embeddings=True), ELEMENTWISE), "afmoe"),
}
"""Models of each stock class, and the class that is chosen."""

GATED_ALL = CASES["mixture, elementwise, all"][0]

FORCED: dict[str, tuple[ModelConfig, Target]] = {
    "mixture": (MOE, "qwen3_next"),
    "dense, no gate": (DENSE, "qwen3_5_text"),
    "dense, headwise": (gated(DENSE, HEADWISE), "lfm3"),
    "dense, tied": (replace(DENSE, tie_embeddings=True), "lfm3"),
}
"""Models that a class holds too, though another is preferred."""


def run_config(model: ModelConfig, *, dtype: str = "fp32", path: str = "synthetic") -> RunConfig:
    return RunConfig(model=model, train=TrainConfig(seq_len=64), data=DataConfig(path=path), precision=PrecisionConfig(dtype=dtype))


def language_model(model: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: str = "weights") -> LanguageModel:
    """With matrices of about unit gain and norms between about 0.3 and 1.7, all in fp32 or rounded from it."""
    return fill(LanguageModel(model, dtype=dtype, backend=BACKEND, mesh=ParallelMesh.single()), key=seed)


def masters(model: LanguageModel) -> dict[str, Tensor]:
    """The tensors of its checkpoint."""
    state = {f"state/{name}": buffer.clone() for name, buffer in model.named_buffers()}
    return {f"master/{name}": parameter.detach().clone() for name, parameter in model.named_parameters()} | state


def save(root: Path, state: dict[str, Tensor], config: RunConfig) -> Path:
    """A run's folder with one checkpoint, written by one rank."""
    pieces = [store.Piece(name, tensor.shape, (0,) * tensor.dim(), tensor) for name, tensor in state.items()]
    checkpoints = root / "checkpoints"
    store.write_rank(store.begin(checkpoints, STEP), 0, pieces)
    store.publish(checkpoints, STEP, world_size=1, metadata={"config": to_dict(config), "applied_steps": STEP})
    return root


def load_theirs(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Their model in fp32, and what loading said."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "local_files_only": True} | options
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), said


def clear_tokens(ours: LanguageModel) -> Tensor:
    """Two rows of ids over the whole vocabulary, [2, 24], of which none comes near a tie of a router."""
    for seed in range(20):
        tokens = torch.randint(0, ours.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(seed))
        try:
            with torch.no_grad(), clear_routes(ours):
                ours.logits(tokens)
            return tokens
        except AssertionError:
            continue
    raise AssertionError("every seed comes near a tie")
