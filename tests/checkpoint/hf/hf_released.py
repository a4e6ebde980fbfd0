"""Models in the layout of those that were released with arXiv 2505.06708, and what they compute, from its description."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

SIZES = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,  # g = 3 of each key/value head: 1 or 2 would hide a wrong grouping
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}
TOKENS = torch.randint(SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(5))


def released(folder: Path, kind: str, *, qk_norm: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Path, dict[str, Tensor]]:
    """Random weights in their layout; `kind` is headwise, elementwise or baseline."""
    h, n, g, d, f = (SIZES[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"))
    gate_rows = {"headwise": n, "elementwise": n * d, "baseline": 0}[kind]
    shapes = {"model.embed_tokens": (SIZES["vocab_size"], h), "lm_head": (SIZES["vocab_size"], h), "model.norm": (h,)}
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm": (h,), f"{at}.post_attention_layernorm": (h,)}
        shapes |= {f"{at}.self_attn.{name}_proj": (rows, h) for name, rows in (("q", n * d + gate_rows), ("k", g * d), ("v", g * d))}
        shapes |= {f"{at}.self_attn.o_proj": (h, n * d)}
        shapes |= {f"{at}.self_attn.{name}_norm": (d,) for name in ("q", "k") if qk_norm}
        shapes |= {f"{at}.mlp.gate_proj": (f, h), f"{at}.mlp.up_proj": (f, h), f"{at}.mlp.down_proj": (h, f)}
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in shapes.items():
        full = torch.randn(shape, generator=generator)
        weights[f"{name}.weight"] = (1 + 0.4 * full if len(shape) == 1 else full / shape[-1] ** 0.5).to(dtype)
    config = SIZES | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM"},
        "headwise_attn_output_gate": kind == "headwise",
        "elementwise_attn_output_gate": kind == "elementwise",
        "use_qk_norm": qk_norm,
        "qkv_bias": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "modeling_qwen3.py").write_text("raise AssertionError('the code of a directory is never run')")
    return folder, {name: tensor.float() for name, tensor in weights.items()}


def released_logits(w: dict[str, Tensor], kind: str, *, qk_norm: bool = True) -> Tensor:
    """Their forward pass, one head at a time."""
    x = w["model.embed_tokens.weight"][TOKENS]
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        heads = attend(normed(x, w[f"{at}.input_layernorm.weight"]), w, f"{at}.self_attn", kind, qk_norm=qk_norm)
        x = x + heads @ w[f"{at}.self_attn.o_proj.weight"].T
        y = normed(x, w[f"{at}.post_attention_layernorm.weight"])
        up = F.silu(y @ w[f"{at}.mlp.gate_proj.weight"].T) * (y @ w[f"{at}.mlp.up_proj.weight"].T)
        x = x + up @ w[f"{at}.mlp.down_proj.weight"].T
    return normed(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).sqrt()


def attend(x: Tensor, w: dict[str, Tensor], at: str, kind: str, *, qk_norm: bool) -> Tensor:
    """Gated heads, side by side: head j of key/value head i finds its queries and its gate within the rows of i."""
    n, g, d = (SIZES[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    per = n // g
    q_rows = w[f"{at}.q_proj.weight"].chunk(g)
    outputs = []
    for group in range(g):
        key = x @ w[f"{at}.k_proj.weight"][group * d : (group + 1) * d].T
        value = x @ w[f"{at}.v_proj.weight"][group * d : (group + 1) * d].T
        key = turned(normed(key, w[f"{at}.k_norm.weight"]) if qk_norm else key)
        for j in range(per):
            query = x @ q_rows[group][j * d : (j + 1) * d].T
            query = turned(normed(query, w[f"{at}.q_norm.weight"]) if qk_norm else query)
            scores = (query @ key.mT) / d**0.5
            visible = torch.ones(scores.shape[-2:]).tril().bool()
            out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
            gates = {"headwise": slice(per * d + j, per * d + j + 1), "elementwise": slice((per + j) * d, (per + j + 1) * d)}
            outputs.append(out * torch.sigmoid(x @ q_rows[group][gates[kind]].T) if kind in gates else out)
    return torch.cat(outputs, dim=-1)


def turned(x: Tensor) -> Tensor:
    """Rotary positions: channel i with channel i + d/2."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * SIZES["rope_theta"] ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)
