"""A bundle filled with random weights is a whole bundle: it opens, its hashes hold, and it makes finite noise."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.random_bundle import fill_with_random_weights
from runtime.bundle import open_bundle
from runtime.errors import BundleError
from runtime.inspection import verify_bundle
from runtime.pipeline import VideoPipeline
from runtime.request import GenerateRequest
from tests.conftest import Toy


def test_a_bundle_filled_with_random_weights_runs(two_experts: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(two_experts.original, folder)
    fill_with_random_weights(folder)
    verify_bundle(folder, on_file=lambda path: None)
    first, second = (open_bundle(bundle).manifest.weights["fp32"] for bundle in (folder, two_experts.original))
    assert first.keys() == second.keys()
    assert all(first[name].file.sha256 != second[name].file.sha256 for name in first)
    video = VideoPipeline.open(folder, num_threads=1).generate(
        GenerateRequest(prompt="a red fox", width=16, height=16, num_frames=1, num_steps=2, seed=1)
    )
    assert np.isfinite(video.latents).all()
    assert video.latents.std() > 0


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no finished bundle"):
        fill_with_random_weights(tmp_path)
