"""Finds every call into Transformer Engine in a file of ours, and binds it to the signatures of `signatures.json`.

What it asks of the files, so that nothing escapes it:

- TE's namespaces are called `te` and `recipes`, and nothing else is; they come from `load()` and `load_recipes()`, an argument or an
attribute. - A chain of names that goes through one of them ends in a call: nothing of TE is passed on without one. - An instance whose
methods are called is `self.module` of the class that made it, and goes to functions of ours as an `nn.Module` alone. All
  that is read of it is a name that TE's class or PyTorch's `nn.Module` has.
- Other instances (recipes, regions, an optimizer) are returned, entered or passed on; no method of a `recipe` is called.
- The package is imported by `load`, `load_recipes` and `load_stashes` alone; what the last reads is bound by hand.
"""

import ast
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

SIGNATURES: dict[str, Any] = json.loads(Path(__file__).with_name("signatures.json").read_text(encoding="utf-8"))
NAMESPACES = {"te": "transformer_engine.pytorch", "recipes": "transformer_engine.common.recipe"}
LOADERS = ("load", "load_recipes", "load_stashes")
INSTANCE = "self.module"
TAKERS = ("_lent", "_bare", "setattr")
"""What an instance may be passed to: functions that see no more than an `nn.Module`."""
CARRIERS = ("Region", "Attention")
"""Classes of ours that take a namespace along, as their attribute `te`."""


@dataclass(frozen=True)
class Bound:
    """A call that fits.

    Args:
        line: Where it stands.
        target: What is called, by its name in `signatures.json`, and the method.
    """

    line: int
    target: str


class Misfit(AssertionError):
    """A call that does not fit, or that cannot be resolved."""


def bind_calls(source: str, entries: dict[str, Any] | None = None) -> list[Bound]:
    """All calls of a file.

    Raises:
        Misfit: Of the first that does not fit or cannot be resolved, with its line.
    """
    finder = _Finder(SIGNATURES["entries"] if entries is None else entries)
    finder.visit(ast.parse(source))
    return finder.found


def _chain(node: ast.AST) -> list[str] | None:
    """`a.b.c` as its names; None of anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else None


class _Finder(ast.NodeVisitor):
    def __init__(self, entries: dict[str, Any]):
        self.entries, self.found = entries, list[Bound]()
        self.types: list[str] = []  # of `self.module` in the class at hand
        self.function = ""

    def fail(self, node: ast.AST, why: str) -> None:
        raise Misfit(f"line {getattr(node, 'lineno', '?')}: {ast.unparse(node)[:120]}: {why}")

    # ---- where names come from

    def visit_Import(self, node: ast.Import) -> None:
        if any(alias.name.split(".")[0] == "transformer_engine" for alias in node.names):
            self.fail(node, "the package is imported by `from` in a loader")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] == "transformer_engine" and self.function not in LOADERS:
            self.fail(node, f"only {' and '.join(LOADERS)} import the package")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.function = self.function, node.name
        self.generic_visit(node)
        self.function = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer = self.types
        made = [one for one in ast.walk(node) if isinstance(one, ast.Assign) and INSTANCE in map(ast.unparse, one.targets)]
        self.types = [self._made_by(one) for one in made]
        self.generic_visit(node)
        self.types = outer

    def _made_by(self, node: ast.Assign) -> str:
        chain = _chain(node.value.func) if isinstance(node.value, ast.Call) else None
        if chain is None or chain[0] not in NAMESPACES:
            self.fail(node, f"{INSTANCE} is made by a call of TE's")
        return self._name_of(node, chain)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            for part in ast.walk(target):
                name = part.id if isinstance(part, ast.Name) else None
                if name in NAMESPACES and not self._gives(name, node.value):
                    self.fail(node, f"{name} may only be bound by a loader or an attribute {name}")
        # `te = self.te` is no use of TE, but a way to it.
        names_it = (
            len(node.targets) == 1 and isinstance(node.targets[0], (ast.Name, ast.Attribute)) and _last(node.targets[0]) in NAMESPACES
        )
        for target in node.targets:
            if ast.unparse(target) != INSTANCE:
                self.visit(target)
        if not (names_it and self._gives(_last(node.targets[0]), node.value)):
            self.visit(node.value)

    def _gives(self, name: str, value: ast.AST) -> bool:
        if isinstance(value, ast.IfExp):
            return self._gives(name, value.body) and isinstance(value.orelse, ast.Constant)
        loader = LOADERS[list(NAMESPACES).index(name)]
        return (isinstance(value, ast.Call) and _chain(value.func) == [loader]) or _last(value) == name

    # ---- uses

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in NAMESPACES and isinstance(node.ctx, ast.Load):
            self.fail(node, "a namespace of TE's is passed on without a call")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = _chain(node)
        if chain is None:
            self.generic_visit(node)
        elif ".".join(chain[:2]) == INSTANCE:
            self._read(node, chain)
        elif any(name in NAMESPACES for name in chain[:-1]) or chain[0] in NAMESPACES:
            self.fail(node, "something of TE's is read without a call")
        elif chain[-1] in NAMESPACES and isinstance(node.ctx, ast.Load):
            self.fail(node, "a namespace of TE's is passed on without a call")

    def _read(self, node: ast.Attribute, chain: list[str]) -> None:
        if not self.types:
            self.fail(node, f"{INSTANCE} in a class that does not make it")
        if len(chain) == 2:
            self.fail(node, "an instance of TE's is passed on")
        for name in self.types:
            if chain[2] not in self.entries[name]["attributes"] and not hasattr(nn.Module, chain[2]):
                self.fail(node, f"{name} has no attribute {chain[2]}")

    def visit_Call(self, node: ast.Call) -> None:
        chain = _chain(node.func)
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if chain is not None and ".".join(chain[:2]) == INSTANCE:
            self._call_instance(node, chain[2:])
        elif chain is not None and any(name in NAMESPACES for name in chain[:-1]):
            at = next(i for i, name in enumerate(chain) if name in NAMESPACES)
            self._bind(node, self._name_of(node, chain[at:]), "")
        elif chain is not None and "recipe" in chain[:-1]:
            self.fail(node, "a method of a recipe")
        elif chain is not None and chain[-1] in TAKERS:
            arguments = [one for one in arguments if ast.unparse(one) != INSTANCE]
        elif chain is not None and ".".join(chain) in CARRIERS:
            arguments = [one for one in arguments if _last(one) not in NAMESPACES]
        else:
            self.visit(node.func)
        for argument in arguments:
            self.visit(argument)

    def _call_instance(self, node: ast.Call, rest: list[str]) -> None:
        if not self.types or len(rest) > 1:
            self.fail(node, "cannot be resolved")
        for name in self.types:
            self._bind(node, name, rest[0] if rest else "forward")

    def _name_of(self, node: ast.AST, chain: list[str]) -> str:
        name = ".".join([NAMESPACES[chain[0]], *chain[1:]])
        if name not in self.entries:
            self.fail(node, f"{name} is not among the signatures")
        return name

    def _bind(self, node: ast.Call, name: str, method: str) -> None:
        entry = self.entries[name]
        if method and method not in entry["methods"]:
            self.fail(node, f"{name} has no method {method}")
        rows = (entry["methods"][method] if method else entry)["call"]
        kinds = {kind for _, kind, _ in rows}
        plain = [one for one in node.args if not isinstance(one, ast.Starred)]
        if len(plain) < len(node.args) and "VAR_POSITIONAL" not in kinds:
            self.fail(node, "how many arguments a star stands for cannot be known")
        keywords = [keyword.arg for keyword in node.keywords]
        if None in keywords:
            self.fail(node, "which arguments two stars stand for cannot be known")
        try:
            _signature(rows).bind(*plain, **dict.fromkeys(keywords))
        except TypeError as error:
            self.fail(node, f"{name}.{method}: {error}" if method else f"{name}: {error}")
        unknown = set(keywords) - {row[0] for row in rows} - set(entry.get("pops", []))
        if "VAR_KEYWORD" in kinds and unknown:
            self.fail(node, f"{name} knows no keyword {sorted(unknown)}")
        self.found.append(Bound(node.lineno, f"{name}.{method}" if method else name))


def _last(node: ast.AST) -> str:
    """The last name of a chain; empty of anything else."""
    chain = _chain(node)
    return chain[-1] if chain else ""


def _signature(rows: list[list[Any]]) -> inspect.Signature:
    parameters = [
        inspect.Parameter(name, inspect._ParameterKind[kind], default=None if has_default else inspect.Parameter.empty)
        for name, kind, has_default in rows
    ]
    return inspect.Signature(parameters)
