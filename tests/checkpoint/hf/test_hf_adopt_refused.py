"""Directories that are damaged, incomplete or contradict themselves: one message each, and nothing is left behind."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_dirs import USE, export_of, random_state, theirs_of, write_directory
from parity.variants import DENSE, MOE, with_gate, with_moe
from torch import Tensor

from megagate.checkpoint.hf.adopt import adopt
from megagate.checkpoint.hf.hf_config import hf_config
from megagate.checkpoint.hf.table import Target
from megagate.config.model import GateConfig, ModelConfig
from megagate.errors import CheckpointError, ConfigError, RunError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST = "model.layers.0"
QUERIES = f"{FIRST}.self_attn.q_proj.weight"
HEADWISE = with_gate(GateConfig("G1", "headwise"))
NO_SHARED = with_moe(shared_ffn_size=0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(source: Path, output: Path, kind: type[Exception] = CheckpointError) -> str:
    """The message; no file or folder is made or changed."""
    top, before = output.parent, files(output.parent)
    folders = sorted(path for path in top.rglob("*") if path.is_dir())
    with pytest.raises(kind) as caught:
        adopt(source, output)
    assert files(top) == before
    assert sorted(path for path in top.rglob("*") if path.is_dir()) == folders
    assert ";" in str(caught.value), "what and why; the remedy"
    return str(caught.value)


def directory(folder: Path, model: ModelConfig = MOE, target: Target = "qwen3_next", *, shards: int = 1) -> Path:
    return write_directory(folder, hf_config(model, target, USE), theirs_of(model, target, random_state(model)), shards=shards)


# ---- config.json


def test_what_is_no_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "missing does not exist; give the directory" in refused(tmp_path / "missing", out)
    (tmp_path / "file").write_text("x")
    assert "file is a file; give" in refused(tmp_path / "file", out)
    source = directory(tmp_path / "hf")
    config = source / "config.json"
    content = config.read_text()
    for text, told in (("{", "is not JSON"), ("[1]", "must be a JSON object, and is a list"), ("\xff", "is not JSON")):
        config.write_bytes(text.encode("latin1"))
        message = refused(source, out)
        assert message.startswith(str(config)) and told in message
    config.write_text(content)
    config.rename(source / "other.json")
    assert "config.json cannot be read (No such file or directory); give" in refused(source, out)


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "num_hidden_layers": (10**30, "it may be 65536 at most"),
    "hidden_size": (64, "by megagate.model it is 32"),
    "vocab_size": (251, "by megagate.model it is 250"),
    "num_experts_per_tok": (2, "by megagate.model it is 3"),
    "norm_topk_prob": (False, "by megagate.model it is True"),
    "rope_theta": (5e5, "by megagate.model it is 10000.0"),
    "rope_parameters": ({"rope_type": "yarn", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}, "rope_parameters is {"),
    "rope_scaling": ({"rope_type": "yarn", "factor": 4.0}, "by megagate.model it is None"),
    "tie_word_embeddings": (True, "by megagate.model it is False"),
    "layer_types": (["full_attention", "linear_attention"], "layer_types is ['full_attention', 'linear_attention']"),
    "partial_rotary_factor": (0.25, "by megagate.model it is 1.0"),
    "rms_norm_eps": (1e-5, "by megagate.model it is 1e-06"),
    "architectures": (["Qwen3NextModel"], "it must be ['Qwen3NextForCausalLM']"),
    "quantization_config": ({"quant_method": "fp8"}, "weights are quantised"),
    "model_type": ("qwen3_moe", "for model_type qwen3_moe it must be ['Qwen3MoeForCausalLM']"),
    "megagate": ({"format": 1, "model": {"hidden": 3}}, "megagate.model is damaged, or of another version"),
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_a_config_that_contradicts_itself(tmp_path: Path, key: str) -> None:
    source = directory(tmp_path / "hf")
    path = source / "config.json"
    value, told = CONTRADICTIONS[key]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    message = refused(source, tmp_path / "out")
    assert message.startswith(f"{path}: ") and told in message
    assert key in message or key == "model_type"


def test_a_class_that_cannot_hold_the_model(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}))
    told = "model_type is qwen3_moe, and that class cannot hold megagate.model: model.attention.gate.position (G1)"
    assert told in refused(source, tmp_path / "out")


def test_a_config_that_was_rewritten_without_some_keys_says_the_same(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    path = source / "config.json"
    settings = json.loads(path.read_text())
    for key in ("rope_theta", "partial_rotary_factor", "full_attention_interval", "torch_dtype", "dtype"):
        del settings[key]
    path.write_text(json.dumps(settings | {"transformers_version": "5.23.0", "max_position_embeddings": 32, "eos_token_id": 3}))
    assert adopt(source, tmp_path / "out").config.model == MOE


def test_our_own_code_without_the_model(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", target="remote-code")
    path = source / "config.json"
    settings = json.loads(path.read_text())
    del settings["megagate"]
    path.write_text(json.dumps(settings))
    assert "the key megagate with the model is missing" in refused(source, tmp_path / "out")


# ---- tensors that are not those of the config


Change = Callable[[dict[str, Tensor]], None]


def without(name: str) -> Change:
    return lambda theirs: theirs.__delitem__(name)


def put(name: str, tensor: Tensor) -> Change:
    return lambda theirs: theirs.__setitem__(name, tensor)


def raise_one(name: str) -> Change:
    def change(theirs: dict[str, Tensor]) -> None:
        theirs[name] = theirs[name].clone()
        theirs[name].view(-1)[-1] += 0.5

    return change


TENSORS: dict[str, tuple[ModelConfig, Target, Change, str]] = {
    "a missing expert": (MOE, "qwen3_next", without(f"{FIRST}.mlp.experts.5.up_proj.weight"), "experts.5.up_proj.weight [16, 32] is"),
    "a missing norm": (MOE, "qwen3_next", without(f"{FIRST}.self_attn.q_norm.weight"), "self_attn.q_norm.weight [8] is missing"),
    "an extra tensor": (MOE, "qwen3_next", put("mtp.fc.weight", torch.ones(3)), "mtp.fc.weight [3] in model.safetensors is not"),
    "a bias": (MOE, "qwen3_next", put(f"{FIRST}.self_attn.q_proj.bias", torch.ones(64)), "q_proj.bias [64] in model.safetensors is not"),
    "a shape": (MOE, "qwen3_next", put("lm_head.weight", torch.ones(256, 32)), "has the shape [256, 32], not [250, 32]"),
    "one expert more": (
        MOE,
        "qwen3_next",
        put(f"{FIRST}.mlp.experts.8.up_proj.weight", torch.ones(16, 32)),
        "experts.8.up_proj.weight [16, 32] in model.safetensors is not",
    ),
    "gates that differ within a head": (HEADWISE, "qwen3_5_text", raise_one(QUERIES), "one row per head, repeated"),
    "a gate where there is none": (
        with_gate(GateConfig()),
        "qwen3_5_text",
        raise_one(QUERIES),
        "by the config the gate's rows are 0",
    ),
    "a shared expert where there is none": (
        NO_SHARED,
        "qwen3_next",
        raise_one(f"{FIRST}.mlp.shared_expert.down_proj.weight"),
        "by the config this is 0, and it is not",
    ),
    "a head that is not the tied embedding": (
        replace(DENSE, tie_embeddings=True),
        "qwen3_5_text",
        put("lm_head.weight", torch.ones(250, 32)),
        "by the config's tie_word_embeddings they are one",
    ),
    "whole numbers": (MOE, "qwen3_next", put("lm_head.weight", torch.ones(250, 32, dtype=torch.int8)), "lm_head.weight is of the type I8"),
    "8 bits": (
        MOE,
        "qwen3_next",
        put("lm_head.weight", torch.ones(250, 32).to(torch.float8_e4m3fn)),
        "lm_head.weight is of the type F8_E4M3, and weights must be F32, BF16 or F16",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_the_models(tmp_path: Path, name: str) -> None:
    model, target, change, told = TENSORS[name]
    theirs = theirs_of(model, target, random_state(model))
    change(theirs)
    source = write_directory(tmp_path / "hf", hf_config(model, target, USE), theirs)
    message = refused(source, tmp_path / "out")
    assert message.startswith(str(source)) and told in message


# ---- files


def test_files_that_are_damaged(tmp_path: Path) -> None:
    source, out = directory(tmp_path / "hf"), tmp_path / "out"
    path = source / WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
        other = json.loads(json.dumps(header))
        change(other)
        text = json.dumps(other).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    entry, keys, values = "lm_head.weight", f"{FIRST}.self_attn.k_proj.weight", f"{FIRST}.self_attn.v_proj.weight"
    for damaged, told in (
        (content[:-1], "its tensors have"),
        (content[:20], "its header is damaged"),
        (b"", "its header is damaged"),
        (b"\xff" * 8 + content[8:], "its header is damaged"),
        (content[:8] + b"x" + content[9:], "its header is damaged"),
        (content + b"\0", "its tensors have"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "its header is damaged"),
        (with_header(lambda other: other[entry].pop("dtype")), "its header is damaged"),
        (with_header(lambda other: other[entry].update(dtype="F5")), "lm_head.weight is of the type F5"),
        (with_header(lambda other: other[entry].update(shape=[3, 3])), "a tensor of shape (3, 3) and F32 takes 36 bytes, not 32000"),
        (with_header(lambda other: other[entry].update(shape="x")), "must be whole numbers"),
        (with_header(lambda other: other[entry].update(data_offsets=[-4, 4])), "must be whole numbers"),
        (with_header(lambda other: other.update(more=other[entry])), "what stands before it ends at"),
        (with_header(lambda other: other[keys].update(data_offsets=other[values]["data_offsets"])), "what stands before it ends at"),
    ):
        path.write_bytes(damaged)
        message = refused(source, out)
        assert message.startswith(f"{path}: ") and told in message
    path.write_bytes(content)
    adopt(source, out)


def test_shards_that_do_not_fit_together(tmp_path: Path) -> None:
    source, out = directory(tmp_path / "hf", shards=3), tmp_path / "out"
    index, first, second = source / INDEX, *sorted(source.glob("model-*"))[:2]
    content = json.loads(index.read_text())
    names = [name for name, file in content["weight_map"].items() if file == first.name]

    def with_map(**changes: object) -> str:
        return json.dumps(content | {"weight_map": {**content["weight_map"], **changes}})

    for text, told in (
        (with_map(**{names[0]: "no.safetensors"}), f"no.safetensors is missing, and {INDEX} names it for 1 tensors, {names[0]} among them"),
        (with_map(**{names[0]: second.name}), f"{names[0]} is in {first.name}, {INDEX} names {second.name}"),
        (with_map(ghost=first.name), f"ghost is not in {first.name}, which {INDEX} names for it"),
        (with_map(**{names[0]: "../hf/" + first.name}), "must be the name of a file beside the index"),
        (with_map(**{names[0]: 3}), "weight_map must map names of tensors to names of files"),
        ("{}", "weight_map must map"),
        ("{", "is not JSON"),
    ):
        index.write_text(text)
        assert told in refused(source, out)
    index.write_text(json.dumps(content))
    moved = first.rename(source / "away")
    assert f"{first} is missing, and {INDEX} names it for {len(names)} tensors" in refused(source, out)
    shutil.copy(second, first)
    assert f"is in {first.name} and in {second.name}, and each may be there once" in refused(source, out)
    moved.rename(first)
    shutil.copy(first, source / WEIGHTS)
    assert f"holds both {WEIGHTS} and {INDEX}" in refused(source, out)
    (source / WEIGHTS).unlink()
    index.unlink()
    assert f"holds 3 files such as {first.name}, and neither" in refused(source, out)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    (source / WEIGHTS).unlink()
    assert "holds no weights" in refused(source, tmp_path / "out")
    torch.save({"x": torch.ones(1)}, source / "pytorch_model.bin")
    message = refused(source, tmp_path / "out")
    assert "holds weights as pickles" in message and "save_pretrained(NEW) writes safetensors" in message


# ---- the output


def test_outputs_that_cannot_be_taken(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for output, told in (
        (tmp_path / "full", "must be a new or an empty folder, and it exists"),
        (source, "must be a new or an empty folder, and it exists"),
        (source / "new", f"must not lie in the directory that is read ({source})"),
        (tmp_path / "step-00000003", "step-* names one of them"),
    ):
        message = refused(source, output, ConfigError)
        assert message.startswith(f"OUT ({output}) ") and told in message
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(source, tmp_path / "file" / "b", RunError)
    (tmp_path / "made").mkdir()
    assert adopt(source, tmp_path / "made").folder.parent == tmp_path / "made"


@pytest.mark.parametrize("stays_full", [True, False])
def test_without_space_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays_full: bool) -> None:
    """A disk that is full from some write on, and one on which another program makes room again after a single failure."""
    source, write, left = export_of(tmp_path / "hf", MOE, "qwen3_next", random_state(MOE)), os.write, 0

    def until_full(descriptor: int, data: memoryview) -> int:
        nonlocal left
        left -= 1
        if left < 0 and (stays_full or left == -1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr("megagate.checkpoint.hf.adopt._FILE_BYTES", 10_000)
    monkeypatch.setattr(os, "write", until_full)
    for writes in (0, 1, 2, 5, 20, 60):
        left = writes
        assert "no space" in refused(source, tmp_path / "out", RunError)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = directory(tmp_path / "hf")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megagate.checkpoint.rewrite.publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adopt(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
