"""Our models against Hugging Face's, with the same weights, in fp32: logits, loss, gradients."""

import dataclasses

import pytest
import torch
from parity.sharded import BACKEND, assert_all_close, assert_close, clear_routes, fill
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig, RopeConfig
from megagate.model.lm import LanguageModel
from megagate.nn.loss import IGNORE_INDEX
from megagate.parallel.mesh import ParallelMesh

# Three query heads per kv head: with one or two, wrong groupings can go unseen.
ATTENTION = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8, rope=RopeConfig(base=1000.0))
MOE = ModelConfig(vocab_size=200, hidden_size=48, num_layers=2, attention=ATTENTION, moe=MoEConfig(num_experts=8, top_k=3, ffn_size=16))
PLAIN_TOP_K = dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, renormalize=False))
GATED = dataclasses.replace(MOE, attention=dataclasses.replace(ATTENTION, gate=GateConfig("G1", "elementwise")))
SHARED = dataclasses.replace(GATED, moe=dataclasses.replace(MOE.moe, shared_ffn_size=40))
OWN_GATE = dataclasses.replace(GATED, moe=dataclasses.replace(SHARED.moe, shared_gate=True))
DENSE_FIRST = dataclasses.replace(MOE, ffn_size=80, moe=dataclasses.replace(MOE.moe, first_dense_layers=1))
TIED_DENSE = dataclasses.replace(MOE, moe=MoEConfig(), ffn_size=80, tie_embeddings=True)
UNTIED_DENSE = dataclasses.replace(TIED_DENSE, tie_embeddings=False)
SEQUENCE = 24

Named = dict[str, Tensor]


def ours(config: ModelConfig) -> LanguageModel:
    return fill(LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single()))


def theirs(config: ModelConfig) -> nn.Module:
    """Their model of the same config."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.attention.rope.base, "partial_rotary_factor": 1.0},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": SEQUENCE,
    }
    if not config.is_moe:
        return Qwen3ForCausalLM(Qwen3Config(**shared, intermediate_size=config.ffn_size))
    shared |= {
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.ffn_size,
        "norm_topk_prob": config.moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.moe.first_dense_layers)),
        "intermediate_size": config.ffn_size,
    }
    if config.attention.gate.position == "none":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared))
    layers = ["full_attention"] * config.num_layers
    shared |= {"shared_expert_intermediate_size": config.moe.shared_ffn_size, "partial_rotary_factor": 1.0}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**shared, layer_types=layers))


def named_as_theirs(values: Named, config: ModelConfig, *, gradients: bool = False) -> Named:
    """Our parameters, or their gradients, by their names and in their layout."""
    gated, real = config.attention.gate.position != "none", slice(0, config.vocab_size)
    out = {"model.embed_tokens.weight": values["embedding.weight"][real], "model.norm.weight": values["final_norm.weight"]}
    if not config.tie_embeddings:
        out["lm_head.weight"] = values["head.weight"][real]
    for layer in range(config.num_layers):
        mine = {name.removeprefix(f"layers.{layer}."): v for name, v in values.items() if name.startswith(f"layers.{layer}.")}
        block = {
            "input_layernorm.weight": mine["attention_norm.weight"],
            "post_attention_layernorm.weight": mine["ffn_norm.weight"],
            **{f"self_attn.{one}_proj.weight": mine[f"attention.{one}.weight"] for one in "qkvo"},
            **{f"self_attn.{one}.weight": mine[f"attention.{one}.weight"] for one in ("q_norm", "k_norm")},
        }
        if gated:  # rows of one head: its query, then its gate
            heads = [mine[f"attention.{one}.weight"].unflatten(0, (config.attention.num_heads, -1)) for one in ("q", "gate")]
            block["self_attn.q_proj.weight"] = torch.cat(heads, 1).flatten(0, 1)
        if config.is_moe_layer(layer):
            block |= {"mlp.gate.weight": mine["moe.router.weight"]}
            block |= {"mlp.experts.gate_up_proj": mine["moe.experts.gate_up"], "mlp.experts.down_proj": mine["moe.experts.down"]}
            if config.moe.shared_ffn_size:
                block |= shared_expert_as_theirs(mine, gradients=gradients)
        else:
            block |= {f"mlp.{one}_proj.weight": mine[f"ffn.{one}.weight"] for one in ("gate", "up", "down")}
        out |= {f"model.layers.{layer}.{name}": value for name, value in block.items()}
    if gated and not gradients:  # their norms multiply by 1 + w
        out = {name: value - 1 if "norm" in name else value for name, value in out.items()}
    return out


def shared_expert_as_theirs(mine: Named, *, gradients: bool) -> Named:
    """Of one layer. They multiply its output by sigmoid(gate x). Without such a gate ours is not scaled: under zeros, 1/2 of twice ours."""
    gate, up, down = (mine[f"moe.shared_expert.{one}.weight"] for one in ("gate", "up", "down"))
    block = {"mlp.shared_expert.gate_proj.weight": gate, "mlp.shared_expert.up_proj.weight": up}
    if "moe.shared_gate.weight" in mine:
        return block | {"mlp.shared_expert.down_proj.weight": down, "mlp.shared_expert_gate.weight": mine["moe.shared_gate.weight"]}
    if gradients:
        return block | {"mlp.shared_expert.down_proj.weight": down / 2}
    return block | {"mlp.shared_expert.down_proj.weight": 2 * down, "mlp.shared_expert_gate.weight": torch.zeros(1, gate.shape[1])}


@pytest.mark.parametrize(
    "config",
    [MOE, PLAIN_TOP_K, DENSE_FIRST, GATED, SHARED, OWN_GATE, TIED_DENSE, UNTIED_DENSE],
    ids=[
        "qwen3_moe",
        "qwen3_moe without renormalisation",
        "qwen3_moe with a dense first layer",
        "qwen3_next",
        "qwen3_next with a shared expert",
        "qwen3_next with a shared expert and its gate",
        "qwen3 tied",
        "qwen3",
    ],
)
def test_equals_hugging_face(config):
    model, peer = ours(config), theirs(config)
    values = {name: p.detach() for name, p in model.named_parameters()}
    loaded = peer.load_state_dict(named_as_theirs(values, config), strict=False)
    assert not loaded.unexpected_keys
    absent = {"lm_head.weight"} if config.tie_embeddings else set()  # tied: the same parameter by another name
    # They always build a shared expert, of width 0 if need be, and its gate.
    only_theirs = "nothing" if config.moe.shared_gate else "shared_expert_gate" if config.moe.shared_ffn_size else "shared_expert"
    assert {name for name in loaded.missing_keys if only_theirs not in name} == absent

    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, config.vocab_size, (2, SEQUENCE + 1), generator=generator)
    tokens, labels = text[:, :-1], text[:, 1:].clone()
    labels[0, 5:9] = IGNORE_INDEX
    logits = peer(input_ids=tokens, use_cache=False).logits
    assert_close(model.logits(tokens), logits, to=1e-5, what="logits")

    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss.backward()
    with clear_routes(model):
        parts = model(tokens, labels)
    parts.ce_sum.backward()
    assert_close(parts.ce_sum, loss, to=1e-6, what="loss")
    gradients = named_as_theirs({name: p.grad for name, p in model.named_parameters()}, config, gradients=True)
    expected = dict(peer.named_parameters())
    assert len(gradients) == len([name for name in expected if only_theirs not in name])
    assert_all_close(gradients, {name: expected[name].grad for name in gradients}, to=2e-5)
