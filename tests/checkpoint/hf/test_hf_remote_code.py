"""The code that exports carry along loads from a folder, refuses what it does not know, and needs nothing of megagate."""

import ast
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from exports import spoil
from hf_exports import language_model
from parity.sharded import assert_close
from parity.variants import DENSE, MOE, with_gate, with_moe
from remote_models import as_remote, random_ids, remote_config, write_export
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megagate.checkpoint.hf import configuration_megagate as configuration
from megagate.checkpoint.hf import hf_config, layers_megagate, modeling_megagate
from megagate.checkpoint.hf.configuration_megagate import MegagateConfig
from megagate.checkpoint.hf.targets import REMOTE, TRANSFORMERS
from megagate.config.count import parameter_shapes
from megagate.config.keys import all_keys
from megagate.config.model import GateConfig, ModelConfig

CODE = Path(configuration.__file__).parent
MIXTURE = with_moe(score="sigmoid", z_loss_coef=0.0, bias_update_rate=0.02, shared_gate=True, first_dense_layers=1)
EVERYTHING = replace(MIXTURE, ffn_size=48, sandwich_norm=True)


def load(folder: Path, **settings):
    """The model, after all of its weights were found, and no others."""
    peer, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return peer


@pytest.mark.parametrize("model", [EVERYTHING, replace(DENSE, tie_embeddings=True)], ids=["mixture", "tied"])
def test_a_folder_loads_and_is_saved_with_its_code(model, modules_cache, tmp_path):
    ours = language_model(model)
    folder = write_export(tmp_path / "first", ours)
    written, expected = load_file(folder / "model.safetensors"), as_remote(ours.state_dict(), model)
    assert written.keys() == expected.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    spoil(folder, lambda _, config: config.update(eos_token_id=9))
    first = load(folder)
    tokens = random_ids(2, 12)
    assert Path(sys.modules[type(first).__module__].__file__).is_relative_to(modules_cache)
    assert first.config.eos_token_id == 9
    assert_close(first(tokens).logits, ours.logits(tokens), to=1e-5, what="logits")
    if model.tie_embeddings:
        assert first.lm_head.weight is first.model.embed_tokens.weight

    first.save_pretrained(tmp_path / "second")
    for file in CODE.glob("*_megagate.py"):
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()
    second = load(tmp_path / "second")
    assert torch.equal(second(tokens).logits, first(tokens).logits)
    assert second.config.megagate == first.config.megagate == {"format": 1, "model": asdict(model)}


def test_its_hidden_states_are_a_model_of_their_own(modules_cache, tmp_path):
    folder = write_export(tmp_path / "export", language_model(DENSE))
    whole, tokens = load(folder), random_ids(2, 12)
    hidden, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(hidden).__name__ == "MegagateModel" and not info["missing_keys"] and set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert torch.equal(hidden.eval()(tokens).last_hidden_state, whole.eval().model(tokens).last_hidden_state)


def test_counts_of_the_routers_bias_are_loaded_as_whole_numbers(modules_cache, tmp_path):
    ours = language_model(EVERYTHING)
    peer = load(write_export(tmp_path / "export", ours), torch_dtype=torch.bfloat16)
    gate = peer.model.layers[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.bias_steps.dtype == torch.int32
    assert gate.bias_steps.any()
    assert torch.equal(gate.bias_steps, ours.layers[1].moe.router.bias_steps)


def test_a_model_without_weights_begins_as_a_new_one(modules_cache, tmp_path):
    folder = write_export(tmp_path / "export", language_model(EVERYTHING))
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
    for name, weight in peer.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        else:
            assert 0.5 < weight.std() / EVERYTHING.init_std < 1.5, name
    assert not peer.model.layers[1].mlp.gate.bias_steps.any()
    parameter_gate = modeling_megagate.MegagateForCausalLM(remote_config(with_gate(GateConfig("G1", score="parameter"))))
    assert not parameter_gate.model.layers[0].self_attn.gate.weight.any()


@pytest.mark.parametrize("model", [EVERYTHING, DENSE], ids=["mixture", "dense"])
def test_it_has_as_many_parameters_on_the_meta_device(model):
    with torch.device("meta"):
        peer = modeling_megagate.MegagateForCausalLM(remote_config(model))
    padding = 2 * (model.padded_vocab_size - model.vocab_size) * model.hidden_size
    ours = sum(torch.Size(shape).numel() for shape in parameter_shapes(model).values())
    assert sum(weight.numel() for weight in peer.parameters()) == ours - padding


def test_the_code_needs_pytorch_and_transformers_alone():
    for file in CODE.glob("*_megagate.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
                if node.level:
                    assert (CODE / f"{node.module}.py") in list(CODE.glob("*_megagate.py"))
                    continue
            else:
                continue
            for name in names:
                assert name.partition(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}, f"{file.name}: {name}"


def test_it_says_of_itself_what_megagate_says_of_it():
    """The files travel alone: format, versions and licence stand in them too."""
    assert configuration.FORMAT == hf_config.FORMAT
    major, minor, _ = TRANSFORMERS[REMOTE].split(".")
    licence = f'license="{configuration.__doc__.rpartition("SPDX-License-Identifier: ")[2].strip()}"'
    assert licence in (CODE.parents[2] / "setup.py").read_text(encoding="utf-8")
    for module in (configuration, layers_megagate, modeling_megagate):
        assert f"transformers {major}.{minor} to 5" in module.__doc__
        assert configuration.__doc__.rpartition("\n\n")[2] == module.__doc__.rpartition("\n\n")[2]


def test_it_knows_every_key_and_every_choice_of_a_model():
    assert configuration.model_defaults() == asdict(ModelConfig())
    literals = {name.removeprefix("model."): key.choices for name, key in all_keys().items() if name.startswith("model.") and key.choices}
    literals.pop("moe.balance_scope")  # of training alone
    assert dict(configuration.CHOICES) == literals


def test_standard_names_alone_are_enough():
    config = MegagateConfig(hidden_size=64, num_attention_heads=4, num_experts=8, rope_theta=500.0)
    assert config.megagate["model"]["hidden_size"] == 64
    assert config.megagate["model"]["moe"]["num_experts"] == 8
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}


def changed(path: str, value: object) -> dict:
    model = asdict(MOE)
    *groups, key = path.split(".")
    group = model
    for name in groups:
        group = group[name]
    group[key] = value
    return {"format": 1, "model": model}


@pytest.mark.parametrize(
    ("megagate", "settings", "message"),
    [
        (changed("attention.window", 4), {}, r"megagate.model.attention.window \(4\) is not known"),
        (changed("attention.gate.position", "G6"), {}, r"megagate.model.attention.gate.position \(G6\) must be one of none, G1"),
        (changed("moe.score", "relu"), {}, r"megagate.model.moe.score \(relu\) must be one of softmax, sigmoid"),
        ({"format": 2, "model": {}}, {}, r"megagate.format \(2\) must be 1"),
        (changed("norm_eps", 1e-6), {"rms_norm_eps": 1e-5}, r"rms_norm_eps \(1e-05\) must equal megagate.model.norm_eps \(1e-06\)"),
        (
            changed("moe.top_k", 3),
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            r"rope_theta \(5.0\) must equal megagate.model.attention.rope.base \(10000.0\)",
        ),
    ],
)
def test_a_config_that_it_does_not_understand_is_refused(megagate, settings, message):
    with pytest.raises(ValueError, match=message):
        MegagateConfig(megagate, **settings)


def test_positions_that_it_was_not_trained_with_are_refused():
    config = remote_config(DENSE)
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(ValueError, match="must be of rope_type default"):
        modeling_megagate.MegagateForCausalLM(config)
    config = remote_config(DENSE)
    config.rope_theta = 5.0  # as `from_pretrained(folder, rope_theta=5.0)` does
    with pytest.raises(ValueError, match=r"rope_theta \(5.0\) must equal rope_parameters.rope_theta \(10000.0\)"):
        modeling_megagate.MegagateForCausalLM(config)


def test_a_config_without_sizes_is_no_model():
    with pytest.raises(ValueError, match=r"num_key_value_heads \(0\) must be at least 1"):
        modeling_megagate.MegagateForCausalLM(MegagateConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
