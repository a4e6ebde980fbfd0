"""Loss spikes while a run goes on: what `tools/find_spikes.py` will find in its records, told with the samples of the step."""

import math
from pathlib import Path
from typing import Any

from megagate.data.loader import TrainLoader
from megagate.errors import DataError
from megagate.log import logger
from megagate.train.curve import read_curve
from megagate.train.spikes import SpikeDetector


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
        if not (step and metrics.exists()):
            return
        try:
            self.detector.take(read_curve(metrics, last_step=step).finite()[1])
        except DataError as error:  # no reason to end a training
            logger.info("loss spikes: the losses before this resume are not known, the first steps are not judged (%s)", error)

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
