"""The count's command: the paper's figures, the built models, bytes of a layout, refusals, and the launch script that asks first."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity.sharded import BACKEND

from megagate.config.count import count_parameters
from megagate.config.paper import presets
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh
from megagate.plan.figures import is_printed_as, of_all, of_preset
from megagate.plan.hardware import GPU_BYTES

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "count_params.py"
SCRIPT = ROOT / "examples" / "pretrain_moe.sh"
ROW5 = ("--preset", "paper/table1/row05")
LAYOUT = ("--layout", "dp=8,tp=1,ep=8,zero=1")
(NOTE_OF_ACTIVE,) = of_preset("paper/table1/row01").notes


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def record(*arguments: str) -> dict:
    result = run(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.returncode == 2 and result.stderr.startswith("ConfigError: ") and "Traceback" not in result.stderr
    return result.stderr


# ---- the paper's figures


@pytest.mark.parametrize("row", [2, 3, *range(5, 16)])
def test_rows_of_table_1_add_what_the_paper_prints(row):
    figures = of_preset(f"paper/table1/row{row:02d}")
    assert figures.agrees is True and figures.notes == (NOTE_OF_ACTIVE,)
    assert figures.added > 0 and figures.baseline == "paper/table1/row01"


def test_the_baseline_is_the_15a2b():
    figures = of_preset("paper/table1/row01")
    assert (figures.total, figures.active, figures.added) == (15_577_227_264, 1_987_682_304, 0)
    (note,) = figures.notes
    assert "2.54B activated" in note and "15.577B and 1.99B" in note


def test_every_15a2b_says_that_its_active_parameters_are_not_the_papers():
    of_15a2b = {name for name, row in presets().items() if row.config.model.is_moe}
    assert {figures.name for figures in of_all() if NOTE_OF_ACTIVE in figures.notes} == of_15a2b
    assert NOTE_OF_ACTIVE in record("--config", "examples/configs/moe_15a2b.yaml")["notes"]


def test_the_released_width_is_the_authors():
    (note,) = of_preset("released/1b_gate_elementwise").notes
    assert "authors' own" in note and " 0.4% more parameters" in note
    assert of_preset("released/1b_gate_headwise").notes == ()


def test_where_the_paper_differs_both_are_told():
    figures = of_preset("paper/table1/row04")
    assert figures.agrees is False and 453e6 < figures.added < 454e6
    note, _ = figures.notes
    assert "400 M" in note and "453.2 M" in note
    table6 = [figures for figures in of_all() if figures.name.startswith("paper/table6/") and figures.name != "paper/table6/row01"]
    assert len(table6) == 5
    for figures in table6:
        note, _ = figures.notes
        assert f"{figures.paper_added_millions:g} M" in note and f"{figures.added / 1e6:.1f} M" in note


def test_only_these_differ():
    assert [figures.name for figures in of_all() if figures.agrees is False] == [
        "paper/table1/row04",
        *(f"paper/table6/row{row:02d}" for row in range(2, 7)),
    ]


@pytest.mark.parametrize(
    ("value", "figure", "same"),
    [(100.66, 100, True), (100.66, 101, True), (100.66, 102, False), (1.5729, 1.6, True), (1.5729, 1.5, True), (1.5729, 1.4, False)],
)
def test_a_printed_figure_is_rounded_or_cut(value, figure, same):
    assert is_printed_as(value, figure) is same


@pytest.mark.parametrize("name", presets())
def test_the_count_is_that_of_the_built_model(name):
    model = presets()[name].config.model
    built = LanguageModel(model, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single())
    real = sum(parameter.numel() for parameter in built.parameters())
    assert model.padded_vocab_size == model.vocab_size, "else padding rows are not counted"
    assert of_preset(name).total == count_parameters(model).total == real


# ---- the command


def test_help_and_counts_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    assert "--layout" in run("--help", PYTHONPATH=str(tmp_path)).stdout
    result = run(*ROW5, *LAYOUT, "--gpu", "h100-80gb", PYTHONPATH=path)
    assert result.returncode == 0, result.stderr


def test_help_does_not_import_the_library(tmp_path: Path) -> None:
    (tmp_path / "megagate.py").write_text("raise ImportError('megagate was imported')")
    assert run("--help", PYTHONPATH=str(tmp_path)).returncode == 0


def test_a_preset_in_words_and_as_json():
    figures = of_preset("paper/table1/row05")
    text = run(*ROW5).stdout
    for number in (figures.total, figures.active, figures.added, figures.flops_per_token, figures.kv_cache_bytes_per_token):
        assert f" {number:,}" in text
    assert "201 M  added; agrees" in text and "GB per GPU" not in text
    got = record(*ROW5)
    assert got.keys() >= {"total", "active", "added", "paper_added_millions", "flops_per_token", "kv_cache_bytes_per_token"}
    assert (got["total"], got["added"], got["paper_added_millions"], got["agrees"]) == (figures.total, figures.added, 201, True)


def test_all_presets_in_words_and_as_json():
    got = record("--all")
    assert list(got) == list(presets())
    assert got["paper/table1/row09"]["added"] == 100_663_296 and got["paper/table2/row01"]["paper_added_millions"] is None
    text = run("--all").stdout
    for name in presets():
        assert f"\n{name} " in text
    assert "453.2 M" in text
    (row3,) = [line.split() for line in text.splitlines() if line.startswith("paper/table1/row03 ")]
    assert row3[:7] == ["paper/table1/row03", "15778.6", "2189.0", "14890", "49152", "201.3", "201"]
    assert got["paper/table1/row03"]["flops_per_token"] // 1_000_000 == 14_890
    assert text.count("2.54B") == text.count("authors' own") == 1, "a note is told once"


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        (("--preset", "paper/table2/row01", "--model.attention.gate.position", "G1"), 5456),
        (("--preset", "paper/table2/row01"), None),
        (("--preset", "paper/table2/row02"), None),
        (("--preset", "paper/table2/row07"), None),
        (("--preset", "released/1b_gate_elementwise"), 5456),
        (("--config", "examples/configs/tiny.yaml"), None),
    ],
)
def test_the_width_with_which_a_dense_model_has_its_baselines_size(arguments, width):
    got, text = record(*arguments), run(*arguments).stdout
    assert got["equal_ffn_size"] == width and ("has the ungated model's parameters" in text) is (width is not None)
    if width:
        assert f" model.ffn_size {width} " in text
        narrowed = record(*arguments, "--model.ffn_size", str(width))
        assert abs(narrowed["total"] - (got["total"] - got["added"])) < 0.001 * got["total"]


def test_nothing_is_left_of_a_feed_forward_that_is_smaller_than_the_gate():
    small = ("--preset", "paper/table2/row01", "--model.ffn_size", "64", "--model.attention.gate.position", "G1")
    assert record(*small)["equal_ffn_size"] is None


def test_gpus_are_listed():
    text = run("--gpu", "list")
    assert text.returncode == 0 and "h100-80gb         80 GB\n" in text.stdout and "--gpu list" in run("--help").stdout
    assert "v100" not in text.stdout, "it does not compute in bf16"
    assert record("--gpu", "list") == dict(GPU_BYTES)


def test_overrides_are_counted():
    longer = record(*ROW5, "--train.seq_len", "8192")
    here = record(*ROW5)
    assert longer["paper_added_millions"] == 201, "the model is the preset's"
    assert longer["flops_per_token"] - here["flops_per_token"] == 6 * 24 * 4096 * 32 * 128
    other = record(*ROW5, "--model.num_layers=12")
    assert other["paper_added_millions"] is None and other["added"] == here["added"] // 2
    assert other["baseline"] == "the same model without gate and switch heads"


def test_a_config_of_the_users():
    got = record("--config", "examples/configs/tiny.yaml")
    assert got["name"] == "your config" and got["paper_added_millions"] is None and 0 < got["added"] < got["active"] < got["total"]
    assert record("--config", "examples/configs/tiny.yaml", "--config", "examples/configs/gate_none.yaml")["added"] == 0


@pytest.mark.parametrize("last", [("--preset", "paper/table1/row10"), ("--preset=paper/table1/row10",)])
@pytest.mark.parametrize("first", [ROW5, ("--preset=paper/table1/row05",)])
def test_of_several_presets_the_last_counts(first, last):
    got = record(*first, *last)
    assert got["added"] == 1_572_864 and got["paper_added_millions"] == 1.6


def test_bytes_of_a_layout():
    got = record(*ROW5, *LAYOUT)
    sizes = got["bytes_per_gpu"]
    experts = got["total"] - 1_283_039_232  # all else: 24 layers of attention, gate, router and norms, embedding and head
    assert sizes["weights"] == 2 * (1_283_039_232 + experts // 8)
    assert sizes["gradients"] == 2 * sizes["weights"]
    assert sizes["masters"] == sizes["moments"] // 2 == 4 * (1_283_039_232 // 8 + experts // 8)
    assert sizes["recomputed"] < sizes["kept"] and got["recompute"] is True
    states = sum(sizes[item] for item in ("weights", "gradients", "masters", "moments"))
    assert (sizes["total"], sizes["total_recompute"]) == (states + sizes["kept"], states + sizes["recomputed"])


@pytest.mark.parametrize("small", [(), ("--train.seq_len", "16", "--model.vocab_size", "1000")], ids=["paper", "small"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_rows_add_up(zero, small):
    """With few tokens, and few in the vocabulary, the fullest moment of stages 1 and 3 is the step."""
    text = run(*ROW5, *small, "--layout", f"dp=8,ep=8,zero={zero}").stdout
    assert ": step, at most" in text
    *states, buffers, kept, recomputed, step, total, total_recompute = printed_sizes(text)[:10]
    assert len(states) == 4 and (step > buffers + kept) is (zero != 2 and small != ())
    for activations, in_all in ((kept, total), (recomputed, total_recompute)):
        assert sum(states) + max(buffers + activations, step) == pytest.approx(in_all, abs=0.04)


def printed_sizes(text: str) -> list[float]:
    """The last number of each row of the memory's table."""
    _, _, table = text.partition("GB per GPU")
    return [float(line.split()[-1]) for line in table.splitlines()[1:]]


def test_what_uneven_experts_cost_is_told():
    spread, alone = (record(*ROW5, "--layout", layout)["bytes_per_gpu"] for layout in ("dp=8,ep=8", "dp=8,ep=1"))
    rows, width = 4096 * 8, 2048 + 3 * 768
    assert spread["kept_if_twice"] - spread["kept"] == pytest.approx(24 * rows * 2 * width, rel=0.02)
    assert spread["recomputed_if_twice"] >= spread["recomputed"]
    assert alone["kept_if_twice"] == alone["kept"], "a rank that has all experts has the rows of its own tokens"
    text = run(*ROW5, *LAYOUT).stdout
    assert printed_sizes(text)[10:] == [round(spread[what] / 1e9, 2) for what in ("kept_if_twice", "recomputed_if_twice")]
    assert "activations if its experts get twice their share" in text
    assert "twice their share" not in run("--preset", "paper/table2/row01", "--layout", "dp=8").stdout


def test_auto_is_what_a_gpu_takes_for_it():
    dense = ("--preset", "paper/table2/row01", "--layout", "dp=8,zero=0", "--precision.dtype")
    assert "parallel.zero_stage (0) must be at least 1 where precision.dtype is bf16" in refused(*dense, "auto")
    assert record(*dense, "fp32")["bytes_per_gpu"]["weights"] > 0
    two, auto = (record(*ROW5, *LAYOUT, "--precision.dtype", dtype)["bytes_per_gpu"] for dtype in ("bf16", "auto"))
    assert auto == two


def test_the_config_says_what_the_layout_leaves_out():
    own = ("--parallel.tp", "2", "--parallel.ep", "8", "--parallel.zero_stage", "2")
    spelled = record(*ROW5, "--layout", "dp=8,tp=2,ep=8,zero=2")
    assert spelled["world_size"] == 16
    assert record(*ROW5, *own, "--layout", "dp=8")["bytes_per_gpu"] == spelled["bytes_per_gpu"]
    assert record(*ROW5, *own, "--world", "16")["bytes_per_gpu"] == spelled["bytes_per_gpu"]
    assert record(*ROW5, *LAYOUT)["bytes_per_gpu"] != spelled["bytes_per_gpu"]


def test_a_run_that_does_not_fit_is_refused():
    assert run(*ROW5, *LAYOUT, "--gpu", "h100-80gb").returncode == run(*ROW5, *LAYOUT, "--gpu", "52.5").returncode == 0
    assert "--gpu 49.5 (49.5 GB) must hold the run in 90%" in refused(*ROW5, *LAYOUT, "--gpu", "49.5")
    result = run(*ROW5, *LAYOUT, "--gpu", "a100-40gb", "--json")
    assert result.returncode == 2
    assert "--gpu a100-40gb (40 GB) must hold the run in 90%" in result.stderr
    assert json.loads(result.stdout)["bytes_per_gpu"]["total_recompute"] > 36e9, "what was found is told all the same"


BLOCKWISE = ("--precision.backend", "te", "--precision.fp8.recipe", "blockwise")


def test_what_an_estimate_under_fp8_is_worth_is_told():
    plain, rounded = record(*ROW5, *LAYOUT), record(*ROW5, *LAYOUT, *BLOCKWISE)
    assert plain["memory_notes"] == [] and len(rounded["memory_notes"]) == 2
    assert rounded["bytes_per_gpu"]["kept"] > plain["bytes_per_gpu"]["kept"]
    assert run(*ROW5, *LAYOUT, *BLOCKWISE).stdout.endswith("\n".join(rounded["memory_notes"]) + "\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*ROW5, *BLOCKWISE, *LAYOUT, "--gpu", "a100-80gb"), ("precision.fp8.recipe (blockwise) needs a GPU", "this one has 8.0")),
        ((*ROW5, *BLOCKWISE, *LAYOUT, "--gpu", "mi300x-192gb"), ("precision.backend (te) needs a CUDA GPU", "not NVIDIA's")),
        ((*ROW5, *BLOCKWISE, *LAYOUT, "--gpu", "40"), ("--gpu 40 (40 GB) must hold the run",)),
        ((*ROW5, *BLOCKWISE, "--layout", "dp=8,ep=8,zero=3"), ("parallel.zero_stage (3) must be less where",)),
        ((*ROW5, *BLOCKWISE, "--train.seq_len", "4100"), ("train.seq_len (4100) must be a multiple of 16",)),
        (("--preset", "paper/table1/row5"), ("paper/table1/row05", "--preset")),
        ((*ROW5, "--layout", "dp=3,ep=8"), ("number of ranks (3) must be divisible by parallel.ep (8)",)),
        ((*ROW5, "--layout", "dp=8,ep=8,zero=0"), ("parallel.zero_stage (0)",)),
        ((*ROW5, "--layout", "ep=8"), ("--layout ep=8 must name dp",)),
        ((*ROW5, "--layout", "dp=8,pp=2"), ("'pp=2'", "dp, tp, ep or zero")),
        ((*ROW5, "--layout", "dp=8,dp=4"), ("'dp=4'", "once")),
        ((*ROW5, "--layout", "dp=-8"), ("'dp=-8'",)),
        ((*ROW5, "--layout", "dp=0"), ("at least 1",)),
        *(((*ROW5, *LAYOUT, "--gpu", gpu), (f"--gpu {gpu} is unknown", "in GB", *GPU_BYTES)) for gpu in ("h100", "-80", "0", "inf", "nan")),
        ((*ROW5, "--world", "0"), ("--world (0) must be at least 1; give --world",)),
        (("--preset", ""), ("--preset ('') names no preset", "paper/table1/row05")),
        ((*ROW5, "--gpu", "h100-80gb"), ("--gpu (h100-80gb) needs the number of ranks", "--layout")),
        ((*ROW5, *LAYOUT, "--world", "8"), ("--world (8)", "leave one of them out")),
        (("--all", *ROW5), ("--all goes with --json only",)),
        ((*ROW5, "--model.moe.top_k", "200"), ("model.moe.top_k (200)",)),
        ((*ROW5, "--model.width", "3"), ("model.width",)),
        ((), ("model.hidden_size (0)", "--config")),
    ],
)
def test_bad_input_is_told(arguments, words):
    message = refused(*arguments)
    for word in words:
        assert word in message


# ---- the launch script


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    """A folder with a `python3` that runs the tool, and stands in for the trainer."""
    path = tmp_path / "python3"
    path.write_text(f'#!/bin/sh\n[ "$1" = -u ] && {{ echo trains; exit 0; }}\nexec {sys.executable} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    nvidia_smi(tmp_path, "exit 9")
    return tmp_path


def nvidia_smi(folder: Path, does: str) -> None:
    """A stand-in for a GPU's."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
    path.chmod(0o755)


def launched(trainer: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{trainer}:{os.environ['PATH']}", "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", **environment}
    command = ["bash", str(SCRIPT), "--local_rank=0", *arguments]
    return subprocess.run(command, cwd=trainer, env=env, capture_output=True, text=True, timeout=60, check=False)


SPREAD = (*ROW5, "--parallel.ep", "8")


def test_the_script_asks_whether_the_run_fits(trainer):
    fits, not_ = (launched(trainer, *SPREAD, MEGAGATE_GPU=gpu) for gpu in ("h100-80gb", "a100-40gb"))
    assert (fits.returncode, fits.stdout) == (0, "trains\n") and "GB per GPU with dp=8 tp=1 ep=8 zero=1" in fits.stderr
    assert (not_.returncode, not_.stdout) == (2, "") and "must hold the run" in not_.stderr
    default = launched(trainer, MEGAGATE_GPU="a10-24gb")
    assert (default.returncode, default.stdout) == (0, "trains\n") and "your config" in default.stderr, "it asks about tiny.yaml"


@pytest.mark.parametrize("arguments", [("--help",), ("--print_config",)])
def test_the_script_asks_nothing_where_nothing_is_trained(trainer, arguments):
    result = launched(trainer, *SPREAD, *arguments, MEGAGATE_GPU="a100-40gb")
    assert (result.returncode, result.stdout, result.stderr) == (0, "trains\n", "")


@pytest.mark.parametrize(
    "environment", [{"LOCAL_RANK": "1", "MEGAGATE_GPU": "a100-40gb"}, {"LOCAL_RANK": "1"}, {"MEGAGATE_GPU": "none"}], ids=str
)
def test_one_rank_of_a_machine_asks_and_none_where_that_is_switched_off(trainer, environment):
    nvidia_smi(trainer, "echo 40960")
    result = launched(trainer, *SPREAD, **environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "trains\n", "")


def test_the_script_asks_the_smallest_gpu(trainer):
    """40960 MiB are 42.9 GB, 81559 MiB 85.5 GB; whole ones are counted."""
    where = '[ "$*" = "--query-gpu=memory.total --format=csv,noheader,nounits" ] || exit 1; '
    nvidia_smi(trainer, where + "echo 81559; echo 102400")
    fits = launched(trainer, *SPREAD)
    assert (fits.returncode, fits.stdout) == (0, "trains\n") and "GB per GPU with dp=8 tp=1 ep=8 zero=1" in fits.stderr
    nvidia_smi(trainer, where + "echo 102400; echo 40960")
    for environment in ({}, {"MEGAGATE_GPU": ""}):
        not_ = launched(trainer, *SPREAD, **environment)
        assert (not_.returncode, not_.stdout) == (2, "") and "--gpu 42 (42 GB) must hold the run" in not_.stderr
    assert launched(trainer, *SPREAD, MEGAGATE_GPU="h100-80gb").returncode == 0, "what is named counts"


@pytest.mark.parametrize(
    "does", ["exit 9", "echo 40960; exit 9", "echo No devices were found", "echo '[N/A]'", "echo oh >&2; exit 1", "exit 0"]
)
def test_a_broken_nvidia_smi_stops_nothing(trainer, does):
    nvidia_smi(trainer, does)
    result = launched(trainer, *SPREAD)
    assert (result.returncode, result.stdout, result.stderr) == (0, "trains\n", "")


def test_without_nvidia_smi_nothing_is_asked(trainer):
    (trainer / "nvidia-smi").unlink()
    for name in ("bash", "dirname", "sh", "sort", "head"):
        (trainer / name).symlink_to(shutil.which(name) or "")
    result = launched(trainer, *SPREAD, PATH=str(trainer))
    assert (result.returncode, result.stdout, result.stderr) == (0, "trains\n", "")
