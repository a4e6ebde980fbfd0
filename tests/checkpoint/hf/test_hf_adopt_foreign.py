"""Directories that others wrote: stock classes of transformers, the gated models released with the paper, and what is refused of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_dirs import write_directory
from parity.sharded import BACKEND
from torch import Tensor
from torch.nn import functional as F

from megagate.checkpoint.hf.adopt import Adopted, adopt, check_adopted
from megagate.checkpoint.store import Checkpoint
from megagate.config.keys import from_dict
from megagate.config.model import ModelConfig
from megagate.errors import CheckpointError
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

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
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # the class's own are beyond this vocabulary
FULL = {"layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOKENS = torch.randint(SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(5))


def logits_of(folder: Path) -> Tensor:
    """Logits of an adopted model."""
    with Checkpoint.open(folder) as checkpoint:
        config = from_dict(checkpoint.metadata["config"]).model
        model = LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single())
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(checkpoint.read_whole(f"master/{name}"))
    return model.logits(TOKENS)


# ---- stock classes


def stock(folder: Path, kind: str, **settings: object) -> tuple[Path, Tensor]:
    """A directory as transformers itself saves it, with no weight at its initial value, and the logits of its model."""
    import transformers  # noqa: PLC0415 - slow, and not for every test here

    config = transformers.AutoConfig.for_model(kind, **(SIZES | settings))
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / max(parameter.shape[-1], 1) ** 0.5)
        expected = model(TOKENS).logits
    model.save_pretrained(folder)
    return folder, expected


STOCK: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True},
    "qwen3_moe dense first": {**EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": False},
    "qwen3_moe second layers": {**EXPERTS, "decoder_sparse_step": 2},
    "qwen3_next": {**FULL, **EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_next no shared": {**FULL, **EXPERTS, "shared_expert_intermediate_size": 0},
    "qwen3_next dense": {**FULL, "num_experts": 0},
    "qwen3_5_text": FULL,
    "lfm3": {
        **NO_IDS,
        "layer_types": ["full_attention"] * 2,
        "norm_eps": 1e-5,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7000.0}},
    },
    "lfm3 without gate and sandwich": {
        **NO_IDS,
        "layer_types": ["full_attention"] * 2,
        "use_attention_gate": False,
        "use_sandwich_norm": False,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7000.0}},
    },
    "afmoe": {"layer_types": ["sliding_attention"] * 2, "num_dense_layers": 2, "sliding_window": 64},
}


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_model_computes_the_same(tmp_path: Path, name: str) -> None:
    folder, expected = stock(tmp_path / "hf", name.split()[0], **STOCK[name])
    done = adopt(folder, tmp_path / "out")
    assert check_adopted(done)
    assert not done.exported
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 1e-5 * expected.abs().max()


# ---- the models released with the paper, computed here from their description


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
    write_directory(folder, config, weights)
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


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kind", ["headwise", "elementwise", "baseline"])
def test_a_released_model_computes_the_same(tmp_path: Path, kind: str, qk_norm: bool) -> None:
    folder, weights = released(tmp_path / "hf", kind, qk_norm=qk_norm)
    done = adopt(folder, tmp_path / "out")
    assert done.layout == ("qwen3" if kind == "baseline" else "gated_attention")
    assert done.config.model.attention.gate.position == ("none" if kind == "baseline" else "G1")
    expected = released_logits(weights, kind, qk_norm=qk_norm)
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 1e-5 * expected.abs().max()
    assert check_adopted(done) == len(weights)


def test_a_released_model_in_bf16(tmp_path: Path) -> None:
    folder, weights = released(tmp_path / "hf", "headwise", dtype=torch.bfloat16)
    adopt(folder, tmp_path / "out")
    expected = released_logits(weights, "headwise")
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 1e-5 * expected.abs().max()


# ---- what megagate's model cannot be


def changed(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


BOTH_GATES = {"headwise_attn_output_gate": True, "elementwise_attn_output_gate": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sliding window": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "layer_types is sliding_attention"),
    "sliding window of a mixture": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
    "yarn": ("qwen3", {"rope_scaling": YARN}, "rope_parameters.rope_type is yarn"),
    "partial rotation": ("qwen3_5_text", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor is 0.5"),
    "partial rotation by default": ("qwen3_5_text", {"rope_parameters": None}, "rope_parameters.partial_rotary_factor is 0.25"),
    "linear attention by default": ("qwen3_next", {"layer_types": None}, "layer_types is linear_attention"),
    "attention bias": ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    "their bias": ("qwen3", {"qkv_bias": True}, "qkv_bias is True"),
    "activation": ("qwen3", {"hidden_act": "gelu"}, "hidden_act is gelu"),
    "quantised": ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is present"),
    "both gates": ("qwen3", BOTH_GATES, "so is elementwise_attn_output_gate"),
    "gate switched off": ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate is False"),
    "dense in the middle": ("qwen3_moe", {"mlp_only_layers": [1]}, "make layers 1 dense"),
    "convolutions": ("lfm3", {"layer_types": None}, "layer_types is conv"),
    "no rotation": ("afmoe", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types is full_attention (layer 1)"),
    "short window": ("afmoe", {"sliding_window": 32}, "sliding_window is 32"),
    "scaled embedding": ("afmoe", {"mup_enabled": True}, "mup_enabled is True"),
    "scaled routes": ("afmoe", {"num_dense_layers": 1}, "num_dense_layers is 1 of 2"),
    "a text for a number": ("qwen3", {"hidden_size": "48"}, "transformers refuses this configuration of a qwen3"),
    "heads that do not divide": ("qwen3", {"num_key_value_heads": 4}, "model.attention.num_heads (6) must be divisible by"),
    "another head": ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "architectures is ['Qwen3ForSequenceClassification']"),
    "unknown": ("qwen3", {"model_type": "mamba9"}, "model_type is mamba9"),
    "no kind": ("qwen3", {"model_type": None}, "model_type is None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    kind, settings, told = REFUSED[name]
    base = STOCK[kind] | SIZES | {"model_type": kind, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    if kind == "lfm3":
        base["rope_parameters"] = STOCK[kind]["rope_parameters"]
    if kind in ("qwen3_5_text", "qwen3_next"):
        base["rope_parameters"] = base["rope_parameters"] | {"partial_rotary_factor": 1.0}
    if "partial_rotary_factor" in settings or "rope_scaling" in settings:
        base["rope_parameters"] = None
    if settings.get("rope_parameters", 0) is None:
        del base["partial_rotary_factor"]
    write_directory(tmp_path / "hf", base | settings, {"unread": torch.zeros(1)})
    message = refused(lambda: adopt(tmp_path / "hf", tmp_path / "out"))
    assert message.startswith(f"{tmp_path / 'hf' / 'config.json'}") and told in message and ";" in message
    assert not (tmp_path / "out").exists()


def refused(change: Callable[[], Adopted]) -> str:
    with pytest.raises(CheckpointError) as caught:
        change()
    return str(caught.value)


def test_the_base_of_these_refusals_is_read(tmp_path: Path) -> None:
    """The model of each class above, without the change, is one: only the tensors are not there."""
    for kind in {kind for kind, _, _ in REFUSED.values()}:
        base = STOCK[kind] | SIZES | {"model_type": kind}
        write_directory(tmp_path / kind, base, {"unread": torch.zeros(1)})
        assert "of its tensors are not those of the model" in refused(lambda kind=kind: adopt(tmp_path / kind, tmp_path / "out"))


def test_defaults_of_absent_keys_are_the_classes(tmp_path: Path) -> None:
    """A released model with the keys that differ from their class's defaults only."""
    folder, _ = released(tmp_path / "hf", "elementwise")
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for key in ("use_qk_norm", "tie_word_embeddings", "rope_theta"):
        del settings[key]
    path.write_text(json.dumps(settings))
    model: ModelConfig = adopt(folder, tmp_path / "out").config.model
    assert (model.attention.qk_norm, model.attention.rope.base, model.tie_embeddings) == (True, 10000.0, False)
