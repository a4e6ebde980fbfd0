"""Writes `signatures.json`: the signatures of what we use of Transformer Engine, read by `ast` from its pure Python wheel.

Nothing is imported, so that neither a GPU nor the libraries are needed: `pip download --no-deps transformer-engine==2.20.2` gets the wheel.

    python tests/te/make_signatures.py transformer_engine-2.20.2-py3-none-any.whl

A class entry has `call` (of its constructor), the signatures of its methods, those of its bases among them, and the names that any of its
methods sets on `self`; a function entry has `call`, and `pops`: the names that it takes out of its keywords. A parameter is
[name, kind, has a default]. Bases outside of the wheel are named.
"""

import ast
import json
import sys
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

OUT = Path(__file__).with_name("signatures.json")
PYTORCH, RECIPES = "transformer_engine.pytorch", "transformer_engine.common.recipe"
NAMES = {
    PYTORCH: [
        "Linear",
        "LayerNormLinear",
        "GroupedLinear",
        "DotProductAttention",
        "RMSNorm",
        "Fp8Padding",
        "Fp8Unpadding",
        "autocast",
        "checkpoint",
        "moe_permute",
        "moe_permute_with_probs",
        "moe_permute_and_pad_with_probs",
        "moe_unpermute",
        "moe_sort_chunks_by_index",
        "moe_sort_chunks_by_index_with_probs",
        "is_fp8_available",
        "is_mxfp8_available",
        "is_fp8_block_scaling_available",
        "get_device_compute_capability",
        "optimizers.FusedAdam",
        "router.fused_topk_with_score_function",
        "router.fused_compute_score_for_moe_aux_loss",
        "router.fused_moe_aux_loss",
        "quantization.get_align_size_for_quantization",
        "quantization.DelayedScalingRecipeState",
        "quantization.FP8GlobalStateManager",
        "quantization.FP8GlobalState",
    ],
    RECIPES: ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "Format"],
}
"""What may be used, by the module that users import it from."""
Definition = ast.ClassDef | ast.FunctionDef


@dataclass
class Sources:
    """Modules of the package, parsed when they are first asked for.

    Args:
        files: Sources by path, as in the wheel.
        version: Of the package.
    """

    files: dict[str, str]
    version: str
    trees: dict[str, ast.Module] = field(default_factory=dict)

    @classmethod
    def of_wheel(cls, path: Path) -> "Sources":
        """A wheel's."""
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".py", ".dist-info/METADATA"))]
            files = {name: archive.read(name).decode() for name in names}
        (metadata,) = (name for name in files if name.endswith("METADATA"))
        lines = files.pop(metadata).splitlines()
        return cls(files, next(line.split(": ")[1] for line in lines if line.startswith("Version: ")))

    @classmethod
    def of_folder(cls, path: Path, version: str) -> "Sources":
        """Those of an installed package; `path` is the folder that holds `transformer_engine/`."""
        files = sorted((path / "transformer_engine").rglob("*.py"))
        return cls({file.relative_to(path).as_posix(): file.read_text(encoding="utf-8") for file in files}, version)

    @cached_property
    def modules(self) -> dict[str, str]:
        """Paths by module name."""
        return {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in self.files}

    def tree(self, module: str) -> ast.Module:
        """The syntax tree of a module."""
        if module not in self.trees:
            self.trees[module] = ast.parse(self.files[self.modules[module]])
        return self.trees[module]

    def find(self, module: str, name: str) -> tuple[str, Definition] | None:
        """Where a name that `module` offers is defined, following imports; None outside of the wheel.

        Raises:
            LookupError: The module is in the wheel and does not offer it.
        """
        first, _, rest = name.partition(".")
        if rest:
            inner = f"{module}.{first}"
            return self.find(inner, rest) if inner in self.modules else self._through_import(module, first, rest)
        if module not in self.modules:
            return None
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(self._absolute(module, node), alias.name)
        for source in self._stars(module):
            try:
                return self.find(source, name)
            except LookupError:
                continue
        raise LookupError(f"{module} has no {name}")

    def _stars(self, module: str) -> list[str]:
        """Modules of the wheel from which `module` imports everything."""
        imports = [node for node in ast.walk(self.tree(module)) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
        return [source for node in imports if (source := self._absolute(module, node)) in self.modules]

    def _through_import(self, module: str, first: str, rest: str) -> tuple[str, Definition] | None:
        """`first.rest` where `first` is an imported module, perhaps from outside."""
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.Import) and any((alias.asname or alias.name).split(".")[0] == first for alias in node.names):
                return None
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == first:
                        return self.find(f"{self._absolute(module, node)}.{alias.name}", rest)
        raise LookupError(f"{module} has no {first}")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        """The module that an import is from."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = self.modules[module].endswith("/__init__.py")
        above = parts[: len(parts) - node.level + is_package]
        return ".".join([*above, *([node.module] if node.module else [])])


def parameters(node: ast.FunctionDef, *, bound: bool) -> list[list]:
    """[name, kind, has a default] of each; `bound` leaves out self or cls."""
    arguments = node.args
    positional = arguments.posonlyargs + arguments.args
    without = len(positional) - len(arguments.defaults)
    rows: list[list] = [
        [one.arg, "POSITIONAL_ONLY" if i < len(arguments.posonlyargs) else "POSITIONAL_OR_KEYWORD", i >= without]
        for i, one in enumerate(positional)
    ]
    if arguments.vararg:
        rows.append([arguments.vararg.arg, "VAR_POSITIONAL", False])
    rows += [
        [one.arg, "KEYWORD_ONLY", default is not None] for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        rows.append([arguments.kwarg.arg, "VAR_KEYWORD", False])
    return rows[1:] if bound else rows


def fields(node: ast.ClassDef) -> list[list]:
    """The constructor that `dataclass` makes: annotated names are its parameters."""
    return [
        [one.target.id, "POSITIONAL_OR_KEYWORD", one.value is not None]
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    ]


def popped(node: ast.FunctionDef) -> list[str]:
    """Names that a function takes out of its `**kwargs`."""
    calls = (one for one in ast.walk(node) if isinstance(one, ast.Call) and ast.unparse(one.func) == "kwargs.pop")
    return [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]


def is_decorated(node: Definition, name: str) -> bool:
    """Whether a decorator is called so, with or without arguments."""
    heads = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
    return any((head.id if isinstance(head, ast.Name) else getattr(head, "attr", "")) == name for head in heads)


def lineage(sources: Sources, module: str, node: ast.ClassDef) -> tuple[list[tuple[str, ast.ClassDef]], list[str]]:
    """The class and its bases, nearest first, and the names of bases from outside of the wheel."""
    found, outside = [(module, node)], []
    for base in node.bases:
        name = ast.unparse(base)
        where = sources.find(module, name)
        if where is None:
            outside.append(name)
        else:
            above, beyond = lineage(sources, *where)
            found += above
            outside += beyond
    return found, outside


def set_on_self(node: ast.ClassDef) -> set[str]:
    """Names assigned to in the class or to `self` in a method, by `fast_setattr` too."""
    names = set()
    for one in ast.walk(node):
        targets = one.targets if isinstance(one, ast.Assign) else [one.target] if isinstance(one, ast.AnnAssign) else []
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                    names.add(part.attr)
        if isinstance(one, ast.Call) and ast.unparse(one.func) in ("self.fast_setattr", "setattr") and one.args:
            name = one.args[0] if ast.unparse(one.func) == "self.fast_setattr" else one.args[1]
            if isinstance(name, ast.Constant):
                names.add(name.value)
    for one in node.body:
        if isinstance(one, ast.Assign | ast.AnnAssign):
            names |= {part.id for part in ast.walk(one) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return names


def describe(sources: Sources, module: str, name: str) -> dict:
    """The entry of one class or function."""
    where = sources.find(module, name)
    if where is None:
        raise LookupError(f"{module}.{name} leads out of the wheel")
    home, node = where
    entry: dict = {"home": f"{home}:{node.lineno}"}
    if isinstance(node, ast.FunctionDef):
        return entry | {"kind": "function", "call": parameters(node, bound=False), "pops": popped(node)}
    classes, outside = lineage(sources, home, node)
    methods, attributes = {}, set()
    for of, one in reversed(classes):
        for method in one.body:
            if isinstance(method, ast.FunctionDef):
                if is_decorated(method, "property") or is_decorated(method, "setter"):
                    attributes.add(method.name)
                else:
                    methods[method.name] = {
                        "home": f"{of}:{method.lineno}",
                        "call": parameters(method, bound=not is_decorated(method, "staticmethod")),
                    }
        attributes |= set_on_self(one)
    constructor = fields(node) if is_decorated(node, "dataclass") else methods.get("__init__", {"call": []})["call"]
    kept = {key: value for key, value in sorted(methods.items()) if key in ("__call__",) or not key.startswith("_")}
    return entry | {"kind": "class", "call": constructor, "bases": outside, "methods": kept, "attributes": sorted(attributes)}


def make(sources: Sources) -> dict:
    """The whole file."""
    entries = {f"{module}.{name}": describe(sources, module, name) for module, names in NAMES.items() for name in names}
    return {"package": "transformer-engine", "version": sources.version, "entries": entries}


def render(content: dict) -> str:
    """JSON with one row per parameter list, so that a diff of versions reads well."""
    lines = json.dumps(content, indent=1).split("\n")
    joined, depth = [], 0
    for line in lines:
        stripped = line.strip()
        if depth:
            joined[-1] += stripped if stripped.startswith("]") else f" {stripped}".replace("[ ", "[")
            depth += stripped.count("[") - stripped.count("]")
        else:
            joined.append(line)
            depth = line.count("[") - line.count("]")
    return "\n".join(joined) + "\n"


if __name__ == "__main__":
    OUT.write_text(render(make(Sources.of_wheel(Path(sys.argv[1])))))
