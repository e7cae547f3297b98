"""Videos as they land on disk: kinds of file, contents, and what is left when something goes wrong."""

import errno
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.video import check_output, contact_sheet, open_writer
from runtime.video_sinks import Npy

Frames = NDArray[np.uint8]
KINDS = ("video.mp4", "video.gif", "video.npy", "folder")
NUM_FRAMES, HEIGHT, WIDTH, FPS = 9, 48, 80, 16


@pytest.fixture
def frames() -> Frames:
    """A smooth pattern that moves: red grows to the right, green downwards, blue with time."""
    moving = np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    moving[..., 0] = np.arange(WIDTH) * 3
    moving[..., 1] = (np.arange(HEIGHT) * 5)[:, None]
    moving[..., 2] = (np.arange(NUM_FRAMES) * 25)[:, None, None]
    return moving


def write(path: Path, frames: Frames, *, metadata: str = "") -> None:
    with open_writer(path, fps=FPS, width=frames.shape[2], height=frames.shape[1], metadata=metadata) as writer:
        writer.write(frames[:1])
        for start in range(1, len(frames), 4):
            writer.write(frames[start : start + 4])


def read(path: Path) -> Frames:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def mean_error(given: Frames, expected: Frames) -> float:
    assert given.shape == expected.shape
    return float(np.abs(given.astype(float) - expected).mean())


def test_mp4_holds_every_frame_at_its_rate_and_size_in_yuv420p(tmp_path: Path, frames: Frames) -> None:
    write(tmp_path / "video.mp4", frames, metadata='{"seed": 7}')
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate is not None and float(stream.average_rate) == FPS
        assert (stream.width, stream.height) == (WIDTH, HEIGHT)
        assert container.metadata["comment"] == '{"seed": 7}'
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([index / FPS for index in range(NUM_FRAMES)])
    assert mean_error(read(tmp_path / "video.mp4"), frames) < 2.5  # of 255; measured 1.4, most of it from halving the chroma


def test_mp4_says_that_its_colours_are_bt709(tmp_path: Path) -> None:
    red = np.zeros((3, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    write(tmp_path / "red.mp4", red)
    with av.open(str(tmp_path / "red.mp4")) as container:
        frame = next(iter(container.decode(video=0)))
    assert int(frame.colorspace) == int(frame.color_primaries) == int(frame.color_trc) == 1
    luma = frame.to_ndarray()[:32].mean()
    assert luma == pytest.approx(16 + 219 * 0.2126, abs=1.5)  # BT.709's red; BT.601's would be 81


def test_mp4_has_its_index_before_the_pictures(tmp_path: Path, frames: Frames) -> None:
    write(tmp_path / "video.mp4", frames)
    written = (tmp_path / "video.mp4").read_bytes()
    assert 0 < written.index(b"moov") < written.index(b"mdat")


def test_gif_holds_every_frame_close_to_its_colours_and_time(tmp_path: Path, frames: Frames) -> None:
    write(tmp_path / "video.gif", frames)
    assert mean_error(read(tmp_path / "video.gif"), frames) < 5  # of 255; measured 2.7, from 256 colours
    with av.open(str(tmp_path / "video.gif")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([index / FPS for index in range(NUM_FRAMES)], abs=0.006)


def test_npy_and_png_hold_the_frames_exactly(tmp_path: Path, frames: Frames) -> None:
    write(tmp_path / "video.npy", frames)
    assert np.array_equal(np.load(tmp_path / "video.npy"), frames)
    write(tmp_path / "folder", frames)
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"frame_{index:05}.png" for index in range(NUM_FRAMES)]
    assert np.array_equal(np.concatenate([read(file) for file in files]), frames)


@pytest.mark.parametrize("kind", KINDS)
def test_video_appears_under_its_name_only_when_whole(tmp_path: Path, frames: Frames, kind: str) -> None:
    with open_writer(tmp_path / kind, fps=FPS, width=WIDTH, height=HEIGHT) as writer:
        writer.write(frames)
        assert not (tmp_path / kind).exists()
    assert [path.name for path in tmp_path.iterdir()] == [kind]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_writing_leaves_nothing(tmp_path: Path, frames: Frames, kind: str) -> None:
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / kind, fps=FPS, width=WIDTH, height=HEIGHT) as writer:
        writer.write(frames)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_interrupted_writing_keeps_the_file_that_was_there(tmp_path: Path, frames: Frames, kind: str) -> None:
    (tmp_path / kind).write_text("precious")
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / kind, fps=FPS, width=WIDTH, height=HEIGHT) as writer:
        writer.write(frames)
        raise KeyboardInterrupt
    assert (tmp_path / kind).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1
    write(tmp_path / kind, frames)
    assert (tmp_path / kind).read_bytes() != b"precious"


def test_empty_folder_is_filled_and_a_full_one_is_refused(tmp_path: Path, frames: Frames) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", frames)
    assert len(list((tmp_path / "folder").iterdir())) == NUM_FRAMES
    with pytest.raises(RequestError, match="not an empty folder"):
        check_output(tmp_path / "folder")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: to a writer the same as a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_full_disk_is_reported_at_any_moment_and_leaves_nothing(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), np.uint8)  # a moment is a share of the whole file
    write(tmp_path / kind, noise)
    whole = tmp_path / kind
    size = max(path.stat().st_size for path in ([whole] if whole.is_file() else whole.iterdir()))
    (tmp_path / "other").mkdir()
    with file_size_limit(int(size * share)), pytest.raises(RequestError, match="no space left") as caught:
        write(tmp_path / "other" / kind, noise)
    assert "free some space" in caught.value.hint
    assert list((tmp_path / "other").iterdir()) == []


def test_full_disk_that_python_reports_is_a_request_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: Frames
) -> None:
    def refuse(self: Npy, frame: Frames) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Npy, "append", refuse)
    with pytest.raises(RequestError, match="no space left"):
        write(tmp_path / "video.npy", frames)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("video.avi", "unknown kind"),
        ("missing/video.mp4", "does not exist"),
        ("file.txt/video.mp4", "does not exist"),
        ("taken.mp4", "is a folder"),
        ("x" * 300 + ".mp4", "cannot be written"),
    ],
)
def test_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(RequestError, match=message) as caught:
        check_output(tmp_path / name)
    assert caught.value.hint


def test_folder_that_takes_no_files_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot be written"):
        check_output(Path("/proc/video.mp4"))  # exists wherever these tests run, and refuses even root


def test_checking_an_output_leaves_no_trace(tmp_path: Path) -> None:
    for kind in KINDS:
        check_output(tmp_path / kind)
    assert list(tmp_path.iterdir()) == []


def test_mp4_refuses_odd_sizes(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="even width and height"):
        open_writer(tmp_path / "video.mp4", fps=FPS, width=81, height=48)


def test_frames_of_another_size_are_a_slip(tmp_path: Path, frames: Frames) -> None:
    with (
        pytest.raises(ValueError, match="expected uint8"),
        open_writer(tmp_path / "a.npy", fps=FPS, width=8, height=8) as writer,
    ):
        writer.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet_puts_frames_in_rows_and_fills_the_last_with_black(tmp_path: Path, frames: Frames) -> None:
    contact_sheet(frames[:5], tmp_path / "sheet.png", columns=3)
    sheet = read(tmp_path / "sheet.png")[0]
    down, across = HEIGHT + 2, WIDTH + 2
    assert sheet.shape == (2 * down - 2, 3 * across - 2, 3)
    assert np.array_equal(sheet[:HEIGHT, 2 * across :], frames[2])
    assert np.array_equal(sheet[down:, across : across + WIDTH], frames[4])
    assert not sheet[down:, across + WIDTH :].any()
    assert not sheet[HEIGHT:down].any()
    assert len(list(tmp_path.iterdir())) == 1
