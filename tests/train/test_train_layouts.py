"""One loss curve under every layout; each form of the public command starts one of them."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from train_jobs import DEEPSPEED, SCRIPT, Job, Jobs, Record, free_port, metrics

STEPS = 10
SAMPLES_PER_MICRO_STEP = 2
EXACT_TO = 1e-5  # relative
LIMIT_S = 240.0  # of one job; two run at a time on what may be a busy machine
KEYS = ("loss", "aux_loss", "z_loss", "grad_norm", "val_loss")


def settings(folder: Path, *, dp: int, tp: int = 1, ep: int = 1, stage: int = 1) -> list[object]:
    micro = SAMPLES_PER_MICRO_STEP // dp
    return [
        *("--train.output_dir", folder / "run", "--train.steps", STEPS, "--train.micro_batch_size", micro),
        *("--parallel.tp", tp, "--parallel.ep", ep, "--parallel.zero_stage", stage, "--eval.every", 5, "--checkpoint.every", 0),
    ]


def by_launcher(jobs: Jobs, options: list[object], **layout: int) -> list[Job]:
    return [jobs.deepspeed(options, settings(jobs.folder, **layout))]


def forked(jobs: Jobs, *, world: int, **layout: int) -> list[Job]:
    return [jobs.fork(*settings(jobs.folder, **layout), world=world)]


def by_script(jobs: Jobs, **layout: int) -> list[Job]:
    config = SCRIPT.parent / "configs" / "nano.yaml"
    words = ["bash", SCRIPT, "--config", config, *settings(jobs.folder, **layout)]
    return [jobs.command(words, NPROC="2", DS_LAUNCH_ARGS=f"--master_port {free_port()}")]


def by_two_nodes(jobs: Jobs, **layout: int) -> list[Job]:
    """Two launchers, as on two machines."""
    hosts, config = jobs.folder / "hosts", SCRIPT.parent / "configs" / "nano.yaml"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n", encoding="utf-8")
    meet = ["--hostfile", hosts, "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    job = [SCRIPT, "--config", config, *settings(jobs.folder, **layout)]
    return [jobs.command([DEEPSPEED, *meet, "--node_rank", node, *job]) for node in (0, 1)]


LAYOUTS: dict[str, Callable[[Jobs], list[Job]]] = {
    "one rank": partial(by_launcher, options=[], dp=1),
    "dp2": partial(by_launcher, options=["--num_gpus", 2], dp=2),
    "ep2": partial(by_launcher, options=["--no_python", "--num_gpus", 2], dp=2, ep=2),
    "tp2": partial(by_script, dp=1, tp=2),
    "tp2 x ep2": partial(by_two_nodes, dp=1, tp=2, ep=2),
    "tp2 x ep4": partial(by_launcher, options=["--num_accelerators", 4], dp=2, tp=2, ep=4),
    "dp2 x tp2": partial(forked, world=4, dp=2, tp=2),  # no form of the command is left, and imports of four ranks take long
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Record]]]:
    """The records of every layout; two jobs at a time, since a launch mostly waits for imports."""
    started = {name: Jobs(tmp_path_factory.mktemp("layout")) for name in LAYOUTS}

    def run(name: str) -> list[Record]:
        found = LAYOUTS[name](started[name])
        codes = [code for job in found for code in job.wait(LIMIT_S)]
        assert set(codes) == {0}, f"{name}:\n" + "\n".join(job.text for job in found)
        return metrics(started[name].folder / "run")

    try:
        with ThreadPoolExecutor(2) as pool:
            yield dict(zip(LAYOUTS, pool.map(run, LAYOUTS), strict=True))
    finally:
        for jobs in started.values():
            jobs.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_is_that_of_one_rank(curves: dict[str, list[Record]], name: str) -> None:
    one, found = curves["one rank"], curves[name]
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for expected, record in zip(one, found, strict=True):
        for key in KEYS:
            if key in expected:
                step = f"{key} of step {record['step']}"
                assert math.isclose(record[key], expected[key], rel_tol=EXACT_TO), f"{step}: {record[key]}, {expected[key]} on one rank"


@pytest.mark.slow
def test_the_curve_is_one_that_would_show_a_difference(curves: dict[str, list[Record]]) -> None:
    one = curves["one rank"]
    assert one[-1]["loss"] < one[0]["loss"] - 0.1
    assert all(record["aux_loss"] > 1 and record["z_loss"] > 0.1 and record["grad_norm"] > 0.1 for record in one)
    assert ["val_loss" in record for record in one] == [step in (5, 10) for step in range(1, STEPS + 1)]
