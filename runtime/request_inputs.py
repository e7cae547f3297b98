"""What a request's images and video mean for it: whether the variant takes them, the size that follows, the steps that are left out."""

import logging

import numpy as np

from runtime.conditioning import matched_extent, size_for_image
from runtime.errors import RequestError
from runtime.geometry import VideoSize, token_pixels
from runtime.images import MAX_PIXELS
from runtime.request import GenerateRequest
from runtime.schedulers import Conventions
from runtime.variants import VARIANTS, ImageFit, Presence, Variant

log = logging.getLogger(__name__)
DEFAULT_STRENGTH = 0.8  # `WanVideoToVideoPipeline`'s


def check_inputs(request: GenerateRequest, variant: Variant, conventions: Conventions) -> None:
    """Refuse an image or video that the variant does not take, and the lack of one that it needs.

    Raises:
        RequestError: the first thing that does not fit, with what does.
    """
    takes = variant.conditioning
    for field, given, presence in (
        ("image", request.image, takes.image),
        ("last_image", request.last_image, takes.last_image),
        ("video", request.video, takes.video),
    ):
        name, option = field.replace("_", " "), f"--{field.replace('_', '-')}"
        if given is None and presence is Presence.REQUIRED:
            raise RequestError(
                f"{variant.name} needs {'an' if name == 'image' else 'a'} {name}", hint=f"give one with {option}"
            )
        if given is not None and presence is Presence.NONE:
            raise RequestError(f"{variant.name} takes no {name}", hint=f"leave {option} out; it is for {_takers(field)}")
        if given is not None and (given.dtype != np.uint8 or given.shape[-1] != 3 or given.ndim != 3 + (field == "video")):
            raise RequestError(
                f"{name} is {given.dtype} {list(given.shape)}; need uint8 RGB, channels last", hint="convert it first"
            )
        if given is not None and not given[..., 0].size:
            raise RequestError(f"{name} is {list(given.shape)}: it holds no pixels", hint="give another one")
    if request.last_image is not None and request.image is None:
        raise RequestError("a last image without a first one", hint="give the first one with --image")
    if request.strength is not None and request.video is None:
        raise RequestError("strength without a video", hint="give one with --video, or leave --strength out")
    if request.image is not None and request.last_image is not None and conventions is Conventions.ORIGINAL:
        rows, columns = matched_extent(request.last_image.shape[:2], request.image.shape[:2])
        if takes.image_fit is ImageFit.STRETCH and rows * columns > MAX_PIXELS:
            raise RequestError("first and last image differ too much in size", hint="give two images of one size")


def _takers(field: str) -> str:
    """Names of the variants that take such an input, `field` of their conditioning."""
    return ", ".join(row.name for row in VARIANTS.values() if getattr(row.conditioning, field) is not Presence.NONE)


def video_size(request: GenerateRequest, variant: Variant, conventions: Conventions) -> VideoSize:
    """The size asked for; what is left out follows from the image or video, else from the variant.

    Raises:
        RequestError: more frames than the video has, or too few for two images.
    """
    defaults, stride = variant.defaults, variant.vae.temporal_stride
    width = defaults.width if request.width is None else request.width
    height = defaults.height if request.height is None else request.height
    num_frames = defaults.num_frames if request.num_frames is None else request.num_frames
    if request.image is not None and request.width is None and request.height is None:
        rows, columns, _ = request.image.shape
        width, height = size_for_image(
            columns,
            rows,
            area=defaults.width * defaults.height,
            step=token_pixels(variant.vae, variant.transformer),
            stride=variant.vae.spatial_stride,
            fit=variant.conditioning.image_fit,
            conventions=conventions,
        )
    if request.video is not None:
        available = len(request.video)
        if request.num_frames is None:
            num_frames = max(available - 1, 0) // stride * stride + 1  # diffusers drops the rest, too
            if num_frames < available:
                log.warning("the video has %d frames; the first %d are taken: a video has %dn+1", available, num_frames, stride)
        if num_frames > available:
            raise RequestError(f"num_frames={num_frames}: the video has {available}", hint="lower --frames")
    if request.last_image is not None and num_frames == 1:
        raise RequestError("num_frames=1: a first and a last image need two", hint=f"try {1 + stride}")
    return VideoSize(width=width, height=height, num_frames=num_frames)


def skipped_steps(num_steps: int, strength: float) -> int:
    """Steps left out at the beginning (`WanVideoToVideoPipeline.get_timesteps`).

    Raises:
        RequestError: a strength out of range, or one that leaves no step.
    """
    if not 0 < strength <= 1:
        raise RequestError(f"strength={strength}: need more than 0, at most 1", hint=f"{DEFAULT_STRENGTH} is usual")
    taken = int(num_steps * strength)
    if not taken:
        raise RequestError(f"strength={strength} leaves none of {num_steps} steps", hint="raise --strength or --steps")
    return num_steps - taken
