"""What verification judges: rounding told from wrong weights, crashes of ours from theirs, released models, memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exports import exported
from hf_dirs import export_of
from hf_exports import CASES, DENSE, MOE, language_model, masters, moe
from hf_released import released
from remote_models import ALL_VARIANTS

from megagate.checkpoint.hf.adopt import adopt
from megagate.checkpoint.hf.adopt_files import read_json
from megagate.checkpoint.hf.ops import GroupedQueryAndGate
from megagate.checkpoint.hf.table import mapping
from megagate.checkpoint.hf.verify import verify_adopted, verify_export
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt
from megagate.checkpoint.hf.verify_logits import agreement, fixed_tokens
from megagate.checkpoint.hf.verify_memory import available_memory
from megagate.checkpoint.hf.verify_models import Case, compare_whole
from megagate.checkpoint.hf.verify_stream import wide_logits
from megagate.config.model import ModelConfig
from megagate.errors import CheckpointError
from megagate.model.lm import LanguageModel

OUTPUT = "model.layers.1.self_attn.o_proj.weight"
MODELS = {name: model for name, (model, _) in CASES.items()} | ALL_VARIANTS


class StateWeights(Rebuilt):
    """Those of a model."""

    def __init__(self, model: LanguageModel):
        self.state = model.state_dict()

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_model_runs_in_fp64(model: ModelConfig) -> None:
    ours, tokens = language_model(model).eval(), fixed_tokens(model.vocab_size)
    exact, narrow = wide_logits(model, StateWeights(ours), tokens), ours.logits(tokens)
    assert 0 < (exact - narrow).abs().max() <= 1e-5 * narrow.abs().max()


def large(folder: Path, model: ModelConfig, *, error: float = 0.0) -> Case:
    """A model whose logits are near 5000, so that fp32 rounds them by more than 1e-4; theirs with an error in one matrix."""
    target = "qwen3_moe" if model.is_moe else "qwen3"
    state = masters(language_model(model))
    state["master/head.weight"] *= 1000
    right = FolderTensors(export_of(folder / "right", model, target, state))
    state["master/layers.1.attention.o.weight"] *= 1 + error
    theirs = export_of(folder / "theirs", model, target, state)
    weights = Rebuilt(model, mapping(model, target), right)
    return Case(theirs, model, target, FolderTensors(theirs), weights, config=read_json(theirs / "config.json"))


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "mixture"])
def test_rounding_of_large_logits_passes_and_is_said(model: ModelConfig, tmp_path: Path) -> None:
    found = compare_whole(large(tmp_path, model))
    for logits in (found.logits, found.greedy):
        assert logits.flaw is None and logits.max_error > 1e-4 and logits.largest > 1000
        assert logits.rounding.positions > 10 and logits.rounding.theirs <= 4 * logits.rounding.ours
    assert found.flaws == ()
    made = large(tmp_path / "again", model)
    adopt(made.folder, tmp_path / "new")
    found = verify_adopted(made.folder, tmp_path / "new")
    assert found.passed and "passed as rounding of fp32" in "\n".join(found.lines())


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "mixture"])
def test_a_small_error_beyond_rounding_is_wrong(model: ModelConfig, tmp_path: Path) -> None:
    found = compare_whole(large(tmp_path, model, error=2e-5))
    assert "logits differ by up to" in found.flaws[0] and found.logits.max_error < 5e-5 * found.logits.largest, found


class TestRounding:
    """Which differences fp32 explains."""

    EXACT = torch.randn(3, 80, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100
    NOISE = torch.rand(3, 80, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2e-4 - 1e-4
    OURS = (EXACT + NOISE).float()

    def flaw(self, theirs: torch.Tensor, exact: torch.Tensor) -> str | None:
        return agreement(self.OURS, theirs.float(), [], wide=lambda: exact).flaw

    def test_noise_of_the_same_size_passes(self) -> None:
        assert self.flaw(self.EXACT - self.NOISE, self.EXACT) is None

    def test_without_fp64_nothing_is_excused(self) -> None:
        assert agreement(self.OURS, (self.EXACT - self.NOISE).float(), []).flaw

    @pytest.mark.parametrize(("times", "passes"), [(3.5, True), (6.0, False)])
    def test_theirs_may_be_some_times_as_far_off(self, times: float, passes: bool) -> None:
        assert (self.flaw(self.EXACT - times * self.NOISE, self.EXACT) is None) == passes

    def test_one_position_is_enough_to_fail(self) -> None:
        theirs = self.EXACT - self.NOISE
        theirs[1, 40, 3] += 2e-3
        found = agreement(self.OURS, theirs.float(), [], wide=lambda: self.EXACT)
        assert found.flaw and found.at == (1, 40, 3) and found.rounding is not None

    def test_another_route_in_fp64_is_no_rounding(self) -> None:
        """It moves our own logits far, which must not allow theirs to be as far."""
        exact = self.EXACT.clone()
        exact[:, 20:] += 5.0
        theirs = self.OURS.clone()
        theirs[:, 20:] += 1.0
        assert self.flaw(theirs, exact)

    def test_a_flip_behind_a_rounding_is_still_told_apart(self) -> None:
        theirs = (self.EXACT - self.NOISE).float()
        theirs[1, 30:] += 1.0
        gaps = torch.ones(3, 80, dtype=torch.float64)
        gaps[1, 30] = 1e-7
        found = agreement(self.OURS, theirs, [gaps], wide=lambda: self.EXACT)
        assert found.flaw is None and found.left_out == 50

    def test_what_is_not_a_number_is_wrong(self) -> None:
        assert self.flaw(torch.full_like(self.EXACT, torch.nan), self.EXACT)


@pytest.mark.parametrize("model", [moe(ffn_size=18), replace(MOE, hidden_size=30)], ids=["ffn", "hidden"])
def test_a_crash_of_ours_is_not_told_as_theirs(model: ModelConfig, tmp_path: Path) -> None:
    made = exported(tmp_path, model)
    with pytest.raises(RuntimeError, match="strides should be multiple of 16 bytes"):
        verify_export(*made)
    with pytest.raises(CheckpointError, match="must be a multiple of 4 for a mixture in fp32"):
        adopt(made.folder, tmp_path / "new")


@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_a_released_model_is_compared_without_its_code(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, weights = released(tmp_path / "hf", kind)
    adopt(folder, tmp_path / "new")
    found = verify_adopted(folder, tmp_path / "new")
    assert found.passed and found.tensors == len(weights) and found.logits.max_error <= 1e-5, found
    assert "logits: of a qwen3_5_text model of the same tensors" in "\n".join(found.lines())

    def swapped(op: GroupedQueryAndGate, theirs: list[torch.Tensor], *, where: str) -> list[torch.Tensor]:
        """The gates taken before the queries."""
        groups = theirs[0].unflatten(0, (op.kv_heads, -1))
        gates = op.heads // op.kv_heads * op.rows
        gate, query = groups.split([gates, groups.shape[1] - gates], dim=1)
        return [query.flatten(0, 1), gate.flatten(0, 1)]

    monkeypatch.setattr(GroupedQueryAndGate, "from_hf", swapped)
    adopt(folder, tmp_path / "swapped")
    wrong = verify_adopted(folder, tmp_path / "swapped")
    assert len(wrong.flaws) == 1 and "logits differ by up to" in wrong.flaws[0] and "layers.0.attention" in wrong.flaws[0], wrong.flaws


def test_a_released_model_that_no_class_holds_is_said_not_to_be_compared(tmp_path: Path) -> None:
    folder, _ = released(tmp_path / "hf", "headwise", qk_norm=False)
    adopt(folder, tmp_path / "new")
    found = verify_adopted(folder, tmp_path / "new")
    assert found.passed and found.logits is None and "logits: NOT compared" in "\n".join(found.lines())


def system(root: Path, files: dict[str, str]) -> Path:
    for name, content in {"proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
MEMORY = {
    "no groups": ({}, 51_200),
    "nothing said": ({"proc/meminfo": ""}, None),
    "no limit": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n", f"{V2}/a/memory.current": "9\n"}, 51_200),
    "own": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "9000\n", f"{V2}/a/memory.current": "2000\n"}, 7000),
    "outer": ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/memory.max": "9000\n", f"{V2}/a/memory.current": "2000\n"}, 7000),
    "container": ({"proc/self/cgroup": "0::/../x\n", f"{V2}/memory.max": "9000\n", f"{V2}/memory.current": "2500\n"}, 6500),
    "pages": (
        {f"{V2}/memory.max": "9000\n", f"{V2}/memory.current": "8000\n", f"{V2}/memory.stat": "anon 1\ninactive_file 3000\n"},
        4000,
    ),
    "larger than the machine": ({f"{V2}/memory.max": "900000\n", f"{V2}/memory.current": "1\n"}, 51_200),
    "over the limit": ({f"{V2}/memory.max": "100\n", f"{V2}/memory.current": "200\n"}, 0),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu:/c\n3:memory:/a\n",
            f"{V1}/a/memory.limit_in_bytes": "9000\n",
            f"{V1}/a/memory.usage_in_bytes": "6000\n",
            f"{V1}/a/memory.stat": "total_inactive_file 500\n",
        },
        3500,
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_what_machine_and_groups_leave(name: str, tmp_path: Path) -> None:
    files, expected = MEMORY[name]
    assert available_memory(system(tmp_path, files)) == expected


def test_memory_of_this_machine_is_told() -> None:
    assert available_memory() > 1 << 20
