"""Specs: what pairs share, what is refused and with which words."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from lr_specs import SMALL, write_spec

from megagate.analysis.lr.slurm import array_command
from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.study import Study
from megagate.config.keys import differences, flatten
from megagate.config.run import RunConfig
from megagate.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "lr_stability"


def test_runs_go_seed_by_seed_and_rung_by_rung(tmp_path: Path) -> None:
    runs = read_spec(write_spec(tmp_path)).runs()
    assert [str(key) for key in runs[:5]] == [
        "baseline-lr0.004-s0",
        "elementwise-lr0.004-s0",
        "baseline-lr0.008-s0",
        "elementwise-lr0.008-s0",
        "baseline-lr0.004-s1",
    ]
    assert len(runs) == len(set(runs)) == 8


def test_a_pair_differs_in_its_variant_alone(tmp_path: Path) -> None:
    spec = read_spec(write_spec(tmp_path, variants=["baseline", "headwise", "elementwise", "sandwich", "half"]))
    base = spec.config(RunKey("baseline", 8e-3, 1), tmp_path)
    changed = {
        "headwise": {"position": "G1", "granularity": "headwise"},
        "elementwise": {"position": "G1"},
        "half": {"position": "G1", "score": "constant"},
    }
    for name, gate in changed.items():
        found = {key: new for key, _, new in differences(base, spec.config(RunKey(name, 8e-3, 1), tmp_path))}
        del found["train.output_dir"]
        assert found == {f"model.attention.gate.{key}": value for key, value in gate.items()}
    sandwich = differences(base, spec.config(RunKey("sandwich", 8e-3, 1), tmp_path))
    assert [key for key, _, _ in sandwich] == ["model.sandwich_norm", "train.output_dir"]


def test_a_run_has_its_rate_floor_seed_and_folder(tmp_path: Path) -> None:
    spec = read_spec(write_spec(tmp_path, min_lr_share=0.25))
    config = flatten(spec.config(RunKey("baseline", 8e-3, 1), tmp_path))
    wanted = {"optim.lr": 8e-3, "schedule.min_lr": 2e-3, "train.seed": 1, "train.steps": 12, "data.cache_dir": str(tmp_path / "data")}
    wanted["train.output_dir"] = str(tmp_path / "runs" / "baseline-lr0.008-s1")
    assert {key: config[key] for key in wanted} == wanted


def test_what_a_base_says_of_saving_and_looking_is_the_studys_own(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "train: {steps: 7, seed: 7, resume: never}\neval: {every: 5, min_gain_nats: 0.5, prompt: a}\nwandb: {mode: online}\n"
        "optim: {lr: 7.0}\nschedule: {min_lr: 7.0}\ndata: {cache_dir: kept}\n"
    )
    config = flatten(read_spec(write_spec(tmp_path, configs=["a.yaml"])).config(RunKey("baseline", 8e-3, 1), tmp_path))
    wanted = {"train.steps": 12, "train.seed": 1, "train.resume": "auto", "optim.lr": 8e-3, "schedule.min_lr": pytest.approx(8e-4)}
    wanted |= {"eval.every": 0, "eval.min_gain_nats": 0.0, "eval.prompt": "", "wandb.mode": "disabled", "data.cache_dir": "kept"}
    assert {key: config[key] for key in wanted} == wanted


def test_a_variant_by_a_known_name_keeps_what_the_name_sets(tmp_path: Path) -> None:
    own = [{"headwise": {"set": {"optim.beta1": 0.5}}}, {"half": {"set": {"model.attention.gate.constant": 0.25}}}]
    spec = read_spec(write_spec(tmp_path, variants=["baseline", *own], stop={"above_initial": 0.25, "window": 6}))
    headwise, half = (flatten(spec.base(name)) for name in ("headwise", "half"))
    assert [headwise[f"model.attention.gate.{key}"] for key in ("position", "granularity")] == ["G1", "headwise"]
    assert [half[f"model.attention.gate.{key}"] for key in ("position", "constant")] == ["G1", 0.25] and headwise["optim.beta1"] == 0.5
    assert (spec.stop.above_initial, spec.stop.window) == (0.25, 6), "a window of half of the steps looks once"


def test_files_lie_under_each_other_and_their_paths_start_at_the_spec(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {norm_eps: 1.0e-3, init_std: 0.5}\noptim: {beta2: 0.5}\n")
    (tmp_path / "b.yaml").write_text("model: {init_std: 0.25}\n")
    own = {"mine": {"configs": ["b.yaml"], "set": {"optim.beta1": 0.5}}}
    spec = read_spec(write_spec(tmp_path, configs=["a.yaml"], variants=["baseline", own]))
    base, mine = (flatten(spec.base(name)) for name in ("baseline", "mine"))
    keys = ("model.norm_eps", "model.init_std", "optim.beta1", "optim.beta2")
    assert [base[key] for key in keys] == [1e-3, 0.5, 0.9, 0.5]
    assert [mine[key] for key in keys] == [1e-3, 0.25, 0.5, 0.5]


def test_a_preset_lies_over_the_base_and_under_the_variants_own(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {num_layers: 3, moe: {top_k: 4}}\n")
    own = {"mine": {"preset": "paper/table1/row05", "configs": ["a.yaml"], "set": {"model.moe.top_k": 2}}}
    base, mine = (flatten(read_spec(write_spec(tmp_path, variants=["baseline", own])).base(name)) for name in ("baseline", "mine"))
    keys = ("model.hidden_size", "model.moe.num_experts", "model.num_layers", "model.moe.top_k")
    assert [base[key] for key in keys] == [16, 0, 1, 1] and [mine[key] for key in keys] == [2048, 128, 3, 2]
    with pytest.raises(ConfigError, match=r"variants: mine: preset \(5\) must be text, as in paper/table1/row05; write it so"):
        read_spec(write_spec(tmp_path, variants=["baseline", {"mine": {"preset": 5}}]))


def test_what_decides_is_all_but_where_runs_are_done(tmp_path: Path) -> None:
    found = read_spec(write_spec(tmp_path)).decides()
    assert read_spec(write_spec(tmp_path, executor={"kind": "local", "jobs": 2})).decides() == found
    other = read_spec(write_spec(tmp_path, set=SMALL["set"] | {"optim.beta2": 0.5})).decides()
    assert {key for key in found if found[key] != other[key]} == {f"variants.{name}.optim.beta2" for name in ("baseline", "elementwise")}
    bar = read_spec(write_spec(tmp_path, collapsed_above=2.5)).decides()
    assert {key for key in found if found[key] != bar[key]} == {"collapsed_above"}
    assert read_spec(write_spec(tmp_path, set=SMALL["set"] | {"log.every": 7, "data.cache_dir": "elsewhere"})).decides() == found


SLURM = {"kind": "slurm", "nodes": 1, "gpus_per_node": 1, "script": "S"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"learning_rate": [1.0]}, "'learning_rate' is not a known key; did you mean learning_rates?"),
    "an unknown variant": ({"variants": ["baseline", "headwize"]}, "'headwize' is none of baseline, headwise, .* did you mean headwise?"),
    "an unknown setting": ({"set": {"optim.beta_2": 0.5}}, "optim.beta_2 .* did you mean optim.beta2?"),
    "a setting of the study's own": ({"set": {"optim.lr": 0.5}}, r"optim.lr \(0.5\) is the study's own to set; leave it out"),
    "a value of the wrong type": ({"set": {"optim.beta2": "much"}}, r"optim.beta2 \('much', .* must be a number"),
    "a ladder out of order": ({"learning_rates": [8e-3, 4e-3]}, "must ascend, but 0.004 follows 0.008; sort them"),
    "a rung twice": ({"learning_rates": [4e-3, 4e-3]}, "must ascend, but 0.004 follows 0.004"),
    "a rung as YAML reads 4e-3": ({"learning_rates": ["4e-3"]}, "'4e-3' must be a number above 0 .*write 4.0e-3"),
    "a rung beyond all floats": ({"learning_rates": [10**400]}, "must be a number above 0"),
    "a bar beyond all floats": ({"collapsed_above": 10**400}, "collapsed_above .* must be a number"),
    "a variant twice": ({"variants": ["half", "half"]}, "variants names half twice; keep one"),
    "a baseline that is not the first": ({"variants": ["half", "baseline"]}, "variants: baseline must be the first, .*; move it"),
    "a seed twice": ({"seeds": [0, 0]}, "seeds names 0 twice; keep one"),
    "no seeds": ({"seeds": []}, "seeds .* must be a list of at least one"),
    "no steps": ({"steps": None}, "lacks steps; add it"),
    "top rungs that leave none": ({"top_rungs": 2}, r"top_rungs \(2\) must leave one of the 2 rungs below"),
    "a window behind the end": ({"stop": {"window": 7}}, r"stop.window \(7\) must be at most half of steps \(12\)"),
    "an executor of several kinds": ({"executor": {"kind": ["local"]}}, r"executor.kind \(\['local'\]\) must be one of"),
    "an unknown executor": ({"executor": {"kind": "pbs"}}, r"executor.kind \('pbs'\) must be one of local, slurm, hosts"),
    "an unknown key of an executor": ({"executor": {"kind": "local", "job": 2}}, "executor.job .* did you mean jobs?"),
    "no jobs at a time": ({"executor": {"kind": "local", "jobs": 0}}, r"executor.jobs \(0\) must be a whole number from 1 on"),
    "an executor's number as text": ({"executor": {"kind": "local", "threads": "2"}}, r"executor.threads \('2'\) must be a whole number"),
    "a file that is none": ({"executor": {**SLURM, "script": 3}}, r"executor.script \(3\) must be text; write the path of a file"),
    "a file without a name": ({"executor": {**SLURM, "script": ""}}, r"executor.script \(''\) must be text"),
    "options of sbatch as one text": ({"executor": {**SLURM, "sbatch": "--time=1"}}, r"executor.sbatch \('--time=1'\) must be a list of"),
    "an option of sbatch that is no text": ({"executor": {**SLURM, "sbatch": [3]}}, r"executor.sbatch \(\[3\]\) must be a list of texts"),
    "an array of one's own": ({"executor": {**SLURM, "sbatch": ["--array=0-3"]}}, "executor.sbatch: --array=0-3 is the tool's own to set"),
    "a name of a job of one's own": ({"executor": {**SLURM, "sbatch": ["-J", "x"]}}, "executor.sbatch: -J is the tool's own to set"),
    "a floor above the peak": ({"min_lr_share": 1.5}, r"min_lr_share \(1.5\) must be a number of at least 0 and at most 1; mend it"),
    "a seed below 0": ({"seeds": [-1]}, r"seeds \(-1\) must be a whole number from 0 on"),
    "an unknown rule": ({"stop": {"windows": 3}}, "stop: 'windows' is not a known key; did you mean window?"),
    "an unknown key of a variant": ({"variants": ["baseline", {"x": {"sets": {}}}]}, "x: 'sets' is not a known key; did you mean"),
    "a hyphen in a variant's name": ({"variants": ["baseline", {"a-b": {}}]}, r"variants: a-b \('a-b'\) must be of a-z, 0-9 and _; rename"),
    "a cluster without its size": ({"executor": {"kind": "hosts", "hostfile": "F"}}, "lacks nodes, gpus_per_node; add it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_specs_are_refused(case: str, tmp_path: Path) -> None:
    changes, words = BAD[case]
    with pytest.raises(ConfigError, match=words):
        read_spec(write_spec(tmp_path, **changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("train.output_dir", "x"), ("train.resume", "never"), ("train.steps", 7), ("train.seed", 7), ("optim.lr", 0.5)),
        *(("schedule.min_lr", 0.5), ("wandb.mode", "online"), ("eval.every", 5)),
    ],
)
def test_what_the_study_sets_is_not_a_variants_to_set(key: str, value: str | float, tmp_path: Path) -> None:
    for changes in ({"set": {key: value}}, {"variants": ["baseline", {"own": {"set": {key: value}}}]}):
        with pytest.raises(ConfigError, match=rf"set: {key} \({value!r}\) is the study's own to set; leave it out"):
            read_spec(write_spec(tmp_path, **changes))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    spec.write_text(spec.read_text() + "steps: 24\n")
    with pytest.raises(ConfigError, match=r"spec.yaml: line \d+, column 1 is not valid YAML: 'steps' stands twice; mend that line"):
        read_spec(spec)


def test_where_a_spec_is_no_yaml_is_told(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: small\nseeds: [0, 1\nsteps: 12\n")
    with pytest.raises(ConfigError, match=r"spec.yaml: line 3, column 6 is not valid YAML: expected ',' or ']'"):
        read_spec(spec)
    spec.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        read_spec(spec)


def test_no_data_is_refused_and_the_embedded_text_is_said(tmp_path: Path) -> None:
    rest = {key: value for key, value in SMALL["set"].items() if key != "data.path"}
    spec = read_spec(write_spec(tmp_path, set=rest))
    with pytest.raises(ConfigError, match="small: variants: baseline: no data: data.path is set nowhere; set it, to embedded where"):
        spec.decides()
    assert read_spec(write_spec(tmp_path, set=rest | {"data.path": "embedded"})).decides()["variants.baseline.data.path"] == "embedded"


def test_a_warm_up_that_leaves_no_window_is_refused(tmp_path: Path) -> None:
    for warmup in (9, 10):  # of 12 steps, with a window of 3
        spec = read_spec(write_spec(tmp_path, set=SMALL["set"] | {"schedule.warmup_steps": warmup}))
        if warmup == 9:
            assert len(spec.configs_of(spec.runs(), tmp_path)) == 8
            continue
        with pytest.raises(ConfigError, match=r"baseline: schedule.warmup_steps \(10\) and stop.window \(3\) .* never looks; lower one"):
            spec.configs_of(spec.runs(), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("data.path", "embedded"), ("train.seq_len", 8), ("train.global_batch_size", 4), ("eval.batches", 1)]
)
def test_a_variant_that_reads_other_tokens_is_refused(key: str, value: str | int, tmp_path: Path) -> None:
    spec = read_spec(write_spec(tmp_path, variants=["baseline", {"other": {"set": {key: value}}}]))
    with pytest.raises(ConfigError, match=f"small: variants: other: {key} .* must be the baseline's"):
        spec.configs_of(spec.runs(), tmp_path)


def test_a_cluster_that_no_layout_fits_is_refused(tmp_path: Path) -> None:
    cluster = {"kind": "slurm", "nodes": 3, "gpus_per_node": 1, "script": "s.sbatch"}
    spec = read_spec(write_spec(tmp_path, executor=cluster))
    with pytest.raises(ConfigError, match="small: the run baseline-lr0.004-s0 on 3 ranks: .*global_batch_size"):
        spec.configs_of(spec.runs(), tmp_path)


def test_the_sizes_that_are_named_instead_fit_all_runs_in_all_they_need(tmp_path: Path) -> None:
    cluster = {"kind": "slurm", "nodes": 3, "gpus_per_node": 1, "script": "s.sbatch"}
    batch = {"train.global_batch_size": 16, "train.micro_batch_size": 1}
    wide = {"wide": {"set": {"model.attention.num_heads": 4, "parallel.tp": 2}}}
    spec = read_spec(write_spec(tmp_path, executor=cluster, set=SMALL["set"] | batch, variants=["baseline", "elementwise", wide]))

    def require(needed: int, config: RunConfig, ranks: int) -> None:
        if config.model.attention.gate.position == "G1" and ranks < needed:
            raise ConfigError(f"{ranks} are too few")

    # The baseline goes on 1, 2 and 4, `wide`, with an axis of its own, on 2, 4 and 8, and the gated one where `require` lets it.
    for needed, nodes, words in ((0, 3, "2 x 1 and 4 x 1"), (4, 3, "4 x 1"), (8, 4, "8 x 1"), (0, 1, "2 x 1")):
        sized = replace(spec, executor=replace(spec.executor, nodes=nodes))
        with pytest.raises(ConfigError, match=f"^small: the run .* on {nodes} ranks: .* the nearest that fit: {words}$"):
            sized.configs_of(spec.runs(), tmp_path, require=partial(require, needed))


def test_what_is_wrong_with_a_file_names_the_variant(tmp_path: Path) -> None:
    spec = read_spec(write_spec(tmp_path, variants=["baseline", {"own": {"preset": "nope"}}]))
    with pytest.raises(ConfigError, match="^small: variants: own: .*nope"):
        spec.base("own")


def test_commands_hold_the_cluster_and_the_config(tmp_path: Path) -> None:
    cluster = {"nodes": 2, "gpus_per_node": 8}
    slurm = read_spec(write_spec(tmp_path, executor={"kind": "slurm", **cluster, "script": "s.sbatch", "sbatch": ["--time=1:00:00"]}))
    study = Study(slurm, tmp_path / "out")
    words = array_command(study, [*study.keys[:3], study.keys[5]], spec=tmp_path / "a b.yaml", jobs=2)
    size = "--nodes=2 --gpus-per-node=8 --ntasks-per-node=8"
    own = "--parsable --job-name=small --array=0-2,5%2"
    log = f"--output={tmp_path}/out/logs/slurm-%A_%a.out"
    expected = f"sbatch {size} {log} --time=1:00:00 {own} s.sbatch --study '{tmp_path}/a b.yaml' --output {tmp_path}/out"
    assert shlex.join(words) == expected
    assert slurm.executor.command(Path("a b.yaml")) == "bash examples/slurm/ranks.sh --config 'a b.yaml'"
    hosts = read_spec(write_spec(tmp_path, executor={"kind": "hosts", **cluster, "hostfile": "F"})).executor
    assert hosts.world_size == 16
    started = "bash examples/cluster/hosts.sh --hostfile F --nodes 2 --gpus 8 --stop-with-parent -- --config c"
    assert hosts.command(Path("c")) == started
    local = read_spec(write_spec(tmp_path, executor={"kind": "local", "threads": 4})).executor
    assert local.command(Path("c")) == "OMP_NUM_THREADS=4 python -m megagate.train.main --config c"
    assert (local.jobs, slurm.executor.jobs) == (1, None), "as many as the cluster takes"
    assert "--array=0-7" in array_command(study, study.keys, spec=tmp_path / "s", jobs=slurm.executor.jobs)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("cpu_*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_studies(path: Path, tmp_path: Path) -> None:
    spec = read_spec(path)
    assert spec.name == path.stem and spec.collapsed_above is not None
    assert len(spec.configs_of(spec.runs(), tmp_path)) == len(spec.variants) * len(spec.learning_rates) * len(spec.seeds)
    assert "data.path" in yaml.safe_load(path.read_text())["set"]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a line of text\n" * 100)
    command = ["bash", str(EXAMPLES / "fetch_text.sh"), str(tmp_path / "out")]
    environment = os.environ | {"TEXT": str(tmp_path / "text"), "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "") and "0.0 MB of text in 1 files; at least 30 MB are needed" in done.stderr
    assert not (tmp_path / "out" / "data").exists()
