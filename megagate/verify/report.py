"""The doctor's words."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megagate.config.run import RunConfig
from megagate.verify.diagnosis import Diagnosis, Row
from megagate.verify.doctor import Order
from megagate.verify.precision import PrecisionOrder

REDUCED, WITHOUT_FP8 = " (reduced layout)", " (without FP8)"


def verdict(order: Order, diagnosis: Diagnosis) -> str:
    """The last line."""
    if diagnosis.causes:
        return f"FAIL: {'; '.join(diagnosis.causes)}"
    return f"PASS{REDUCED if order.reduced else ''}{WITHOUT_FP8 if order.left_out != 'none' else ''}"


def first_line(order: Order | PrecisionOrder) -> str:
    """The layout, and whether it is the one that was asked for."""
    config, world = order.config, order.world_size
    layout = f"{world} ranks as dp {world // config.parallel.tp} x tp {config.parallel.tp}, ep {config.parallel.ep}"
    if order.reduced:
        tp, ep = order.asked
        return f"reduced layout: tp {tp}, ep {ep} need more than {world} ranks; checked with {layout}"
    return f"layout: {layout}"


def render(order: Order, diagnosis: Diagnosis) -> str:
    """All that was found, as text."""
    bf16 = order.config.precision.dtype == "bf16"
    error = "x bf16 rounding" if bf16 else "worst error"
    lines = [first_line(order), _run_line(order.config), *([f"with the fault {order.fault}"] if order.fault else [])]
    lines += [*([_left_out_line(order)] if order.left_out != "none" else []), ""]
    rows = [("parameters", "gradient ratio", error, "verdict"), *map(_cells, diagnosis.gradients + diagnosis.later)]
    lines += [*table(rows), ""]
    weights = [("weights", "ratio", "difference", "verdict"), *map(_cells, (diagnosis.initial, diagnosis.updates, *diagnosis.weights))]
    lines += [*table(weights), ""]
    outputs = [("forward pass", "output ratio", error, "verdict"), *(_cells(row) for row in diagnosis.outputs)]
    lines += [*table(outputs), ""]
    numbers = [("number", "parallel", "expected", "verdict")]
    numbers += [(n.what, f"{n.ours:.7g}", f"{n.reference:.7g}", _word(n.ok)) for n in diagnosis.numbers]
    lines += [*table(numbers), ""]
    sent = [("sent by rank 0 in a step", "axis", "calls", "bytes", "minimum")]
    sent += [(f"{row.sender}: {row.kind}", row.axis, f"{row.calls}", f"{row.bytes:,}", f"{row.minimum:,}") for row in diagnosis.sent]
    lines += [*(table(sent) if diagnosis.sent else ["nothing is sent"]), "", verdict(order, diagnosis)]
    return "\n".join(lines)


def record(order: Order, diagnosis: Diagnosis) -> dict[str, Any]:
    """The same for machines."""
    parallel = order.config.parallel
    layout = {"world": order.world_size, "tp": parallel.tp, "ep": parallel.ep, "zero_stage": parallel.zero_stage}
    found = asdict(diagnosis) | {"sent": [row._asdict() for row in diagnosis.sent]}
    return plain(
        {
            "verdict": verdict(order, diagnosis),
            "passed": not diagnosis.causes,
            "reduced": order.reduced,
            "layout": layout,
            "precision": order.config.precision.dtype,
            "fault": order.fault,
            "left_out": {"precision.fp8.recipe": order.left_out} if order.left_out != "none" else {},
            **found,
        }
    )


def plain(value: Any) -> Any:
    """Numbers that JSON has not, as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _left_out_line(order: Order) -> str:
    kernels = "te" if order.config.precision.backend == "te" else "emulated"
    return f"precision.fp8 ({order.left_out}) is not part of this: `--backend {kernels}` looks at it, product by product"


def _run_line(config: RunConfig) -> str:
    model, train = config.model, config.train
    kind = f"{model.moe.num_experts} experts top-{model.moe.top_k}" if model.is_moe else "dense"
    return (
        f"ZeRO-{config.parallel.zero_stage}, {config.precision.dtype}, gradients summed in "
        f"{'fp32' if config.precision.grad_dtype == 'fp32' else config.precision.dtype}"
        f"{', recompute' if train.recompute else ''}; shrunk to {model.num_layers} layers, width {model.hidden_size}, {kind}, "
        f"{train.global_batch_size} sequences of {train.seq_len} tokens a step, {train.micro_batch_size} at a time on a rank; SGD"
    )


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "-" if math.isnan(row.ratio) else f"{row.ratio:.6f}"
    error = f"{row.error:.1e}" if row.error < 1e-2 or row.error >= 1e4 else f"{row.error:.2f}"
    return row.what, ratio, error, _word(row.ok) + (f" {row.factor}" if row.factor else "" if row.ok else f" in {row.where}")


def _word(ok: bool) -> str:
    return "ok" if ok else "WRONG"


def table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns under each other: the first and the last to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = range(1, len(widths) if rows[0][-1] != "verdict" else len(widths) - 1)
    for row in rows:
        padded = zip(row, widths, strict=True)
        yield "  ".join(c.rjust(width) if i in numeric else c.ljust(width) for i, (c, width) in enumerate(padded)).rstrip()
