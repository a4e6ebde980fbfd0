"""The command line: merging, conversion, output, and one clear message for each kind of mistake."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megagate.config.cli import parse, to_yaml
from megagate.config.keys import all_keys, differences, flatten, from_dict, to_dict
from megagate.config.paper import preset, presets
from megagate.config.run import RunConfig
from megagate.errors import ConfigError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv, prog="megagate")
    return str(caught.value)


def changed(*argv: str) -> dict[str, object]:
    """The keys that a command line sets to something else than their default."""
    return {name: value for name, _, value in differences(RunConfig(), parse(argv, prog="megagate"))}


def test_no_arguments_are_the_defaults() -> None:
    assert parse([], prog="megagate") == RunConfig()


def test_both_spellings_of_an_override() -> None:
    assert changed("--parallel.ep", "8", "--parallel.tp=2") == {"parallel.ep": 8, "parallel.tp": 2}


def test_values_become_the_type_of_their_key() -> None:
    argv = ["--optim.lr", "1e-3", "--train.recompute", "true", "--optim.grad_clip", "2", "--data.path", "0123", "--eval.prompt", "a: b"]
    wanted = {"optim.lr": 1e-3, "train.recompute": True, "optim.grad_clip": 2.0, "data.path": "0123", "eval.prompt": "a: b"}
    assert changed(*argv) == wanted
    assert isinstance(parse(argv, prog="megagate").optim.grad_clip, float)


def test_files_and_overrides_count_in_order_of_appearance(tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", "train: {steps: 1, seed: 1}\noptim: {lr: 2e-3}\n")
    second = write(tmp_path, "second.yaml", "train:\n  steps: 2\n")
    assert changed("--config", first, f"--config={second}") == {"train.steps": 2, "train.seed": 1}
    assert changed("--config", second, "--config", first)["train.steps"] == 1
    assert changed("--config", first, "--train.steps", "7")["train.steps"] == 7
    assert changed("--train.steps", "7", "--config", first)["train.steps"] == 1


ROW = "paper/table1/row05"


@pytest.mark.parametrize("spelling", [["--preset", ROW], [f"--preset={ROW}"]])
def test_both_spellings_of_a_preset(spelling: list[str]) -> None:
    assert parse(spelling, prog="megagate") == preset(ROW).config


@pytest.mark.parametrize("name", presets())
def test_every_preset_by_name(name: str) -> None:
    assert parse(["--preset", name], prog="megagate") == preset(name).config


def test_presets_files_and_overrides_count_in_order_of_appearance(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "train: {steps: 5}\nmodel: {attention: {gate: {granularity: headwise}}}\nparallel: {tp: 4}\n")
    of = preset(ROW).config

    def others(*argv: str) -> dict[str, object]:
        return {name: value for name, _, value in differences(of, parse(argv, prog="megagate"))}

    changes = {"train.steps": 5, "model.attention.gate.granularity": "headwise", "parallel.tp": 4}
    assert others("--preset", ROW, "--config", path) == changes
    assert others("--preset", ROW, "--config", path, "--train.steps", "7") == {**changes, "train.steps": 7}
    assert others("--preset", ROW, "--train.steps", "7", f"--config={path}") == changes
    assert others("--config", path, "--train.seed", "7", "--preset", ROW) == {"parallel.tp": 4}, "a preset is a whole run but its layout"


@pytest.mark.parametrize("name", ["paper/table1/row01", "paper/table2/row01", "paper/table6/row05", "released/1b_gate_headwise"])
def test_the_last_preset_leaves_nothing_of_the_first(name: str) -> None:
    """Also where it sets less: a baseline after a gated row is no gated baseline."""
    for first in (ROW, "paper/table1/row12", "paper/table3/row05", "paper/table6/row02", "paper/table2/row07"):
        assert parse(["--preset", first, "--preset", name], prog="megagate") == preset(name).config


def test_a_preset_that_is_unknown_or_missing(tmp_path: Path) -> None:
    message = refusal("--preset", "paper/table2/row15")
    assert message.startswith("--preset paper/table2/row15 is unknown; the nearest are paper/table2/row")
    assert message == refusal("--preset=paper/table2/row15", "--train.steps=many")
    assert "--preset on the command line needs a value" in refusal("--preset")
    assert "--preset on the command line needs a value" in refusal("--preset", "--train.steps=1")
    assert refusal("--preset=").startswith("--preset ('') names no preset")
    assert "preset (" in refusal("--config", write(tmp_path, "a.yaml", f"preset: {ROW}\n")), "only a command line names presets"


def test_a_wrong_value_names_the_preset_too(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "optim: {lr: fast}\n")
    assert f"optim.lr ('fast', preset {ROW}, {path} line 1) must be a number" in refusal("--preset", ROW, "--config", path)
    assert "--train.stepz (on the command line) is not a known key" in refusal("--preset", ROW, "--train.stepz", "1")


def test_an_empty_value_is_a_value() -> None:
    assert changed("--eval.prompt=a", "--eval.prompt=") == changed("--eval.prompt", "") == {}
    assert changed("--data.path=") == {"data.path": ""}, "the rules refuse it, not the parser"


@pytest.mark.parametrize("spelling", [["--local_rank=3"], ["--local_rank", "3"], ["--local-rank=3"]])
def test_the_launchers_rank_is_ignored(spelling: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert changed(*spelling, "--train.steps", "7") == {"train.steps": 7}
    with pytest.raises(SystemExit):
        parse([*spelling, "--print_config"], prog="megagate")
    assert "rank" not in capsys.readouterr().out


def test_print_config_shows_the_merged_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "a.yaml", "train: {steps: 5}\n")
    with pytest.raises(SystemExit) as caught:
        parse(["--print_config", "--config", path, "--optim.lr", "1e-4"], prog="megagate")
    assert caught.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == to_dict(parse(["--config", path, "--optim.lr", "1e-4"], prog="megagate"))


def test_print_config_of_a_preset_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--preset", ROW, "--parallel.ep", "8"]
    with pytest.raises(SystemExit) as caught:
        parse([*argv, "--print_config"], prog="megagate")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "preset" not in yaml.safe_load(shown)
    assert parse(["--config", write(tmp_path, "shown.yaml", shown)], prog="megagate") == parse(argv, prog="megagate")


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], prog="megagate")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--preset NAME" in shown and "paper/table1/row05" in shown
    for name, key in all_keys().items():
        assert f"--{name}" in shown
        assert key.help, f"the docstring of {name}'s dataclass does not explain it"


def test_yaml_round_trip(tmp_path: Path) -> None:
    argv = ["--optim.eps", "1e-9", "--eval.prompt", "Grüße: '#' \"x\"\n", "--train.output_dir", "1.50", "--train.resume", "null"]
    config = parse([*argv, "--model.attention.gate.position", "G1"], prog="megagate")
    text = to_yaml(config)
    assert parse(["--config", write(tmp_path, "config.yaml", text)], prog="megagate") == config
    assert from_dict(yaml.safe_load(text)) == config
    assert list(yaml.safe_load(text)) == [item.name for item in fields(RunConfig)], "keys keep the order of the dataclasses"
    assert from_dict(flatten(config)) == config


def test_from_dict_refuses_what_is_not_a_config() -> None:
    assert from_dict({}) == RunConfig()
    assert isinstance(from_dict({"optim": {"lr": 1}}).optim.lr, float)
    for settings, words in (
        ({"train": {"stepz": 1}}, "train.stepz is not a known key; did you mean train.steps?"),
        ({"train": {"steps": None}}, "train.steps (None) must be a whole number"),
        ({"train": {"steps": True}}, "train.steps (True) must be a whole number"),
        ({"train": 5}, "train is a group of keys"),
        ({"optim": {"name": ["adamw"]}}, "must be one of adamw, sgd"),
    ):
        with pytest.raises(ConfigError) as caught:
            from_dict(settings)
        assert words in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "nope.yaml")
    assert refusal("--config", missing) == f"--config {missing} cannot be read (No such file or directory); give the path of a YAML file"
    assert f"--config {tmp_path} cannot be read (Is a directory)" in refusal("--config", str(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not text in UTF-8" in refusal("--config", str(binary))


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "broken.yaml", "train:\n  steps: [1\noptim: {}\n")
    assert f"--config {path} line 3, column" in refusal("--config", path)
    assert "is not valid YAML" in refusal("--config", path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}\n", "[1, 2]\n", "5\n"])
def test_a_file_without_settings(tmp_path: Path, text: str) -> None:
    assert "holds no settings" in refusal("--config", write(tmp_path, "empty.yaml", text))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.stepz", "train.steps"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("steps", "train.steps"),
        ("optim_lr", "optim.lr"),
        ("model.hidden", "model.hidden_size"),
        ("model.attention.gates.position", "model.attention.gate.position"),
        ("parallel.expert", None),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, wrong: str, meant: str | None) -> None:
    on_line = refusal(f"--{wrong}=1")
    in_file = refusal("--config", path := write(tmp_path, "a.yaml", f"# a comment\n{wrong}: 1\n"))
    assert f"--{wrong} (on the command line) is not a known key" in on_line
    assert f"{wrong} ({path} line 2) is not a known key" in in_file
    if meant is not None:
        assert on_line.endswith(f"did you mean --{meant}?")
        assert in_file.endswith(f"did you mean {meant}?")


def test_an_unknown_key_deep_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model:\n  attention:\n    gate:\n      positon: G1\n")
    assert f"model.attention.gate.positon ({path} line 4) is not a known key; did you mean model.attention.gate.position?" in refusal(
        "--config", path
    )
    assert "trian (" in refusal("--config", write(tmp_path, "c.yaml", "trian:\n  steps: 1\n"))
    assert "config (" in refusal("--config", write(tmp_path, "b.yaml", f"config: {path}\n"))


@pytest.mark.parametrize("value", ["5", "null", "", "[1]"])
@pytest.mark.parametrize("group", ["train", "model.attention"])
def test_a_value_where_a_group_belongs(tmp_path: Path, group: str, value: str) -> None:
    message = refusal("--config", write(tmp_path, "a.yaml", f"{group}: {value}\n"))
    assert "is a group of keys" in message and f"{group}." in message
    assert f"--{group} (on the command line) is a group of keys" in refusal(f"--{group}", "{x: 1}")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.steps", "many", "a whole number"),
        ("train.steps", "5.0", "a whole number"),
        ("train.steps", "true", "a whole number"),
        ("optim.lr", "fast", "a number"),
        ("train.recompute", "1", "true or false"),
    ],
)
def test_a_value_of_the_wrong_type(tmp_path: Path, key: str, value: str, rule: str) -> None:
    shown = value.capitalize() if value == "true" else value
    assert f"{key} ('{shown}', on the command line) must be {rule}; " in refusal(f"--{key}", value)
    path = write(tmp_path, "a.yaml", f"\n{key}: {value}\n")
    assert f"{key} ('{shown}', {path} line 2) must be {rule}; " in refusal("--config", path)


def test_types_that_only_a_file_can_get_wrong(tmp_path: Path) -> None:
    assert "train.resume ('3', " in (message := refusal("--config", write(tmp_path, "a.yaml", "train: {resume: 3}\n")))
    assert "must be text; put quotes around it" in message
    assert "train.steps (None, " in refusal("--config", write(tmp_path, "b.yaml", "train:\n  steps:\n"))
    assert "eval.prompt ('[1]', " in refusal("--config", write(tmp_path, "c.yaml", "eval: {prompt: [1]}\n"))


def test_a_wrong_choice_lists_the_choices() -> None:
    message = refusal("--model.attention.gate.granularity", "headwize")
    assert "must be one of elementwise, headwise; did you mean headwise?" in message
    assert "must be one of adamw, sgd" in refusal("--optim.name", "zzz")


KEEP = "precision.fp8.keep_high_precision"
SOME = "must be a list of some of embedding, head, router, gate, first_layers, last_layers, each once"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("[gate, head, gate]", f"{KEEP} ([gate, head, gate], PLACE) {SOME}; name gate once"),
        ("[gate, haed]", f"{KEEP} ('haed', PLACE) {SOME}; did you mean head?"),
        ("haed", f"{KEEP} ('haed', PLACE) {SOME}; did you mean head?"),
        ("gate", f"{KEEP} ('gate', PLACE) {SOME}; write [gate]"),
        ("[gate, 3]", f"{KEEP} ('3', PLACE) {SOME}; its default is [embedding, head, router, gate]"),
    ],
)
def test_a_wrong_list_is_told_by_its_element(tmp_path: Path, value: str, told: str) -> None:
    assert refusal(f"--{KEEP}", value) == told.replace("PLACE", "on the command line")
    path = write(tmp_path, "a.yaml", f"\n{KEEP}: {value}\n")
    assert refusal("--config", path) == told.replace("PLACE", f"{path} line 2")


def test_wrong_lists_without_a_command_line() -> None:
    for value, shown, remedy in (
        (["gate", "haed"], "[gate, haed]", "did you mean head?"),
        (("gate", "head", "gate", "head"), "[gate, head, gate, head]", "name gate, head once"),
        (["gate", ["gate"]], "[gate, ['gate']]", "did you mean gate?"),
        (None, "None", "its default is [embedding, head, router, gate]"),
    ):
        with pytest.raises(ConfigError) as caught:
            from_dict({KEEP: value})
        assert str(caught.value) == f"{KEEP} ({shown}) {SOME}; {remedy}"


def test_a_key_set_twice_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "train:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    assert refusal("--config", path) == f"train.steps is set twice in {path} (lines 2 and 4); keep one of them"


def test_words_that_belong_to_no_option() -> None:
    assert "'train.steps=3' on the command line belongs to no option" in refusal("train.steps=3")
    assert "'-x' on the command line belongs to no option" in refusal("-x")
    assert "--train.steps on the command line needs a value" in refusal("--train.steps")
    assert "--train.steps on the command line needs a value" in refusal("--train.steps", "--train.seed", "1")
    assert "--config on the command line needs a value" in refusal("--config")


def test_the_config_floor_imports_no_torch() -> None:
    code = "import sys, megagate, megagate.config.cli, megagate.config.rules, megagate.config.count; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
