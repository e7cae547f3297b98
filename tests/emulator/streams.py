"""Streams and events: what is queued runs later, in the order of its stream, and between streams in any order that the events allow."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

_EAGERNESS = 0.45  # chance that a piece of work runs while something is queued


@dataclass
class Event:
    asked: int = 0
    """How often it was queued."""
    happened: int = 0
    """The last of these that came to pass."""


@dataclass(frozen=True)
class _Wait:
    event: Event
    time: int

    @property
    def over(self) -> bool:
        return self.event.happened >= self.time


@dataclass
class _Stream:
    work: deque[Callable[[], None] | _Wait] = field(default_factory=deque)

    @property
    def can_go_on(self) -> bool:
        first = self.work[0] if self.work else None
        return first is not None and (not isinstance(first, _Wait) or first.over)


class Streams:
    """Queues of work, carried out by whichever thread calls. An error in a piece of work comes out of the call that carries it out.

    Args:
        seed: of what runs when.
    """

    def __init__(self, *, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._streams: dict[int, _Stream] = {}
        self._next = 1
        self._lock = threading.RLock()

    def create(self) -> int:
        with self._lock:
            self._next += 1
            self._streams[self._next] = _Stream()
            return self._next

    def destroy(self, handle: int) -> None:
        self.finish(handle)
        del self._streams[handle]

    def put(self, handle: int, work: Callable[[], None]) -> None:
        """Queue work, and carry out some that is queued on any stream."""
        with self._lock:
            self._streams[handle].work.append(work)
            while self._random.random() < _EAGERNESS and self._go_on():
                pass

    def record(self, event: Event, handle: int) -> None:
        with self._lock:
            event.asked += 1
            time = event.asked

            def happen() -> None:
                event.happened = max(event.happened, time)

            self.put(handle, happen)

    def wait_for(self, event: Event, handle: int) -> None:
        """What is queued on the stream from now on comes after the last recording of the event."""
        with self._lock:
            self._streams[handle].work.append(_Wait(event, event.asked))

    def synchronize(self, event: Event) -> None:
        """Return after the last recording of the event."""
        with self._lock:
            wait = _Wait(event, event.asked)
            while not wait.over:
                self._must_go_on()

    def finish(self, handle: int | None = None) -> None:
        """Carry out everything that is queued on a stream, or on all of them."""
        with self._lock:
            chosen = list(self._streams.values()) if handle is None else [self._streams[handle]]
            while any(stream.work for stream in chosen):
                self._must_go_on()

    def _must_go_on(self) -> None:
        assert self._go_on(), "every stream waits for an event that nothing queued will bring"

    def _go_on(self) -> bool:
        """Carry out one piece of work; False: there is none that can be."""
        able = [stream for stream in self._streams.values() if stream.can_go_on]
        if not able:
            return False
        work = able[int(self._random.integers(len(able)))].work.popleft()
        if not isinstance(work, _Wait):
            work()
        return True
