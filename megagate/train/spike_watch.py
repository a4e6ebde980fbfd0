"""Loss spikes while a run goes on: what `tools/find_spikes.py` will find in its records, told with the samples of the step."""

import math
from pathlib import Path
from typing import Any

from megagate.data.loader import TrainLoader
from megagate.errors import DataError
from megagate.log import logger
from megagate.train.curve import read_curve
from megagate.train.spikes import LEAST, SpikeDetector


class SpikeWatch:
    """Looks at the loss of every step, on the first rank alone.

    Args:
        metrics: The run's own records, which may not exist yet.
        step: Steps done: the records up to this one are looked at again, so that a resumed run finds what an uninterrupted one does. A run
            that begins with another run's checkpoint knows none of that run's losses.
        loader: Of the training batches.
    """

    def __init__(self, metrics: Path, *, step: int, loader: TrainLoader):
        self.loader, self.detector = loader, SpikeDetector()
        if step:
            self._learn(metrics, step)

    def _learn(self, metrics: Path, step: int) -> None:
        losses: list[float] = []
        try:
            curve = read_curve(metrics, last_step=step)
            losses, notes = curve.finite()[1], curve.notes
        except DataError as error:  # no reason to end a training
            notes = [str(error)]
        for text in notes:
            logger.info("loss spikes: of the records before this resume: %s", text)
        if len(losses) < min(step, LEAST):
            logger.info(
                "loss spikes: %s has %d losses of the %d steps before this resume; none is looked for until there are %d",
                *(metrics, len(losses), step, LEAST),
            )
        self.detector.take(losses)

    def look(self, step: int, loss: float) -> dict[str, Any]:
        """`loss_spike` for the record of a step, nats, where an event begins with it; which is told. One that is not finite is left out.

        Args:
            step: Counted from 1.
            loss: Of the whole step, nats.
        """
        found = self.detector.take([loss]) if math.isfinite(loss) else []
        if not found:
            return {}
        (spike,) = found
        origins = self.loader.origins(step - 1)
        first, last = origins.samples
        named = ", ".join(f"{many} of {name}" for name, many in origins.sets.items() if name)
        logger.info(
            "step %d: loss spike: %.4f is %.4f nats (%.1f sigma) above the line through the losses before it; samples %d to %d%s",
            *(step, loss, spike.excess, spike.excess / spike.sigma, first, last, named and f" ({named})"),
        )
        return {"loss_spike": spike.excess}
