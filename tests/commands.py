"""The commands of tools/ in the tests' own process, where torch is loaded already."""

import importlib.util
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[1] / "tools"


def load(name: str) -> ModuleType:
    """`tools/NAME.py` as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"{name}_command", TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name: str, *arguments: object) -> int:
    """The exit code of a command; argparse's way out counts as one too."""
    try:
        return load(name).main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return leaving.code
