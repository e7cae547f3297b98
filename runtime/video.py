"""Writes videos while they are decoded: `.mp4`, `.gif`, `.npy`, or a folder of PNG, told apart by the output's name.

Everything goes into a `….partial` beside the target, which gets its name when the last frame is in; a run that fails or is stopped
leaves nothing, and a file of that name that was there before stays as it was.
"""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.video_sinks import SINKS, PngFolder, Sink, encode_png

Frames = NDArray[np.uint8]
_SHEET_GAP = 2


class VideoWriter:
    """Takes frames as they come; the video appears under its name on `close`. Use with `with`: an exception aborts.

    Made by `open_writer`.
    """

    def __init__(self, path: Path, *, fps: int, width: int, height: int, metadata: str) -> None:
        self.path = path
        self._frame_shape = (height, width, 3)
        self._num_frames = 0
        self._partial = _partial_path(path)
        try:
            with _disk_errors(path):
                self._sink = _sink_type(path)(self._partial, fps, width, height, metadata)
        except BaseException:
            self._remove()
            raise

    def write(self, frames: Frames) -> None:
        """Append frames, uint8 [t, H, W, 3].

        Raises:
            RequestError: the disk is full or the file cannot be written; the writer is of no more use.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self._frame_shape:
            raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [t, *{list(self._frame_shape)}]")
        with _disk_errors(self.path):
            for frame in frames:
                self._sink.append(np.ascontiguousarray(frame))
                self._num_frames += 1

    def close(self) -> None:
        """Finish the video and give it its name.

        Raises:
            RequestError: the last bytes did not fit or the name could not be given; nothing is left behind.
        """
        try:
            if not self._num_frames:
                raise ValueError("no frames were written")
            with _disk_errors(self.path):
                self._sink.finish()
                if self.path.is_dir():
                    self.path.rmdir()  # an empty folder, see check_output
                os.replace(self._partial, self.path)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove what was written."""
        with suppress(Exception):  # a sink on a full disk may fail again; what matters is removed next
            self._sink.discard()
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _remove(self) -> None:
        if self._partial.is_dir():
            shutil.rmtree(self._partial, ignore_errors=True)
        else:
            self._partial.unlink(missing_ok=True)


def open_writer(path: Path, *, fps: int, width: int, height: int, metadata: str = "") -> VideoWriter:
    """Begin a video at `path`.

    Args:
        metadata: text kept in an `.mp4` as its comment; the other kinds have no place for it.

    Raises:
        RequestError: as `check_output`; or odd sizes for `.mp4`.
    """
    check_output(path)
    if path.suffix.lower() == ".mp4" and (width % 2 or height % 2):
        raise RequestError(
            f"{path.name}: H.264 needs an even width and height, got {width}x{height}", hint="write .gif, .npy or PNG"
        )
    return VideoWriter(path, fps=fps, width=width, height=height, metadata=metadata)


def check_output(path: Path) -> None:
    """Check, before anything expensive, that a video can be written to `path`; leaves no trace.

    Raises:
        RequestError: unknown kind of file, missing or unwritable folder, or something of another kind has that name.
    """
    is_folder = _sink_type(path) is PngFolder
    with _disk_errors(path):
        if not path.parent.is_dir():
            raise RequestError(f"{path}: the folder {path.parent} does not exist", hint="create it, or choose another --out")
        with suppress(FileNotFoundError):
            _partial_path(path).lstat()  # a name that is too long shows here
        if is_folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RequestError(f"{path}: exists and is not an empty folder", hint="choose another --out, or empty it")
        if not is_folder and path.is_dir():
            raise RequestError(f"{path}: is a folder", hint="choose another --out")
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"\0")
            probe.flush()


def contact_sheet(frames: Frames, path: Path, *, columns: int) -> None:
    """Write frames uint8 [T, H, W, 3] row by row into one PNG, black between them and where the last row ends.

    Raises:
        RequestError: the file cannot be written.
    """
    count, height, width, channels = frames.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    tall, wide = height + _SHEET_GAP, width + _SHEET_GAP
    cells = np.zeros((rows * columns, tall, wide, channels), np.uint8)
    cells[:count, :height, :width] = frames
    sheet = cells.reshape(rows, columns, tall, wide, channels).swapaxes(1, 2).reshape(rows * tall, columns * wide, channels)
    sheet = sheet[:-_SHEET_GAP, :-_SHEET_GAP]
    partial = _partial_path(path)
    try:
        with _disk_errors(path):
            partial.write_bytes(encode_png(sheet))
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sink_type(path: Path) -> type[Sink]:
    sink = SINKS.get(path.suffix.lower())
    if sink is None or not path.name:
        raise RequestError(
            f"{path}: unknown kind of video", hint="use video.mp4, video.gif, video.npy, or a folder name for PNG"
        )
    return sink


def _partial_path(path: Path) -> Path:
    # a name of its own for every run: two runs towards one target must not write into each other
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses, directly or through FFmpeg, into a RequestError."""
    from av.error import FFmpegError

    try:
        yield
    except (OSError, FFmpegError) as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RequestError(f"{path}: no space left for the video", hint="free some space, or choose another --out") from exc
        reason = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else str(exc)
        raise RequestError(f"{path}: cannot be written: {reason}", hint="choose another --out") from exc
