"""What a request's images and video mean for it: whether the variant takes them, the size that follows, the steps that are left out."""

from typing import TYPE_CHECKING

import numpy as np

from runtime.conditioning import matched_extent, size_for_image
from runtime.errors import RequestError
from runtime.geometry import VideoSize, token_pixels
from runtime.images import MAX_PIXELS
from runtime.schedulers import Conventions
from runtime.variants import ImageFit, Presence, Variant

if TYPE_CHECKING:
    from runtime.request import GenerateRequest

DEFAULT_STRENGTH = 0.8  # `WanVideoToVideoPipeline`'s


def check_inputs(request: "GenerateRequest", variant: Variant, conventions: Conventions) -> None:
    """Refuse an image or video that the variant does not take, and the lack of one that it needs.

    Raises:
        RequestError: the first thing that does not fit, with what does.
    """
    takes = variant.conditioning
    for name, given, presence in (
        ("image", request.image, takes.image),
        ("last image", request.last_image, takes.last_image),
        ("video", request.video, takes.video),
    ):
        option = f"--{name.replace(' ', '-')}"
        if given is None and presence is Presence.REQUIRED:
            raise RequestError(f"{variant.name} needs an image ({name})", hint=f"give one with {option}")
        if given is not None and presence is Presence.NONE:
            raise RequestError(f"{variant.name} takes no {name}", hint=f"leave {option} out; {_takers(name)}")
        if given is not None and (given.dtype != np.uint8 or given.shape[-1] != 3 or given.ndim != 3 + (name == "video")):
            raise RequestError(f"{name} is {given.dtype} {list(given.shape)}; need uint8 RGB, channels last")
    if request.last_image is not None and request.image is None:
        raise RequestError("a last image without a first one", hint="give the first one with --image")
    if request.strength is not None and request.video is None:
        raise RequestError("strength without a video", hint="give one with --video, or leave --strength out")
    if request.image is not None and request.last_image is not None and conventions is Conventions.ORIGINAL:
        rows, columns = matched_extent(request.last_image.shape[:2], request.image.shape[:2])
        if takes.image_fit is ImageFit.STRETCH and rows * columns > MAX_PIXELS:
            raise RequestError("first and last image differ too much in size", hint="give two images of one size")


def _takers(name: str) -> str:
    return f"text-to-video models of Wan2.1 and Wan2.2 A14B take a {name}" if name == "video" else f"I2V models take an {name}"


def video_size(request: "GenerateRequest", variant: Variant, conventions: Conventions) -> VideoSize:
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
            num_frames = max(available - 1, 0) // stride * stride + 1  # the rest is what diffusers drops
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
