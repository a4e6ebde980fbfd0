"""The model that a Hugging Face directory's `config.json` describes, and by which class's layout its tensors are read.

Our own exports say their model exactly, under the key `megagate`. Of others, keys that are absent have the defaults of transformers'
configuration classes; no code of the directory is run. What megagate's model cannot be is refused, with the reason.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megagate.checkpoint.hf.adopt_files import read_json
from megagate.checkpoint.hf.hf_config import ARCHITECTURES, REMOTE_MODEL_TYPE, Use, hf_config
from megagate.checkpoint.hf.table import Layout, Target
from megagate.checkpoint.hf.targets import reasons
from megagate.config.keys import from_dict
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig, RopeConfig
from megagate.config.rules import BASE_HINT, check
from megagate.config.run import RunConfig
from megagate.errors import CheckpointError, ConfigError

CONFIG = "config.json"
_USE_KEYS = ("max_position_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
"""Keys that say how a model is used, not what it is."""

_MOST, _LARGEST = 1 << 16, (1 << 31) - 1
"""Of layers or experts, and of any other number; a config of more is damaged, and to go through its layers would never end."""
_COUNTS = ("num_hidden_layers", "num_layers", "num_experts", "num_local_experts")
_SHOWN = 200
"""Characters of a value, in a message."""
FOLLOWED = ("configuration_files", "transformers_weights")
"""Keys by which transformers reads other files in the place of these, which nobody has checked."""


@dataclass(frozen=True)
class Described:
    """What a directory holds.

    Args:
        model: The model.
        source: The layout of its tensors.
        keep_padding: The file has the rows that pad the vocabulary.
        exported: megagate wrote it.
        empty_shared_expert: The shared expert of its mixtures is of width 0, and is left out.
        max_positions: The longest sequence, in tokens, that it names; 0 where it names none.
    """

    model: ModelConfig
    source: Layout
    keep_padding: bool = False
    exported: bool = False
    empty_shared_expert: bool = False
    max_positions: int = 0


def describe(directory: Path) -> Described:
    """Read `config.json`.

    Raises:
        CheckpointError: It is missing or damaged, describes no model that megagate has, or contradicts itself.
    """
    path = directory / CONFIG
    settings = read_json(path)
    for key, value in _whole_numbers(settings):
        most = _MOST if key in _COUNTS else _LARGEST
        if abs(value) > most:
            raise _refusal(path, key, value, f"it may be {most} at most", "get the directory anew")
    kind, positions = settings.get("model_type"), settings.get("max_position_embeddings")
    source = target_of(path, kind)
    _require_architecture(path, settings, source)
    if settings.get("quantization_config"):
        raise _refusal(path, "quantization_config", "present", "weights are quantised", "give the unquantised checkpoint")
    for key in FOLLOWED:
        if key in settings:
            raise _refusal(path, key, settings[key], "it leads to other files than those that are checked", "remove the key")
    if REMOTE_MODEL_TYPE in settings:
        described = _exported(path, settings, source)
    elif source == "remote-code":
        raise CheckpointError(f"{path}: the key {REMOTE_MODEL_TYPE} with the model is missing, and to-hf writes it; export it again")
    else:
        described = _described_by(path, settings, source)
    try:
        check(RunConfig(model=described.model), world_size=1)
    except (ConfigError, TypeError) as error:  # the latter of a text where a number belongs, which not every class of theirs refuses
        hint = BASE_HINT.partition("{key}")[0]  # for who writes a config; this one was read
        reason = re.sub(rf"; {re.escape(hint)}\S+", "", str(error))
        raise CheckpointError(f"{path} describes a model that megagate does not train: {reason}; get the directory anew") from error
    return Described(**{**vars(described), "max_positions": positions if isinstance(positions, int) and positions > 0 else 0})


def _whole_numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """All of them, by the last part of their keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _whole_numbers(value)
        elif isinstance(value, int):
            yield key, value


def _refusal(path: Path, key: str, value: object, why: str, remedy: str = "such a model cannot be adopted") -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {_short(value)}, and {why}; {remedy}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def target_of(path: Path, kind: object) -> Target:
    """The class that the config in the file `path` names by its `model_type`.

    Raises:
        CheckpointError: It is none of those that are known.
    """
    known: dict[str, Target] = {REMOTE_MODEL_TYPE if target == "remote-code" else target: target for target in ARCHITECTURES}
    if not isinstance(kind, str) or kind not in known:
        raise _refusal(path, "model_type", kind, f"known are {', '.join(known)}", "only these can be read and compared")
    return known[kind]


def _require_architecture(path: Path, settings: Mapping[str, Any], source: Target) -> None:
    """The weights are those of a language model with its head, of the class that `model_type` names."""
    found = settings.get("architectures")
    if found is not None and found != [ARCHITECTURES[source]]:
        why = f"for model_type {settings['model_type']} it must be ['{ARCHITECTURES[source]}']"
        raise _refusal(path, "architectures", found, why, "give the directory of a causal language model")


# ---- what to-hf wrote


def _exported(path: Path, settings: Mapping[str, Any], source: Target) -> Described:
    said = settings[REMOTE_MODEL_TYPE]
    try:
        model = from_dict({"model": dict(said["model"])}).model
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: megagate.model is damaged, or of another version ({error}); export it again") from error
    if found := reasons(model, source):
        raise _refusal(path, "model_type", settings["model_type"], f"that class cannot hold megagate.model: {found[0]}", "export it again")
    keep_padding = settings.get("vocab_size") == model.padded_vocab_size != model.vocab_size
    positions = settings.get("max_position_embeddings")
    use = Use(max_positions=positions if isinstance(positions, int) else 1, keep_padding=keep_padding)
    expected = {"rope_scaling": None, **hf_config(model, source, use)}
    for key, value in expected.items():
        # What is absent was dropped by another tool's rewriting; it says nothing against the model.
        if key not in _USE_KEYS and key in settings and not _agrees(settings[key], value):
            why = f"by megagate.model it is {_short(value)}: the file contradicts itself"
            raise _refusal(path, key, settings[key], why, "export it again, or undo the change")
    return Described(model, source, keep_padding=keep_padding, exported=True)


def _agrees(found: object, expected: object) -> bool:
    """Whether a value is the expected one; a dict may have further keys."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return all(key in found and _agrees(found[key], value) for key, value in expected.items())
    return found == expected


# ---- what others wrote


class _Config:
    """transformers' configuration of the class, with its defaults, as something to demand values of."""

    def __init__(self, path: Path, values: Any) -> None:
        self.path, self.values = path, values

    def __getitem__(self, key: str) -> Any:
        return getattr(self.values, key, None)

    def require(self, key: str, *allowed: object, why: str) -> None:
        """Refuse any value of `key` but these."""
        if self[key] not in allowed:
            raise _refusal(self.path, key, self[key], why)

    def require_layers(self, kind: str, *, why: str) -> None:
        """Every layer is of this kind."""
        strange = [f"{found} (layer {layer})" for layer, found in enumerate(self["layer_types"] or ()) if found != kind]
        if strange:
            raise _refusal(self.path, "layer_types", f"{strange[0]}, one of {len(strange)} other than {kind}", why)


def _described_by(path: Path, settings: Mapping[str, Any], kind: Target) -> Described:
    try:
        return _foreign(path, settings, kind)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # what transformers' own checks let pass
        raise CheckpointError(f"{path}: a value is not of the kind that it has to be ({error}); get the directory anew") from error


def _foreign(path: Path, settings: Mapping[str, Any], kind: Target) -> Described:
    config = _Config(path, _defaults(path, settings, kind))
    config.require("attention_bias", False, None, why="megagate's projections have no biases")
    config.require("qkv_bias", False, None, why="megagate's projections have no biases")
    config.require("hidden_act", "silu", None, why="megagate's feed-forward is SwiGLU")
    gate, moe, source = _GATES[kind](config), MoEConfig(), kind
    if kind == "qwen3" and (gates := _released_gate(config)):
        gate, source = gates, "gated_attention"
    if kind in ("qwen3_moe", "qwen3_next"):
        moe = _mixture(config)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"] or hidden // max(1, heads),
        qk_norm=config["use_qk_norm"] in (True, None),
        gate=gate,
        rope=RopeConfig(base=_rope_base(config, kind)),
    )
    has_dense = not moe.num_experts or moe.first_dense_layers
    model = ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        num_layers=config["num_hidden_layers"],
        ffn_size=config["intermediate_size"] if has_dense else 0,
        tie_embeddings=bool(config["tie_word_embeddings"]),
        sandwich_norm=kind == "afmoe" or (kind == "lfm3" and config["use_sandwich_norm"]),
        norm_eps=float(config["rms_norm_eps"]),
        init_std=float(config["initializer_range"]) or ModelConfig.init_std,
        attention=attention,
        moe=moe,
    )
    empty = kind == "qwen3_next" and moe.num_experts > 0 and not moe.shared_ffn_size
    return Described(model, source, empty_shared_expert=empty)


def _defaults(path: Path, settings: Mapping[str, Any], kind: Target) -> Any:
    """The configuration object of transformers' own class."""
    import transformers  # noqa: PLC0415 - heavy, and needed for the defaults of others' configurations only

    if kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{path}: transformers {transformers.__version__} has no class for model_type {kind}; install a newer one")
    given = {key: value for key, value in settings.items() if key not in ("architectures", "auto_map", "model_type")}
    try:
        return transformers.CONFIG_MAPPING[kind](**given)
    except Exception as error:  # noqa: BLE001 - that library's checks raise many types
        told = " ".join(str(error).split())
        raise CheckpointError(f"{path}: transformers refuses this configuration of a {kind}: {told}; mend it, or get it anew") from error


def _qwen3(config: _Config) -> GateConfig:
    config.require_layers("full_attention", why="megagate has no sliding windows")
    return GateConfig()


def _qwen3_moe(config: _Config) -> GateConfig:
    config.require("sliding_window", None, why="megagate has no sliding windows")
    return GateConfig()


def _hybrid(config: _Config) -> GateConfig:
    config.require_layers("full_attention", why="megagate has no linear attention")
    config.require("attn_output_gate", True, None, why="the class of transformers ignores it and gates all the same")
    return GateConfig("G1", "elementwise")


def _lfm3(config: _Config) -> GateConfig:
    config.require_layers("full_attention", why="megagate has neither convolutions nor sliding windows")
    return GateConfig("G1", "headwise") if config["use_attention_gate"] else GateConfig()


def _afmoe(config: _Config) -> GateConfig:
    config.require_layers("sliding_attention", why="in its other layers the class has no rotary embedding")
    config.require("mup_enabled", False, None, why="megagate does not scale embeddings")
    if config["num_dense_layers"] < config["num_hidden_layers"]:
        layers = f"{config['num_dense_layers']} of {config['num_hidden_layers']}"
        raise _refusal(config.path, "num_dense_layers", layers, "the class's mixtures scale their routes, as megagate's do not")
    if config["sliding_window"] is not None and config["sliding_window"] < config["max_position_embeddings"]:
        why = f"that is less than max_position_embeddings ({config['max_position_embeddings']}), and megagate has no sliding windows"
        raise _refusal(config.path, "sliding_window", config["sliding_window"], why)
    return GateConfig("G1", "elementwise")


_GATES: Mapping[Target, Callable[[_Config], GateConfig]] = MappingProxyType(
    {"qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "qwen3_next": _hybrid, "qwen3_5_text": _hybrid, "lfm3": _lfm3, "afmoe": _afmoe}
)
"""What each class's gate is, after a check of its kinds of layers."""


def _released_gate(config: _Config) -> GateConfig | None:
    """The gate of the models released with arXiv 2505.06708; None for a stock model."""
    kinds = [kind for kind in ("headwise", "elementwise") if config[f"{kind}_attn_output_gate"]]
    if len(kinds) > 1:
        raise _refusal(config.path, "headwise_attn_output_gate", True, "so is elementwise_attn_output_gate", "set one of them")
    return GateConfig("G1", kinds[0]) if kinds else None


def _mixture(config: _Config) -> MoEConfig:
    """The experts; dense layers only before the first mixture."""
    layers, experts = config["num_hidden_layers"], config["num_experts"] or 0
    sparse_step, only_dense = config["decoder_sparse_step"], frozenset(config["mlp_only_layers"] or ())
    dense = [layer for layer in range(layers) if layer in only_dense or not experts or (layer + 1) % sparse_step]
    if len(dense) == layers:
        return MoEConfig()
    if dense != list(range(len(dense))):
        told = f"decoder_sparse_step ({sparse_step}) and mlp_only_layers ({_short(sorted(only_dense))}) make layers {_first(dense)} dense"
        raise CheckpointError(f"{config.path}: {told}, and megagate has dense layers before the first mixture only; it cannot be adopted")
    shared = config["shared_expert_intermediate_size"] or 0
    return MoEConfig(
        num_experts=experts,
        top_k=config["num_experts_per_tok"],
        ffn_size=config["moe_intermediate_size"],
        first_dense_layers=len(dense),
        shared_ffn_size=shared,
        shared_gate=shared > 0,
        renormalize=bool(config["norm_topk_prob"]),
    )


def _first(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:4])) + (", ..." if len(layers) > 4 else "")


def _rope_base(config: _Config, kind: Target) -> float:
    """The base of an unscaled rotary embedding of all channels."""
    rope = config["rope_parameters"] or {}
    if kind == "lfm3":
        rope = rope.get("full_attention", rope)
    for key, value in _rope_flaws(rope):
        why = "megagate's rotary embedding is neither scaled nor partial"
        raise _refusal(config.path, f"rope_parameters.{key}", value, why, "a model of a longer context cannot be adopted as it is")
    return float(rope["rope_theta"])


def _rope_flaws(rope: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    if rope.get("rope_type", "default") != "default":
        yield "rope_type", rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor", rope["partial_rotary_factor"]
    if "rope_theta" not in rope:
        yield "rope_theta", "absent"
