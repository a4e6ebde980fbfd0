"""Several models on one text: the result, what is refused before anything is computed, and that the result survives its file."""

import json
import os
from dataclasses import replace
from math import exp, inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_exports import DENSE, ELEMENTWISE, HEADWISE, MOE, gated, language_model, masters, run_config, save
from test_analysis_text import WORDS, dataset

from megagate.analysis.gate.analyze import Request, analyze, claim, claimed, write
from megagate.analysis.gate.result import Analysis, ModelResult
from megagate.checkpoint.hf.export import export
from megagate.config.model import ModelConfig
from megagate.config.run import DataConfig
from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.dataset import open_dataset
from megagate.data.loader import ValidLoader
from megagate.data.tokenizer import Tokenizer
from megagate.errors import CheckpointError, ConfigError, DataError, RunError

BYTES = replace(DENSE, vocab_size=300)
LAYERS = 12


def run(folder: Path, model: ModelConfig = BYTES, **changes: Any) -> Path:
    return save(folder, masters(language_model(model)), replace(run_config(model), **changes))


def request(models: tuple[str, ...], data: Path, **changes: Any) -> Request:
    return Request(**{"models": models, "data": data, "seq_len": 16, "samples": 3, "tokenizer": "bytes"} | changes)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def test_several_models_side_by_side(tmp_path: Path, text: Path) -> None:
    gates = {"baseline": DENSE, "headwise": gated(DENSE, HEADWISE), "mixture": gated(MOE, ELEMENTWISE)}
    models = {name: replace(model, vocab_size=300) for name, model in gates.items()}
    named = tuple(f"{name}={run(tmp_path / name, model)}" for name, model in models.items())
    done: list[int] = []
    totals: list[int] = []

    def bar(total: int) -> Any:
        totals.append(total)
        return done.append

    found = analyze(request(named, text), bar=bar)
    assert [(model.name, model.gate) for model in found.models] == [
        ("baseline", "none"),
        ("headwise", "headwise at G1, sigmoid"),
        ("mixture", "elementwise at G1, sigmoid"),
    ]
    assert (found.sequences, found.seq_len, found.dtype, found.device) == (3, 16, "fp32", "cpu")
    assert totals == [3 * 3 * 3]
    assert sum(done) == totals[0]
    for model in found.models:
        assert model.targets == 3 * 16
        assert model.ppl == exp(model.loss)
        assert len(model.layers) == len(model.maps) == 2
        assert model.map_tokens == tuple(WORDS[:16])
        assert len(model.maps[0]) == len(model.maps[0][0]) == 16
    assert found.models[0].gate_mean is None
    assert 0 < found.models[1].gate_mean < 1
    assert found.models[0].loss == alone(named[0], text).loss


def alone(model: str, data: Path, **changes: Any) -> ModelResult:
    return analyze(request((model,), data, **changes)).models[0]


def test_the_perplexity_is_that_of_a_validation(tmp_path: Path) -> None:
    ids = list(WORDS.encode()) + [256]
    folder = dataset(tmp_path / "set", ByteTokenizer(), valid=ids)
    where = run(tmp_path / "run")
    found = alone(f"it={where}", folder, tokenizer=None)
    split = open_dataset(str(folder), vocab_size=300, directory=folder).valid
    batch = next(iter(ValidLoader(split, seq_len=16, micro_batch_size=3, dp_rank=0, dp_size=1, batches=1)))
    with torch.no_grad():
        parts = language_model(BYTES)(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels))
    assert found.ppl == pytest.approx(exp(float(parts.ce_sum) / found.targets), rel=1e-6)


def test_a_run_within_documents_is_measured_as_it_was_trained(tmp_path: Path) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in WORDS.splitlines()[:2] * 4))
    across, within = run(tmp_path / "a"), run(tmp_path / "b", data=DataConfig(path="synthetic", attention="document"))
    both = {"seq_len": 120}
    a, b = alone(f"a={across}", lines, **both), alone(f"b={within}", lines, **both)
    assert b.kind.endswith("trained with attention within documents, trained on 64 tokens, measured with attention within documents")
    assert a.kind.endswith("forward pass, trained on 64 tokens, measured with attention across documents") and "within" not in a.kind
    assert (a.targets, b.targets) == (3 * 120, 3 * 120 - 4)  # four of the tokens that are read end documents
    assert a.loss != b.loss
    assert alone(f"a={across}", lines, attention="document", **both).layers == b.layers
    crossed = alone(f"b={within}", lines, attention="causal", **both)
    assert crossed.layers == a.layers
    assert crossed.kind.endswith("trained with attention within documents, trained on 64 tokens, measured with attention across documents")
    together = analyze(request((f"a={across}", f"b={within}"), lines, **both)).models
    assert [model.targets for model in together] == [b.targets, b.targets]
    assert [model.layers for model in together] == [a.layers, b.layers]


def test_the_tokenizer_is_the_runs_own_and_its_exports(tmp_path: Path, text: Path) -> None:
    tokenizer = Tokenizer.train([WORDS], vocab_size=290)
    data = dataset(tmp_path / "set", tokenizer, train=tokenizer.encode(WORDS))
    where = run(tmp_path / "run", data=DataConfig(path=str(data)))
    folder = export(where, tmp_path / "hf").folder
    found = analyze(request((f"ours={where}", f"theirs={folder}"), text, tokenizer=None))
    assert found.models[0].loss == pytest.approx(found.models[1].loss, rel=1e-6)
    assert "".join(found.models[0].map_tokens) == WORDS[: len("".join(found.models[0].map_tokens))]


def test_another_tokenizer_than_a_models_own_is_told(tmp_path: Path, text: Path) -> None:
    tokenizer = Tokenizer.train([WORDS], vocab_size=290)
    data = dataset(tmp_path / "set", tokenizer, train=tokenizer.encode(WORDS))
    models = (f"own={run(tmp_path / 'own', data=DataConfig(path=str(data)))}", f"unknown={run(tmp_path / 'unknown')}")
    notes: list[str] = []
    words = "encoded by --tokenizer bytes, which is not that of own"
    assert analyze(request(models, text, samples=1), note=notes.append).data == f"{text} {words}"
    assert notes == [f"--data is {words}; their figures are of ids that mean other text to them"]
    assert analyze(request(models, text, samples=1, tokenizer=str(data)), note=notes.append).data == str(text)
    assert len(notes) == 1


def test_more_tokens_than_a_model_was_trained_on_are_told(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(WORDS * 2)
    where, notes = run(tmp_path / "run"), []
    length = run_config(BYTES).train.seq_len
    for reads in (length, length + 1):
        found = analyze(request((f"it={where}",), path, samples=1, seq_len=reads), note=notes.append)
        assert (f"trained on {length} tokens" in found.models[0].kind) == (reads > length)
    assert notes == [f"it was trained on {length} tokens, and reads {length + 1}"]


@pytest.mark.parametrize(
    ("layers", "wanted", "kept"),
    [(LAYERS, None, (0, 2, 8, 11)), (2, None, (0, 1)), (28, None, (0, 6, 20, 27)), (LAYERS, (3, 1), (0, 2)), (1, None, (0,))],
)
def test_whose_attention_is_kept(tmp_path: Path, text: Path, layers: int, wanted: tuple[int, ...] | None, kept: tuple[int, ...]) -> None:
    model = replace(BYTES, num_layers=layers)
    assert tuple(alone(f"it={run(tmp_path / 'run', model)}", text, layers=wanted, samples=1, map_tokens=4).maps) == kept


@pytest.mark.parametrize(
    ("models", "changes", "error", "message"),
    [
        (("it",), {}, ConfigError, r"--models it must be NAME=PATH"),
        (("=run",), {}, ConfigError, r"--models =run must be NAME=PATH"),
        (("a/b=run",), {}, ConfigError, r"--models a/b=.*run must be NAME=PATH, the name without a slash"),
        (("it=run", "it=run"), {}, ConfigError, r"--models names 2 models it; each needs a name of its own; rename one"),
        (("it=gone",), {}, CheckpointError, r"--models it: .*gone does not exist; give a run, its checkpoints, one"),
        (("it=text.txt",), {}, CheckpointError, r"--models it: .*text\.txt is a file; give a run"),
        (("it=.",), {}, CheckpointError, r"--models it: .* holds no complete checkpoint; .*; it has no config\.json either"),
        (("it=run", "two=run"), {"layers": (1, 3)}, ConfigError, r"--layers \(3\): it has no such layer, only 1 to 2; choose layers that"),
        (("it=run",), {"device": "abacus"}, RunError, r"--device \(abacus\) cannot be used here \(PyTorch knows no such device\);"),
        (("it=run",), {"device": "meta"}, RunError, r"--device \(meta\) cannot be used here \(it holds no numbers\); use cpu"),
        (("it=run",), {"device": "maia"}, RunError, r"--device \(maia\) cannot be used here \(Could not run .{,80} backend\); use cpu"),
        (("it=run",), {"tokenizer": "/no/where.json"}, DataError, r"--tokenizer /no/where\.json: no such file"),
        (("it=run",), {"tokenizer": None}, DataError, r"--models it: its tokenizer is needed .*\(none: data\.path synthetic has ids"),
        (("it=run",), {"seq_len": 100_000}, DataError, r"text\.txt has \d+ tokens, and one sequence takes 100,001"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, text: Path, models: tuple[str, ...], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    run(tmp_path / "run")
    named = tuple(model.replace("=", f"={tmp_path}/", 1) if model != "=run" else model for model in models)
    with pytest.raises(error, match=message):
        analyze(request(named, text, **changes))


def test_a_damaged_tensor_is_told_when_it_is_read(tmp_path: Path, text: Path) -> None:
    where = run(tmp_path / "run")
    (file,) = (where / "checkpoints").glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the file is damaged"):
        alone(f"it={where}", text)


def test_documents_need_an_end(tmp_path: Path) -> None:
    from megagate.data.manifest import TokenizerIdentity

    class Endless(ByteTokenizer):
        def save(self, path: Path) -> TokenizerIdentity:
            return TokenizerIdentity("none", "", "", 300, -1, -1)

    folder = dataset(tmp_path / "set", Endless(), valid=[1, 2, 3] * 9)
    where = run(tmp_path / "run")
    assert alone(f"it={where}", folder, tokenizer=None).map_tokens[:3] == ("1", "2", "3")
    with pytest.raises(DataError, match=r"it: attention is to stay within documents, and --data has no token that ends them"):
        alone(f"it={where}", folder, tokenizer=None, attention="document")


def test_the_file_gives_the_analysis_back(tmp_path: Path, text: Path) -> None:
    found = analyze(request((f"it={run(tmp_path / 'run', replace(MOE, vocab_size=300))}",), text))
    path = write(found, claim(tmp_path / "a" / "new" / "folder"))
    assert path.name == "analysis.json"
    assert Analysis.from_json(json.loads(path.read_text())) == found
    (model,) = found.models
    layer = replace(model.layers[0], hidden=replace(model.layers[0].hidden, max_abs=inf, mean_max_abs=nan))
    odd = replace(found, models=(replace(model, loss=1e4, layers=(layer,)),))
    back = Analysis.from_json(json.loads(json.dumps(odd.to_json(), allow_nan=False)))
    assert isnan(back.models[0].layers[0].hidden.mean_max_abs)
    assert back.models[0].m_act_max == back.models[0].ppl == inf


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--output \(.*/file\) is a file; name a folder$"):
        claim(tmp_path / "file")
    with pytest.raises(RunError, match=r"--output \(.*/file/below\) cannot be written \(Not a directory\)"):
        claim(tmp_path / "file" / "below")
    assert os.listdir(claim(tmp_path / "fine")) == []


def test_folders_of_models_and_of_data_are_no_place_for_an_analysis(tmp_path: Path) -> None:
    where = run(tmp_path / "run")
    exported = export(where, tmp_path / "hf").folder
    (step,) = (where / "checkpoints").glob("step-*")
    data = dataset(tmp_path / "set", ByteTokenizer(), valid=[1] * 9)
    for folder in (where, where / "checkpoints", step, exported, data):
        before = sorted(os.listdir(folder))
        with pytest.raises(RunError, match=r"--output \(.*\): holds .*, as a model's or a data set's folder does; choose another folder"):
            claim(folder)
        assert sorted(os.listdir(folder)) == before
    (tmp_path / "bare").mkdir()
    (tmp_path / "link").symlink_to("bare")
    with pytest.raises(RunError, match=r"link\): is what is to be analyzed; choose"):
        claim(tmp_path / "link", [tmp_path / "bare"])
    assert os.listdir(claim(where / "analysis")) == []


def test_a_folder_that_was_made_in_vain_goes_again(tmp_path: Path, text: Path) -> None:
    made, there = tmp_path / "a" / "new" / "folder", tmp_path / "there"
    there.mkdir()
    for folder in (made, there):
        with pytest.raises(KeyboardInterrupt), claimed(folder, request(("it=x",), text)):
            assert folder.is_dir()
            raise KeyboardInterrupt
    assert there.is_dir() and not (tmp_path / "a").exists()
    with pytest.raises(KeyboardInterrupt), claimed(made, request(("it=x",), text)):
        (made / "file").touch()
        raise KeyboardInterrupt
    assert (made / "file").exists()
