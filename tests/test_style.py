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
    readmes = [ROOT / "README.md", *(path for top in ("megagate", "tools", "examples") for path in (ROOT / top).rglob("README.md"))]
    assert ROOT / "tools" / "README.md" in readmes
    broken = [
        f"{readme.relative_to(ROOT)}: {link}"
        for readme in readmes
        for link in re.findall(r"\]\(([^)\s]+)\)", readme.read_text(encoding="utf-8"))
        if "://" not in link and not _leads_somewhere(readme, link)
    ]
    assert broken == []


def _leads_somewhere(readme: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = readme.parent / path if path else readme
    if not (target.exists() and anchor):
        return target.exists()
    text = re.sub(r"^```.*?^```", "", target.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub names them
