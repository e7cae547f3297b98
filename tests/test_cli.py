"""`wanrt run` as a user meets it: what is refused, what is printed where, and what is left on disk whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands.console import StepBar
from runtime.denoise import StepEvent
from runtime.errors import CancelledError
from runtime.pipeline import VideoPipeline
from runtime.request import GenerateRequest
from runtime.run import RunRequest, run_to_file
from tests.conftest import RUN, Refuses, Toy, Wanrt
from tests.test_video import file_size_limit

ROOT = Path(__file__).parents[1]
CLI = (sys.executable, str(ROOT / "cli.py"))


@pytest.fixture(scope="module")
def bundle(two_experts: Toy) -> Path:
    return two_experts.original


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frames", "80"), "num_frames=80: need 4n"),
        (("--frames", "0"), "num_frames=0"),
        (("--size", "833x480"), "width=833: need a multiple of 16"),
        (("--size", "832"), "--size 832: expected numbers with 'x' between them"),
        (("--size", "axb"), "--size: 'a' is not a whole number"),
        (("--size", "-16x16"), "argument --size: expected one argument"),
        (("--size", "1e3x16"), "--size: '1e3' is not a whole number"),
        (("--size", "٤٨x16"), "is not a whole number"),
        (("--size", ""), "--size : expected numbers"),
        (("--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (("--seed", "1e5"), "argument --seed: invalid int value"),
        (("--scheduler", "magic"), "argument --scheduler: invalid choice: 'magic'"),
        (("--conventions", "mine"), "argument --conventions: invalid choice: 'mine'"),
        (("--colour",), "unrecognized arguments: --colour"),
        (("--steps", "0"), "num_steps=0: need 1 to 1000"),
        (("--seed", "-1"), "seed=-1"),
        (("--seed", "9" * 30), "need 0 to 18446744073709551615"),
        (("--shift", "0"), "shift=0.0"),
        (("--shift", "nan"), "shift=nan"),
        (("--shift", "-5"), "shift=-5.0"),
        (("--guidance", "nan"), "guidance=.nan"),
        (("--guidance", "1,2,3"), "guidance has 3 scales; this model has 2 experts"),
        (("--guidance", "much"), "--guidance much: not numbers"),
        (("--guidance", ""), "not numbers"),
        (("--tile", "0"), "tile of 0 pixels"),
        (("--tile", "16/0"), "tile of 16 pixels every 0"),
        (("--tile", "16/24"), "tile of 16 pixels every 24"),
        (("--tile", "20/16"), "tile size 20: need a multiple of 8"),
        (("--tile", "1/2/3"), "--tile 1/2/3: expected numbers"),
        (("--tile", "big"), "'big' is not a whole number"),
        (("--threads", "-1"), "num_threads=-1"),
        (("--threads", "1000000"), "need 0 to 1024"),
        (("--prompt", "cat \udcff"), "prompt is not valid UTF-8"),
        (("--negative-prompt", "\udcff", "--guidance", "1"), "negative_prompt is not valid UTF-8"),
        (("--latents", "nowhere.npy"), r"nowhere\.npy: not a readable \.npy file"),
        (("--latents", "."), r"not a readable \.npy file"),
        (("--save-latents", "latents.bin"), "latents are saved as .npy"),
        (("--save-latents", "nowhere/latents.npy"), "the folder nowhere does not exist"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_any_work(
    refuses: Refuses, bundle: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "video.npy").write_text("precious")
    err = refuses("run", bundle, *RUN, *arguments, "--out", tmp_path / "video.npy", code=2, message=message)
    assert "step 1" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["video.npy"]
    assert (tmp_path / "video.npy").read_text() == "precious"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/video.mp4", "the folder .* does not exist"),
        ("full", "is not an empty folder"),
        ("full/file/video.npy", "does not exist"),
        ("video.avi", "unknown kind of video"),
        ("taken.npy", "is a folder"),
        ("reported.npy", r"reported\.npy\.json: is a folder; the report would go there"),
    ],
)
def test_a_place_that_cannot_take_the_video_is_refused(
    refuses: Refuses, bundle: Path, tmp_path: Path, out: str, message: str
) -> None:
    for folder in ("full", "taken.npy", "reported.npy.json"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    refuses("run", bundle, *RUN, "--out", tmp_path / out, code=2, message=message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("out", "latents"), [("a.npy", "a.npy"), ("a.npy", "./b/../a.npy"), ("frames", "frames/latents.npy")])
def test_latents_may_not_land_where_the_video_goes(
    refuses: Refuses, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, latents: str
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "frames").mkdir()
    monkeypatch.chdir(tmp_path)
    refuses("run", bundle, *RUN, "--out", out, "--save-latents", latents, code=2, message="the video goes to")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "frames"]


def test_json_is_the_only_thing_printed_and_says_how_to_make_the_video_again(
    wanrt: Wanrt, bundle: Path, tmp_path: Path
) -> None:
    out, err = wanrt("run", bundle, *RUN, "--json", "--out", tmp_path / "a.npy", "--save-latents", tmp_path / "latents.npy")
    assert err == ""
    report = json.loads(out)["report"]
    assert report == json.loads((tmp_path / "a.npy.json").read_text(encoding="utf-8"))
    assert (report["request"]["prompt"], report["request"]["seed"]) == ("a cat runs", 1)
    assert np.load(tmp_path / "latents.npy").shape == (16, 1, 2, 2)
    assert np.load(tmp_path / "a.npy").shape == (1, 16, 16, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npy.json", "latents.npy"]


def test_the_path_alone_goes_to_stdout(wanrt: Wanrt, bundle: Path, tmp_path: Path) -> None:
    out, err = wanrt("run", bundle, *RUN, "--out", tmp_path / "a.npy")
    assert out == f"{tmp_path / 'a.npy'}\n"
    assert "step 2/2" in err and "seed 1" in err


def test_an_empty_prompt_is_a_prompt(wanrt: Wanrt, bundle: Path, tmp_path: Path) -> None:
    wanrt("run", bundle, *RUN, "--prompt", "", "--negative-prompt", "", "--out", tmp_path / "a.npy")
    assert json.loads((tmp_path / "a.npy.json").read_text())["request"]["prompt"] == ""


def test_a_prompt_of_5000_words_is_cut_and_says_so(
    wanrt: Wanrt, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanrt("run", bundle, *RUN, "--prompt", "cat " * 5000, "--out", tmp_path / "a.npy")
    (warning,) = json.loads((tmp_path / "a.npy.json").read_text())["warnings"]
    assert "the prompt has 5001 tokens, the model reads 512" in warning
    assert warning in caplog.messages


def test_latents_of_another_size_are_refused(refuses: Refuses, bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.zeros((16, 1, 2, 4), np.float32))
    arguments = ("run", bundle, *RUN, "--out", tmp_path / "a.npy", "--latents", tmp_path / "latents.npy")
    refuses(*arguments, code=2, message=r"latents are float32 \[16, 1, 2, 4\]; this size needs float32 \[16, 1, 2, 2\]")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (500, r"a\.npy: no space left for the video"),
        (300, r"latents\.npy: could not be written"),
    ],
)
def test_a_full_disk_leaves_nothing(refuses: Refuses, bundle: Path, tmp_path: Path, limit: int, message: str) -> None:
    arguments: list[str | Path] = ["run", bundle, *RUN, "--out", tmp_path / "a.npy"]
    if "latents" in message:
        arguments += ["--save-latents", tmp_path / "latents.npy"]
    with file_size_limit(limit):
        refuses(*arguments, code=2, message=message)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_full_for_the_report_keeps_the_whole_video(refuses: Refuses, bundle: Path, tmp_path: Path) -> None:
    with file_size_limit(900):  # 128 + 16 · 16 · 3 bytes of video
        refuses("run", bundle, *RUN, "--out", tmp_path / "a.npy", code=2, message=r"a\.npy\.json: could not be written")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert np.load(tmp_path / "a.npy").shape == (1, 16, 16, 3)


def test_too_little_memory_is_an_engine_error_with_advice(
    refuses: Refuses, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def randn(seed: int, shape: tuple[int, ...]) -> None:
        raise MemoryError("Unable to allocate 275. GiB")

    monkeypatch.setattr("runtime.pipeline.randn", randn)
    err = refuses("run", bundle, *RUN, "--out", tmp_path / "a.npy", code=6, message="not enough memory: Unable to allocate")
    assert "--tile" in err
    assert list(tmp_path.iterdir()) == []


def test_a_callback_that_raises_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    def fail(event: StepEvent) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_to_file(VideoPipeline.open(bundle, num_threads=1), small_request(tmp_path), on_step=fail)
    assert list(tmp_path.iterdir()) == []


def test_cancelling_while_decoding_leaves_nothing_but_the_latents(bundle: Path, tmp_path: Path) -> None:
    latents = tmp_path / "latents.npy"
    with pytest.raises(CancelledError, match="while decoding"):
        run_to_file(VideoPipeline.open(bundle, num_threads=1), small_request(tmp_path), cancelled=latents.exists)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.npy"]


def small_request(folder: Path) -> RunRequest:
    generate = GenerateRequest(prompt="a cat", width=16, height=16, num_frames=5, num_steps=2, seed=1)
    return RunRequest(generate=generate, out=folder / "a.npy", save_latents=folder / "latents.npy")


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["denoising", "decoding"])
def test_an_interrupted_process_ends_with_130_and_leaves_nothing(
    bundle: Path, tmp_path: Path, moment: str, interrupt: signal.Signals
) -> None:
    (tmp_path / "a.npy").write_text("precious")
    long = ("--steps", "1000") if moment == "denoising" else ("--steps", "1", "--frames", "4001")
    process = subprocess.Popen(
        [*CLI, "run", bundle, *RUN, *long, "--size", "64x64", "--out", tmp_path / "a.npy"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("step 1/"):
            assert process.poll() is None
        while moment == "decoding" and max(path.stat().st_size for path in tmp_path.glob("*.partial")) < 100_000:
            time.sleep(0.01)
        process.send_signal(interrupt)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert "cancelled" in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert (tmp_path / "a.npy").read_text() == "precious"


def test_an_interrupt_that_a_library_dropped_still_ends_the_run(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    def interrupted_and_dropped(self: object, event: object) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepBar, "step", interrupted_and_dropped)
    status, out, err = command_line("run", bundle, *RUN, "--out", tmp_path / "a.npy")
    assert (status, out) == (130, "")
    assert "cancelled" in err
    assert list(tmp_path.iterdir()) == []


def test_prompt_bytes_that_are_not_utf8_are_refused(bundle: Path, tmp_path: Path) -> None:
    command: list[Any] = [*CLI, "run", bundle, *RUN, "--prompt", b"cat \xff\xfe", "--out", tmp_path / "a.npy"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"\nerror: prompt is not valid UTF-8 text\nhint: " in done.stderr


def shell(line: str, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run a shell line in which `"$@"` is a wanrt command."""
    return subprocess.run(["sh", "-c", line, "sh", *CLI, *map(str, arguments)], capture_output=True)


def test_output_that_nobody_takes_is_said_and_not_a_crash(bundle: Path) -> None:
    closed = shell('"$@" | true; exit "${PIPESTATUS:-0}"', "inspect", bundle)
    assert b"Traceback" not in closed.stderr and b"Exception ignored" not in closed.stderr
    full = shell('"$@" >/dev/full', "inspect", bundle)
    assert full.returncode == 2
    assert full.stderr.startswith(b"error: standard output cannot be written: No space left on device\nhint: ")
    assert b"Traceback" not in full.stderr and b"Exception ignored" not in full.stderr


def test_a_process_without_any_stream_makes_its_video(bundle: Path, tmp_path: Path) -> None:
    done = shell('"$@" <&- >&- 2>&-', "run", bundle, *RUN, "--out", tmp_path / "a.npy")
    assert done.returncode == 0
    assert np.load(tmp_path / "a.npy").shape == (1, 16, 16, 3)
    assert "warnings" in json.loads((tmp_path / "a.npy.json").read_text())


def test_a_file_name_that_is_not_utf8_is_a_file_name(bundle: Path, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/caf\xe9.npy"
    done = subprocess.run([*CLI, "run", bundle, *RUN, "--out", out], capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert os.path.exists(out)
    assert done.stdout.endswith(b"caf\\udce9.npy\n")
