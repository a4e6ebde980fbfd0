"""The specs in examples/lr_stability: read, dry, as they stand, and what their comments say of sizes, held against the configs."""

import re
from math import log
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_lr_command import command

from megagate.analysis.lr.spec import Spec
from megagate.analysis.lr.spec_file import read_spec
from megagate.config.count import count_parameters, flops_per_token
from megagate.config.run import RunConfig
from megagate.plan.memory import check_gpu, estimate

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "examples" / "lr_stability").glob("*.yaml"))
CLUSTER = [path for path in SPECS if not path.name.startswith("cpu_")]
OTHER = re.compile(r"^# \w+: +(\{kind: .*\})$", re.MULTILINE)
RUNS = {"dense_1p7b_48l_400b": 10, "dense_1p7b_48l_1t": 4, "moe_15a2b": 12, "cpu_nano": 175, "cpu_nano_matched": 24, "cpu_nano_moe": 18}


def configs_of(spec: Spec) -> dict[str, RunConfig]:
    """By variant, of its first rung."""
    keys = {key.variant: key for key in reversed(spec.runs())}
    return {name: spec.config(key, Path("out")) for name, key in keys.items()}


def executors(path: Path) -> list[dict[str, Any]]:
    """The spec's own, and those in its comments."""
    text = path.read_text(encoding="utf-8")
    return [yaml.safe_load(text)["executor"], *map(yaml.safe_load, OTHER.findall(text))]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_is_dry_run_as_it_stands(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert command("run", path.relative_to(ROOT), "--output", tmp_path / "out", "--dry-run") == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) >= 1 and not (tmp_path / "out").exists()
    assert len(read_spec(path).runs()) == RUNS[path.stem]


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_the_executors_in_comments_are_right_too(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    others = executors(path)
    assert [(one["kind"], one["gpu"]) for one in others] == [("slurm", "h100-80gb"), ("slurm", "a100-80gb"), ("hosts", "h100-80gb")]
    monkeypatch.chdir(ROOT)
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"node{n} slots=8\n" for n in range(others[2]["nodes"])))
    for number, executor in enumerate(others[1:]):
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) | {"executor": executor}
        if executor["kind"] == "hosts":
            executor["hostfile"] = str(hosts)
        settings["configs"] = [str((path.parent / one).resolve()) for one in settings["configs"]]
        spec = tmp_path / f"{number}.yaml"
        spec.write_text(yaml.safe_dump(settings))
        assert command("run", spec, "--output", tmp_path / "out", "--dry-run") == 0, capfd.readouterr().err
        assert read_spec(spec).decides() == read_spec(path).decides(), "where runs are done does not make another study"
    last = capfd.readouterr().out.splitlines()[-1]
    options = f"--hostfile {hosts} --nodes {others[2]['nodes']} --gpus 8 --env examples/cluster/h100.env --stop-with-parent"
    assert last.startswith(f"bash examples/cluster/hosts.sh {options} -- --config ")


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_what_the_comments_say_of_sizes(path: Path) -> None:
    spec, text = read_spec(path), path.read_text(encoding="utf-8")
    configs, world = configs_of(spec), spec.executor.world_size
    for config in configs.values():
        assert config.train.steps == spec.steps and config.train.seq_len == 4096
        for gpu in ("a100-80gb", "h100-80gb"):
            check_gpu(config, world_size=world, gpu=gpu)
    needed = max(estimate(config, world_size=world).total(recompute=False) for config in configs.values()) / 1e9
    assert float(re.search(r"an estimate of (\d+) GB", text)[1]) == pytest.approx(needed, abs=0.6)

    base = configs["baseline"]
    tokens = spec.steps * base.train.global_batch_size * base.train.seq_len
    paper = 1e12 if path.stem.endswith("_1t") else 4e11
    assert tokens == pytest.approx(paper, rel=0.05)
    for flops, billions, product in re.findall(r"([\d.]+e9)[^x\n]* x (\d+)e9\s+=\s+([\d.]+e\d+)", text):
        assert float(flops) == pytest.approx(flops_per_token(base.model, 4096), rel=0.01)
        assert float(billions) * 1e9 == pytest.approx(tokens, rel=0.002)
        assert float(product) == pytest.approx(float(flops) * float(billions) * 1e9, rel=0.02)
    assert " x 419e9" in text or " x 1007e9" in text

    safe = 2e-3 if base.model.is_moe else spec.learning_rates[0]
    assert spec.min_lr_share * safe == pytest.approx(3e-5, rel=0.002), "the paper's floor at its own rate"


@pytest.mark.parametrize("path", [path for path in CLUSTER if "dense" in path.stem], ids=lambda path: path.stem)
def test_gated_dense_models_have_the_baselines_parameters(path: Path) -> None:
    sizes = {name: count_parameters(config.model).total for name, config in configs_of(read_spec(path)).items()}
    for name, size in sizes.items():
        assert size == pytest.approx(sizes["baseline"], rel=0.001), name
    assert sizes["baseline"] == pytest.approx(1705.7e6, rel=1e-4) and sizes["elementwise"] == pytest.approx(1704.6e6, rel=1e-4)


def test_the_mixture_gets_the_gates_parameters_on_top() -> None:
    sizes = {name: count_parameters(config.model).total for name, config in configs_of(read_spec(CLUSTER[-1])).items()}
    assert (sizes["elementwise"] - sizes["baseline"]) / 1e6 == pytest.approx(201, abs=0.5), "Table 1, row 5"
    assert (sizes["headwise"] - sizes["baseline"]) / 1e6 == pytest.approx(1.6, abs=0.05), "Table 1, row 10"


def test_ladders_are_the_papers_and_a_look_sees_what_is_claimed() -> None:
    rungs = {path.stem: read_spec(path).learning_rates for path in CLUSTER}
    assert rungs == {"dense_1p7b_48l_400b": (4e-3, 8e-3), "dense_1p7b_48l_1t": (5.3e-3, 8e-3), "moe_15a2b": (1e-3, 2e-3, 4e-3, 8e-3)}
    for path in CLUSTER:
        spec = read_spec(path)
        observe = spec.base("baseline").observe
        assert observe.every > 0 and observe.queries > 0 and spec.collapsed_above is None
        assert spec.learning_rates[-spec.top_rungs] == (4e-3 if path.stem == "moe_15a2b" else 8e-3)
    assert log(9.195 / 7.421) == pytest.approx(0.21, abs=0.005), "the number in dense_1p7b_48l_400b.yaml"
