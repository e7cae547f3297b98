"""What a report says a generation took."""

import time
from typing import Any

import numpy as np
import pytest

from runtime.pipeline import VideoPipeline
from runtime.report import StageClock
from runtime.request import GenerateRequest
from tests.conftest import Toy


def test_a_report_has_every_step_and_the_time_until_the_first_one_was_done(two_experts: Toy) -> None:
    request = GenerateRequest(prompt="a cat", width=16, height=16, num_frames=1, num_steps=3, seed=1)
    with VideoPipeline.open(two_experts.original, num_threads=1) as pipeline:
        first, second = (pipeline.generate(request).report for _ in range(2))
    assert first.stage_seconds.keys() - second.stage_seconds.keys() == {"open"}
    for report in first, second:
        assert report.stage_seconds.keys() - {"open"} == {"text_encoder", "denoise", "vae", "video"}
        assert len(report.step_seconds) == 3
        assert report.first_step_seconds is not None
        assert report.first_step_seconds > report.step_seconds[0] > 0
        assert sum(report.step_seconds) < report.stage_seconds["denoise"] + 1e-3


def test_opening_a_network_counts_to_its_stage(two_experts: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    request = GenerateRequest(prompt="a cat", width=16, height=16, num_frames=1, num_steps=1, seed=1)
    with VideoPipeline.open(two_experts.original, num_threads=1) as pipeline:
        network, opened = pipeline._opener.network, 0.05

        def slow(*which: str) -> Any:
            time.sleep(opened)
            return network(*which)

        monkeypatch.setattr(pipeline._opener, "network", slow)
        stages = pipeline.generate(request).report.stage_seconds
    assert min(stages[name] for name in ("text_encoder", "denoise", "vae")) >= opened


def test_opening_counts_once_and_only_the_first_step_ends_the_wait() -> None:
    clock = StageClock(opening_seconds=100.0)
    clock.step(0.25)
    waited = clock.first_step_seconds or 0
    clock.step(0.5)
    assert 100 < waited < 101
    assert clock.first_step_seconds == waited
    assert np.allclose(clock.step_seconds, [0.25, 0.5])


def test_a_later_generation_does_not_count_the_opening(two_experts: Toy) -> None:
    request = GenerateRequest(prompt="a cat", width=16, height=16, num_frames=1, num_steps=1, seed=1)
    with VideoPipeline.open(two_experts.original, num_threads=1) as pipeline:
        pipeline._opening_seconds = 100.0  # as if it had been slow
        first, second = (pipeline.generate(request).report for _ in range(2))
    assert first.first_step_seconds is not None and second.first_step_seconds is not None
    assert second.first_step_seconds < 100 < first.first_step_seconds
