"""No file is ever unpickled: sources of the package, the tools and the examples are searched for every way to do it.

What stays in memory is another thing: processes that one command has started send each other pickled objects, over pipes
(`parallel/spawn.py`, `parallel/rank.py`) and, small ones, over the process group (`parallel/comm.py`, `gather_objects`). Whoever can
write there is already one of the run's own ranks. Neither touches a disk.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_MEMORY = {
    "megagate/parallel/rank.py": {"import of pickle"},
    "megagate/parallel/spawn.py": {"import of pickle"},
    "megagate/parallel/comm.py": {"all_gather_object"},
}
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OBJECTS = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list"}
ENDINGS = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def offences(source: str) -> Iterator[str]:
    """Every way in which a source could read or write a pickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import of {name.name}" for name in node.names if name.name.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in PICKLERS:
                yield f"import of {module}"
            if module.split(".")[0] in ("torch", "numpy"):
                names = [name.name for name in node.names if name.name in ("load", "save", "serialization")]
                yield from (f"{module}.{name}, imported by name" for name in names)
        elif isinstance(node, ast.Call):
            yield from _of_call(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(ENDINGS):
            yield f"file {node.value}"


def _of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    named = {word.arg: ast.unparse(word.value) for word in node.keywords}
    name = called.rpartition(".")[2]
    if called in ("torch.load", "torch.serialization.load") and named.get("weights_only") != "True":
        yield f"{called} without weights_only=True"
    if called in ("torch.save", "torch.serialization.save", "torch.package", "torch.jit.load", "pd.read_pickle", "pandas.read_pickle"):
        yield called
    if named.get("allow_pickle", "False") != "False":
        yield f"{called} with allow_pickle"
    if name in OBJECTS:
        yield name
    if name in ("__reduce__", "__setstate__", "Unpickler", "find_class"):
        yield called


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["import of pickle"]),
        ("import torch, dill as d", ["import of dill"]),
        ("from cloudpickle import loads", ["import of cloudpickle"]),
        ("torch.load(path)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=False)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=True)", []),
        ("torch.save(state, path)", ["torch.save"]),
        ("from torch import load", ["torch.load, imported by name"]),
        ("np.load(path, allow_pickle=True)", ["np.load with allow_pickle"]),
        ("np.load(path, allow_pickle=wanted)", ["np.load with allow_pickle"]),
        ("np.load(path)", []),
        ("dist.broadcast_object_list(values)", ["broadcast_object_list"]),
        ("path = folder / 'model.pt'", ["file model.pt"]),
        ("engine.load_state(checkpoint); json.load(file)", []),
    ],
)
def test_each_way_is_seen(source: str, found: list[str]) -> None:
    assert list(offences(source)) == found


def test_nothing_reads_or_writes_a_pickle() -> None:
    paths = [path for folder in ("megagate", "tools", "examples") for path in (ROOT / folder).rglob("*.py")] + [ROOT / "setup.py"]
    assert len(paths) > 100
    found = {str(path.relative_to(ROOT)): set(offences(path.read_text(encoding="utf-8"))) for path in paths}
    assert {path: ways for path, ways in found.items() if ways} == IN_MEMORY


def test_no_example_of_a_shell_does() -> None:
    scripts = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".sh", ".sbatch")]
    assert scripts and not [path for path in scripts if "torch.load" in path.read_text() or "pickle" in path.read_text()]
