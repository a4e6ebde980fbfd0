"""The configuration of a gated-attention language model of megagate, for Hugging Face transformers 4.53 to 5.

This file, `layers_megagate.py` and `modeling_megagate.py` lie beside the weights and need nothing but torch and transformers:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

What transformers has a name for (`hidden_size`, `num_experts`, ...) stands under that name; the rest under `megagate`, as

    {"format": 1, "model": the model as megagate configures it, complete}

A name that stands in both places has one value. Only the vocabulary (it may have been resized, or kept padded) and the tie of the
embeddings are taken from the standard name where the two differ.

Part of the Python package megagate (megagate/checkpoint/hf), whose tools/convert_checkpoint.py puts it beside the weights that it writes.
SPDX-License-Identifier: Apache-2.0
"""

from typing import Any

from transformers import PretrainedConfig

FORMAT = 1
"""The version of the `megagate` entry that these two files read."""

STANDARD_NAMES = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "ffn_size"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "attention.num_heads"),
    ("num_key_value_heads", "attention.num_kv_heads"),
    ("head_dim", "attention.head_dim"),
    ("rope_theta", "attention.rope.base"),
    ("rms_norm_eps", "norm_eps"),
    ("tie_word_embeddings", "tie_embeddings"),
    ("initializer_range", "init_std"),
    ("num_experts", "moe.num_experts"),
    ("num_experts_per_tok", "moe.top_k"),
    ("moe_intermediate_size", "moe.ffn_size"),
    ("shared_expert_intermediate_size", "moe.shared_ffn_size"),
    ("norm_topk_prob", "moe.renormalize"),
    ("router_aux_loss_coef", "moe.balance_coef"),
)
"""(Name of the attribute, where the same value stands in `megagate["model"]`)."""

STANDARD_WINS = ("vocab_size", "tie_word_embeddings")

CHOICES = (
    ("attention.gate.position", ("none", "G1", "G2", "G3", "G4", "G5")),
    ("attention.gate.granularity", ("elementwise", "headwise")),
    ("attention.gate.score", ("input", "parameter", "constant", "self")),
    ("attention.gate.activation", ("sigmoid", "silu", "identity", "ns_sigmoid", "rmsnorm")),
    ("attention.gate.combine", ("multiply", "add")),
    ("attention.switch.projections", ("none", "v", "kv")),
    ("moe.score", ("softmax", "sigmoid")),
)
"""What `modeling_megagate.py` can compute. Another value is an error, never taken for one of these."""


class MegagateConfig(PretrainedConfig):
    """What a model is.

    Args:
        megagate: `{"format": 1, "model": {...}}`, see `model_defaults` for its keys; a key that is missing has its default.
        max_position_embeddings: Longest sequence that the model was trained on; nothing is allocated for it.
        rope_parameters: `{"rope_type": "default", "rope_theta": base}`.
        output_router_logits: Return the routers' logits, and add their balance loss to the loss.
        kwargs: The standard names, see `STANDARD_NAMES`, and what every configuration of transformers takes.

    Raises:
        ValueError: `megagate` is of another format, has a key or a choice that these files do not know, or contradicts a standard name.
    """

    model_type = "megagate"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        megagate: dict[str, Any] | None = None,
        *,
        max_position_embeddings: int = 4096,
        rope_parameters: dict[str, Any] | None = None,
        hidden_act: str = "silu",
        use_cache: bool = True,
        output_router_logits: bool = False,
        **kwargs: Any,
    ):
        standard = {name: kwargs.pop(name) for name, _ in STANDARD_NAMES if name in kwargs}
        if rope_parameters is not None and "rope_theta" in rope_parameters:
            standard["rope_theta"] = rope_parameters["rope_theta"]
        model = _complete(megagate, standard)
        for name, path in STANDARD_NAMES:
            setattr(self, name, standard.get(name, _at(model, path)))
        self.megagate = {"format": FORMAT, "model": model}
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": self.rope_theta}
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # transformers 5 has no default for them
            setattr(self, name, kwargs.setdefault(name, None))
        super().__init__(tie_word_embeddings=self.tie_word_embeddings, **kwargs)


def model_defaults() -> dict[str, Any]:
    """Every key of `megagate["model"]` with the value it has where it is not given."""
    gate = {
        "position": "none",
        "granularity": "elementwise",
        "head_shared": False,
        "score": "input",
        "activation": "sigmoid",
        "combine": "multiply",
        "constant": 0.5,
    }
    attention = {
        "num_heads": 0,
        "num_kv_heads": 0,
        "head_dim": 0,
        "qk_norm": True,
        "gate": gate,
        "switch": {"projections": "none", "num_experts": 1, "top_k": 1},
        "rope": {"base": 10000.0},
    }
    moe = {
        "num_experts": 0,
        "top_k": 1,
        "ffn_size": 0,
        "first_dense_layers": 0,
        "shared_ffn_size": 0,
        "shared_gate": False,
        "score": "softmax",
        "renormalize": True,
        "bias_update_rate": 0.0,
        "balance_coef": 1e-3,
        "balance_scope": "global_batch",
        "z_loss_coef": 1e-3,
    }
    return {
        "vocab_size": 0,
        "hidden_size": 0,
        "num_layers": 0,
        "ffn_size": 0,
        "tie_embeddings": False,
        "sandwich_norm": False,
        "residual_clip": 0.0,
        "norm_eps": 1e-6,
        "init_std": 0.02,
        "attention": attention,
        "moe": moe,
    }


def _complete(megagate: dict[str, Any] | None, standard: dict[str, Any]) -> dict[str, Any]:
    """`megagate["model"]` with what it leaves out: by the standard name where that is given, else by default."""
    given = {"format": FORMAT, "model": {}} if megagate is None else megagate
    if given.get("format") != FORMAT:
        raise ValueError(
            f"megagate.format ({given.get('format')}) must be {FORMAT}, which is all that this configuration_megagate.py reads; take "
            "configuration_megagate.py and modeling_megagate.py from the megagate that wrote this config.json"
        )
    leaves = dict(_leaves(given["model"]))
    for name, path in STANDARD_NAMES:
        if name not in standard:
            continue
        if leaves.setdefault(path, standard[name]) != standard[name] and name not in STANDARD_WINS:
            raise ValueError(
                f"{name} ({standard[name]}) must equal megagate.model.{path} ({leaves[path]}): they are one value under two names; "
                "change both in config.json"
            )
    model = model_defaults()
    known = dict(_leaves(model))
    for path, value in leaves.items():
        if path not in known:
            raise ValueError(
                f"megagate.model.{path} ({value}) is not known to this configuration_megagate.py; take it and modeling_megagate.py from "
                "the megagate that wrote this config.json"
            )
        *groups, key = path.split(".")
        _at(model, ".".join(groups))[key] = value
    for path, choices in CHOICES:
        if _at(model, path) not in choices:
            raise ValueError(
                f"megagate.model.{path} ({_at(model, path)}) must be one of {', '.join(choices)}, all that this modeling_megagate.py "
                "computes; take it and configuration_megagate.py from the megagate that wrote this config.json"
            )
    return model


def _leaves(tree: dict[str, Any], prefix: str = ""):
    """(dotted path, value) of all that is no dict."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _at(tree: dict[str, Any], path: str) -> Any:
    """What stands at a dotted path; the tree itself at an empty one."""
    for key in filter(None, path.split(".")):
        tree = tree[key]
    return tree
