"""A small study for tests: half a second a run."""

from pathlib import Path
from typing import Any

import yaml

SMALL: dict[str, Any] = {
    "name": "small",
    "set": {
        "model.vocab_size": 258,
        "model.hidden_size": 16,
        "model.num_layers": 1,
        "model.ffn_size": 16,
        "model.attention.num_heads": 2,
        "model.attention.num_kv_heads": 2,
        "model.attention.head_dim": 8,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 2,
        "train.seq_len": 16,
        "data.path": "synthetic",
        "precision.dtype": "fp32",
        "parallel.zero_stage": 0,
        "checkpoint.every": 5,
        "checkpoint.asynchronous": False,
        "eval.batches": 2,
        "observe.every": 4,
    },
    "variants": ["baseline", "elementwise"],
    "learning_rates": [4.0e-3, 8.0e-3],
    "seeds": [0, 1],
    "steps": 12,
    "stop": {"above_initial": 0.5, "window": 3},
}


def write_spec(folder: Path, **changes: Any) -> Path:
    """SMALL with other keys; a value of None takes a key away."""
    path = folder / "spec.yaml"
    content = {key: value for key, value in (SMALL | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
