"""Being asked to stop: SIGTERM and Ctrl-C save a checkpoint and leave."""

import signal
from types import FrameType, TracebackType

import torch

from megagate.parallel.comm import maximum
from megagate.parallel.mesh import Axis


class StopSignal:
    """While entered, SIGTERM and SIGINT are remembered instead of ending the process.

    The launcher hands both on to its ranks, often one after the other, so a second signal changes nothing.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def agreed(self, world: Axis, device: torch.device) -> int:
        """The signal that any rank has received, 0 for none; the same on all ranks. Collective over `world`."""
        return int(maximum(torch.tensor(self.received, device=device), world))
