"""Whole generations from images and videos against diffusers' pipelines on the same weights: every step, every frame."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanVideoToVideoPipeline
from PIL import Image
from torch.nn.functional import interpolate

from runtime.geometry import Float32
from runtime.images import Pixels
from runtime.request import GenerateRequest
from runtime.schedulers import Conventions, SchedulerName
from runtime.tiling import TileSpec
from tests.conftest import Toy, Wanrt, make_toy
from tests.harness import relative_error
from tests.test_conditioning import CLIP_MEAN, CLIP_STD
from tests.test_pipeline import OriginalGrid, assert_same, run_ours
from tests.tolerances import TOLERANCES
from tests.toys import IMAGE_TOYS, make_scheduler

LATENTS, LEVELS = TOLERANCES["latents after a step, fp32"], TOLERANCES["frame, of 255"]
ASKED = GenerateRequest(
    prompt="a red panda runs",
    negative_prompt="slow dog",
    width=48,
    height=32,
    num_frames=9,
    num_steps=3,
    seed=42,
    guidance=(3.5,),
)
TWO_EXPERTS: dict[str, Any] = {"experts": 2, "boundary_ratio": 0.9}


def picture(width: int, height: int, seed: int = 0) -> Pixels:
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Toy]:
    """Toys by kind, each made when first asked for."""
    made: dict[str, Toy] = {}

    def toy(kind: str) -> Toy:
        if kind not in made:
            options = TWO_EXPERTS if kind == "i2v-a14b" else {}
            other = next(iter(made.values()), None)
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = make_toy(folder, engines_of=other, config=IMAGE_TOYS[kind], seed=5, flow_shift=5.0, **options)
        return made[kind]

    return toy


def run_diffusers(pipeline: Any, request: GenerateRequest, **options: Any) -> tuple[list[Float32], Any]:
    """Latents after every step, and frames as uint8 [T, H, W, 3] by diffusers' own truncation."""
    steps: list[Float32] = []

    def keep(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append(kwargs["latents"][0].numpy().copy())
        return kwargs

    assert request.seed is not None
    images = {"image": request.image, "last_image": request.last_image}
    options |= {name: Image.fromarray(pixels) for name, pixels in images.items() if pixels is not None}
    if request.video is None:
        options["num_frames"] = request.num_frames
    else:
        options |= {"video": [Image.fromarray(frame) for frame in request.video], "strength": request.strength}
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_steps,
        guidance_scale=request.guidance[0] if request.guidance else 5.0,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        callback_on_step_end=keep,
        **options,
    ).frames[0]
    return steps, (frames * 255).astype(np.uint8)


SHAPES = {"landscape": (64, 32, 9), "portrait": (32, 48, 5), "square": (32, 32, 1), "long": (32, 16, 33)}


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("shape", SHAPES)
def test_i2v_gives_the_video_of_diffusers(toys: Callable[[str], Toy], shape: str, layout: str) -> None:
    width, height, num_frames = SHAPES[shape]
    toy = toys("i2v")
    request = replace(ASKED, width=width, height=height, num_frames=num_frames, image=picture(70, 50))
    theirs = run_diffusers(toy.oracle(), request)
    assert_same(run_ours(getattr(toy, layout), replace(request, shift=5.0, conventions=Conventions.DIFFUSERS)), theirs)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_first_and_last_frame_give_the_video_of_diffusers(toys: Callable[[str], Toy], layout: str) -> None:
    toy = toys("flf2v")
    request = replace(ASKED, image=picture(70, 50), last_image=picture(50, 60, seed=1))
    theirs = run_diffusers(toy.oracle(), request)
    assert_same(run_ours(getattr(toy, layout), replace(request, shift=5.0, conventions=Conventions.DIFFUSERS)), theirs)


@pytest.mark.parametrize("last_image", [None, picture(30, 80, seed=1)], ids=["first", "first and last"])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_two_image_experts_give_the_video_of_diffusers(toys: Callable[[str], Toy], layout: str, last_image: Any) -> None:
    toy = toys("i2v-a14b")
    request = replace(ASKED, num_frames=5, image=picture(50, 70), last_image=last_image, guidance=(3.5, 2.0), num_steps=5)
    theirs = run_diffusers(toy.oracle(), request, guidance_scale_2=2.0)
    assert_same(run_ours(getattr(toy, layout), replace(request, shift=5.0, conventions=Conventions.DIFFUSERS)), theirs)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_ti2v_from_text_gives_the_video_of_diffusers(toys: Callable[[str], Toy], layout: str) -> None:
    toy = toys("ti2v")
    theirs = run_diffusers(toy.oracle(), ASKED)
    assert_same(run_ours(getattr(toy, layout), replace(ASKED, shift=5.0, conventions=Conventions.DIFFUSERS)), theirs)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize(("width", "height", "num_frames"), [(48, 32, 9), (32, 64, 5), (32, 32, 1)])
def test_ti2v_from_an_image_gives_the_video_of_diffusers(
    toys: Callable[[str], Toy], width: int, height: int, num_frames: int, layout: str
) -> None:
    toy = toys("ti2v")
    request = replace(ASKED, width=width, height=height, num_frames=num_frames, image=picture(70, 50))
    steps, frames = run_diffusers(WanImageToVideoPipeline.from_pretrained(toy.folder), request)
    ours, video = run_ours(getattr(toy, layout), replace(request, shift=5.0, conventions=Conventions.DIFFUSERS))
    for our_latents, their_latents in zip(
        ours, steps, strict=True
    ):  # diffusers puts the clean frame in after the last step only
        np.testing.assert_array_equal(our_latents[:, 0], ours[0][:, 0])
        if num_frames > 1:
            assert relative_error(our_latents[:, 1:], their_latents[:, 1:]) < LATENTS
    assert np.abs(video.frames.astype(int) - frames.astype(int)).max() <= LEVELS


def signed(image: Any) -> torch.Tensor:
    """What the original repositories make of an image, [1, 3, H, W]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)


def prepare_as_the_original(oracle: Any) -> None:
    """Give a diffusers pipeline Wan2.1's sigmas and its ways from an image to the frame and to the image encoder."""

    def into_frame(image: Any, *, height: int, width: int) -> torch.Tensor:
        return interpolate(signed(image), size=(height, width), mode="bicubic")

    def features(image: Any, device: Any) -> Any:
        side = oracle.image_encoder.config.image_size
        images = image if isinstance(image, list) else [image]
        squashed = torch.cat([interpolate(signed(each), size=(side, side), mode="bicubic") for each in images])
        pixels = (squashed.mul(0.5).add(0.5) - CLIP_MEAN) / CLIP_STD
        return oracle.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]

    oracle.video_processor.preprocess, oracle.encode_image = into_frame, features
    oracle.scheduler = OriginalGrid(make_scheduler("unipc", flow_shift=1.0), largest=0.999, shift=5.0)


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_original_layout_prepares_images_as_the_original_does(toys: Callable[[str], Toy], kind: str) -> None:
    toy = toys(kind)
    last_image = picture(70, 50, seed=1) if kind == "flf2v" else None
    request = replace(ASKED, image=picture(70, 50), last_image=last_image, shift=5.0)
    oracle = toy.oracle()
    prepare_as_the_original(oracle)
    assert_same(run_ours(toy.original, request), run_diffusers(oracle, request))


def test_original_layout_of_two_image_experts_prepares_the_image_as_the_original_does(toys: Callable[[str], Toy]) -> None:
    toy = toys("i2v-a14b")
    request = replace(ASKED, num_frames=5, image=picture(50, 70), guidance=(3.5, 2.0), num_steps=5, shift=5.0)
    oracle = toy.oracle()
    prepare_as_the_original(oracle)
    assert_same(run_ours(toy.original, request), run_diffusers(oracle, request, guidance_scale_2=2.0))


def test_original_layout_of_ti2v_covers_the_frame_with_the_image(toys: Callable[[str], Toy]) -> None:
    toy = toys("ti2v")
    request = replace(ASKED, image=picture(33, 91), shift=5.0)
    oracle = WanImageToVideoPipeline.from_pretrained(toy.folder)
    oracle.video_processor.preprocess = cover_frame
    oracle.scheduler = OriginalGrid(make_scheduler("unipc", flow_shift=1.0), largest=0.999, shift=5.0)
    (ours, _), (theirs, _) = run_ours(toy.original, request), run_diffusers(oracle, request)
    for our_latents, their_latents in zip(ours, theirs, strict=True):  # the clean frame: see above
        assert relative_error(our_latents[:, 1:], their_latents[:, 1:]) < LATENTS


def cover_frame(image: Any, *, height: int, width: int) -> torch.Tensor:
    """Wan2.2's way from an image to TI2V's frame: scaled to cover it, then its centre."""
    scale = max(width / image.width, height / image.height)
    covering = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (covering.width - width) // 2, (covering.height - height) // 2
    return signed(covering.crop((left, top, left + width, top + height)))


def video_to_video(toy: Toy) -> Any:
    """diffusers' pipeline; of two experts, which it does not know, a stand-in for its transformer takes the right one."""
    pipeline = toy.oracle()
    parts = {name: getattr(pipeline, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    oracle = WanVideoToVideoPipeline(**parts)
    if pipeline.transformer_2 is not None:
        boundary = pipeline.config.boundary_ratio * 1000
        high_noise, low_noise = pipeline.transformer.forward, pipeline.transformer_2.forward
        oracle.transformer.forward = lambda **inputs: (high_noise if inputs["timestep"] >= boundary else low_noise)(**inputs)
    return oracle


@pytest.mark.parametrize(("scheduler", "strength"), [("unipc", 0.6), ("dpmpp", 0.35), ("euler", 0.8), ("unipc", 1.0)])
def test_video_to_video_gives_the_video_of_diffusers(one_expert: Toy, scheduler: Any, strength: float) -> None:
    video = np.stack([picture(40, 60, seed=seed) for seed in range(7)])  # of which 5 make whole latent frames
    request = replace(ASKED, num_frames=None, video=video, strength=strength, num_steps=7, width=48, height=32)
    oracle = video_to_video(one_expert)
    oracle.scheduler = make_scheduler(scheduler, flow_shift=3.0)
    theirs = run_diffusers(oracle, request)
    assert_same(run_ours(one_expert.diffusers, replace(request, scheduler=SchedulerName(scheduler))), theirs)


def test_video_to_video_with_two_experts_takes_them_by_timestep(two_experts: Toy) -> None:
    video = np.stack([picture(40, 60, seed=seed) for seed in range(5)])
    request = replace(ASKED, num_frames=None, video=video, strength=0.9, num_steps=8, width=32, height=48)
    theirs = run_diffusers(video_to_video(two_experts), request)
    assert_same(run_ours(two_experts.diffusers, request), theirs)


def test_tiles_cut_the_image_for_the_encoder_as_diffusers_cuts_it(toys: Callable[[str], Toy]) -> None:
    request = replace(ASKED, width=64, height=48, num_frames=5, image=picture(70, 50))
    oracle = toys("i2v").oracle()
    oracle.vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24, tile_sample_stride_width=24
    )
    theirs = run_diffusers(oracle, request)
    assert_same(run_ours(toys("i2v").diffusers, replace(request, tile=TileSpec.square(32, 24))), theirs)


def test_an_image_needs_no_prompt_on_the_command_line(toys: Callable[[str], Toy], tmp_path: Path, wanrt: Wanrt) -> None:
    Image.fromarray(picture(70, 50)).save(tmp_path / "first.webp")
    out = tmp_path / "out.npy"
    wanrt("run", toys("i2v").original, "--image", tmp_path / "first.webp", "--size", "48x32", "--frames", "5",
          "--steps", "2", "--seed", "1", "--threads", "1", "--out", out)  # fmt: skip
    assert np.load(out).shape == (5, 32, 48, 3)
    assert json.loads(out.with_name("out.npy.json").read_text())["request"]["prompt"] == ""
