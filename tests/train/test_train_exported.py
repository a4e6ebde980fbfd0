"""A run of the main job and its text, all the way: exported, used by transformers and by the evaluation harness, adopted, trained on."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import call
from parity.sharded import BACKEND
from torch import Tensor
from train_jobs import ROOT, Jobs, metrics

from megagate.checkpoint.store import Checkpoint
from megagate.config.keys import from_dict
from megagate.data.manifest import read_manifest
from megagate.data.tokenizer import Tokenizer, load_tokenizer
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

pytestmark = pytest.mark.slow

convert = partial(call, "convert_checkpoint")
TINY = ROOT / "examples" / "configs" / "tiny.yaml"
STEPS, PROMPT = 8, "The function returns"
SMALL = (
    *("--model.vocab_size", 500, "--model.hidden_size", 48, "--model.num_layers", 2, "--model.moe.ffn_size", 32, "--train.seq_len", 64),
    *("--train.steps", STEPS, "--schedule.warmup_steps", 2, "--checkpoint.every", STEPS),
)
EVALUATION = ("--eval.every", STEPS, "--eval.batches", 2, "--eval.min_gain_nats", 0, "--eval.sample_tokens", 0)


class Run(NamedTuple):
    """A run of a vocabulary that is padded, and the folder that was made of it."""

    folder: Path
    exported: Path


@pytest.fixture(scope="module")
def shared_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    started = Jobs(tmp_path_factory.mktemp("exported"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def run(shared_jobs: Jobs) -> Run:
    folder = shared_jobs.folder / "run"
    shared_jobs.run("--train.output_dir", folder, *SMALL, *EVALUATION, config=TINY)
    assert convert("to-hf", folder, shared_jobs.folder / "out") == 0
    return Run(folder, shared_jobs.folder / "out")


def tensors(path: Path) -> dict[str, Tensor]:
    """Of the model alone."""
    with Checkpoint.open(path) as checkpoint:
        return {name: checkpoint.read_whole(name) for name in checkpoint.tensors if name.startswith("master/")}


def model_of(path: Path) -> LanguageModel:
    with Checkpoint.open(path) as checkpoint:
        config = from_dict(checkpoint.metadata["config"]).model
    model = LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single())
    model.load_state_dict({name.removeprefix("master/"): tensor for name, tensor in tensors(path).items()}, assign=True)
    return model.eval()


def tokenizer_of(run: Path) -> Tokenizer:
    (data,) = (run / "data").glob("embedded-*")
    return load_tokenizer(data, read_manifest(data).tokenizer)


def test_transformers_continues_text_as_the_model_does(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words, ours = AutoTokenizer.from_pretrained(run.exported, local_files_only=True), tokenizer_of(run.folder)
    for text in (PROMPT, "a  b\n\tdéjà vu 12345", "naïve 中文"):
        assert words(text)["input_ids"] == ours.encode(text) and words.decode(ours.encode(text)) == text
    theirs = AutoModelForCausalLM.from_pretrained(run.exported, local_files_only=True)
    made = theirs.generate(**words(PROMPT, return_tensors="pt"), max_new_tokens=12)
    ids = ours.encode(PROMPT)
    model = model_of(run.folder)
    for _ in range(12):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert made[0].tolist() == ids[: made.shape[1]] and made.shape[1] > len(ours.encode(PROMPT))
    assert words.decode(made[0], skip_special_tokens=True).startswith(PROMPT)


def test_what_is_adopted_again_trains_on(run, shared_jobs):
    new, more = shared_jobs.folder / "new", shared_jobs.folder / "more"
    assert convert("from-hf", run.exported, new) == 0
    before, after = tensors(run.folder), tensors(new)
    assert before.keys() == after.keys()
    padded = {"master/embedding.weight", "master/head.weight"}
    for name, tensor in before.items():
        real = slice(0, 500) if name in padded else slice(None)
        if name.endswith("norm.weight"):  # kept as w - 1
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=2**-24)
        else:
            assert torch.equal(after[name][real], tensor[real]), name
    # A step that is too small to change anything: validation starts from where the run ended.
    still = ("--optim.lr", 1e-12, "--schedule.min_lr", 1e-12, "--schedule.warmup_steps", 0, "--eval.every", 1, "--train.steps", 1)
    data = ("--data.path", "embedded", "--data.cache_dir", run.folder / "data", "--train.global_batch_size", 8)
    options = (*data, *EVALUATION, *still, "--train.output_dir", more)
    shared_jobs.run("--train.resume", new, *options, config=new / "config.yaml")
    assert metrics(more)[-1]["val_loss"] == pytest.approx(metrics(run.folder)[-1]["val_loss"], abs=2e-6)


def test_the_evaluation_harness_sees_the_model_that_was_trained(run):
    """Its log likelihoods of the endings are ours of the same tokens; the words that it has generated are ours."""
    home = {"HF_HOME": str(run.folder / "home"), "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    command = [ROOT / "examples" / "evaluate" / "run.sh", run.exported, "--batch_size", "5"]
    environment = os.environ | home
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in ("megagate_choice", "megagate_continue"))
    results = Path(f"{run.exported}-evaluation")
    model, words = model_of(run.folder), tokenizer_of(run.folder)

    choices = samples(results, "megagate_choice")
    right = 0
    for sample in choices:
        question, endings = sample["doc"]["text"], sample["doc"]["endings"]
        likelihoods = [log_likelihood(model, words.encode(question), words.encode(f"{question} {ending}")) for ending in endings]
        found = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert found == pytest.approx(likelihoods, abs=1e-3), question
        right += likelihoods.index(max(likelihoods)) == sample["doc"]["answer"]
    assert len(choices) == 24
    (summary,) = (json.loads(path.read_text())["results"] for path in results.rglob("results_*.json"))
    assert summary["megagate_choice"]["acc,none"] == pytest.approx(right / len(choices))

    continued = samples(results, "megagate_continue")
    for sample in continued:
        assert sample["resps"][0][0] == greedy(model, words, sample["doc"]["text"], 8), sample["doc"]["text"]
    assert len(continued) == 12


def samples(results: Path, task: str) -> list[dict[str, Any]]:
    (path,) = results.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_likelihood(model: LanguageModel, question: list[int], whole: list[int]) -> float:
    scores = model.logits(torch.tensor([whole]))[0].log_softmax(-1)
    return sum(scores[place - 1, whole[place]].item() for place in range(len(question), len(whole)))


def greedy(model: LanguageModel, words: Tokenizer, text: str, count: int) -> str:
    """Up to the end of the line or of the document."""
    ids = words.encode(text)
    made: list[int] = []
    while len(made) < count and words.eod_id not in made:
        made.append(int(model.logits(torch.tensor([ids + made]))[0, -1].argmax()))
    return words.decode([one for one in made if one != words.eod_id]).partition("\n")[0]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "usage: examples/evaluate/run.sh DIR [OPTIONS OF lm_eval]; DIR is a folder that tools/convert_checkpoint.py to-hf"),
        ("tokenizer.json", "has no tokenizer.json, and the questions are text: export again with --tokenizer"),
    ],
)
def test_the_evaluation_script_says_what_is_missing(missing, said, tmp_path):
    if missing == "tokenizer.json":
        (tmp_path / "config.json").write_text("{}")
    script = ROOT / "examples" / "evaluate" / "run.sh"
    done = subprocess.run([script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr and not done.stdout
