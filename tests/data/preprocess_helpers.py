"""Small texts, and all steps of preprocessing them in this process."""

import json
from collections.abc import Sequence
from pathlib import Path

from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.preprocess.plan import Plan, Settings, publish_plan
from megagate.data.preprocess.units import OnError, write_unit

BYTES = Settings(tokenizer=ByteTokenizer().identity(), split=(1, 0, 0))
TEXTS = ["first", "zweite, größer", "三\nlines\r\nin one", "", "x" * 700, '{"text": "quoted"}', "last"]


def lines_of(texts: Sequence[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, text in enumerate(texts))


def prepare(folder: Path, plan: Plan, *, on_error: OnError = "stop", order: Sequence[int] | None = None) -> None:
    """All units of a plan in this process."""
    publish_plan(folder, plan)
    (folder / "units").mkdir(exist_ok=True)
    for unit in range(len(plan.units)) if order is None else order:
        write_unit(plan, unit, folder=folder, encoder=ByteTokenizer(), on_error=on_error, report=lambda _: None)
