"""Image and video files as users have them: turned, transparent, grey, damaged, hostile."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from runtime.clips import load_video
from runtime.errors import RequestError
from runtime.images import load_image
from runtime.video import open_writer

COLOURS = np.array([[[250, 10, 10], [10, 250, 10], [10, 10, 250]], [[0, 0, 0], [90, 90, 90], [255, 255, 255]]], np.uint8)


def save(path: Path, pixels: NDArray[Any] | Image.Image, **options: Any) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True})])
def test_lossless_files_give_their_pixels(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(load_image(save(tmp_path / name, COLOURS, **options)), COLOURS)


def test_a_jpeg_gives_nearly_its_pixels(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 16 * 24).reshape(16, 24, 1).repeat(3, axis=2).astype(np.uint8)
    loaded = load_image(save(tmp_path / "a.jpg", smooth, quality=95))
    assert np.abs(loaded.astype(int) - smooth).max() < 12


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_exif_turns_the_image(tmp_path: Path, orientation: int, quarter_turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(save(tmp_path / "a.png", COLOURS, exif=exif))
    np.testing.assert_array_equal(loaded, np.rot90(COLOURS, k=quarter_turns))


def test_transparency_is_dropped_as_the_peers_drop_it(tmp_path: Path) -> None:
    alpha = np.full((2, 3, 1), 7, np.uint8)
    np.testing.assert_array_equal(load_image(save(tmp_path / "a.png", np.concatenate((COLOURS, alpha), axis=2))), COLOURS)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    np.testing.assert_array_equal(load_image(save(tmp_path / "a.png", grey)), np.stack([grey] * 3, axis=2))


def test_sixteen_bits_of_grey_keep_their_upper_half(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256], [0x8000, 0xFF00, 0xFFFF]], np.uint16)
    np.testing.assert_array_equal(load_image(save(tmp_path / "a.png", deep))[:, :, 1], [[0, 0, 1], [128, 255, 255]])


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    indexed = Image.fromarray(COLOURS).convert("P", palette=Image.Palette.ADAPTIVE, colors=6)
    np.testing.assert_array_equal(load_image(save(tmp_path / "a.png", indexed)), np.asarray(indexed.convert("RGB")))


def png_with_header(width: int, height: int) -> bytes:
    """A PNG whose header promises a size; nothing is behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (encoded("GIF"), "not an image"),
        (encoded("PNG")[:2000], "cannot be read"),
        (encoded("JPEG")[:900], "cannot be read"),
        (encoded("WEBP")[:200], "not an image|cannot be read"),
        (png_with_header(9000, 9000), "at most 67 million pixels"),
        (png_with_header(2**31 - 1, 2**31 - 1), "at most 67 million pixels"),
        (png_with_header(6500, 100), "64 to 1"),
        (png_with_header(40, 40), "cannot be read"),
    ],
    ids=["empty", "text", "gif", "cut png", "cut jpeg", "cut webp", "81 megapixels", "bomb", "thread", "no data"],
)
def test_what_cannot_be_an_image_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    with pytest.raises(RequestError, match=words) as caught:
        load_image(file)
    assert caught.value.hint


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for place, reason in ((tmp_path / "none.png", "No such file"), (tmp_path, "directory")):
        with pytest.raises(RequestError, match=f"cannot be read: .*{reason}"):
            load_image(place)
        with pytest.raises(RequestError, match="no such file"):
            load_video(place)


def test_a_video_gives_its_frames_and_only_as_many_as_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    levels = np.array([30, 120, 210, 60, 160], np.uint8)
    with open_writer(file, fps=8, width=32, height=16, metadata="{}") as writer:
        writer.write(np.broadcast_to(levels[:, None, None, None], (5, 16, 32, 3)).copy())
    video = load_video(file)
    assert video.shape == (5, 16, 32, 3)
    assert np.abs(video.mean(axis=(1, 2, 3)) - levels).max() < 4
    assert load_video(file, num_frames=3).shape[0] == 3


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), (0, 0)),
        ((0, 1, -1, 0), (0, -1)),
        ((-1, 0, 0, -1), (-1, -1)),
        ((0, -1, 1, 0), (-1, 0)),
        ((-1, 0, 0, 1), (0, -1)),
    ],
    ids=["as it is", "clockwise", "upside down", "anticlockwise", "mirrored"],
)
def test_a_display_matrix_turns_and_mirrors_a_video(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: tuple[int, int]
) -> None:
    file = tmp_path / "a.mp4"
    frames = np.zeros((1, 16, 32, 3), np.uint8)
    frames[0, :8, :16] = 250
    with open_writer(file, fps=8, width=32, height=16) as writer:
        writer.write(frames)
    content = bytearray(file.read_bytes())
    begin = content.index(b"tkhd") + 44  # of nine numbers: a, b, u, c, d, v, x, y, w
    assert struct.unpack_from(">5i", content, begin) == (1 << 16, 0, 0, 0, 1 << 16)
    a, b, c, d = (each << 16 for each in matrix)
    struct.pack_into(">5i", content, begin, a, b, 0, c, d)
    file.write_bytes(content)
    video = load_video(file)
    assert video.shape[1:3] == ((16, 32) if matrix[0] else (32, 16))
    bright = [place for place in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if video[0][place].mean() > 125]
    assert bright == [corner]


def test_a_video_that_is_cut_short_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, part = tmp_path / "whole.mkv", tmp_path / "part.mkv"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "bgr0"
        noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
        for frame in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert len(load_video(whole)) == 20 and not caplog.messages
    assert 5 < len(load_video(part)) < 15
    assert "promises about 20: it may be cut short" in caplog.text
    caplog.clear()
    assert len(load_video(part, num_frames=5)) == 5 and not caplog.messages


def test_what_cannot_be_a_video_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.mp4"
    text.write_bytes(b"hello")
    with pytest.raises(RequestError, match="cannot be read as a video"):
        load_video(text)
