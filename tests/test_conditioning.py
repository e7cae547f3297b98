"""The arithmetic of image conditioning against the peers' own functions, and against torch where the peers call it."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from runtime.conditioning import (
    Conditions,
    image_conditions,
    image_inputs,
    known_frames,
    noisy_start,
    size_for_image,
    video_inputs,
)
from runtime.geometry import VideoSize
from runtime.images import Pixels, bicubic
from runtime.schedulers import Conventions
from runtime.variants import VARIANTS, ImageFit

I2V, FLF2V, TI2V = (VARIANTS[name] for name in ("wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b", "wan2.2-ti2v-5b"))
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
SIZE = VideoSize(width=64, height=48, num_frames=9)


def picture(width: int, height: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def signed(pixels: Pixels) -> torch.Tensor:
    """What torchvision's `to_tensor` and the original repositories' normalisation make of an image, [3, H, W]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def close(given: NDArray[Any], expected: torch.Tensor) -> bool:
    return given.shape == tuple(expected.shape) and bool(np.abs(given - expected.numpy()).max() < 1e-5)


# Height and width of the image → those of the video; from running the original repositories' own code.
STRETCHED = [
    (1280 * 720, (720, 1280), (720, 1280)),
    (1280 * 720, (480, 832), (720, 1248)),
    (1280 * 720, (1024, 1024), (960, 960)),
    (1280 * 720, (768, 1024), (816, 1104)),
    (832 * 480, (720, 1280), (464, 832)),
    (832 * 480, (832, 480), (832, 480)),
    (832 * 480, (1024, 1024), (624, 624)),
    (832 * 480, (480, 832), (464, 832)),  # its square root is 479.999…
]
COVERED = [((1024, 1024), (928, 960)), ((1080, 1920), (704, 1248)), ((768, 1024), (800, 1088))]


@pytest.mark.parametrize(("area", "image", "video"), STRETCHED)
def test_original_i2v_sizes_keep_the_area(area: int, image: tuple[int, int], video: tuple[int, int]) -> None:
    size = size_for_image(
        image[1], image[0], area=area, step=16, stride=8, fit=ImageFit.STRETCH, conventions=Conventions.ORIGINAL
    )
    assert size[::-1] == video


@pytest.mark.parametrize(("image", "video"), COVERED)
def test_original_ti2v_sizes_have_the_nearest_aspect(image: tuple[int, int], video: tuple[int, int]) -> None:
    size = size_for_image(
        image[1], image[0], area=1280 * 704, step=32, stride=16, fit=ImageFit.COVER, conventions=Conventions.ORIGINAL
    )
    assert size[::-1] == video


@pytest.mark.parametrize(("width", "height"), [(832, 480), (480, 832), (640, 640), (333, 1001), (1920, 800)])
@pytest.mark.parametrize(("area", "step"), [(832 * 480, 16), (1280 * 704, 32)])
def test_diffusers_sizes_are_those_of_its_example(width: int, height: int, area: int, step: int) -> None:
    aspect = height / width
    expected_height = round(np.sqrt(area * aspect)) // step * step
    expected_width = round(np.sqrt(area / aspect)) // step * step
    for fit in ImageFit:
        size = size_for_image(width, height, area=area, step=step, stride=step // 2, fit=fit, conventions=Conventions.DIFFUSERS)
        assert size == (expected_width, expected_height)


@pytest.mark.parametrize(
    ("extent", "wanted"), [((37, 61), (48, 64)), ((480, 832), (464, 832)), ((100, 33), (16, 16)), ((5, 1), (8, 9))]
)
def test_bicubic_is_torchs(extent: tuple[int, int], wanted: tuple[int, int]) -> None:
    image = signed(picture(extent[1], extent[0]))
    assert close(bicubic(image.numpy(), wanted[1], wanted[0]), interpolate(image[None], size=wanted, mode="bicubic")[0])


@pytest.mark.parametrize(("width", "height"), [(100, 70), (70, 100), (50, 50), (63, 47)])
def test_diffusers_frames_and_clip_pixels_are_those_of_its_processors(width: int, height: int) -> None:
    image, last = picture(width, height), picture(height, width, seed=1)
    inputs = image_inputs(image, last, SIZE, variant=FLF2V, conventions=Conventions.DIFFUSERS)
    processor = VideoProcessor(vae_scale_factor=8)
    pictures = [Image.fromarray(image), Image.fromarray(last)]
    frames = [processor.preprocess(each, height=SIZE.height, width=SIZE.width)[0] for each in pictures]
    np.testing.assert_array_equal(inputs.frames[:, 0], frames[0].numpy())
    np.testing.assert_array_equal(inputs.frames[:, -1], frames[1].numpy())
    assert not inputs.frames[:, 1:-1].any()
    pixels = CLIPImageProcessorPil()(images=pictures, return_tensors="pt").pixel_values
    assert inputs.pixels is not None
    assert close(inputs.pixels, pixels)


@pytest.mark.parametrize(("width", "height"), [(100, 70), (40, 90), (64, 48)])
def test_original_frames_and_clip_pixels_are_bicubic_without_antialiasing(width: int, height: int) -> None:
    image = picture(width, height)
    inputs = image_inputs(image, None, SIZE, variant=I2V, conventions=Conventions.ORIGINAL)
    assert close(inputs.frames[:, 0], interpolate(signed(image)[None], size=(48, 64), mode="bicubic")[0])
    assert inputs.frames.shape == (3, 9, 48, 64)
    assert not inputs.frames[:, 1:].any()
    squashed = interpolate(signed(image)[None], size=(224, 224), mode="bicubic").mul(0.5).add(0.5)
    assert inputs.pixels is not None
    assert close(inputs.pixels, (squashed - CLIP_MEAN) / CLIP_STD)


def test_original_cuts_a_last_image_of_another_size_with_its_sides_exchanged() -> None:
    first, last = picture(12, 8), picture(10, 4, seed=1)
    # Ratio max(12/10, 8/4) = 2: meant for 20 x 8, taken as 20 rows of 8 columns: 8 rows of grey above and below, 1 column off each side.
    bordered = torch.zeros(3, 20, 8)
    bordered[:, 8:12] = signed(last)[:, :, 1:9]
    inputs = image_inputs(first, last, SIZE, variant=FLF2V, conventions=Conventions.ORIGINAL)
    assert close(inputs.frames[:, -1], interpolate(bordered[None], size=(48, 64), mode="bicubic")[0])
    assert close(inputs.frames[:, 0], interpolate(signed(first)[None], size=(48, 64), mode="bicubic")[0])


@pytest.mark.parametrize(("width", "height"), [(100, 70), (70, 100), (64, 48)])
def test_original_ti2v_covers_the_frame_and_cuts_the_centre(width: int, height: int) -> None:
    scale = max(64 / width, 48 / height)
    resized = Image.fromarray(picture(width, height)).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.LANCZOS
    )
    left, top = (resized.width - 64) // 2, (resized.height - 48) // 2
    expected = signed(np.asarray(resized.crop((left, top, left + 64, top + 48))))
    inputs = image_inputs(picture(width, height), None, SIZE, variant=TI2V, conventions=Conventions.ORIGINAL)
    assert inputs.pixels is None
    np.testing.assert_array_equal(inputs.frames, expected.numpy()[:, None])


def test_video_frames_are_resized_as_diffusers_resizes_them() -> None:
    video = np.stack([picture(50, 30, seed=seed) for seed in range(6)])
    expected = VideoProcessor(vae_scale_factor=8).preprocess_video([Image.fromarray(frame) for frame in video], 48, 64)[0]
    frames = video_inputs(video, VideoSize(width=64, height=48, num_frames=5)).frames
    np.testing.assert_array_equal(frames, expected.numpy()[:, :5])


@pytest.mark.parametrize("has_last_image", [False, True])
@pytest.mark.parametrize("num_frames", [5, 9, 33])
def test_the_mask_has_a_channel_for_each_frame_of_a_latent_frame(num_frames: int, has_last_image: bool) -> None:
    known = torch.zeros(num_frames, 2, 3)
    known[0] = 1
    known[-1] = float(has_last_image)
    expected = torch.cat((known[:1].repeat_interleave(4, dim=0), known[1:])).view(-1, 4, 2, 3).transpose(0, 1)
    grid = ((num_frames - 1) // 4 + 1, 2, 3)
    np.testing.assert_array_equal(known_frames(grid, stride=4, has_last_image=has_last_image), expected.numpy())


def test_mask_comes_before_the_image_latents_and_noise_before_both() -> None:
    latents = np.full((16, 3, 2, 2), 7, np.float32)
    conditions = image_conditions(latents, None, variant=I2V, has_last_image=False)
    joined = conditions.model_input(np.full((16, 3, 2, 2), -1, np.float32))
    assert joined.shape == (36, 3, 2, 2)
    assert (joined[:16] == -1).all()
    assert (joined[16:20, 0] == 1).all()
    assert (joined[20:] == 7).all()


def test_clean_frames_take_their_place_and_leave_the_rest() -> None:
    noisy = np.full((2, 3, 1, 1), -1, np.float32)
    conditions = Conditions(clean_latents=np.full((2, 1, 1, 1), 5, np.float32))
    assert conditions.clean_frames == 1
    np.testing.assert_array_equal(conditions.impose(noisy)[:, :, 0, 0], [[5, -1, -1]] * 2)
    np.testing.assert_array_equal(noisy, -1)


def test_a_noisy_start_is_what_diffusers_adds() -> None:
    from tests.toys import make_scheduler

    clean, noise = (np.random.default_rng(seed).standard_normal((2, 2, 3, 3)).astype(np.float32) for seed in (0, 1))
    scheduler = make_scheduler("unipc", flow_shift=3.0)
    scheduler.set_timesteps(10)
    expected = scheduler.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), scheduler.timesteps[4:5])
    np.testing.assert_allclose(noisy_start(clean, noise, float(scheduler.sigmas[4])), expected, atol=1e-6)
