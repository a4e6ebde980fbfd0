"""Directories that would hang, fill the memory, or be read otherwise than they are meant: refused in a message, before any of it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_dirs import USE, random_state, require_verified, tensors_of, theirs_of, write_directory
from parity.variants import DENSE, MOE, VARIANTS
from safetensors.torch import load_file, save_file
from torch import Tensor

from megagate.checkpoint.hf.adopt import adopt
from megagate.checkpoint.hf.adopt_files import INDEX, SINGLE
from megagate.checkpoint.hf.hf_config import hf_config
from megagate.checkpoint.hf.ops import Zeros
from megagate.checkpoint.hf.table import Target
from megagate.config.model import ModelConfig
from megagate.errors import CheckpointError, ConfigError

SWITCH = next(model for model in VARIANTS.values() if model.attention.switch.switched)


def directory(folder: Path, model: ModelConfig = DENSE, target: Target = "qwen3_5_text") -> Path:
    return write_directory(folder, hf_config(model, target, USE), theirs_of(model, target, random_state(model)))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, kind: type[Exception] = CheckpointError, output: Path | None = None) -> str:
    with pytest.raises(kind) as caught:
        adopt(folder, output or folder.parent / "out")
    assert not (folder.parent / "out").exists()
    assert ";" in str(caught.value), "what and why; the remedy"
    return str(caught.value)


# ---- stacks of experts


def fused(change: dict[str, Tensor]) -> dict[str, Tensor]:
    state = random_state(MOE)
    theirs = {name: tensor for name, tensor in theirs_of(MOE, "qwen3_next", state).items() if ".experts." not in name}
    for layer in range(MOE.num_layers):
        for part, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            theirs[f"model.layers.{layer}.mlp.experts.{part}"] = state[f"master/layers.{layer}.moe.experts.{ours}"]
    return theirs | change


@pytest.mark.parametrize(
    ("part", "shape"),
    [("gate_up_proj", (8, 33, 32)), ("gate_up_proj", (7, 32, 32)), ("gate_up_proj", (10**12, 2, 0)), ("down_proj", (8, 16, 32))],
    ids=["odd", "fewer experts", "of nothing", "transposed"],
)
def test_a_stack_of_another_shape_is_not_cut_up(tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    name = f"model.layers.1.mlp.experts.{part}"
    write_directory(tmp_path / "hf", hf_config(MOE, "qwen3_next", USE), fused({name: torch.ones(shape)}))
    message = refused(tmp_path / "hf")
    assert f"{SINGLE}: {name} has the shape {list(shape)}, and by config.json the experts are [8, 32, " in message


def test_stacks_of_more_experts_than_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_directory(tmp_path / "hf", hf_config(MOE, "qwen3_next", USE), fused({}))
    matrices = MOE.num_layers * MOE.moe.num_experts * 3
    monkeypatch.setattr("megagate.checkpoint.hf.adopt_files._MOST_MATRICES", matrices - 1)
    assert f"its stacks hold {matrices} matrices, and {matrices - 1} are the most" in refused(tmp_path / "hf")
    monkeypatch.setattr("megagate.checkpoint.hf.adopt_files._MOST_MATRICES", matrices)
    assert require_verified(adopt(tmp_path / "hf", tmp_path / "out"))


# ---- files that are too large, or none


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    length = 4 << 30
    with (source / SINGLE).open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)  # without blocks on the disk
    assert f"it is said to have {length} bytes" in refused(source)


def test_a_config_that_is_no_small_file(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    path = source / "config.json"
    path.write_text(" " * (4 << 20) + path.read_text())
    assert "and may have 4,194,304 at most" in refused(source)
    path.unlink()
    path.symlink_to("/dev/null")
    assert "config.json must be a file, and is none" in refused(source)


@pytest.mark.parametrize("depth", [65, 100_000])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_nested_deeply(tmp_path: Path, name: str, depth: int) -> None:
    source = directory(tmp_path / "hf")
    if name == INDEX:
        (source / SINGLE).unlink()
    (source / name).write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    assert f"{name} is nested deeper than 64 levels" in refused(source)


@pytest.mark.parametrize(("file", "told"), [("x" * 300, "is missing, and"), ("x\0y", "must be the name of a file beside the index")])
def test_an_index_that_names_what_cannot_be_a_file(tmp_path: Path, file: str, told: str) -> None:
    source = directory(tmp_path / "hf")
    (source / SINGLE).unlink()
    (source / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    assert told in refused(source)


# ---- configs


def test_a_config_of_more_switched_projections_than_there_are_tensors(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", SWITCH, "remote-code")
    for count, told in ((40_000_000, "num_experts is 40000000, and it may be 65536 at most"), (60_000, "switched projections in each")):
        model = json.loads((source / "config.json").read_text())["megagate"]
        model["model"]["attention"]["switch"]["num_experts"] = count
        change_config(source, megagate=model)
        assert told in refused(source)


def test_zeros_of_any_size_take_no_memory() -> None:
    (zeros,) = Zeros(((1 << 20, 1 << 20),)).to_hf([])
    assert zeros.shape == (1 << 20, 1 << 20) and not zeros[3, :9].any()
    assert zeros.untyped_storage().nbytes() == 4


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    change_config(source, layer_types=["linear_attention"] * 10_000)
    message = refused(source)
    assert "layer_types is ['linear_attention', 'linear_attention'" in message and len(message) < 1000


def test_a_bad_value_of_others_is_not_answered_with_a_config_of_ours(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "hf", hf_config(DENSE, "qwen3_5_text", USE) | {"intermediate_size": 0}, {})
    settings = json.loads((source / "config.json").read_text())
    del settings["megagate"]
    (source / "config.json").write_text(json.dumps(settings))
    message = refused(source)
    assert "model.ffn_size (0) must be at least 1" in message and "--config" not in message


# ---- tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    source, name = directory(tmp_path / "hf"), "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(source / SINGLE)
    tensors[name][3, 5] = value
    save_file(tensors, source / SINGLE)
    assert f"{SINGLE}: {name} holds numbers that are not finite" in refused(source)


def test_double_precision_is_not_called_quantised(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    save_file({name: tensor.double() for name, tensor in load_file(source / SINGLE).items()}, source / SINGLE)
    message = refused(source)
    assert "is of the type F64, and weights must be F32, BF16 or F16; save them in fp32 first" in message and "quantised" not in message


def test_norms_in_16_bits_are_told_apart(tmp_path: Path) -> None:
    """What `w - 1` was rounded to there is a thousand times coarser than in fp32."""
    state = random_state(DENSE)
    theirs, config = theirs_of(DENSE, "qwen3_5_text", state), hf_config(DENSE, "qwen3_5_text", USE)
    wide = adopt(write_directory(tmp_path / "fp32", config, theirs), tmp_path / "out32")
    assert wide.below_half and wide.narrow == 0.0
    half = adopt(write_directory(tmp_path / "bf16", config, {name: one.bfloat16() for name, one in theirs.items()}), tmp_path / "out16")
    norms = {name: weight for name, weight in state.items() if name.endswith("norm.weight")}
    found = tensors_of(tmp_path / "out16")
    worst = max((found[name] - weight).abs().max().item() for name, weight in norms.items())
    assert half.below_half == 0 and worst > 1e-3
    assert worst <= half.narrow < 4 * worst


# ---- what was written


def test_a_checkpoint_that_is_damaged_is_not_verified(tmp_path: Path) -> None:
    done = adopt(directory(tmp_path / "hf"), tmp_path / "out")
    assert require_verified(done) == done.tensors
    path = next(done.folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"its bytes have the digest .* was recorded when it was saved"):
        require_verified(done)


# ---- the output


def test_names_that_no_folder_can_have(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, told in (("y" * 300, "(File name too long)"), ("x\0y", "(embedded null byte)"), ("dangling", "and it exists")):
        assert told in refused(source, ConfigError, tmp_path / name)


def test_folders_that_were_made_for_it_go_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = directory(tmp_path / "hf")
    (tmp_path / "there").mkdir()

    def end(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("megagate.checkpoint.rewrite.publish", end)
    for output in (tmp_path / "a" / "b" / "c", tmp_path / "there" / "c"):
        with pytest.raises(KeyboardInterrupt):
            adopt(source, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "there"]
    assert not any((tmp_path / "there").iterdir())


def test_dense_and_mixture_differ_in_what_is_a_stack(tmp_path: Path) -> None:
    """In a model without experts a tensor of that name is one that it has not."""
    name = "x.experts.gate_up_proj"
    theirs = theirs_of(DENSE, "qwen3_5_text", random_state(DENSE)) | {name: torch.ones(4, 2, 2)}
    source = write_directory(tmp_path / "hf", hf_config(DENSE, "qwen3_5_text", USE), theirs)
    assert f"{name} [4, 2, 2] in {SINGLE} is not in that model" in refused(source)
