"""Writes `apex_signatures.json`: the signatures of what we use of NVIDIA's apex, read by `ast` from a checkout; nothing is imported.

    git clone https://github.com/NVIDIA/apex
    python tests/backend/make_apex_signatures.py apex
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from signatures import Row, rows_of  # noqa: E402 - also where this is run as a script

OUT = Path(__file__).with_name("apex_signatures.json")
WANTED = {
    "apex.optimizers.FusedAdam": "apex/optimizers/fused_adam.py",
    "apex.normalization.fused_layer_norm.mixed_dtype_fused_rms_norm_affine": "apex/normalization/fused_layer_norm.py",
}
"""By the name that is imported, the file that defines it."""


def entry(source: str, name: str) -> dict[str, Any]:
    """The parameters of a function, or those of the public methods of a class and of its constructor."""
    (node,) = (one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == name)
    if isinstance(node, ast.FunctionDef):
        return {"call": rows_of(node, bound=False)}
    methods: dict[str, list[Row]] = {one.name: rows_of(one, bound=True) for one in node.body if isinstance(one, ast.FunctionDef)}
    call = methods.pop("__init__")
    return {"call": call, "methods": methods, "bases": [ast.unparse(base) for base in node.bases]}


def make(checkout: Path) -> dict[str, Any]:
    """All entries."""
    sources = {name: (checkout / path).read_text(encoding="utf-8") for name, path in WANTED.items()}
    return {name: entry(source, name.rpartition(".")[2]) for name, source in sources.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    OUT.write_text(json.dumps({"repository": "github.com/NVIDIA/apex", "commit": head, "entries": make(folder)}, indent=1) + "\n")
