"""The session: two processes of one thread, the server of each one's ranks, and no skip that is not on the list."""

import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a test fails by what was changed and not by chance; `--hypothesis-profile default` draws new ones.
settings.register_profile("fixed", derandomize=True, database=None)
settings.load_profile("fixed")

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: ranks share few cores

TESTS = Path(__file__).parent
ALLOWED_SKIPS = TESTS / "allowed_skips.txt"

if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))  # for `import ranks`


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-product", action="store_true", help="test_parity_matrix.py: all combinations, not all pairs")
    parser.addoption("--no-skips", action="store_true", help="whatever is skipped fails the session, listed or not")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes, also on many cores: each has up to four ranks of its own. Tests of a GPU have it for themselves."""
    return 0 if config.option.markexpr == "gpu" else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish(session: pytest.Session) -> None:
    if "ranks" in sys.modules and not session.config.option.collectonly:
        sys.modules["ranks"].start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "ranks" in sys.modules:
        sys.modules["ranks"].POOL.close()
    if hasattr(session.config, "workerinput"):  # one of several processes: the one that started them has all reports
        return
    if unlisted_skips(session.config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    unlisted = unlisted_skips(config)
    if not skips(config):
        return
    terminalreporter.section("skipped")
    for skip in skips(config):
        node, reason = skip
        terminalreporter.write_line(f"{'NOT ALLOWED ' if skip in unlisted else ''}{node} | {reason}")
    if unlisted:
        rule = "allowed here" if config.option.no_skips else f"in {ALLOWED_SKIPS.name}"
        terminalreporter.write_line(f"{len(unlisted)} skips are not {rule}: the session fails", red=True)


def skips(config: pytest.Config) -> list[tuple[str, str]]:
    """Node id and reason of every test or file that was skipped."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [(report.nodeid, skip_reason(report)) for report in reporter.stats.get("skipped", [])]


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def unlisted_skips(config: pytest.Config) -> list[tuple[str, str]]:
    """Skips whose node id and reason match no line of the list; with `--no-skips` all."""
    if config.option.no_skips:
        return skips(config)
    lines = [line.split(" | ", 1) for line in ALLOWED_SKIPS.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [
        (node, reason)
        for node, reason in skips(config)
        if not any(fnmatchcase(node, pattern) and fnmatchcase(reason, why) for pattern, why in lines)
    ]
