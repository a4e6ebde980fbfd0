"""The same weights in our model and in the one that exports carry along as code."""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from hf_exports import masters, run_config, save
from parity.variants import DENSE, MOE, VARIANTS, with_gate
from torch import Tensor

from megagate.checkpoint.hf.configuration_megagate import MegagateConfig
from megagate.checkpoint.hf.export import export
from megagate.checkpoint.hf.modeling_megagate import MegagateForCausalLM
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, RopeConfig
from megagate.model.lm import LanguageModel

THREE_PER_GROUP = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8, gate=GateConfig("G1", "headwise"))
"""With one or two query heads per key/value head, wrong groupings can go unseen."""
NO_QK_NORM = replace(DENSE.attention, qk_norm=False)

ALL_VARIANTS = VARIANTS | {
    "no gate, tied": replace(with_gate(GateConfig("none")), tie_embeddings=True),
    "no qk-norm": replace(DENSE, attention=NO_QK_NORM),
    "no qk-norm, G4 headwise": replace(DENSE, attention=replace(NO_QK_NORM, gate=GateConfig("G4", "headwise"))),
    "three query heads per group": replace(DENSE, attention=THREE_PER_GROUP),
    "other base and epsilon": replace(MOE, norm_eps=0.1, attention=replace(MOE.attention, rope=RopeConfig(base=10.0))),
}

THEIR_NAMES = (
    (r"^embedding\.", "model.embed_tokens."),
    (r"^final_norm\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^layers\.", "model.layers."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.attention\.", ".self_attn."),
    (r"\.moe\.shared_expert\.(\w+)\.", r".mlp.shared_expert.\1_proj."),
    (r"\.moe\.shared_gate\.", ".mlp.shared_expert_gate."),
    (r"\.moe\.router\.", ".mlp.gate."),
    (r"\.moe\.experts\.", ".mlp.experts."),
    (r"\.ffn\.(\w+)\.", r".mlp.\1_proj."),
)


def as_remote(values: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights, or their gradients, by the names of an export with remote code; written without the mapping, which is held to it."""
    named = {}
    for ours, value in values.items():
        name = ours
        for pattern, theirs in THEIR_NAMES:
            name = re.sub(pattern, theirs, name)
        if name.endswith("experts.gate_up"):
            for expert, (gate, up) in enumerate(each.chunk(2) for each in value):
                prefix = f"{name.removesuffix('gate_up')}{expert}"
                named |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down"):
            named |= {f"{name.removesuffix('down')}{expert}.down_proj.weight": each for expert, each in enumerate(value)}
        else:
            named[name] = value[: config.vocab_size] if name in ("model.embed_tokens.weight", "lm_head.weight") else value
    return named


def remote_config(config: ModelConfig, **settings: object) -> MegagateConfig:
    return MegagateConfig({"format": 1, "model": asdict(config)}, **settings)


def remote_model(model: LanguageModel, *, attn_implementation: str = "sdpa", **settings: object) -> MegagateForCausalLM:
    """With the weights of our model, every one of them by its name."""
    peer = MegagateForCausalLM._from_config(remote_config(model.config, **settings), attn_implementation=attn_implementation)
    loaded = peer.to(model.dtype).load_state_dict(as_remote(model.state_dict(), model.config), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) == ({"lm_head.weight"} if model.config.tie_embeddings else set())
    return peer.eval()


def random_ids(*shape: int, vocab_size: int = 250, seed: int = 3) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def write_export(folder: Path, model: LanguageModel) -> Path:
    """The export of a checkpoint of our model, with code."""
    run = save(folder.with_name(f"{folder.name}-run"), masters(model), run_config(model.config))
    return export(run, folder, format="remote-code").folder
