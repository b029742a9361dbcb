"""A thread for the work of the host that no step waits for: statistics, files, trackers."""

import queue
import threading
from collections.abc import Callable

LIMIT = 2  # pieces of work that may wait; the main thread waits beyond, so that slow work cannot fill the memory
IDLE_SECONDS = 2.0

Work = Callable[[], None]


class Background:
    """Does work in one thread, in the order in which it is submitted, while the main thread goes on.

        background = Background(when_idle=writer.flush_if_due)
        background.submit(functools.partial(writer.write, 20, {"loss": 3.2}))
        background.wait()
        background.close()

    An exception of the work is raised in the main thread by its next `submit` or `wait`; what was still waiting is dropped.

    Args:
      when_idle: is called in the thread every few seconds while there is no other work.
    """

    def __init__(self, when_idle: Work):
        self._when_idle = when_idle
        self._queue: queue.Queue[Work | None] = queue.Queue(LIMIT)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Adds a piece of work; waits while LIMIT of them are waiting."""
        self._raise_error()
        self._queue.put(work)

    def wait(self) -> None:
        """Waits until all work is done."""
        self._queue.join()
        self._raise_error()

    def close(self) -> None:
        """Waits until all work is done, and ends the thread. An error that nobody has seen yet is not raised."""
        self._queue.put(None)
        self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            try:
                work = self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                self._do(self._when_idle)
                continue
            if work is not None:
                self._do(work)
            self._queue.task_done()
            if work is None:
                return

    def _do(self, work: Work) -> None:
        if self._error is not None:
            return
        try:
            work()
        except BaseException as error:  # whatever it is, the main thread raises it
            self._error = error
