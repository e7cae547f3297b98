"""Video files in, frames out, for video-to-video; `runtime.video` writes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError

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
    except (av.FFmpegError, ValueError) as exc:
        raise RequestError(f"{path}: cannot be read as a video: {exc}", hint="check the file") from exc
    if not frames or any(frame.shape != frames[0].shape for frame in frames):
        raise RequestError(f"{path}: {'no frames' if not frames else 'frames of different sizes'}", hint="check the file")
    return np.stack(frames)


def _frames(container: Any) -> Iterator[NDArray[np.uint8]]:
    for frame in container.decode(video=0):
        yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90)))
