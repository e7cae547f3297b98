"""The trained checkpoint that ships: small, described, the same in diffusers, and its demo shows what the prompt says."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.moving_shapes.card import card
from benchmarks.moving_shapes.diffusers_loader import open_pipeline
from benchmarks.moving_shapes.score import score_clip
from benchmarks.moving_shapes.trained import CHECKPOINT
from cli import main
from export.build import BuildRequest, build_bundle
from runtime.clips import load_video
from runtime.pipeline import VideoPipeline
from runtime.request import GenerateRequest
from runtime.schedulers import Conventions
from tests.tolerances import TOLERANCES

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / "bundle"
    build_bundle(BuildRequest(out=folder, checkpoint=CHECKPOINT, targets=("cpu",)))
    return folder


def test_all_files_fit_into_24_mib() -> None:
    sizes = [path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(sizes) < 24 * 2**20
    assert max(sizes) < 16 * 2**20


def test_its_card_says_what_its_training_left() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "moving-shapes-training.json").read_text(encoding="utf-8"))
    assert (CHECKPOINT / "README.md").read_text(encoding="utf-8") == card(report)


def test_make_demo_shows_what_its_prompt_says(bundle: Path, tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    prompt, options = (re.findall(rf"^{name} := (.+)$", makefile, re.M)[0] for name in ("DEMO_PROMPT", "DEMO_OPTIONS"))
    assert prompt == "a red circle moves right on a blue background"
    out = tmp_path / "demo.mp4"
    assert main(["run", str(bundle), "--prompt", prompt, *shlex.split(options), "--out", str(out)]) == 0
    frames = load_video(out)
    assert score_clip(frames, prompt).obeys
    assert not score_clip(frames, prompt.replace("red", "green")).right["colour"]
    assert not score_clip(frames, prompt.replace("circle", "cross")).right["shape"]
    assert not score_clip(frames, prompt.replace("right", "left")).right["direction"]


def test_diffusers_makes_the_same_video_of_the_same_seed(bundle: Path) -> None:
    prompt, seed = "a large green triangle moves quickly left on a white background", 3
    theirs = open_pipeline(CHECKPOINT)(
        prompt=prompt, negative_prompt="", height=64, width=64, num_frames=17, num_inference_steps=20, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(seed), output_type="np",
    ).frames[0]  # fmt: skip
    with VideoPipeline.open(bundle, target="cpu", num_threads=1) as pipeline:
        ours = pipeline.generate(
            GenerateRequest(
                prompt=prompt,
                negative_prompt="",
                width=64,
                height=64,
                num_frames=17,
                num_steps=20,
                guidance=(5.0,),
                shift=5.0,
                seed=seed,
                conventions=Conventions.DIFFUSERS,
            )
        ).frames
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= TOLERANCES["frame, of 255"]
    right = score_clip(ours, prompt).right
    assert right["colour"] and right["shape"] and right["direction"]
