"""One look at a whole model."""

from collections.abc import Callable

from megagate.model.lm import LanguageModel
from megagate.probe.figures import LayerFigures
from megagate.probe.probe import Probe
from megagate.probe.taps import taps


def look(model: LanguageModel, forward: Callable[[], object], *, queries: int = 0) -> dict[int, LayerFigures]:
    """The figures of every layer, counted from 0, of the forward passes that `forward` makes. Collective.

    Args:
        model: All of it lies in this rank's memory, or is gathered by hooks as it runs.
        forward: Passes of that model; without gradients.
        queries: Of each sequence, whose attention is looked at; 0 is all.
    """
    probe = Probe(model.config, model.mesh, queries=queries)
    with taps(dict(enumerate(model.layers)), probe.look):
        forward()
    return probe.close()
