"""Calls in our sources, held by `ast` to the signatures of packages that need not be installed."""

import ast
import inspect
from collections.abc import Mapping

Row = list
"""[name, kind, whether it has a default]: a parameter, as JSON keeps it."""


class Misfit(AssertionError):
    """A call that does not fit, or one of which that cannot be told."""


def rows_of(node: ast.FunctionDef, *, bound: bool) -> list[Row]:
    """The parameters of a function; `bound` leaves out self."""
    arguments = node.args
    positional = arguments.posonlyargs + arguments.args
    without = len(positional) - len(arguments.defaults)
    rows = [
        [one.arg, "POSITIONAL_ONLY" if i < len(arguments.posonlyargs) else "POSITIONAL_OR_KEYWORD", i >= without]
        for i, one in enumerate(positional)
    ]
    rows += [[arguments.vararg.arg, "VAR_POSITIONAL", False]] if arguments.vararg else []
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    rows += [[one.arg, "KEYWORD_ONLY", default is not None] for one, default in keywords]
    rows += [[arguments.kwarg.arg, "VAR_KEYWORD", False]] if arguments.kwarg else []
    return rows[1:] if bound else rows


def signature(rows: list[Row]) -> inspect.Signature:
    """What `bind` asks for."""
    empty = inspect.Parameter.empty
    kinds = {name: getattr(inspect.Parameter, kind) for name, kind, _ in rows}
    return inspect.Signature([inspect.Parameter(name, kinds[name], default=None if default else empty) for name, _, default in rows])


def bind_calls(source: str, *, package: str, signatures: Mapping[str, inspect.Signature]) -> list[str]:
    """The dotted names of all that is called of a package, one for each call, in order.

    Args:
        source: Imports what it needs of the package by `from ... import`, and does nothing with it but call it.
        package: Its name.
        signatures: By dotted name.

    Raises:
        Misfit: A call that does not fit its signature, or a use that is none.
    """
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(_is_of(module, package) for module in modules):
            raise Misfit(f"line {node.lineno}: import names of {package} by `from`")
        if isinstance(node, ast.ImportFrom) and _is_of(node.module or "", package):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names]
    strays = [node for node in uses if all(node is not call.func for call in calls)]
    if strays:
        raise Misfit(f"line {strays[0].lineno}: {strays[0].id} is used without being called")
    calls.sort(key=lambda call: call.lineno)
    for call in calls:
        _bind(call, names[call.func.id], signatures)
    return [names[call.func.id] for call in calls]


def _is_of(module: str, package: str) -> bool:
    return module.split(".")[0] == package


def _bind(call: ast.Call, name: str, signatures: Mapping[str, inspect.Signature]) -> None:
    if name not in signatures:
        raise Misfit(f"line {call.lineno}: {name} is not among the signatures")
    if any(isinstance(one, ast.Starred) for one in call.args) or any(keyword.arg is None for keyword in call.keywords):
        raise Misfit(f"line {call.lineno}: stars hide what {name} is given")
    try:
        signatures[name].bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    except TypeError as error:
        raise Misfit(f"line {call.lineno}: {name}: {error}") from None
