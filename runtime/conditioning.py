"""From a request's images or video to what the denoising loop is given: sizes, pixels for the encoders, mask, clean frames.

All NumPy; the encoders themselves are run by `runtime.pipeline`. Where the original repositories and diffusers treat an image
differently, conventions decide (decision 7). Sources: Wan-Video/Wan2.1 `wan/{image2video,first_last_frame2video}.py` and
`wan/modules/clip.py` (9737cba9), Wan-Video/Wan2.2 `wan/{image2video,textimage2video}.py` and `wan/utils/utils.py` (42bf4cfa),
diffusers 0.42.1 `WanImageToVideoPipeline`.
"""

import math
from dataclasses import dataclass

import numpy as np

from runtime.geometry import Float32, VideoSize
from runtime.images import Pixels, bicubic, centre_cut, lanczos, pillow_bicubic, to_signed
from runtime.schedulers import Conventions
from runtime.variants import ImageEncoderArch, ImageFit, ImageUse, Variant

_CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32).reshape(3, 1, 1)
_CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32).reshape(3, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the denoising loop is given beside the prompts; all constant over it.

    Args:
        channels: [C', T, h, w], joined to the latents' channels at every step.
        clean_latents: [C, n, h, w], the first n latent frames, which hold no noise.
        image_features: [image_tokens, image_dim] for the image branch.
    """

    channels: Float32 | None = None
    clean_latents: Float32 | None = None
    image_features: Float32 | None = None

    @property
    def clean_frames(self) -> int:
        """Leading latent frames that hold no noise."""
        return 0 if self.clean_latents is None else self.clean_latents.shape[1]

    def impose(self, latents: Float32) -> Float32:
        """The latents with the clean frames in their place."""
        if self.clean_latents is None:
            return latents
        return np.concatenate((self.clean_latents, latents[:, self.clean_frames :]), axis=1)

    def model_input(self, latents: Float32) -> Float32:
        """The latents with all channels that the transformer takes."""
        return latents if self.channels is None else np.concatenate((latents, self.channels))


NO_CONDITIONS = Conditions()


def size_for_image(
    width: int, height: int, *, area: int, step: int, stride: int, fit: ImageFit, conventions: Conventions
) -> tuple[int, int]:
    """Width and height of the video for an image of `width` x `height`: its aspect, about the given area.

    Args:
        step: pixels of one token, of which sides are multiples.
        stride: pixels of one latent position.
    """
    aspect = height / width
    if conventions is Conventions.DIFFUSERS:  # `WanImageToVideoPipeline`'s example
        tall, wide = (round(float(np.sqrt(side))) // step * step for side in (area * aspect, area / aspect))
        return wide, tall
    if fit is ImageFit.STRETCH:  # the peer's float floor, which makes 464 of a side of 479.999…
        patch = step // stride
        tall, wide = (
            round(float(np.sqrt(side)) // stride // patch * patch) * stride for side in (area * aspect, area / aspect)
        )
        return wide, tall
    return _nearest_aspect(width / height, area=area, step=step)


def _nearest_aspect(aspect: float, *, area: int, step: int) -> tuple[int, int]:
    """The better of two sizes within the area: width rounded down first, or height (Wan2.2 `best_output_size`)."""
    wide = (area * aspect) ** 0.5
    first_width = max(step, int(wide // step * step))
    first = first_width, int(area / first_width // step * step)
    second_height = max(step, int(area / wide // step * step))
    second = int(area / second_height // step * step), second_height

    def distortion(size: tuple[int, int]) -> float:
        found = size[0] / size[1] if size[1] else math.inf
        return max(aspect / found, found / aspect) if found else math.inf

    return first if distortion(first) < distortion(second) else second


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderInputs:
    """What the encoders are given.

    Args:
        pixels: [n, 3, image_size, image_size] for the image encoder; None without one, or without an image.
        frames: [3, T, H, W] in -1..1 for the VAE's encoder.
    """

    pixels: Float32 | None
    frames: Float32


def image_inputs(
    image: Pixels, last_image: Pixels | None, size: VideoSize, *, variant: Variant, conventions: Conventions
) -> EncoderInputs:
    """Encoder inputs of a request with an image and perhaps a last one."""
    fit = ImageFit.STRETCH if conventions is Conventions.DIFFUSERS else variant.conditioning.image_fit
    if conventions is Conventions.ORIGINAL and fit is ImageFit.STRETCH:
        signed = [to_signed(image)]
        if last_image is not None:
            signed.append(_matched_in_size(to_signed(last_image), image.shape))
        frames = [bicubic(each, size.width, size.height) for each in signed]
        pixels = None if variant.image_encoder is None else _squashed(signed, variant.image_encoder)
    else:
        images = [image] if last_image is None else [image, last_image]
        resize = _cover if fit is ImageFit.COVER else lanczos
        frames = [to_signed(resize(each, size.width, size.height)) for each in images]
        pixels = None if variant.image_encoder is None else _centred(images, variant.image_encoder)
    if variant.conditioning.image_use is ImageUse.FIRST_FRAME:
        return EncoderInputs(pixels=pixels, frames=frames[0][:, None])
    clip = np.zeros((3, size.num_frames, size.height, size.width), np.float32)  # mid-grey; pages never written cost no memory
    clip[:, 0] = frames[0]
    if last_image is not None:
        clip[:, -1] = frames[1]
    return EncoderInputs(pixels=pixels, frames=clip)


def matched_extent(last: tuple[int, ...], first: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns to which the original repositories bring a last image of another size than the first one's."""
    if last == first:
        return last[0], last[1]
    ratio = max(first[1] / last[1], first[0] / last[0])
    return round(last[1] * ratio), round(last[0] * ratio)


def video_inputs(video: Pixels, size: VideoSize) -> EncoderInputs:
    """Encoder inputs of a request with a video, uint8 [T, H, W, 3], of which the first frames are taken."""
    frames = np.empty((3, size.num_frames, size.height, size.width), np.float32)
    for index in range(size.num_frames):
        frames[:, index] = to_signed(lanczos(video[index], size.width, size.height))
    return EncoderInputs(pixels=None, frames=frames)


def image_conditions(latents: Float32, features: Float32 | None, *, variant: Variant, has_last_image: bool) -> Conditions:
    """Conditions from what the encoders gave.

    Args:
        latents: normalised [C, T, h, w] of `EncoderInputs.frames`.
    """
    if variant.conditioning.image_use is ImageUse.FIRST_FRAME:
        return Conditions(clean_latents=latents, image_features=features)
    mask = known_frames(latents.shape[1:], stride=variant.vae.temporal_stride, has_last_image=has_last_image)
    return Conditions(channels=np.concatenate((mask, latents)), image_features=features)


def known_frames(grid: tuple[int, ...], *, stride: int, has_last_image: bool) -> Float32:
    """Mask channels [stride, T, h, w]: which video frames an image stands for, one channel for each frame of a latent frame.

    The first latent frame has one video frame only, repeated over its channels; the last video frame is the last channel.
    """
    mask = np.zeros((stride, *grid), np.float32)
    mask[:, 0] = 1
    if has_last_image:
        mask[-1, -1] = 1
    return mask


def noisy_start(latents: Float32, noise: Float32, sigma: float) -> Float32:
    """A video's latents with as much noise as the first step that is taken expects: (1 - sigma) · x + sigma · noise."""
    weight = np.float32(sigma)
    return (np.float32(1) - weight) * latents + weight * noise


def _cover(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scaled by Lanczos until it covers the frame, then cut around the centre."""
    rows, columns, _ = pixels.shape
    scale = max(width / columns, height / rows)
    return np.ascontiguousarray(centre_cut(lanczos(pixels, round(columns * scale), round(rows * scale)), width, height))


def _matched_in_size(last: Float32, first_shape: tuple[int, ...]) -> Float32:
    """The last image where its size is not the first one's: cut, or bordered with grey, around its centre.

    As the original does: it means to scale the image until it covers the first one's size, but only cuts to that size, and takes
    the width for the height and the height for the width.
    """
    rows, columns = matched_extent(last.shape[1:], first_shape[:2])
    return _centred_in(last, rows=rows, columns=columns)


def _centred_in(image: Float32, *, rows: int, columns: int) -> Float32:
    """[3, H, W] cut or bordered with zeros to `rows` x `columns` (torchvision's `center_crop`)."""
    _, height, width = image.shape
    above, left = max(rows - height, 0) // 2, max(columns - width, 0) // 2
    grown = np.zeros((3, max(rows, height), max(columns, width)), np.float32)
    grown[:, above : above + height, left : left + width] = image
    top, start = round((grown.shape[1] - rows) / 2), round((grown.shape[2] - columns) / 2)
    return grown[:, top : top + rows, start : start + columns]


def _squashed(images: list[Float32], arch: ImageEncoderArch) -> Float32:
    """The original's way to the image encoder: the whole image bicubic, without antialiasing, sides scaled apart."""
    side, half = arch.image_size, np.float32(0.5)
    return np.stack([(bicubic(image, side, side) * half + half - _CLIP_MEAN) / _CLIP_STD for image in images])


def _centred(images: list[Pixels], arch: ImageEncoderArch) -> Float32:
    """diffusers' way (`CLIPImageProcessor`): the short side scaled to the encoder's by Pillow's bicubic, the centre cut out."""
    return np.stack([_centred_one(image, arch.image_size) for image in images])


def _centred_one(image: Pixels, side: int) -> Float32:
    rows, columns, _ = image.shape
    short = min(rows, columns)
    resized = pillow_bicubic(image, int(side * columns / short), int(side * rows / short))
    scaled = centre_cut(resized, side, side).transpose(2, 0, 1).astype(np.float64) * (1 / 255)
    return (scaled.astype(np.float32) - _CLIP_MEAN) / _CLIP_STD
