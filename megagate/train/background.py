"""An action that runs beside the training loop."""

import time
from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Task(Generic[T]):
    """An action in a thread of its own, or, not in the background, one that is over when the task is made.

    It must not use collectives. What it raises is kept for `result`. The thread does not keep a process alive that ends by an error of
    its own: other ranks would wait for it. Such a process waits for a while (`Saver.abandon`), for Python would take the thread away in the
    middle of C++ code, and then the process aborts instead of ending by its error.

    Attributes:
        seconds: How long the action took; 0 while it runs.
    """

    def __init__(self, action: Callable[[], T], *, background: bool):
        self.seconds = 0.0
        self._value: T | None = None
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, args=(action,), name="megagate-checkpoint", daemon=True) if background else None
        if self._thread is not None:
            self._thread.start()
        else:
            self._run(action)

    def _run(self, action: Callable[[], T]) -> None:
        began = time.perf_counter()
        try:
            self._value = action()
        except Exception as error:
            self._error = error
        self.seconds = time.perf_counter() - began

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it has raised something."""
        return self._error is not None

    def wait(self, seconds: float | None = None) -> None:
        """Return when it is over, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def result(self) -> T | None:
        """Wait until it is over; what the action returned, or raise what it has raised."""
        self.wait()
        error, self._error = self._error, None  # an error knows its frames, and these this task: no ring is left behind
        if error is not None:
            raise error
        return self._value
