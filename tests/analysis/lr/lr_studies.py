"""Made-up studies with planted effects."""

import random
from collections.abc import Callable
from typing import Any

from megagate.analysis.lr.entries import Facts

RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
BASE = (2.45, 2.40, 2.50, 2.62, 2.80)
"""Of the baseline, nats: best at 8e-3."""

Effect = Callable[[str, int], float]


def facts(**changes: Any) -> Facts:
    """Five rungs, five seeds, the bigram bar."""
    there = {
        "name": "made_up",
        "variants": ("baseline", "headwise", "sandwich", "half"),
        "learning_rates": RATES,
        "seeds": (0, 1, 2, 3, 4),
        "steps": 800,
        "collapsed_above": 2.706,
        "top_rungs": 2,
        "vocab_size": 256,
    }
    return Facts(**{**there, **changes})


def entry(variant: str, lr: float, seed: int, val_loss: float | None, **changes: Any) -> dict[str, Any]:
    """One run as `study.json` tells it."""
    there = {
        "variant": variant, "lr": lr, "seed": seed, "status": "finished", "reason": None, "step": 800, "val_loss": val_loss,
        "train_loss": val_loss, "peak_hidden": 1e5 * lr, "attention_logit_max": 10.0, "gate_mean": None if variant == "baseline" else 0.4,
        "first_token_attention": 0.03, "uniform_attention": 0.042, "spikes": 0, "steps": 800, "seconds": 100.0, "parameters": 1,
    }  # fmt: skip
    return {**there, **changes}


def study(of: Facts, effect: Effect, *, noise: float = 0.0, common: float = 0.1, draw: int = 0) -> list[dict[str, Any]]:
    """Losses of `BASE` and what a variant adds at a rung; `common` is the spread of what a seed's variants share, `noise` of each run."""
    chance = random.Random(draw)
    runs = []
    for seed in of.seeds:
        luck = chance.gauss(0, common)
        for rung, lr in enumerate(of.learning_rates):
            for variant in of.variants:
                runs.append(entry(variant, lr, seed, BASE[rung] + luck + effect(variant, rung) + chance.gauss(0, noise)))
    return runs
