"""Weights on their way from a file to the device: read by a thread of its own, through page-locked memory, beside the computing."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from runtime.backends.base import Array
from runtime.backends.cuda.copies import CopyStream, Event
from runtime.residency import Unit

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20
"""Staged copies go in pieces of this size: large enough for the bus, small enough to read one while another travels."""
NUM_CHUNKS = 4
_READERS = 4
_PIECE_BYTES = 8 << 20


class TensorBytes(Protocol):
    """Where weights are read from."""

    def tensor(self, name: str) -> Array:
        """A tensor's elements, in C order."""
        ...


@dataclass(slots=True, eq=False)
class Pinned:
    """A unit kept in page-locked memory: filled once, then each transfer is one copy."""

    memory: Array
    filled: bool = False


@dataclass(slots=True, eq=False)
class Transfer:
    """One unit on its way. `ready` happens on the copy stream when it has arrived; `issued` says that `ready` may be waited for."""

    unit: Unit
    source: TensorBytes
    pointer: int
    pinned: Pinned | None
    after: Event | None  # what the destination's last reader must have reached
    ready: Event
    issued: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False
    error: BaseException | None = None


class Loader:
    """The thread that reads weights and queues their copies, in the order in which they were asked for.

    While nobody asks, it fills the page-locked memory of units that will be asked for (`fill_ahead`).
    """

    def __init__(self, copies: CopyStream) -> None:
        self._copies = copies
        self._queue: SimpleQueue[Transfer | threading.Event | None] = SimpleQueue()
        self._ahead: list[tuple[Unit, TensorBytes, Pinned]] = []
        self._chunks: list[tuple[Array, Event]] = []
        self._next_chunk = 0
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="wanrt-read")
        self._thread = threading.Thread(target=self._serve, name="wanrt-load", daemon=True)
        self._thread.start()

    def submit(self, transfer: Transfer) -> None:
        """Ask for a transfer."""
        self._queue.put(transfer)

    def fill_ahead(self, units: list[tuple[Unit, TensorBytes, Pinned]]) -> None:
        """Units to read into page-locked memory while nothing else is to do, instead of those named before."""
        self._ahead = units

    def wait(self, transfer: Transfer) -> None:
        """Wait until a transfer's copies are queued.

        Raises:
            WanError: reading or copying failed.
        """
        transfer.issued.wait()
        if transfer.error is not None:
            raise transfer.error

    def settle(self) -> None:
        """Wait until nothing more happens by itself: everything asked for is queued, cancelled or has failed; no memory is filled."""
        self._ahead = []
        settled = threading.Event()
        self._queue.put(settled)
        settled.wait()

    def close(self) -> None:
        """End the thread; nobody waits for what it was asked for any more."""
        self._ahead = []
        self._queue.put(None)
        self._thread.join()
        self._readers.shutdown()

    def _serve(self) -> None:
        while True:
            asked = self._next()
            if asked is None:
                return
            if isinstance(asked, threading.Event):
                asked.set()
                continue
            try:
                if not asked.cancelled:
                    self._copies.use_here()
                    self._transfer(asked)
            except BaseException as error:
                asked.error = error  # raised where it is waited for; what others asked for may still succeed
            asked.issued.set()

    def _next(self) -> Transfer | threading.Event | None:
        while self._queue.empty() and (ahead := self._ahead):
            unit, source, pinned = ahead.pop(0)
            try:
                self._fill(unit, source, pinned)
            except Exception as error:
                log.info("%s cannot be read ahead, and will be tried again when it is needed: %r", unit.name, error)
        return self._queue.get()

    def _transfer(self, transfer: Transfer) -> None:
        if transfer.pinned is not None:
            self._fill(transfer.unit, transfer.source, transfer.pinned)
        if transfer.after is not None:
            self._copies.hold(transfer.after)
        if transfer.pinned is not None:
            self._copies.copy(transfer.pinned.memory[: transfer.unit.nbytes], transfer.pointer)
        else:
            for start in range(0, transfer.unit.nbytes, CHUNK_BYTES):
                self._stage(transfer, start, min(start + CHUNK_BYTES, transfer.unit.nbytes))
        self._copies.mark(transfer.ready)

    def _stage(self, transfer: Transfer, start: int, stop: int) -> None:
        if len(self._chunks) < NUM_CHUNKS:
            self._chunks.append((self._copies.page_locked(CHUNK_BYTES), self._copies.new_event()))
            chunk, event = self._chunks[-1]
        else:
            chunk, event = self._chunks[self._next_chunk % NUM_CHUNKS]
            self._next_chunk += 1
            self._copies.wait(event)
        self._read(transfer.unit, transfer.source, chunk, start, stop)
        self._copies.copy(chunk[: stop - start], transfer.pointer + start)
        self._copies.mark(event)

    def _fill(self, unit: Unit, source: TensorBytes, pinned: Pinned) -> None:
        if not pinned.filled:
            self._read(unit, source, pinned.memory, 0, unit.nbytes)
            pinned.filled = True

    def _read(self, unit: Unit, source: TensorBytes, into: Array, start: int, stop: int) -> None:
        """Bytes `start` to `stop` of a unit, by several readers: one alone is slower than the bus."""
        pieces = list(_pieces(unit, start, stop))

        def read(piece: tuple[str, int, int, int]) -> None:
            name, first, last, at = piece
            np.copyto(into[at - start : at - start + last - first], source.tensor(name).reshape(-1).view(np.uint8)[first:last])

        list(self._readers.map(read, pieces))


def _pieces(unit: Unit, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
    """The parts of tensors that lie between two offsets of a unit: name, first and last byte of the tensor, offset in the unit."""
    for tensor in unit.tensors:
        first, last = max(start, tensor.offset), min(stop, tensor.offset + tensor.nbytes)
        for at in range(first, last, _PIECE_BYTES):
            yield tensor.name, at - tensor.offset, min(at + _PIECE_BYTES, last) - tensor.offset, at
