"""The style that a tool can check: ruff's rules stand in pyproject.toml. And links that lead somewhere."""

import ast
import re
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_ruff_is_clean() -> None:
    tool = Path(sysconfig.get_path("scripts")) / "ruff"
    command = [str(tool), "check", "--no-cache", "--output-format", "concise", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_library_prints_nothing() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "megagate").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == [], "output goes through megagate.log"


def test_links_of_the_readmes_lead_somewhere() -> None:
    broken = []
    for readme in (ROOT / "README.md", ROOT / "megagate" / "README.md"):
        text = readme.read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub names them
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if "://" not in link and not ((readme.parent / path).exists() and (not anchor or anchor in anchors)):
                broken.append(f"{readme.name}: {link}")
    assert broken == []
