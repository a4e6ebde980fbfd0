"""The same weights in our model and in the one that exports carry along as code."""

import re
from dataclasses import asdict, replace

import torch
from parity.sharded import BACKEND, fill
from parity.variants import DENSE, MOE, VARIANTS, with_gate
from torch import Tensor

from megagate.checkpoint.hf.configuration_megagate import MegagateConfig
from megagate.checkpoint.hf.modeling_megagate import MegagateForCausalLM
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, RopeConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

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


def our_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Filled with values far from those at the start."""
    return fill(LanguageModel(config, dtype=dtype, backend=BACKEND, mesh=ParallelMesh.single()))


def remote_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The weights of our model by the names of an export with remote code."""
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in THEIR_NAMES:
            name = re.sub(ours, theirs, name)
        if name.endswith("experts.gate_up"):
            for expert, (gate, up) in enumerate(each.chunk(2) for each in value):
                prefix = f"{name.removesuffix('gate_up')}{expert}"
                weights |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down"):
            weights |= {f"{name.removesuffix('down')}{expert}.down_proj.weight": each for expert, each in enumerate(value)}
        else:
            weights[name] = value[: model.config.vocab_size] if "embed_tokens" in name or "lm_head" in name else value
    return weights


def remote_config(config: ModelConfig, **settings: object) -> MegagateConfig:
    return MegagateConfig({"format": 1, "model": asdict(config)}, **settings)


def remote_model(model: LanguageModel, **settings: object) -> MegagateForCausalLM:
    """With the weights of our model, every one of them by its name."""
    attention = settings.pop("attn_implementation", "sdpa")
    peer = MegagateForCausalLM._from_config(remote_config(model.config, **settings), attn_implementation=attention, dtype=model.dtype)
    loaded = peer.load_state_dict(remote_weights(model), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) == ({"lm_head.weight"} if model.config.tie_embeddings else set())
    return peer.eval()


def random_ids(*shape: int, vocab_size: int = 250, seed: int = 3) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
