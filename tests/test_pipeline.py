"""Whole generations against diffusers' `WanPipeline` on the same weights, prompt, seed and steps: every step, every frame."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.denoise import StepEvent
from runtime.errors import CancelledError
from runtime.geometry import Float32
from runtime.pipeline import Video, VideoPipeline
from runtime.request import GenerateRequest
from runtime.schedulers import Conventions, SchedulerName
from runtime.tiling import TileSpec
from tests.conftest import Toy, make_toy
from tests.harness import relative_error
from tests.tolerances import TOLERANCES
from tests.toys import WIDE_TOY, make_scheduler

LATENTS = TOLERANCES["latents after a step, fp32"]
LEVELS = TOLERANCES["frame, of 255"]
PROMPT = GenerateRequest(
    prompt="a red panda runs on snow", negative_prompt="slow dog", width=64, height=48, num_frames=9, num_steps=5, seed=42
)


def run_diffusers(pipeline: Any, request: GenerateRequest, **options: Any) -> tuple[list[Float32], Any]:
    """Latents after every step, and frames as uint8 [T, H, W, 3] by diffusers' own truncation."""
    steps: list[Float32] = []

    def keep(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append(kwargs["latents"][0].numpy().copy())
        return kwargs

    assert request.seed is not None
    frames = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_frames=request.num_frames,
        num_inference_steps=request.num_steps,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        callback_on_step_end=keep,
        **options,
    ).frames[0]
    return steps, (frames * 255).astype(np.uint8)


def run_ours(bundle: Path, request: GenerateRequest) -> tuple[list[Float32], Video]:
    steps: list[Float32] = []
    video = VideoPipeline.open(bundle, num_threads=1).generate(
        request, on_step=lambda event: steps.append(event.latents.copy())
    )
    return steps, video


def assert_same(ours: tuple[list[Float32], Video], theirs: tuple[list[Float32], Any]) -> None:
    assert len(ours[0]) == len(theirs[0])
    for step, (our_latents, their_latents) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert relative_error(our_latents, their_latents) < LATENTS, f"step {step + 1}"
    assert ours[1].frames.shape == theirs[1].shape
    assert np.abs(ours[1].frames.astype(int) - theirs[1].astype(int)).max() <= LEVELS


def test_diffusers_folder_gives_the_same_video_with_its_own_settings(one_expert: Toy) -> None:
    theirs = run_diffusers(one_expert.oracle(), PROMPT, guidance_scale=5.0)
    assert_same(run_ours(one_expert.diffusers, PROMPT), theirs)


@pytest.mark.parametrize("scheduler", ["unipc", "dpmpp", "euler"])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_every_scheduler_and_layout_gives_the_video_of_diffusers(one_expert: Toy, layout: str, scheduler: Any) -> None:
    request = replace(PROMPT, width=32, height=80, num_frames=5, num_steps=6, seed=7, negative_prompt="", guidance=(3.5,))
    oracle = one_expert.oracle()
    oracle.scheduler = make_scheduler(scheduler, flow_shift=8.0)
    theirs = run_diffusers(oracle, request, guidance_scale=3.5)
    ours = replace(request, scheduler=SchedulerName(scheduler), shift=8.0, conventions=Conventions.DIFFUSERS)
    assert_same(run_ours(getattr(one_expert, layout), ours), theirs)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_two_experts_switch_where_diffusers_switches(two_experts: Toy, layout: str) -> None:
    request = replace(PROMPT, num_frames=5, num_steps=8, guidance=(4.0, 3.0), seed=3)
    theirs = run_diffusers(two_experts.oracle(), request, guidance_scale=4.0, guidance_scale_2=3.0)
    ours = replace(request, shift=5.0, conventions=Conventions.DIFFUSERS)
    assert_same(run_ours(getattr(two_experts, layout), ours), theirs)


def test_guidance_of_one_leaves_the_negative_prompt_out_as_diffusers_does(one_expert: Toy) -> None:
    request = replace(PROMPT, num_frames=1, num_steps=3, guidance=(1.0,))
    theirs = run_diffusers(one_expert.oracle(), request, guidance_scale=1.0)
    assert_same(run_ours(one_expert.diffusers, request), theirs)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_very_few_steps(one_expert: Toy, num_steps: int) -> None:
    request = replace(PROMPT, num_frames=1, num_steps=num_steps, width=48, height=48)
    assert_same(run_ours(one_expert.diffusers, request), run_diffusers(one_expert.oracle(), request, guidance_scale=5.0))


class OriginalGrid:
    """Gives a diffusers scheduler the original repositories' sigmas, which end at 0 from 0.999 (UniPC) or 1 (DPM++)."""

    def __init__(self, scheduler: Any, *, largest: float, shift: float) -> None:
        self._scheduler, self._largest, self._shift = scheduler, largest, shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def set_timesteps(self, num_steps: int, device: Any = None) -> None:
        self._scheduler.set_timesteps(num_steps, device=device)
        grid = np.linspace(self._largest, 0, num_steps + 1)[:-1]
        grid = self._shift * grid / (1 + (self._shift - 1) * grid)
        self._scheduler.sigmas = torch.tensor([*grid, 0.0], dtype=torch.float32)
        self._scheduler.timesteps = torch.from_numpy((grid * 1000).astype(np.int64))


@pytest.mark.parametrize(("scheduler", "largest"), [("unipc", 0.999), ("dpmpp", 1.0)])
@pytest.mark.parametrize("experts", [1, 2])
def test_original_layout_follows_the_original_sigmas(
    one_expert: Toy, two_experts: Toy, experts: int, scheduler: Any, largest: float
) -> None:
    toy, shift = (one_expert, 5.0) if experts == 1 else (two_experts, 12.0)
    scales: tuple[float, ...] = (5.0,) if experts == 1 else (4.0, 3.0)
    request = replace(PROMPT, num_frames=5, num_steps=10, guidance=scales, width=48, height=64)
    oracle = toy.oracle()
    oracle.scheduler = OriginalGrid(make_scheduler(scheduler, flow_shift=1.0), largest=largest, shift=shift)
    second = {"guidance_scale_2": scales[-1]} if experts == 2 else {}
    theirs = run_diffusers(oracle, request, guidance_scale=scales[0], **second)
    assert_same(run_ours(toy.original, replace(request, scheduler=SchedulerName(scheduler))), theirs)


def test_tiled_decoding_gives_the_frames_of_diffusers(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, config=WIDE_TOY, seed=4)
    request = replace(PROMPT, width=96, height=80, num_frames=5, num_steps=2)
    oracle = toy.oracle()
    oracle.vae.enable_tiling(
        tile_sample_min_height=48, tile_sample_min_width=64, tile_sample_stride_height=32, tile_sample_stride_width=48
    )
    theirs = run_diffusers(oracle, request, guidance_scale=5.0)
    tiles = TileSpec(tile_height=48, tile_width=64, stride_height=32, stride_width=48)
    assert_same(run_ours(toy.diffusers, replace(request, tile=tiles)), theirs)


def test_explicit_latents_take_the_place_of_a_seed(one_expert: Toy) -> None:
    request = replace(PROMPT, num_frames=1, num_steps=2)
    _, first = run_ours(one_expert.original, request)
    _, again = run_ours(one_expert.original, replace(request, seed=None, latents=first.initial_latents))
    np.testing.assert_array_equal(first.latents, again.latents)
    np.testing.assert_array_equal(first.frames, again.frames)


def test_same_seed_gives_the_same_bits(one_expert: Toy) -> None:
    request = replace(PROMPT, num_frames=5, num_steps=2)
    np.testing.assert_array_equal(
        run_ours(one_expert.original, request)[1].frames, run_ours(one_expert.original, request)[1].frames
    )


def test_cancelling_stops_before_the_next_step(one_expert: Toy) -> None:
    seen: list[StepEvent] = []
    cancelled: Callable[[], bool] = lambda: len(seen) == 2  # noqa: E731
    with pytest.raises(CancelledError, match="before step 3 of 5"):
        VideoPipeline.open(one_expert.original).generate(PROMPT, on_step=seen.append, cancelled=cancelled)
    assert [event.step for event in seen] == [1, 2]
