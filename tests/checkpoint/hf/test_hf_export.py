"""Exports load in transformers and compute what the model computes: each stock class, both directions of every choice."""

from pathlib import Path

import pytest
import torch
from hf_exports import CASES, FORCED, language_model, load_theirs, masters, run_config, save, tokens_of
from parity.sharded import assert_close, clear_routes

from megagate.checkpoint.hf.export import export
from megagate.checkpoint.hf.table import Target
from megagate.config.model import ModelConfig

NOTHING = {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


@pytest.mark.parametrize(
    ("model", "target", "format"),
    [(model, target, "auto") for model, target in CASES.values()] + [(model, target, target) for model, target in FORCED.values()],
    ids=[f"{how}{target}: {name}" for how, cases in (("", CASES), ("asked for ", FORCED)) for name, (_, target) in cases.items()],
)
def test_transformers_computes_the_same(tmp_path: Path, model: ModelConfig, target: Target, format: str) -> None:
    ours = language_model(model)
    done = export(save(tmp_path / "run", masters(ours), run_config(model)), tmp_path / "hf", format=format)
    assert done.target == target
    theirs, said = load_theirs(done.folder)
    assert {key: value for key, value in said.items() if value} == {} and said.keys() >= NOTHING
    assert type(theirs).__module__.startswith(f"transformers.models.{target.removesuffix('_text')}."), "stock"
    tokens = tokens_of(model)
    with torch.no_grad(), clear_routes(ours):
        expected = ours.logits(tokens)[..., : model.vocab_size]
        assert_close(theirs(tokens).logits, expected, to=1e-5, what="logits")
        made = theirs.generate(tokens[:, :9], max_new_tokens=6, do_sample=False, pad_token_id=0)
        for length in range(9, 15):
            again = ours.logits(made[:, :length])[:, -1, : model.vocab_size].argmax(-1)
            assert torch.equal(again, made[:, length]), "cached generation is the recomputed one"
