"""Directories that others wrote: stock classes of transformers, the gated models released with the paper, and what is refused of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_dirs import require_verified, write_directory
from hf_released import SIZES, TOKENS, released, released_logits
from parity.sharded import BACKEND
from safetensors.torch import load_file, save_file
from torch import Tensor

from megagate.checkpoint.hf.adopt import Adopted, adopt
from megagate.checkpoint.hf.verify import verify_adopted
from megagate.checkpoint.store import Checkpoint
from megagate.config.keys import from_dict
from megagate.config.model import ModelConfig
from megagate.errors import CheckpointError
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # the class's own are beyond this vocabulary
FULL = {"layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


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
    assert require_verified(done)
    assert not done.exported
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["lfm3", "qwen3 tied"])
def test_logits_are_verified_where_files_have_other_names_or_a_copy_of_the_embedding(tmp_path: Path, name: str) -> None:
    folder, _ = stock(tmp_path / "hf", name.split()[0], **STOCK[name])
    tensors = load_file(folder / "model.safetensors")
    if name == "lfm3":
        assert "model.layers.0.self_attn.gate_proj.weight" in tensors, "transformers saves g_proj so"
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = adopt(folder, tmp_path / "out")
    assert done.tensors == len(tensors)
    for memory in (None, 1):  # whole, and block by block
        found = verify_adopted(folder, tmp_path / "out", memory=memory)
        assert found.passed, found.lines()
        assert found.logits is not None


# ---- the models released with the paper


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kind", ["headwise", "elementwise", "baseline"])
def test_a_released_model_computes_the_same(tmp_path: Path, kind: str, qk_norm: bool) -> None:
    folder, weights = released(tmp_path / "hf", kind, qk_norm=qk_norm)
    done = adopt(folder, tmp_path / "out")
    assert done.layout == ("qwen3" if kind == "baseline" else "gated_attention")
    assert done.config.model.attention.gate.position == ("none" if kind == "baseline" else "G1")
    expected = released_logits(weights, kind, qk_norm=qk_norm)
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 1e-5 * expected.abs().max()
    assert require_verified(done) == len(weights)


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
    "no tensor is so large": ("qwen3", {"vocab_size": 2**40}, "vocab_size is 1099511627776, and it may be 2147483647 at most"),
    "a text for experts": ("qwen3_moe", {"num_local_experts": "x"}, "describes a model that megagate does not train"),
    "no step": ("qwen3_moe", {"decoder_sparse_step": 0}, "a value is not of the kind that it has to be"),
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
        write_directory(tmp_path / kind, base, {f"unread.{index}": torch.zeros(1) for index in range(20)})
        assert "of its tensors are not those of the model" in refused(lambda kind=kind: adopt(tmp_path / kind, tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_hidden_layers": 60_000}, "by its config.json the model has 60000 layers"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2, "num_attention_heads": 2**30, "num_key_value_heads": 2}, "are impossible"),
    ],
)
def test_sizes_beyond_all_tensors(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    write_directory(tmp_path / "hf", SIZES | {"model_type": "qwen3"} | settings, {str(key): torch.zeros(1) for key in range(2)})
    assert told in refused(lambda: adopt(tmp_path / "hf", tmp_path / "out"))


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
