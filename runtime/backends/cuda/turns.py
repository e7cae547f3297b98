"""Changes to shared books one at a time, also when Python's cycle collector makes one: it runs on any thread, between any two lines."""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType


class Turns:
    """Use with `with` around a change; within it, the same thread may enter again. What comes through `later` never interrupts one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._depth = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def later(self, change: Callable[[], None]) -> None:
        """Make a change now or, while another is being made by any thread, this one too, right after that."""
        self._waiting.append(change)
        self._catch_up()

    def __enter__(self) -> None:
        if self._holder != threading.get_ident():
            self._lock.acquire()
            self._holder = threading.get_ident()
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
            self._lock.release()
            self._catch_up()

    def _catch_up(self) -> None:
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._waiting.popleft()()
            finally:
                self._lock.release()
