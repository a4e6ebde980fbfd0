"""The command that prepares data: killed at any moment and started again, spread over an array, run twice at once, on a full disk."""

import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megagate.data.manifest import open_shards, read_manifest, verify
from megagate.data.tokenizer import Tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
# Runs a command, and prints the peak, in KiB, of the largest process among it and its workers.
LARGEST = (
    "import resource, subprocess, sys\n"
    "subprocess.run(sys.argv[1:], check=True)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)
Start = Callable[..., "subprocess.Popen[str]"]
Tree = dict[str, bytes]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 documents of some 600 bytes."""
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    draw = random.Random(0)
    with open(path, "w") as stream:
        for number in range(3_000):
            words = " ".join(draw.choice(("gate", "sink", "größe", "head", "expert")) for _ in range(draw.randrange(200)))
            stream.write(json.dumps({"text": f"{number} {words}"}, ensure_ascii=False) + "\n")
    return path


def command(*arguments: object, output: Path, text: Path | str, tokenizer: object = "bytes") -> list[str]:
    names = ["--input", text, "--output", output, "--tokenizer", tokenizer]
    settings = ["--unit-bytes", 20_000, "--split", "0.9,0.06,0.04", "--workers", 2]
    return [str(word) for word in (sys.executable, TOOL, *names, *settings, *arguments)]


def start(*arguments: object, **names: object) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    slurm = names.pop("slurm", {})
    limit = names.pop("limit", None)
    limits = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # type: ignore[arg-type]
    return subprocess.Popen(
        command(*arguments, **names),  # type: ignore[arg-type]
        env={**environment, "PYTHONPATH": str(TOOL.parents[1]), **slurm},  # type: ignore[dict-item]
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limits,  # noqa: PLW1509  one thread here
    )


def run(*arguments: object, **names: object) -> tuple[int, str, str]:
    process = start(*arguments, **names)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def units_done(output: Path) -> int:
    return len(list((output / "units").glob("part-*.json")))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Tree:
    """What an undisturbed run leaves."""
    output = tmp_path_factory.mktemp("reference") / "new/place"
    code, out, err = run(output=output, text=text)
    assert code == 0, err
    assert "share 1/1, 0 of them done" in out and "0 skipped in all" in out and "tokens/s" in err and "documents/s" in err and "MB/s" in err
    manifest = verify(output)
    shards = {split: open_shards(output, manifest, split=split) for split in ("train", "valid", "test")}
    assert sum(shard.documents for found in shards.values() for shard in found) == 3_000
    assert units_done(output) > 60
    return tree(output)


@pytest.mark.parametrize("whole_session", [True, False], ids=["all-processes", "the-parent"])
def test_killed_in_a_loop_it_leaves_the_same_bytes(tmp_path: Path, text: Path, reference: Tree, whole_session: bool) -> None:
    draw = random.Random(whole_session)
    output = tmp_path / "out"
    lives = kept = 0
    while True:
        process = start(output=output, text=text)
        before, lives = units_done(output), lives + 1
        # Somewhere in the work: not before a unit more is there, or a loop would never end.
        while process.poll() is None and units_done(output) == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        if whole_session and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        if process.wait() == 0:
            break
        kept += units_done(output) < len([name for name in reference if name.endswith(".json") and "part-" in name])
        assert process.returncode == -signal.SIGKILL, process.communicate()
        assert lives < 100
    assert kept >= 3, "it was never killed within its work"
    code, out, err = run(output=output, text=text)
    assert code == 0, err
    assert tree(output) == reference


def test_killed_before_its_first_unit_it_leaves_the_same_bytes(tmp_path: Path, text: Path, reference: Tree) -> None:
    for delay in (0.05, 0.15, 0.25, 0.35, 0.45):
        process = start(output=tmp_path / "out", text=text)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run(output=tmp_path / "out", text=text)[0] == 0
    assert tree(tmp_path / "out") == reference


def test_shares_of_an_array_make_the_same_bytes_in_any_order(tmp_path: Path, text: Path, reference: Tree) -> None:
    output = tmp_path / "out"
    code, out, _ = run("--unit-range", "3/3", output=output, text=text)
    assert code == 0 and "share 3/3 is done; when all are, run the same command with --finalize" in out
    code, _, err = run("--finalize", output=output, text=text)
    assert code == 2 and "units are missing: 0-1, 3-4, 6-7" in err and not (output / "dataset.json").exists()
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"}
    both = [start(output=output, text=text, slurm={**array, "SLURM_ARRAY_TASK_ID": str(task)}) for task in (1, 0)]
    assert [process.communicate()[1] and process.returncode for process in both] == [0, 0]
    code, out, err = run("--finalize", output=output, text=text)
    assert code == 0, err
    assert tree(output) == reference
    assert run("--finalize", output=output, text=text)[0] == 0 and tree(output) == reference


def test_two_writers_at_once_do_no_harm(tmp_path: Path, text: Path, reference: Tree) -> None:
    writers = [start(output=tmp_path / "out", text=text) for _ in range(3)]
    results = [(process.communicate(timeout=120), process.returncode) for process in writers]
    assert [code for _, code in results] == [0, 0, 0], results  # who is overtaken takes what stands there
    assert tree(tmp_path / "out") == reference


def test_another_plan_is_refused_and_nothing_changes(tmp_path: Path, text: Path, reference: Tree) -> None:
    output = tmp_path / "out"
    assert run(output=output, text=text)[0] == 0
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer.train(["some text to learn from"], vocab_size=270).save(tokenizer)
    other = tmp_path / "b.jsonl"
    other.write_bytes(text.read_bytes() + b'{"text": "more"}\n')
    for arguments, names, message in [
        (("--text-key", "body"), {"text": text}, "text_key was 'text', and is 'body' now"),
        ((), {"text": text, "tokenizer": tokenizer}, "tokenizer was"),
        ((), {"text": other}, "2 inputs were added, removed or changed"),
    ]:
        code, _, err = run(*arguments, output=output, **names)
        assert code == 2 and err.startswith("DataError: ") and message in err and err.count("\n") == 1
        assert tree(output) == reference
    (output / "plan.json").unlink()
    code, _, err = run("--text-key", "body", output=output, text=text)
    assert code == 2 and "holds a data set that was not made by this plan" in err


def test_a_full_disk_is_told_and_the_next_run_goes_on(tmp_path: Path, text: Path, reference: Tree) -> None:
    output = tmp_path / "out"
    code, _, err = run(output=output, text=text, limit=20_000)  # bytes a file may have: a unit's ids need more
    assert code == 2 and "cannot write" in err and "-train.bin: File too large; free some space" in err and "Traceback" not in err
    assert units_done(output) == 0 and [name for name in tree(output) if name.endswith(".tmp")] == []
    assert run(output=output, text=text)[0] == 0
    assert tree(output) == reference


# Runs a command on a disk of 1 MB, and again once it has grown; copies what is there then. Names: disk, copy, then the command.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=1m none "$0" || exit 90
copy=$1; shift
"$@"; echo "code $?, $(ls "$0"/out/units/*.json | wc -l) units, $(find "$0" -name '*.tmp' | wc -l) temporary" >&2
mount -o remount,size=64m "$0" && "$@" && cp -r "$0/out" "$copy"
"""


def test_a_disk_that_is_really_full_is_told_and_the_next_run_goes_on(tmp_path: Path, text: Path, reference: Tree) -> None:
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    (tmp_path / "disk").mkdir()
    mount = [*own, "mount", "-t", "tmpfs", "none", str(tmp_path / "disk")]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no mounts of one's own here")
    words = command(output=tmp_path / "disk/out", text=text)
    script = [*own, "sh", "-c", ON_A_SMALL_DISK, str(tmp_path / "disk"), str(tmp_path / "copy"), *words]
    result = subprocess.run(script, env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result
    assert f"cannot write {tmp_path}/disk/out/" in result.stderr and ": No space left on device; free some space" in result.stderr
    assert re.search(r"^code 2, [1-9]\d* units, 0 temporary$", result.stderr, re.MULTILINE), result.stderr
    assert tree(tmp_path / "copy") == reference


def test_interrupted_it_leaves_no_temporary_file(tmp_path: Path, text: Path, reference: Tree) -> None:
    output = tmp_path / "out"
    process = start(output=output, text=text)
    while process.poll() is None and not units_done(output):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; finished units are kept" in err and "Traceback" not in err
    assert [name for name in tree(output) if name.endswith(".tmp")] == []
    assert run(output=output, text=text)[0] == 0 and tree(output) == reference


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_told(tmp_path: Path, text: Path, reference: Tree, number: signal.Signals) -> None:
    output = tmp_path / "out"
    process = start(output=output, text=text)
    while not units_done(output):
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(workers[0], number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and f"died (exit code {-number})" in err and "run again to go on" in err
    assert ("lack of memory" in err) == (number == signal.SIGKILL)
    assert run(output=output, text=text)[0] == 0 and tree(output) == reference


def test_bad_lines_stop_it_or_are_counted(tmp_path: Path, text: Path) -> None:
    raw = text.read_bytes()
    at = raw.index(b"\n", len(raw) // 2) + 1
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(raw[:at] + b'{"text": "\xff"}\n{"no": 1}\n' + raw[at:] + b'{"text": "cut of')
    output = tmp_path / "out"
    code, _, err = run(output=output, text=bad)
    assert code == 2 and f"{bad}, byte " in err and "or choose --on-error skip" in err and err.rstrip().count("DataError") == 1
    code, out, err = run("--on-error", "skip", output=output, text=bad)
    assert code == 0, err
    assert "3 skipped in all" in out and f"bad.jsonl, byte {at}: invalid UTF-8" in out
    source = read_manifest(output).source
    assert source["skipped"] == 3 and source["skipped, invalid UTF-8"] == source["skipped, missing key"] == 1
    verify(output)


def test_a_truncated_file_of_a_data_set_is_told_with_its_cause(tmp_path: Path, text: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n'))
    (tmp_path / "in/1.jsonl.gz").write_bytes(gzip.compress(text.read_bytes())[:50_000])
    cache = {"HF_HOME": str(tmp_path / "cache")}
    code, _, err = run("--on-error", "skip", output=tmp_path / "out", text=f"datasets:{tmp_path}/in", slurm=cache)
    assert code == 2 and f"DataError: {tmp_path}/in, shard 1, row 0 and following: " in err
    assert "(EOFError: " in err and "copy a damaged file again" in err and "memory" not in err and "Traceback" not in err


def test_a_finished_set_is_not_made_again_without_its_units(tmp_path: Path, text: Path, reference: Tree) -> None:
    output = tmp_path / "out"
    assert run(output=output, text=text)[0] == 0
    shutil.rmtree(output / "units")  # all parts are small and merged
    for arguments in ((), ("--unit-range", "1/2"), ("--finalize",)):
        code, out, err = run(*arguments, output=output, text=text)
        assert code == 0 and "0 skipped in all" in out, err
    assert tree(output) == {name: raw for name, raw in reference.items() if not name.startswith("units/")}


def test_folders_and_changed_inputs_are_told(tmp_path: Path, text: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(text, tmp_path / "in/a.jsonl")
    (tmp_path / "in/b.csv").write_text("text\nleft out\n")
    (tmp_path / "in/c.csv").write_text("text\nleft out\n")
    code, out, err = run("--unit-range", "1/2", output=tmp_path / "out", text=tmp_path / "in")
    assert code == 0 and "left out 2 files of folders, by ending: 2 .csv" in out and "were written after" not in err, err
    shutil.copy(text, tmp_path / "in/a.jsonl")
    code, _, err = run("--unit-range", "2/2", output=tmp_path / "out", text=tmp_path / "in")
    assert code == 0 and "1 inputs were written after the plan was made, the first is a.jsonl" in err, err
    code, _, err = run("--text-key", "body", output=tmp_path / "out", text=tmp_path / "in")
    assert code == 2 and "or remove the folder, in which nothing is published yet" in err


def test_the_slurm_script_gives_options_that_the_tool_has(tmp_path: Path, text: Path) -> None:
    script = TOOL.parents[1] / "examples/slurm/preprocess_array.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    names = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "INPUT": "with a space", "TOKENIZER": "bytes", "OUTPUT": "out", "FINALIZE": "1"}
    slurm = {"SLURM_CPUS_PER_TASK": "3", "SLURM_ARRAY_TASK_ID": "0"}
    result = subprocess.run(["bash", script, "--unit-range", "4/16"], env=names | slurm, capture_output=True, text=True, check=True)
    tool, *words = result.stdout.splitlines()
    assert tool == "tools/preprocess_data.py" and (TOOL.parents[1] / tool).is_file()
    expected = {"input": "with a space", "tokenizer": "bytes", "output": "out", "workers": "3", "finalize": None, "unit-range": "4/16"}
    assert words == [word for name, value in expected.items() for word in (f"--{name}", value) if word is not None]
    help_text = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"--{name} " in help_text for name in expected)
    directives = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--array=0-15" in directives and len(directives) == len(set(directives)) == 6


def test_a_trained_tokenizer_gives_its_own_ids(tmp_path: Path, text: Path) -> None:
    tokenizer = Tokenizer.train(["gate sink größe head expert " * 20], vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer.json")
    code, _, err = run(output=tmp_path / "out", text=text, tokenizer=tmp_path / "tokenizer.json")
    assert code == 0, err
    manifest = verify(tmp_path / "out")
    documents = [
        tuple(shard.document(i).tolist())
        for split in ("train", "valid", "test")
        for shard in open_shards(tmp_path / "out", manifest, split=split)
        for i in range(shard.documents)
    ]
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert sorted(documents) == sorted(tuple(ids.tolist()) for ids in tokenizer.encode_documents(texts))


def test_both_packages_leave_the_same_bytes(tmp_path: Path, text: Path) -> None:
    odd = tmp_path / "odd.jsonl"
    lines = [json.dumps({"text": f"{word} \U000330d6'll<|endoftext|> {word}"}) for word in ("gate", "größe")]
    odd.write_text(text.read_text() + "\n".join(lines))
    Tokenizer.train(["gate sink größe head expert we'll " * 20], vocab_size=300).save(tmp_path / "tokenizer.json")
    trees = []
    for backend in ("tokenizers", "gigatoken", "auto"):
        output = tmp_path / backend
        code, out, err = run("--tokenizer-backend", backend, output=output, text=odd, tokenizer=tmp_path / "tokenizer.json")
        assert code == 0 and "by tokenizers" not in out and ("by gigatoken" in out) == (backend != "tokenizers"), err
        trees.append(tree(output))
    assert trees[0] == trees[1] == trees[2]


def test_a_document_of_8_mib_needs_less_than_300_mb(tmp_path: Path, text: Path) -> None:
    words = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    long = (" ".join(words) * 8).encode()[: (8 << 20) - 100].decode(errors="ignore")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": long}, ensure_ascii=False) + "\n")
    Tokenizer.train(words[:100], vocab_size=2_000).save(tmp_path / "tokenizer.json")
    for backend in ("tokenizers", "gigatoken"):
        names = {"output": tmp_path / backend, "text": tmp_path / "long.jsonl", "tokenizer": tmp_path / "tokenizer.json"}
        words_of_command = command("--tokenizer-backend", backend, "--split", "1,0,0", **names)
        # Started by a small process: a new one begins with the peak of the one that it is forked from.
        result = subprocess.run([sys.executable, "-c", LARGEST, *words_of_command], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0 and int(result.stdout.split()[-1]) * 1024 < 300e6, result
    assert tree(tmp_path / "tokenizers") == tree(tmp_path / "gigatoken")


def test_a_tokenizer_that_gigatoken_gets_wrong_is_refused_or_left_to_the_other(tmp_path: Path, text: Path) -> None:
    Tokenizer.train(["gate sink größe head expert " * 20], vocab_size=300).save(tmp_path / "tokenizer.json")
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = {"single_word": True, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    value["added_tokens"].append({"id": 300, "content": "sin", **flags})  # gigatoken 0.10 takes it out of words, too
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    names = {"output": tmp_path / "out", "text": text, "tokenizer": tmp_path / "tokenizer.json"}
    code, _, err = run("--tokenizer-backend", "gigatoken", **names)
    assert code == 2 and err.startswith("DataError: gigatoken makes other ids than tokenizers: ") and units_done(tmp_path / "out") == 0
    code, out, err = run(**names)
    assert code == 0 and "the ids are made by tokenizers: gigatoken makes other ids than tokenizers: " in out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokenizer-backend", "gigatoken"), "gigatoken has no tokenizer `bytes`; leave --tokenizer-backend out"),
        (("--split", "0.9,0.1"), "--split is '0.9,0.1'; it must be three shares"),
        (("--unit-range", "4/3"), "--unit-range is '4/3'"),
        (("--workers", "0"), "--workers is 0; it must be at least 1"),
        (("--tokenizer", "./none.json"), "--tokenizer ./none.json: no such file"),
        (("--text-key", "body"), "no key 'body', only 'text'; choose another --text-key"),
    ],
)
def test_wrong_options_are_one_clean_message(tmp_path: Path, text: Path, arguments: tuple[str, str], message: str) -> None:
    code, _, err = run(*arguments, output=tmp_path / "out", text=text)
    assert code == 2 and message in err and "Traceback" not in err
