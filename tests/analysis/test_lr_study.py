"""A study's folder: when a run has diverged, what it came to, and whose folder it is."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from lr_specs import SMALL, write_spec

from megagate.analysis.lr.entries import Facts
from megagate.analysis.lr.records import diverged_at
from megagate.analysis.lr.spec import Stop
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.status import status_lines
from megagate.analysis.lr.study import Study, digest, replace_file
from megagate.config.run import OptimConfig
from megagate.errors import RunError

STOP = Stop(above_initial=0.5, window=3)


def test_the_rule_takes_the_mean_behind_the_warm_up() -> None:
    losses = [5.0, 5.0, 5.0, 9.0, 9.0, 9.0, 5.0, 5.0, 5.6, 5.5, 5.5]
    # Windows of three end at step 6 or later, and behind a warm-up of w steps at w + 3 or later.
    assert diverged_at(losses, STOP, warmup=0)[0] == 6
    assert diverged_at(losses, STOP, warmup=4)[0] == 7
    assert diverged_at(losses, STOP, warmup=6) == (11, "the mean loss over 3 steps, 5.533, is 0.533 nats above that of the first 3")
    assert diverged_at(losses[:10], STOP, warmup=6) is None
    assert diverged_at(losses, STOP, warmup=9) is None


def test_a_loss_that_is_not_finite_counts_at_once() -> None:
    assert diverged_at([5.0, None], STOP, warmup=40) == (2, "the loss or the gradient is not finite")
    assert diverged_at([5.0, float("nan")], STOP, warmup=40)[0] == 2


def records(losses: list[float | None], **last: Any) -> str:
    lines = [{"step": step, "loss": loss, "step_seconds": 0.5} for step, loss in enumerate(losses, start=1)]
    lines[1] |= {"hidden_max": 7.0, "gate_mean": 0.5, "loss_spike": 1.0}
    lines[3] |= {"hidden_max": 3.0, "gate_mean": 0.25}
    lines[-1] |= last
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(read_spec(write_spec(tmp_path)), tmp_path / "out")
    study.claim(study.spec.decides(), "the spec")
    return study


def test_a_claim_that_is_cut_off_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(read_spec(write_spec(tmp_path)), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("megagate.analysis.lr.study.replace_file", lambda path, text: (_ for _ in ()).throw(OSError("a full disk")))
        with pytest.raises(OSError, match="a full disk"):
            study.claim(study.spec.decides(), "the spec")
    study.require_same(study.spec.decides())


def test_a_finished_run(study: Study) -> None:
    key = study.keys[1]
    config, folder = study.configs([key])[key], study.run_folder(key)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(records([5.0] * 9 + [4.0, 3.0, 2.0]))
    assert study.judge(key, config) is None, "its validation is still to come"
    (folder / "metrics.jsonl").write_text(records([5.0] * 9 + [4.0, 3.0, 2.0], val_loss=2.5))
    outcome = study.judge(key, config)
    assert (outcome.status, outcome.val_loss, outcome.train_loss, outcome.spikes, outcome.seconds) == ("finished", 2.5, 3.0, 1, 6.0)
    assert (outcome.peak_hidden, outcome.gate_mean, outcome.attention_logit_max) == (7.0, 0.25, None)
    assert study.judge(key, config, not_finite=True) == outcome, "there is no step behind the last one"
    assert not study.has_diverged(key, config), "it has to end by itself"
    assert study.outcomes() == {}
    study.settle(outcome)
    study.write_record()
    assert study.outcomes() == {key: outcome} and not (folder / "checkpoints").exists()
    held = json.loads((study.folder / "study.json").read_text())
    assert [run["val_loss"] for run in held["runs"]] == [2.5] and held["decides"] == study.spec.decides()


def test_a_diverged_run_counts_up_to_its_step_whenever_it_is_looked_at(study: Study) -> None:
    key = study.keys[0]
    config, folder = study.configs([key])[key], study.run_folder(key)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(records([5.0, 5.0, 5.0, 6.0, 6.0, 6.0]))
    early = study.judge(key, config)
    assert (early.status, early.step, early.steps, early.val_loss) == ("diverged", 6, 6, None)
    (folder / "metrics.jsonl").write_text(records([5.0, 5.0, 5.0, 6.0, 6.0, 6.0] + [1.0] * 6, val_loss=1.0))
    assert study.judge(key, config) == early
    (folder / "metrics.jsonl").write_text(records([5.0, 5.0, 5.0, 5.0]))
    assert study.judge(key, config) is None
    assert study.judge(key, config, not_finite=True).step == 5


def test_a_line_half_written_is_no_record(study: Study) -> None:
    key = study.keys[0]
    study.run_folder(key).mkdir(parents=True)
    (study.run_folder(key) / "metrics.jsonl").write_text(records([5.0] * 4)[:-9])
    assert [record["step"] for record in study.records(key)] == [1, 2, 3]
    assert "@3 -" in status_lines(study)[2]


def test_records_end_where_a_step_is_missing(study: Study) -> None:
    key = study.keys[0]
    study.run_folder(key).mkdir(parents=True)
    lines = records([5.0] * 12, val_loss=2.5).splitlines()
    (study.run_folder(key) / "metrics.jsonl").write_text("\n".join([*lines[:5], *lines[6:], lines[11]]))
    assert len(study.records(key)) == 5 and study.judge(key, study.configs([key])[key]) is None


def test_a_held_out_loss_that_is_not_finite_is_divergence_at_the_end(study: Study) -> None:
    key = study.keys[0]
    study.run_folder(key).mkdir(parents=True)
    (study.run_folder(key) / "metrics.jsonl").write_text(records([5.0] * 12, val_loss=None))
    outcome = study.judge(key, study.configs([key])[key])
    assert (outcome.status, outcome.step, outcome.reason) == ("diverged", 12, "the held-out loss is not finite")


def test_status_tells_each_run_and_how_long_the_rest_takes(tmp_path: Path) -> None:
    spec = read_spec(write_spec(tmp_path, collapsed_above=2.0, executor={"kind": "local", "jobs": 2}))
    study = Study(spec, tmp_path / "out")
    study.claim(spec.decides(), "")
    made = [records([5.0] * 12, val_loss=2.5), records([5.0] * 12, val_loss=1.5), records([5.0] * 3 + [6.0] * 3), records([5.0] * 4)]
    for key, text in zip(study.keys, made, strict=False):
        study.run_folder(key).mkdir(parents=True)
        (study.run_folder(key) / "metrics.jsonl").write_text(text.replace('"step_seconds": 0.5', '"step_seconds": 60.0'))
        study.settle_if_over(key, study.configs([key])[key], tell=lambda text: None)
    assert status_lines(study) == [
        "| small | 0.004 | 0.008 |",
        "|---|---|---|",
        "| baseline | 2.500* - | diverged@6 - |",
        "| elementwise | 1.500 - | @4 - |",
        "",
        "held-out loss in nats by seed; * above 2: collapsed; @N at step N of 12, - not begun",
        "3 of 8 runs are over (1 diverged), 1 begun, 4 to begin",
        # 12 steps a minute each: 8 of the one that has begun, and 4 runs, by twos
        "a finished run took 720 s in steps; the rest takes some 0.47 h, 2 at a time",
    ]


def test_runs_that_nobody_knows_are_refused(study: Study) -> None:
    (study.folder / "spec.json").unlink()
    with pytest.raises(RunError, match="holds runs but no spec.json, so no study; its digest, .* restore it from there"):
        study.require_same(study.spec.decides())


def test_the_record_is_made_again_where_a_task_has_settled_a_run(study: Study) -> None:
    study.write_record()
    finish(study)
    with study.locked():
        study.refresh_record()
        assert json.loads((study.folder / "study.json").read_text())["runs"] == [], "who runs the study writes it"
    study.refresh_record()
    assert [run["val_loss"] for run in json.loads((study.folder / "study.json").read_text())["runs"]] == [2.5]


def test_a_folder_of_another_study_is_refused_and_one_that_grows_is_not(study: Study, tmp_path: Path) -> None:
    def other(**changes: Any) -> None:
        spec = read_spec(write_spec(tmp_path, **changes))
        Study(spec, study.folder).require_same(spec.decides())

    other()
    other(seeds=[0, 1, 2], learning_rates=[2e-3, 4e-3, 8e-3])
    with pytest.raises(RunError, match=r"(?s)holds another study.*\n  seeds: \[0, 1\] there, \[0\] here\n"):
        other(seeds=[0])
    with pytest.raises(RunError, match=r"(?s)\n  variants.elementwise.optim.beta2: 0.95 there, 0.5 here\n.*choose another folder"):
        other(set=SMALL["set"] | {"optim.beta2": 0.5})
    with pytest.raises(RunError, match=r"collapsed_above: None there, 2.0 here"):
        other(collapsed_above=2.0)
    with pytest.raises(RunError, match=r"(?s)\n  data/11: None there, 11 here\n  and 3 more\na folder") as error:
        study.require_same(study.spec.decides() | {f"data/{number:02}": number for number in range(15)})
    assert "data/12" not in str(error.value)


def test_a_folder_of_a_megagate_that_lacked_a_setting_goes_on_with_its_default(study: Study) -> None:
    path, key = study.folder / "spec.json", "variants.elementwise.optim.beta2"
    content = json.loads(path.read_text())
    now = dict(content["decides"])
    del content["decides"][key]
    path.write_text(json.dumps(content))
    study.require_same(now | {key: OptimConfig.beta2})
    with pytest.raises(RunError, match=rf"(?s)another study:\n  {key}: {OptimConfig.beta2} there, 0.5 here\na folder"):
        study.require_same(now | {key: 0.5})


def test_what_a_study_began_with_is_kept_where_it_grows(study: Study, tmp_path: Path) -> None:
    def began() -> tuple[Any, Any]:
        told = json.loads((study.folder / "spec.json").read_text())["began_with"]
        return told["learning_rates"], told["seeds"]

    grown = study.spec.decides() | {"seeds": [0, 1, 2]}
    study.claim(grown, "")
    assert began() == ([4e-3, 8e-3], [0, 1, 2]), "no run had begun"
    finish(study)
    study.claim(grown | {"learning_rates": [2e-3, 4e-3, 8e-3]}, "")
    study.claim(grown | {"learning_rates": [1e-3, 2e-3, 4e-3, 8e-3], "seeds": [0, 1, 2, 3]}, "")
    assert began() == ([4e-3, 8e-3], [0, 1, 2])
    study.write_record()
    facts = Facts.from_study(json.loads((study.folder / "study.json").read_text()))
    assert (facts.later_rates, facts.later_seeds) == ((1e-3, 2e-3), (3,))
    content = json.loads((study.folder / "spec.json").read_text())
    del content["began_with"]  # as an earlier megagate wrote it
    (study.folder / "spec.json").write_text(json.dumps(content))
    study.claim(grown, "")
    assert began() == ([1e-3, 2e-3, 4e-3, 8e-3], [0, 1, 2, 3])


def test_variants_that_are_missing_are_named_and_not_their_settings(study: Study, tmp_path: Path) -> None:
    spec = read_spec(write_spec(tmp_path, variants=["baseline", "headwise"]))
    words = r"another study:\n  variants: \['baseline', 'elementwise'\] there, \['baseline', 'headwise'\] here\na folder"
    with pytest.raises(RunError, match=words):
        Study(spec, study.folder).require_same(spec.decides())


def finish(study: Study) -> Path:
    key = study.keys[0]
    study.run_folder(key).mkdir(parents=True)
    (study.run_folder(key) / "metrics.jsonl").write_text(records([5.0] * 12, val_loss=2.5))
    study.settle(study.judge(key, study.configs([key])[key]))
    return study.run_folder(key) / "outcome.json"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "it is that of baseline/0.004/1"),
        ({"status": "running"}, "status 'running'"),
        ({"val_loss": None}, "status 'finished' with val_loss None"),
        ({"val_loss": "2.5"}, "val_loss '2.5'"),
        ({"val_loss": float("nan")}, "val_loss nan"),
        ({"peak_hidden": "7"}, "peak_hidden '7'"),
        ({"seconds": None}, "seconds None"),
        ({"steps": True}, "steps True"),
        ({"seed": 0.5}, "it is that of baseline/0.004/0.5"),
        ({"more": 1}, "these differ: more"),
    ],
)
def test_an_outcome_that_is_not_this_runs_is_refused(study: Study, changes: dict[str, Any], words: str) -> None:
    path = finish(study)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RunError, match=f"outcome.json: is no outcome of this run .*{words}.*; remove it, and run the study again"):
        study.outcomes()


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '{"decides": 3}'])
def test_a_damaged_spec_json_is_not_to_be_removed(study: Study, text: str) -> None:
    (study.folder / "spec.json").write_text(text)
    with pytest.raises(RunError, match="spec.json: .*stand in study.json, too: restore it from there"):
        study.require_same(study.spec.decides())


def test_a_line_whose_number_is_none_is_no_record(study: Study) -> None:
    key = study.keys[0]
    study.run_folder(key).mkdir(parents=True)
    lines = records([5.0] * 4).splitlines()
    lines[2] = lines[2].replace("5.0", '"5.0"')
    (study.run_folder(key) / "metrics.jsonl").write_text("\n".join(lines))
    assert len(study.records(key)) == 2 and study.judge(key, study.configs([key])[key]) is None


def test_a_full_disk_is_told_and_what_was_there_is_kept(study: Study) -> None:
    words = r"cannot be written \(F: No space left on device\); mend that, and the same command goes on"
    with pytest.raises(RunError, match=words), study.locked():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "F")
    (study.folder / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), Study(study.spec, study.folder / "file" / "x").locked():
        pass


def test_a_disk_that_is_full_in_the_middle_leaves_the_last_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "file", "first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(OSError, match="No space left"):
            replace_file(tmp_path / "file", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "first"


def test_two_processes_do_not_run_one_study(study: Study) -> None:
    with study.locked(), pytest.raises(RunError, match="another process runs this study"), study.locked():
        pass


def test_the_digest_is_of_what_is_said_and_not_of_its_order() -> None:
    assert digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
    assert len({digest({"a": 1, "b": [2.0]}), digest({"a": 1, "b": [2.5]}), digest({"a": 1})}) == 3
