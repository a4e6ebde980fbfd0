"""`config.json` of a model for each Hugging Face class: every key that a loader has a default for is written, since defaults differ.

For transformers 4 and 5, vLLM and SGLang alike: what they read under two names stands under both.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from megagate.checkpoint.hf.table import NO_SHARED_EXPERT, Target
from megagate.config.model import ModelConfig

FORMAT = 1
"""Of the key `megagate`: {"format": 1, "model": the ModelConfig as nested dicts}, by which an export is read back exactly."""

ARCHITECTURES: Mapping[Target, str] = MappingProxyType(
    {
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "qwen3_next": "Qwen3NextForCausalLM",
        "qwen3_5_text": "Qwen3_5ForCausalLM",
        "lfm3": "Lfm3ForCausalLM",
        "afmoe": "AfmoeForCausalLM",
        "remote-code": "MegagateForCausalLM",
    }
)
REMOTE_MODEL_TYPE = "megagate"
CODE_PATTERN = "*_megagate.py"
"""The files that come along with remote code, in the folder of this module."""
_AUTO_MAP = {
    "AutoConfig": "configuration_megagate.MegagateConfig",
    "AutoModel": "modeling_megagate.MegagateModel",
    "AutoModelForCausalLM": "modeling_megagate.MegagateForCausalLM",
}

_NO_WINDOW = 1 << 20
"""A sliding window, in tokens, that cuts off nothing: where a class has rotary embeddings in layers with a window only."""


@dataclass(frozen=True)
class Use:
    """What a config says beside the model.

    Args:
        max_positions: `max_position_embeddings`, the longest sequence that the model was trained on.
        dtype: In which the weights are to be loaded: `float32` or `bfloat16`.
        eos_id: Ends a text; None for none.
        pad_id: Fills rows; None for none.
        keep_padding: The rows that pad the vocabulary are in the file.
    """

    max_positions: int
    dtype: str = "float32"
    eos_id: int | None = None
    pad_id: int | None = None
    keep_padding: bool = False


def hf_config(model: ModelConfig, target: Target, use: Use) -> dict[str, Any]:
    """The content of `config.json` for a model that `target` can hold."""
    return {**_common(model, target, use), **_OWN[target](model, use), REMOTE_MODEL_TYPE: {"format": FORMAT, "model": asdict(model)}}


def generation_config(use: Use) -> dict[str, Any]:
    """The content of `generation_config.json`."""
    ids = {"bos_token_id": None, "eos_token_id": use.eos_id, "pad_token_id": use.pad_id}
    return {name: value for name, value in ids.items() if value is not None} | {"do_sample": False}


def _common(model: ModelConfig, target: Target, use: Use) -> dict[str, Any]:
    attention = model.attention
    return {
        "architectures": [ARCHITECTURES[target]],
        "model_type": target,
        "vocab_size": model.padded_vocab_size if use.keep_padding else model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": attention.rope.base,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope.base},
        "max_position_embeddings": use.max_positions,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": use.eos_id,
        "pad_token_id": use.pad_id,
        "dtype": use.dtype,
        "torch_dtype": use.dtype,
    }


def _windowless() -> dict[str, Any]:
    return {"use_sliding_window": False, "sliding_window": None}


def _qwen3(model: ModelConfig, use: Use) -> dict[str, Any]:
    return {**_windowless(), "max_window_layers": model.num_layers, "layer_types": _all_layers(model, "full_attention")}


def _mixture(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return {
        "intermediate_size": model.ffn_size or moe.ffn_size,  # of no use where every layer is a mixture, but 0 is refused
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_size,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(model.num_layers) if not model.is_moe_layer(layer)],
        "router_aux_loss_coef": moe.balance_coef,
        "output_router_logits": False,
    }


def _qwen3_moe(model: ModelConfig, use: Use) -> dict[str, Any]:
    return {**_mixture(model), **_windowless()}


def _full_attention(model: ModelConfig) -> dict[str, Any]:
    """Of the classes that mix in linear attention, and turn a quarter of the channels unless told otherwise."""
    rope = {"rope_type": "default", "rope_theta": model.attention.rope.base, "partial_rotary_factor": 1.0}
    return {
        "layer_types": _all_layers(model, "full_attention"),
        "full_attention_interval": 1,
        "partial_rotary_factor": 1.0,
        "rope_parameters": rope,
    }


def _qwen3_next(model: ModelConfig, use: Use) -> dict[str, Any]:
    shared = model.moe.shared_ffn_size or NO_SHARED_EXPERT
    return {**_mixture(model), **_full_attention(model), "shared_expert_intermediate_size": shared}


def _qwen3_5_text(model: ModelConfig, use: Use) -> dict[str, Any]:
    return _full_attention(model)


def _lfm3(model: ModelConfig, use: Use) -> dict[str, Any]:
    return {
        "norm_eps": model.norm_eps,
        "use_sandwich_norm": model.sandwich_norm,
        "use_attention_gate": model.attention.gate.position != "none",
        "layer_types": _all_layers(model, "full_attention"),
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": model.attention.rope.base}},
        "sliding_window": None,
    }


def _afmoe(model: ModelConfig, use: Use) -> dict[str, Any]:
    return {
        "num_dense_layers": model.num_layers,
        "layer_types": _all_layers(model, "sliding_attention"),
        "global_attn_every_n_layers": model.num_layers + 1,
        "sliding_window": max(use.max_positions, _NO_WINDOW),
        "mup_enabled": False,
    }


def _remote(model: ModelConfig, use: Use) -> dict[str, Any]:
    moe = model.moe
    return {
        "model_type": REMOTE_MODEL_TYPE,
        "auto_map": _AUTO_MAP,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_size,
        "shared_expert_intermediate_size": moe.shared_ffn_size,
        "norm_topk_prob": moe.renormalize,
        "router_aux_loss_coef": moe.balance_coef,
        "output_router_logits": False,
    }


def _all_layers(model: ModelConfig, kind: str) -> list[str]:
    return [kind] * model.num_layers


_OWN: Mapping[Target, Callable[[ModelConfig, Use], dict[str, Any]]] = MappingProxyType(
    {
        "qwen3": _qwen3,
        "qwen3_moe": _qwen3_moe,
        "qwen3_next": _qwen3_next,
        "qwen3_5_text": _qwen3_5_text,
        "lfm3": _lfm3,
        "afmoe": _afmoe,
        "remote-code": _remote,
    }
)
