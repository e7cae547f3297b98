"""What a video is written as: each sink encodes frames, one at a time, into one kind of file or a folder.

`runtime.video` decides where they write and what happens when they cannot.
"""

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av import VideoFrame
    from av.filter import Graph

Frames = NDArray[np.uint8]
MP4_CRF = 10  # what the original repositories' quality 8 means to x264 (imageio: int((1 - 8 / 10) * 51))
_BT709, _LIMITED_RANGE = 1, 1  # ISO/IEC 23091-2 code points, and FFmpeg's AVCOL_RANGE_MPEG
_GIF_CLOCK = 100  # ticks a second; GIF has no finer one


class Sink(Protocol):
    """Encodes frames [H, W, 3] into one kind of file or folder."""

    def __init__(self, partial: Path, fps: int, width: int, height: int, metadata: str) -> None: ...

    def append(self, frame: Frames) -> None: ...

    def finish(self) -> None: ...

    def discard(self) -> None:
        """Let go of what is open; what it wrote is removed by the caller."""
        ...


class Mp4:
    """H.264 that plays in browsers: yuv420p, BT.709 and said so, index before the pictures."""

    def __init__(self, partial: Path, fps: int, width: int, height: int, metadata: str) -> None:
        import av

        self._container = av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"})
        if metadata:
            self._container.metadata["comment"] = metadata
        self._stream = self._container.add_stream("libx264", rate=fps, options={"crf": str(MP4_CRF)})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        codec = self._stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        self._next_pts = 0

    def append(self, frame: Frames) -> None:
        picture = _rgb_frame(frame).reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts = self._next_pts
        self._next_pts += 1
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def discard(self) -> None:
        self._container.close()


class Gif:
    """Animated GIF with a palette of its own for every frame, dithered by FFmpeg's `paletteuse`."""

    def __init__(self, partial: Path, fps: int, width: int, height: int, metadata: str) -> None:
        import av

        self._container = av.open(str(partial), "w", format="gif")
        self._stream = self._container.add_stream("gif", rate=fps)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "pal8"
        self._stream.codec_context.time_base = Fraction(1, _GIF_CLOCK)
        self._palettes = _palette_graph(width, height, fps)
        self._fps = fps
        self._next_index = 0

    def append(self, frame: Frames) -> None:
        picture = _rgb_frame(frame)
        picture.pts, picture.time_base = self._next_index, Fraction(1, self._fps)
        self._palettes.push(picture)
        indexed = self._palettes.vpull()
        indexed.pts = round(self._next_index * _GIF_CLOCK / self._fps)
        indexed.time_base = Fraction(1, _GIF_CLOCK)
        self._next_index += 1
        self._container.mux(self._stream.encode(indexed))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def discard(self) -> None:
        self._container.close()


class Npy:
    """uint8 [T, H, W, 3]; NumPy leaves room in the header for the number of frames, which is known last."""

    def __init__(self, partial: Path, fps: int, width: int, height: int, metadata: str) -> None:
        self._file = partial.open("wb")
        self._frame_shape = (height, width, 3)
        self._num_frames = 0
        self._write_header()

    def append(self, frame: Frames) -> None:
        self._file.write(frame.data)
        self._num_frames += 1

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def discard(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._num_frames, *self._frame_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


class PngFolder:
    """`frame_00000.png` and so on."""

    def __init__(self, partial: Path, fps: int, width: int, height: int, metadata: str) -> None:
        partial.mkdir()
        self._folder = partial
        self._next_index = 0

    def append(self, frame: Frames) -> None:
        (self._folder / f"frame_{self._next_index:05}.png").write_bytes(encode_png(frame))
        self._next_index += 1

    def finish(self) -> None: ...

    def discard(self) -> None: ...


SINKS: dict[str, type[Sink]] = {".mp4": Mp4, ".gif": Gif, ".npy": Npy, "": PngFolder}


def _rgb_frame(frame: Frames) -> "VideoFrame":
    import av

    return av.VideoFrame.from_ndarray(frame, format="rgb24")


def encode_png(image: Frames) -> bytes:
    import av

    codec = av.CodecContext.create("png", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1, 1)
    return b"".join(bytes(packet) for packet in codec.encode(_rgb_frame(image)))


def _palette_graph(width: int, height: int, fps: int) -> "Graph":
    """Filters that give every RGB frame the 256 colours that suit it best."""
    import av
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, fps))
    split = graph.add("split")
    palette, apply = graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(apply, 1, 0)
    palette.link_to(apply, 0, 1)
    apply.link_to(graph.add("buffersink"))
    graph.configure()
    return graph
