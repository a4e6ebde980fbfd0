"""Exports load in transformers and compute what the model computes: each stock class, and each variant of gate and router."""

from pathlib import Path

import pytest
import torch
from hf_exports import CASES, FORCED, clear_tokens, language_model, load_theirs, masters, run_config, save
from parity.sharded import assert_close
from parity.variants import VARIANTS

from megagate.checkpoint.hf.export import Export, export
from megagate.checkpoint.hf.table import Target, mapping, mapping_flaws
from megagate.checkpoint.hf.targets import REMOTE, choose
from megagate.checkpoint.saved_model import native_shapes
from megagate.config.model import ModelConfig
from megagate.model.lm import LanguageModel

PROBLEMS = {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


def assert_computes_the_same(ours: LanguageModel, done: Export, **options: object) -> None:
    """Loaded without a word, their logits are ours, and what they generate with a cache is what ours would say without."""
    model = ours.config
    theirs, said = load_theirs(done.folder, **options)
    assert {key: value for key, value in said.items() if value} == {} and said.keys() >= PROBLEMS
    module = "transformers_modules." if done.target == REMOTE else f"transformers.models.{done.target.removesuffix('_text')}."
    assert type(theirs).__module__.startswith(module)
    tokens = clear_tokens(ours)
    with torch.no_grad():
        assert_close(theirs(tokens).logits, ours.logits(tokens)[..., : model.vocab_size], to=1e-5, what="logits")
        seen = torch.ones_like(tokens[:, :9])  # without it id 0, which pads, would not be seen
        made = theirs.generate(tokens[:, :9], attention_mask=seen, max_new_tokens=4, do_sample=False, pad_token_id=0)
        again = ours.logits(made)[:, 8:-1, : model.vocab_size].argmax(-1)
        assert made.shape == (2, 13) and torch.equal(again, made[:, 9:])


def assert_sound(model: ModelConfig, target: Target) -> None:
    """Every element of every tensor of the model is in one row, with or without the padding."""
    for keep_padding in (False, True):
        assert mapping_flaws(mapping(model, target, keep_padding=keep_padding), native_shapes(model)) == []


@pytest.mark.parametrize(
    ("model", "target", "format"),
    [(model, target, "auto") for model, target in CASES.values()] + [(model, target, target) for model, target in FORCED.values()],
    ids=[f"{how}{target}: {name}" for how, cases in (("", CASES), ("asked for ", FORCED)) for name, (_, target) in cases.items()],
)
def test_stock_classes_compute_the_same(tmp_path: Path, model: ModelConfig, target: Target, format: str) -> None:
    assert_sound(model, target)
    ours = language_model(model)
    done = export(save(tmp_path / "run", masters(ours), run_config(model)), tmp_path / "hf", format=format)
    assert done.target == target and done.wide == done.broken == {} and done.padding == (1 if model.tie_embeddings else 2) * (256 - 200)
    assert_computes_the_same(ours, done)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_computes_the_same(tmp_path: Path, modules_cache: Path, variant: str) -> None:
    """A new value of a `Literal` fails here until a class, or the remote code, knows it."""
    model = VARIANTS[variant]
    assert_sound(model, choose(model))
    ours = language_model(model)
    done = export(save(tmp_path / "run", masters(ours), run_config(model)), tmp_path / "hf")
    assert done.target == choose(model)
    assert_computes_the_same(ours, done, trust_remote_code=done.target == REMOTE)
