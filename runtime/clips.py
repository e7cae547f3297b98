"""Video files in, frames out, for video-to-video; `runtime.video` writes them."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError

log = logging.getLogger(__name__)
MAX_BYTES = 4 << 30
"""Decoded frames of one video are kept at their own size: 4 GiB are 690 frames of 1920x1080."""


def load_video(path: Path, *, num_frames: int | None = None) -> NDArray[np.uint8]:
    """Decode a video file, turned as its display matrix says.

    Args:
        num_frames: how many frames from the beginning; all when None.

    Returns:
        uint8 RGB [T, H, W, 3].

    Raises:
        RequestError: missing, not a video, damaged, or too large to be kept.
    """
    import av

    if not path.is_file():
        raise RequestError(f"{path}: no such file", hint="give a video file")
    frames: list[NDArray[np.uint8]] = []
    size = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise RequestError(f"{path}: holds no video", hint="give a video file")
            for frame in _frames(container):
                frames.append(frame)
                size += frame.nbytes
                if len(frames) == num_frames:
                    break
                if size > MAX_BYTES:
                    raise RequestError(
                        f"{path}: more than {MAX_BYTES >> 30} GiB of frames of {frame.shape[1]}x{frame.shape[0]}",
                        hint="take only the first ones with --frames, or scale the video down first",
                    )
            else:
                _warn_if_short(path, container, len(frames))
    except (av.FFmpegError, ValueError) as exc:
        raise RequestError(f"{path}: cannot be read as a video: {exc}", hint="check the file") from exc
    if not frames or any(frame.shape != frames[0].shape for frame in frames):
        raise RequestError(f"{path}: {'no frames' if not frames else 'frames of different sizes'}", hint="check the file")
    video = np.empty((len(frames), *frames[0].shape), np.uint8)
    for index in reversed(range(len(frames))):  # each frame goes as its copy comes, so that nothing is there twice
        video[index] = frames.pop()
    return video


def _warn_if_short(path: Path, container: Any, num_frames: int) -> None:
    """Say so where a file gave clearly fewer frames than its header promises: one cut short can decode without an error."""
    import av

    stream = container.streams.video[0]
    promised = stream.frames or round((container.duration or 0) / av.time_base * (stream.average_rate or 0))
    if num_frames < 0.95 * promised:
        log.warning("%s: %d frames, where its header promises about %d: it may be cut short", path, num_frames, promised)


def _frames(container: Any) -> Iterator[NDArray[np.uint8]]:
    for frame in container.decode(video=0):
        yield np.ascontiguousarray(_turned(frame.to_ndarray(format="rgb24"), frame.side_data.get("DISPLAYMATRIX")))


def _turned(pixels: NDArray[np.uint8], side_data: Any) -> NDArray[np.uint8]:
    """Quarter turns and mirror images of a display matrix (x' = a·x + c·y, y' = b·x + d·y); None for none, a skew is left out."""
    if side_data is None:
        return pixels
    a, b, _, c, d = np.frombuffer(side_data, np.int32)[:5].tolist()
    if a == d == 0:
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
