"""What a person sees while a run goes on."""

import sys
from typing import Any

from tqdm import tqdm

from megagate.log import logger


class Progress:
    """A bar with loss, tokens/s and time left on a terminal; elsewhere a line of the log every so many steps. Silent on other ranks.

    Args:
        first: Steps done before.
        steps: Steps of the run.
        log_every: Steps between lines.
        visible: Whether this rank tells.
    """

    def __init__(self, *, first: int, steps: int, log_every: int, visible: bool):
        self.steps, self.log_every, self.visible = steps, log_every, visible
        hidden = not (visible and sys.stderr.isatty())
        self.bar = tqdm(total=steps, initial=first, unit="step", desc="pretrain", disable=hidden, smoothing=0.05)

    def step(self, record: dict[str, Any]) -> None:
        """Tell of a finished step."""
        facts = {"loss": f"{record['loss']:.4f}", "tokens/s": f"{record['tokens_per_second']:,.0f}"}
        if not self.bar.disable:
            self.bar.set_postfix(facts, refresh=False)
            self.bar.update()
        elif self.visible and (record["step"] % self.log_every == 0 or record["step"] == self.steps):
            left = tqdm.format_interval((self.steps - record["step"]) * record["step_seconds"])
            logger.info(
                "step %d/%d  loss %s  lr %.2e  grad norm %.3f  %s tokens/s  %s left",
                *(record["step"], self.steps, facts["loss"], record["lr"], record["grad_norm"], facts["tokens/s"], left),
            )

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
