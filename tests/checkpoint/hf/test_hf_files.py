"""What an export is made of: dtypes, the padded vocabulary, shards, every key of config.json, the tokenizer."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hf_exports import CASES, DENSE, ELEMENTWISE, MOE, clear_tokens, gated, language_model, load_theirs, masters, moe, run_config, save
from parity.sharded import assert_close
from safetensors import safe_open

from megagate.checkpoint import store
from megagate.checkpoint.hf.export import Export, export
from megagate.checkpoint.hf.hf_config import Use, hf_config
from megagate.checkpoint.hf.table import NO_SHARED_EXPERT, Target
from megagate.checkpoint.hf.targets import REMOTE
from megagate.config.model import ModelConfig
from megagate.data.manifest import Manifest, TokenizerIdentity, write_manifest
from megagate.data.tokenizer import TOKENIZER_NAME, Tokenizer
from megagate.errors import ConfigError, DataError

GATED = gated(replace(moe(shared_ffn_size=24, first_dense_layers=1), ffn_size=48), ELEMENTWISE)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, by safetensors' own reader."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        assert not found.keys() & held.keys()
        found |= held
    return found


def header_of(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file in their order."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    assert [entry["data_offsets"][0] for entry in header.values()] == [0, *(e["data_offsets"][1] for e in header.values())][:-1]
    return header


def config_of(done: Export) -> dict[str, Any]:
    return json.loads((done.folder / "config.json").read_text())


# ---- dtypes


def test_bf16_is_what_the_forward_pass_used(tmp_path: Path) -> None:
    """Masters rounded to bf16, whatever fp32 digits they have; norms less 1 only where bf16 holds that exactly, else in fp32."""
    ours = language_model(GATED)
    state = masters(ours)
    name, wide = "master/layers.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"
    for each, tensor in state.items():
        if "norm" in each:
            tensor.copy_(torch.linspace(0.51, 1.9, tensor.numel()))
    state[name][3] = 0.1
    run = save(tmp_path / "run", state, run_config(GATED, dtype="bf16"))
    done = export(run, tmp_path / "hf")
    weight = state[name].bfloat16().float()
    off = (((weight - 1).bfloat16().float() + 1 - weight) / weight).abs().max().item()
    assert done.dtype == "bf16" and done.wide == {wide: pytest.approx(off, rel=1e-6)} and done.rounded == {} and 5e-3 < off < 0.1
    assert {key: config_of(done)[key] for key in ("dtype", "torch_dtype")} == {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    found = tensors_of(done.folder)
    assert {each for each, tensor in found.items() if tensor.dtype != torch.bfloat16} == {wide}
    assert torch.equal(found[wide], state[name].bfloat16().float() - 1)
    assert next(iter(header_of(done.folder / "model.safetensors"))) == wide, "larger items first, so that all are aligned"
    used = {each: tensor.bfloat16().float() for each, tensor in state.items()}
    assert torch.equal(found["model.embed_tokens.weight"].float(), used["master/embedding.weight"][:200])
    assert torch.equal(found["model.norm.weight"].float() + 1, used["master/final_norm.weight"])
    assert not torch.equal(found["model.norm.weight"].float() + 1, state["master/final_norm.weight"]), "there was something to round"
    ours.load_state_dict({each.removeprefix("master/"): tensor for each, tensor in used.items()})
    theirs, said = load_theirs(done.folder)
    tokens = clear_tokens(ours)
    with torch.no_grad():
        assert_close(theirs(tokens).logits, ours.logits(tokens)[..., :200], to=1e-5, what="logits")

    fp32 = export(run, tmp_path / "fp32", dtype="fp32")
    assert fp32.dtype == "fp32" and fp32.wide == {} and config_of(fp32)["dtype"] == "float32"
    assert {tensor.dtype for tensor in tensors_of(fp32.folder).values()} == {torch.float32}
    assert torch.equal(tensors_of(fp32.folder)["model.embed_tokens.weight"], state["master/embedding.weight"][:200])


def test_norms_that_fp32_rounds_are_told(tmp_path: Path) -> None:
    state = masters(language_model(GATED))
    norm = state["master/layers.0.attention.q_norm.weight"]
    norm.copy_(torch.tensor([0.1, 0.7, 1.5, 0.5, 1e-3, 0.75, 2.0, 1.0]))
    done = export(save(tmp_path / "run", state, run_config(GATED)), tmp_path / "hf")
    (told,) = done.rounded.items()
    back = tensors_of(done.folder)["model.layers.0.self_attn.q_norm.weight"].double() + 1
    assert told == ("model.layers.0.self_attn.q_norm.weight", pytest.approx(((back - norm).abs() / norm).max().item()))
    assert 1e-6 < told[1] < 2**-25 / 1e-3, "half a unit of w - 1"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_numbers_that_are_not_finite_are_counted(tmp_path: Path, dtype: str) -> None:
    """Those of the checkpoint, those that bf16 cannot hold, and those that doubling makes; not numbers that are only large."""
    model = moe(shared_ffn_size=24)
    state = masters(language_model(model))
    state["master/layers.0.attention.k.weight"][0, :3] = torch.tensor([float("inf"), float("nan"), float("inf")])
    state["master/layers.1.attention.k.weight"][1] = -float("inf")
    state["master/layers.1.attention.v.weight"][2, 5] = 3.4e38  # rounds to infinity in bf16
    state["master/layers.1.attention.o.weight"][1, 1] = 2e38  # is doubled
    state["master/layers.0.attention.v.weight"][0, 0] = -3.3e38
    done = export(save(tmp_path / "run", state, run_config(model, dtype=dtype)), tmp_path / "hf")
    expected = {"0.self_attn.k_proj": 3, "1.self_attn.k_proj": 32, "1.self_attn.o_proj": 1}
    expected |= {"1.self_attn.v_proj": 1} if dtype == "bf16" else {}
    assert done.broken == {f"model.layers.{name}.weight": count for name, count in expected.items()}


def test_counts_of_a_routers_bias_are_whole_numbers_in_any_dtype(tmp_path: Path) -> None:
    model = moe(bias_update_rate=0.02)
    state = masters(language_model(model))
    done = export(save(tmp_path / "run", state, run_config(model, dtype="bf16")), tmp_path / "hf")
    found = tensors_of(done.folder)["model.layers.1.mlp.gate.bias_steps"]
    assert done.target == REMOTE and found.dtype == torch.int32 and found.any()
    assert torch.equal(found, state["state/layers.1.moe.router.bias_steps"])


# ---- the vocabulary


@pytest.mark.parametrize("tied", [False, True])
def test_a_padded_vocabulary_is_trimmed_or_kept(tmp_path: Path, tied: bool) -> None:
    model = replace(DENSE, vocab_size=50_257, hidden_size=8, num_layers=1, tie_embeddings=tied)
    ours = language_model(model)
    run = save(tmp_path / "run", masters(ours), run_config(model))
    trimmed, kept = export(run, tmp_path / "trimmed"), export(run, tmp_path / "kept", keep_padding=True)
    assert (trimmed.padding, kept.padding) == (47 if tied else 94, 0)
    tokens = torch.tensor([[0, 50_256, 31_337]])
    for done, size in ((trimmed, 50_257), (kept, 50_304)):
        found = tensors_of(done.folder)
        assert {name: len(tensor) for name, tensor in found.items() if "embed" in name or "head" in name} == {
            "model.embed_tokens.weight": size,
            **({} if tied else {"lm_head.weight": size}),
        }
        theirs, said = load_theirs(done.folder)
        assert config_of(done)["vocab_size"] == size and not any(said.values())
        with torch.no_grad():
            assert_close(theirs(tokens).logits[..., :50_257], ours.logits(tokens)[..., :50_257], to=1e-5)


# ---- shards


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    run = save(tmp_path / "run", masters(language_model(GATED)), run_config(GATED))
    whole, cut = export(run, tmp_path / "whole"), export(run, tmp_path / "cut", max_shard_size="20KB")
    assert [name for name in whole.files if "model" in name] == ["model.safetensors"]
    shards = [name for name in cut.files if name.endswith(".safetensors")]
    assert len(shards) > 5 and cut.files == {path.name: path.stat().st_size for path in cut.folder.iterdir()}
    one, many = tensors_of(whole.folder), tensors_of(cut.folder)
    assert one.keys() == many.keys() and len(one) == whole.tensors == cut.tensors
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
    index = json.loads((cut.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert index["weight_map"].keys() == one.keys() and set(index["weight_map"].values()) == set(shards)
    for name in shards:
        with safe_open(cut.folder / name, "pt") as file:
            held = list(file.keys())
        assert all(index["weight_map"][each] == name for each in held)
        assert len(held) == 1 or sum(one[each].nbytes for each in held) <= 20_000
    theirs, said = load_theirs(cut.folder)
    assert not any(said.values())


def test_blocks_of_a_large_tensor_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megagate.checkpoint.hf import shards

    run = save(tmp_path / "run", masters(language_model(GATED)), run_config(GATED, dtype="bf16"))
    whole = export(run, tmp_path / "whole")
    monkeypatch.setattr(shards, "_BLOCK", 3 * 4 * GATED.hidden_size + 1)
    cut = export(run, tmp_path / "cut")
    assert (whole.folder / "model.safetensors").read_bytes() == (cut.folder / "model.safetensors").read_bytes()


# ---- config.json

OTHER_LAYERS = {"linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"}
OTHER_LAYERS |= {"conv_bias", "conv_L_cache"}  # of kinds that no layer of ours is
MIXTURE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "route_scale", "output_router_logits"}
CLASSES: dict[Target, tuple[str, set[str]]] = {
    "qwen3": ("Qwen3Config", set()),
    "qwen3_moe": ("Qwen3MoeConfig", set()),
    "qwen3_next": ("Qwen3NextConfig", OTHER_LAYERS),
    "qwen3_5_text": ("Qwen3_5TextConfig", OTHER_LAYERS),
    "lfm3": ("Lfm3Config", OTHER_LAYERS),
    "afmoe": ("AfmoeConfig", MIXTURE),  # no layer is a mixture
}
"""The config of each class, and its fields that an export may leave at their defaults."""


@pytest.mark.parametrize("target", [target for target in get_args(Target) if target != REMOTE])
def test_every_key_with_a_default_is_written_and_read_back(target: Target) -> None:
    import transformers

    model = next(model for model, of in CASES.values() if of == target)
    values = hf_config(model, target, Use(64, "bfloat16", eos_id=3, pad_id=4))
    name, left_out = CLASSES[target]
    kind = getattr(transformers, name)
    own = {field.name for field in fields(kind)} - {field.name for field in fields(transformers.PreTrainedConfig)}
    assert own - left_out - values.keys() == set()
    config = kind(**values)
    read = {"eos_token_id": 3, "pad_token_id": 4, "max_position_embeddings": 64, "vocab_size": 200, "head_dim": 8, "rms_norm_eps": 1e-5}
    assert {key: getattr(config, key) for key in read} == read
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    assert rope["rope_theta"] == 1000.0 and rope["rope_type"] == "default"
    assert rope.get("partial_rotary_factor", 1.0) == 1.0
    assert config.megagate["model"] == values["megagate"]["model"] and values["megagate"]["format"] == 1
    older = {"rope_theta": 1000.0, "torch_dtype": "bfloat16"}  # transformers 4 and SGLang
    assert {key: values[key] for key in older} == older


def test_keys_that_serving_reads() -> None:
    plain = hf_config(gated(MOE, ELEMENTWISE), "qwen3_next", Use(64))
    expected = {
        "full_attention_interval": 1,  # SGLang
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention"] * 2,
        "shared_expert_intermediate_size": NO_SHARED_EXPERT,  # vLLM builds none of width 0, and would not know the tensors
        "num_experts": 8,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    assert {key: plain[key] for key in expected} == expected
    first = hf_config(replace(moe(first_dense_layers=1, renormalize=False), ffn_size=48), "qwen3_moe", Use(64))
    assert first["mlp_only_layers"] == [0] and first["intermediate_size"] == 48 and first["norm_topk_prob"] is False
    lfm3 = hf_config(CASES["dense, sandwich, headwise"][0], "lfm3", Use(64))
    assert lfm3["norm_eps"] == lfm3["rms_norm_eps"] == 1e-5 and lfm3["use_sandwich_norm"] and lfm3["use_attention_gate"]
    afmoe = hf_config(CASES["dense, sandwich, elementwise, tied"][0], "afmoe", Use(1 << 21))
    assert afmoe["sliding_window"] >= 1 << 21 and afmoe["layer_types"] == ["sliding_attention"] * 2


# ---- the tokenizer

TEXTS = ["the gate opens, the gate closes: été\n", "a mixture of experts"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


def data_set(folder: Path, identity: TokenizerIdentity) -> Path:
    folder.mkdir(exist_ok=True)
    write_manifest(folder, Manifest(identity, dtype="uint16", shards=(), source={}))
    return folder


def exported(tmp_path: Path, path: str, *, model: ModelConfig | None = None, **options: Any) -> Export:
    model = model or replace(DENSE, vocab_size=300)
    return export(save(tmp_path / "run", masters(language_model(model)), run_config(model, path=path)), tmp_path / "hf", **options)


@pytest.mark.parametrize("named", ["data set", "blend", "file", "folder"])
def test_the_tokenizer_comes_along(tmp_path: Path, tokenizer: Tokenizer, named: str) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "data").mkdir()
    folder = data_set(tmp_path / "data", tokenizer.save(tmp_path / "data" / TOKENIZER_NAME))
    path = {"data set": str(folder), "blend": f"0.3 {folder} 0.7 /no/where"}.get(named, "synthetic")
    own = {"file": str(folder / TOKENIZER_NAME), "folder": str(folder)}.get(named)
    done = exported(tmp_path, path, tokenizer=own, max_positions=77)
    assert done.tokenizer == str(folder / TOKENIZER_NAME)
    theirs = AutoTokenizer.from_pretrained(done.folder)
    for text in TEXTS[:2]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text) and theirs.decode(tokenizer.encode(text)) == text
    ids = {"eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.pad_id}
    assert {"eos_token_id": theirs.eos_token_id, "pad_token_id": theirs.pad_token_id} == ids and theirs.model_max_length == 77
    generation = json.loads((done.folder / "generation_config.json").read_text())
    assert ids.items() <= config_of(done).items() and ids.items() <= generation.items()
    assert config_of(done)["max_position_embeddings"] == 77
    model, _ = load_theirs(done.folder)
    assert model.generation_config.eos_token_id == tokenizer.eod_id


def own_tokenizer(tmp_path: Path, tokenizer: Tokenizer, files: dict[str, str]) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(folder / TOKENIZER_NAME)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def test_its_own_files_come_along_where_it_has_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    files = {
        "tokenizer_config.json": json.dumps(config),
        "chat_template.jinja": template,
        "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
    }
    done = exported(tmp_path, "synthetic", tokenizer=str(own_tokenizer(tmp_path, tokenizer, files | {"other.json": "{}"})))
    assert {name: (done.folder / name).read_text() for name in files} == files, "byte for byte"
    assert not (done.folder / "other.json").exists()
    theirs = AutoTokenizer.from_pretrained(done.folder)
    assert theirs.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "[ab]"


@pytest.mark.parametrize("code", [False, True], ids=["of transformers 5", "with code"])
def test_its_config_is_written_for_transformers_4_and_5(tmp_path: Path, tokenizer: Tokenizer, code: bool) -> None:
    """Without names that only version 5 knows (4.57.6 fails on each of the two), and without code that does not come along."""
    from transformers import AutoTokenizer

    own = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|endoftext|>", "extra_special_tokens": ["<|pad|>"]}
    if code:
        own |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    folder = own_tokenizer(tmp_path, tokenizer, {"tokenizer_config.json": json.dumps(own)})
    done = exported(tmp_path, "synthetic", tokenizer=str(folder))
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "additional_special_tokens": ["<|pad|>"]}
    assert json.loads((done.folder / "tokenizer_config.json").read_text()) == expected
    theirs = AutoTokenizer.from_pretrained(done.folder)
    assert theirs(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0]) and tokenizer.pad_id in theirs.all_special_ids


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"], ids=["no object", "no JSON", "no UTF-8"])
def test_a_damaged_config_of_a_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer, content: bytes) -> None:
    (tmp_path / "data").mkdir()
    folder = data_set(tmp_path / "data", tokenizer.save(tmp_path / "data" / TOKENIZER_NAME))
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"data/tokenizer_config\.json must be a JSON object; put the tokenizer's own back"):
        exported(tmp_path, str(folder))


def test_without_a_tokenizer_it_is_said_why(tmp_path: Path) -> None:
    from megagate.data.byte_tokenizer import ByteTokenizer

    plain = exported(tmp_path / "a", "synthetic")
    assert plain.tokenizer == "none: data.path synthetic has ids without text" and not (plain.folder / TOKENIZER_NAME).exists()
    folder = data_set(tmp_path / "bytes", ByteTokenizer().identity())
    of_bytes = exported(tmp_path / "b", str(folder))
    assert of_bytes.tokenizer.startswith("none: the built-in tokenizer of bytes") and config_of(of_bytes)["eos_token_id"] == 256
    assert not (of_bytes.folder / "tokenizer_config.json").exists()
    assert exported(tmp_path / "c", "/no/where", tokenizer="none").tokenizer == "none, as --tokenizer none asks"


def test_a_tokenizer_that_is_not_there_or_not_the_models_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data\.path \(/no/where\), whose tokenizer the export needs, .* --tokenizer none exports without"):
        exported(tmp_path, "/no/where")
    with pytest.raises(DataError, match=r"embedded, whose tokenizer the export needs, lies neither in .* nor in .*run/data; --tokenizer"):
        exported(tmp_path / "b", "embedded")
    (tmp_path / "c").mkdir()
    tokenizer.save(tmp_path / "c" / TOKENIZER_NAME)
    with pytest.raises(ConfigError, match=rf"has {tokenizer.vocab_size} tokens, and model\.vocab_size is 200; it is not the one"):
        exported(tmp_path / "c", "synthetic", model=DENSE, tokenizer=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match=r"the tokenizer bytes has 258 tokens, and model\.vocab_size is 200"):
        exported(tmp_path / "d", "synthetic", model=DENSE, tokenizer="bytes")
    assert not list(tmp_path.rglob("hf")) and not list(tmp_path.rglob(".hf*"))


def test_the_embedded_tokenizer_is_found_where_the_run_lies_now(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "run" / "data" / "embedded-300-0123456789abcdef"
    place.mkdir(parents=True)
    data_set(place, tokenizer.save(place / TOKENIZER_NAME))
    assert exported(tmp_path, "embedded").tokenizer == str(place / TOKENIZER_NAME)
    step = store.resolve(tmp_path / "run")
    (tmp_path / "linked").symlink_to(step)
    monkeypatch.chdir(step)
    for number, source in enumerate((Path(), Path(".."), Path("../.."), tmp_path / "linked")):
        assert (place / TOKENIZER_NAME).samefile(export(source, tmp_path / f"hf{number}").tokenizer)
