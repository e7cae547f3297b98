"""The one tree of errors a user, a file or a device can cause.

Every error says what was asked and what is possible (`message`) and what to do (`hint`); `cli.main` is the only place
that catches them and turns `exit_code` into the process status.
"""


class WanError(Exception):
    """Base of everything wanrt raises on purpose.

    Args:
        message: what was asked and what is possible.
        hint: what the user can do about it; empty when the message says it all.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RequestError(WanError):
    """This request cannot be met as written: size, frames, prompt, output place."""

    exit_code = 2


class ExportError(WanError):
    """A checkpoint could not be read, or a stage could not be captured as a graph."""

    exit_code = 3


class BuildError(WanError):
    """A target refused to build an engine: component and the builder's last log lines."""

    exit_code = 4


class BundleError(WanError):
    """A bundle is missing, unfinished, damaged, hostile, or made for another version."""

    exit_code = 5


class EngineError(WanError):
    """An engine could not be opened or failed while running."""

    exit_code = 6


class CudaError(EngineError):
    """A CUDA call failed: the call, its code and its name."""


class DeviceMemoryError(EngineError):
    """Not enough device memory: what is needed, what is free, what to lower."""


class CancelledError(WanError):
    """The caller asked to stop; nothing half-written is left."""

    exit_code = 130
