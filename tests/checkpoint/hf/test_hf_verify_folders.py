"""What lies in a folder beside its weights: code is not run, another config is not followed, and small files that are wrong are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from exports import Config, Exported, Tensors, exported, spoil
from hf_exports import DENSE, MOE
from remote_models import ALL_VARIANTS

from megagate.checkpoint.hf.adopt import adopt
from megagate.checkpoint.hf.verify import verify_adopted, verify_export
from megagate.errors import CheckpointError

REMOTE = ALL_VARIANTS["gate position G2"]
LITTLE = 1000
"""Bytes: no two models fit into them."""


def edit(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def longer(folder: Path, code: str) -> None:
    path = folder / "modeling_megagate.py"
    path.write_text(path.read_text() + code)


def beside(folder: Path, code: str) -> None:
    (folder / "other.py").write_text(code)


def below(folder: Path, code: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "evil.py").write_text(code)


def of_generation(folder: Path, code: str) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{code}\ndef generate(model, *args, **options):\n    {code}\n")


def mapped(folder: Path, code: str) -> None:
    below(folder, code)
    edit(folder, auto_map={"AutoConfig": "sub/evil.E", "AutoModelForCausalLM": "modeling_megagate.MegagateForCausalLM"})


def mapped_elsewhere(folder: Path, code: str) -> None:
    """By a second config, to which the first leads."""
    mine = (folder / "config.json").read_text()
    mapped(folder, code)
    (folder / "config.4.0.0.json").write_text((folder / "config.json").read_text())
    (folder / "config.json").write_text(mine)
    edit(folder, configuration_files=["config.4.0.0.json"])


def lost(folder: Path, _: str) -> None:
    (folder / "modeling_megagate.py").unlink()


CHANGES = [longer, beside, below, of_generation, mapped, mapped_elsewhere, lost]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_code_that_is_not_ours_is_not_run(change: Callable, tmp_path: Path, modules_cache: Path) -> None:
    made, trace = exported(tmp_path, REMOTE), tmp_path / "was_run"
    adopt(made.folder, tmp_path / "new")
    change(made.folder, f"open({str(trace)!r}, 'w').close()")
    name = {"below": "sub/evil.py", "mapped": "sub/evil.py", "mapped_elsewhere": "sub/evil.py", "beside": "other.py"}
    name |= {"of_generation": "custom_generate/generate.py"}
    told = name.get(change.__name__, "modeling_megagate.py")
    for found in (verify_export(*made), verify_adopted(made.folder, tmp_path / "new")):
        assert not found.passed and found.logits is None, found
        if "mapped" not in change.__name__:
            assert found.tensors and len(found.flaws) == 1 and found.flaws[0].startswith(told), found.flaws
    assert not trace.exists() and not list(modules_cache.rglob("*.py"))


@pytest.mark.parametrize("change", [beside, of_generation, mapped_elsewhere], ids=lambda change: change.__name__)
@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "streamed"])
def test_nothing_of_the_folder_but_config_and_weights_reaches_transformers(change, memory, tmp_path, modules_cache, monkeypatch) -> None:
    """Even where the check of the code in the folder lets it pass."""
    made, trace = exported(tmp_path, REMOTE), tmp_path / "was_run"
    change(made.folder, f"open({str(trace)!r}, 'w').close()")
    monkeypatch.setattr("megagate.checkpoint.hf.verify.foreign_code", lambda _: [])
    found = verify_export(*made, memory=memory)
    assert found.logits is not None and found.logits.flaw is None and not trace.exists()


@pytest.mark.parametrize("key", ["configuration_files", "transformers_weights"])
def test_keys_that_lead_to_other_files_are_refused(key: str, tmp_path: Path) -> None:
    made = exported(tmp_path, DENSE)
    edit(made.folder, **{key: ["config.4.0.0.json"]})
    with pytest.raises(CheckpointError, match=f"config.json: {key} is .*, and it leads to other files than those that are checked"):
        adopt(made.folder, tmp_path / "new")
    assert any(key in flaw for flaw in verify_export(*made).flaws)


WRONG = {
    "a window": ({"use_sliding_window": True, "sliding_window": 100}, "config.json has sliding_window 100, and to-hf writes None"),
    "another class": ({"architectures": ["Qwen3ForCausalLM"]}, "architectures ['Qwen3ForCausalLM'], and to-hf writes ['Qwen3Moe"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config {'quant_method': 'fp8'}, and to-hf writes no"),
    "two dtypes": ({"torch_dtype": "bfloat16"}, "torch_dtype bfloat16, and to-hf writes float32"),
    "one position": ({"max_position_embeddings": 1}, "max_position_embeddings 1, and to-hf writes 64"),
    "a part of the channels": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25, and to-hf writes no such key"),
    "no megagate": ({"megagate": "x"}, "config.json has megagate x, and to-hf writes {'format': 1"),
    "dtypes": ({"dtype": [1]}, "config.json has dtype [1], an export has float32 or bfloat16"),
    "classes": ({"model_type": [1]}, "config.json: model_type is [1], and known are"),
    "another's": ({"model_type": "lfm3"}, "config.json has model_type lfm3, which cannot hold the model"),
    "an id": ({"eos_token_id": 200}, "eos_token_id 200, and the model's tokens are 0 to 199"),
    "an id in one file": ({"eos_token_id": 5}, "generation_config.json has eos_token_id missing, and to-hf writes 5"),
    "a number for a truth": ({"use_cache": 1}, "use_cache 1, and to-hf writes True"),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("right"), MOE)


@pytest.fixture
def folder(right: Exported, tmp_path: Path) -> Path:
    """A copy of the right export."""
    made = tmp_path / "copy"
    made.mkdir()
    for path in right.folder.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_to_hf_does_not_write_is_wrong(name: str, right: Exported, folder: Path) -> None:
    keys, told = WRONG[name]
    edit(folder, **keys)
    flaws = verify_export(right.checkpoint, folder).flaws
    assert any(told in flaw for flaw in flaws), flaws


FILES = {
    "generation_config.json": {
        "{": "generation_config.json is not JSON",
        '{"do_sample": true}': "generation_config.json has do_sample True, and to-hf writes False",
        "": "generation_config.json cannot be read",
    },
    "tokenizer.json": {"{": "tokenizer.json cannot be read as a tokenizer"},
}


@pytest.mark.parametrize(("file", "content"), [(file, content) for file, contents in FILES.items() for content in contents])
def test_small_files_that_are_wrong_are_named(file: str, content: str, right: Exported, folder: Path) -> None:
    (folder / file).unlink(missing_ok=True)
    if content:
        (folder / file).write_text(content)
    (flaw,) = verify_export(right.checkpoint, folder).flaws
    assert FILES[file][content] in flaw, flaw


def test_a_tokenizer_has_no_more_tokens_than_the_model(right: Exported, folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    for count, passes in ((200, True), (201, False)):
        Tokenizer(WordLevel({f"w{index}": index for index in range(count)})).save(str(folder / "tokenizer.json"))
        found = verify_export(right.checkpoint, folder)
        assert found.passed == passes and (passes or "has 201 tokens, and the model 200" in found.flaws[0]), found.flaws


def test_the_dtype_and_the_positions_that_were_asked_for_are_compared(tmp_path: Path) -> None:
    made = exported(tmp_path, DENSE, max_positions=128)

    def to_bf16(tensors: Tensors, config: Config) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
        config["dtype"] = config["torch_dtype"] = "bfloat16"

    assert verify_export(*made, dtype="fp32", max_positions=128).passed
    (flaw,) = verify_export(*made, dtype="fp32").flaws
    assert "max_position_embeddings 128, and to-hf writes 64" in flaw
    spoil(made.folder, to_bf16)
    assert verify_export(*made, max_positions=128).passed, "it is the model, in bf16"
    flaws = verify_export(*made, dtype="fp32", max_positions=128).flaws
    assert "config.json has dtype bfloat16, and to-hf writes float32 for this model" in flaws
