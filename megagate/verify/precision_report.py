"""The words of the doctor of kernels."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megagate.config.count import parameter_parts
from megagate.verify.cells import QUANTITIES, Cell, PrecisionFindings, RecipeFindings, Row
from megagate.verify.precision import HIGH, PrecisionOrder
from megagate.verify.report import REDUCED, first_line, plain, table

SHOWN = 4
"""Causes in the last line; all are in the tables and the JSON."""
FORMATS = {
    HIGH: "no FP8",
    "delayed": "e4m3 and, for gradients, e5m2; a scale for each tensor, of the passes before",
    "current": "e4m3 and, for gradients, e5m2; a scale for each tensor",
    "blockwise": "e4m3; a scale for 128 numbers of inputs and gradients, for 128 x 128 of weights",
    "mxfp8": "e4m3; a scale for 32 numbers",
}


def precision_verdict(order: PrecisionOrder, findings: PrecisionFindings) -> str:
    """The last line."""
    if findings.causes:
        more = len(findings.causes) - SHOWN
        return f"FAIL: {'; '.join(findings.causes[:SHOWN])}{f'; and {more} more' if more > 0 else ''}"
    return f"PASS{REDUCED if order.reduced else ''}"


def render_precision(order: PrecisionOrder, findings: PrecisionFindings) -> str:
    """All that was found, as text."""
    lines = [first_line(order), _run_line(order), *([f"with the fault {order.fault}"] if order.fault else [])]
    for found in findings.recipes:
        ours, reference = found.loss
        lines += ["", f"{found.recipe}: {FORMATS[found.recipe]}. Loss {ours:.6g}, of plain PyTorch {reference:.6g}", ""]
        lines += [*table([("relative error, % [expected]", *QUANTITIES, "verdict"), *_lines(order, found)])]
    return "\n".join([*lines, "", precision_verdict(order, findings)])


def record_precision(order: PrecisionOrder, findings: PrecisionFindings) -> dict[str, Any]:
    """The same for machines."""
    parallel = order.config.parallel
    return plain(
        {
            "verdict": precision_verdict(order, findings),
            "passed": not findings.causes,
            "reduced": order.reduced,
            "layout": {"world": order.world_size, "tp": parallel.tp, "ep": parallel.ep},
            "precision": order.config.precision.dtype,
            "backend": order.examined,
            "fault": order.fault,
            "causes": findings.causes,
            "recipes": [asdict(found) for found in findings.recipes],
        }
    )


def _run_line(order: PrecisionOrder) -> str:
    config, model = order.config, order.config.model
    kind = f"{model.moe.num_experts} experts top-{model.moe.top_k}" if model.is_moe else "dense"
    kept = [part for part in config.precision.fp8.keep_high_precision if part not in ("embedding", "head", "router")]
    what = "Transformer Engine" if order.examined == "te" else "emulated FP8"
    tokens = f"{config.train.micro_batch_size} sequences of {config.train.seq_len} tokens on each rank"
    return (
        f"{what} beside plain PyTorch, both in {config.precision.dtype}{', recompute' if config.train.recompute else ''}; kept out of FP8 "
        f"beside embedding, head and router: {', '.join(kept) or 'nothing'}; shrunk to {model.num_layers} layers, width "
        f"{model.hidden_size}, {kind}, {tokens}"
    )


def _lines(order: PrecisionOrder, found: RecipeFindings) -> Iterator[tuple[str, ...]]:
    """Every product and part; of the whole model its outputs, and its gradients by what they are of."""
    parts = parameter_parts(order.config.model)
    gradients: dict[str, Row] = {}
    for row in found.rows:
        if row.level == "model" and row.name in parts:
            group = f"model: gradients of {parts[row.name]}"
            worst = gradients.setdefault(group, Row("model", group, row.fp8))
            for quantity, cell in row.cells.items():
                if quantity not in worst.cells or cell.excess > worst.cells[quantity].excess:
                    worst.cells[quantity] = cell
        else:
            yield _cells(row)
    yield from map(_cells, gradients.values())


def _cells(row: Row) -> tuple[str, ...]:
    prefix = {"product": "", "part": "all of ", "model": "model: "}[row.level]
    name = row.name if row.name.startswith("model: ") else f"{prefix}{row.name}"
    kept = "" if row.fp8 or row.level != "product" else ", not in FP8"
    return f"{name}{kept}", *(_cell(row.cells.get(quantity)) for quantity in QUANTITIES), "ok" if row.ok else "WRONG"


def _cell(cell: Cell | None) -> str:
    return "-" if cell is None else f"{100 * cell.error:.2g} [{100 * cell.low:.2g}, {100 * cell.high:.2g}]{'' if cell.ok else ' !'}"
