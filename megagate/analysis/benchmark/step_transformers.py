"""A training step of a peer: Hugging Face transformers' Qwen3Moe, the stock class whose layers equal megagate's ungated model."""

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megagate.analysis.benchmark.interleave import Work
from megagate.analysis.benchmark.step import SHAPES
from megagate.analysis.benchmark.step_plain import SEED, batches, step_of
from megagate.parallel.init import pick_device


def qwen3_moe(shape: str) -> Work:
    """The same sizes, loss, optimizer and batches, experts by `grouped_mm`."""
    sizes, device = SHAPES[shape], pick_device(0)
    model, attention = sizes.model, sizes.model.attention
    config = Qwen3MoeConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        num_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.top_k,
        moe_intermediate_size=model.moe.ffn_size,
        norm_topk_prob=model.moe.renormalize,
        max_position_embeddings=sizes.seq_len,
        use_cache=False,
        output_router_logits=False,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    peer = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", dtype=torch.bfloat16).to(device).train()

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return peer(input_ids=tokens, labels=tokens).loss  # it shifts them itself: the same targets as `labels`

    return step_of(peer, loss_of, batches(sizes, device))
