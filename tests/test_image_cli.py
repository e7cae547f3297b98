"""Images and videos on the command line: what is refused before anything is read, and what the report keeps."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.video import open_writer
from tests.conftest import RUN, Refuses, Toy, Wanrt


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)).save(tmp_path / "first.png")
    return tmp_path / "first.png"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    with open_writer(tmp_path / "in.mp4", fps=8, width=32, height=16, metadata="{}") as writer:
        writer.write(np.zeros((7, 16, 32, 3), np.uint8))
    return tmp_path / "in.mp4"


def test_a_text_to_video_model_refuses_an_image(two_experts: Toy, picture: Path, refuses: Refuses) -> None:
    refuses("run", two_experts.original, *RUN, "--image", picture, code=2, message="wan2.2-t2v-a14b takes no image")


@pytest.mark.parametrize("option", ["--image", "--last-image", "--video"])
def test_a_broken_file_is_refused_before_the_bundle_is_opened(tmp_path: Path, option: str, refuses: Refuses) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    refuses("run", tmp_path / "no-bundle", "--prompt", "a cat", option, broken, code=2, message="broken: ")


def test_without_an_image_a_prompt_is_needed(tmp_path: Path, picture: Path, refuses: Refuses) -> None:
    refuses("run", tmp_path, code=2, message="no prompt given")
    refuses("run", tmp_path / "no-bundle", "--image", picture, code=5, message="no such bundle")


def test_strength_needs_a_video(two_experts: Toy, refuses: Refuses) -> None:
    refuses("run", two_experts.original, *RUN, "--strength", "0.5", code=2, message="strength without a video")


def test_a_video_becomes_another_and_the_report_says_from_what(
    two_experts: Toy, tmp_path: Path, clip: Path, wanrt: Wanrt
) -> None:
    out = tmp_path / "out.npy"
    wanrt("run", two_experts.original, "--prompt", "a cat", "--size", "16x16", "--video", clip, "--strength", "0.5",
          "--steps", "4", "--seed", "1", "--threads", "1", "--out", out)  # fmt: skip
    assert np.load(out).shape == (5, 16, 16, 3)
    request = json.loads(out.with_name("out.npy.json").read_text())["request"]
    assert (request["strength"], request["num_steps"], len(request["video_sha256"])) == (0.5, 4, 64)
    assert request["image_sha256"] is None
