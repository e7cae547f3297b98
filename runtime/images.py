"""Image files in, pixels out, and the peers' ways of resizing them; what the pixels are for is `runtime.conditioning`'s to say.

Files are opened as diffusers' `load_image` opens them: turned as EXIF says, transparency dropped, grey and palettes made RGB. Only 16
bits of grey, which it clips to white, keep their upper half.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.geometry import Float32

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
"""RGB, [H, W, 3]."""
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26
"""About 67 million: 0.2 GB once decoded, and 0.8 GB as float32."""
MAX_ASPECT = 64
"""Longer side by shorter: covering a frame with a thread of an image would make it that many times as large as the frame."""
_CUBIC = np.float32(-0.75)  # the cubic's free parameter in torch and OpenCV; Pillow has -0.5


def load_image(path: Path) -> Pixels:
    """Decode an image file.

    Raises:
        RequestError: missing, of another format, truncated, damaged or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `MAX_PIXELS` is the limit here; damaged EXIF data and the like are left out
            with Image.open(path, formats=FORMATS) as image:
                _check_extent(path, image.width, image.height)
                pixels = np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except Image.DecompressionBombError as exc:
        raise _too_large(path) from exc
    except UnidentifiedImageError as exc:
        raise RequestError(f"{path}: not an image of a known kind", hint=f"give a file of {', '.join(FORMATS)}") from exc
    except RequestError:
        raise
    except OSError as exc:
        if exc.errno is None:  # Pillow's own, of damaged files
            raise _damaged(path, exc) from exc
        raise RequestError(f"{path}: cannot be read: {exc.strerror}", hint="give an image file") from exc
    except Exception as exc:  # damaged files make Pillow's readers raise errors of struct, zlib and others
        raise _damaged(path, exc) from exc
    return np.ascontiguousarray(pixels)


def lanczos(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resize as diffusers' `VideoProcessor` does: Pillow's Lanczos, antialiased, sides scaled apart."""
    return _resized(pixels, width, height, "LANCZOS")


def pillow_bicubic(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resize with Pillow's bicubic filter, antialiased."""
    return _resized(pixels, width, height, "BICUBIC")


def bicubic(image: Float32, width: int, height: int) -> Float32:
    """Resize [C, H, W] as torch's `interpolate(mode="bicubic")` does: corners not aligned, not antialiased, ends repeated.

    Only the rows and columns that some output pixel needs are looked at.
    """
    rows, row_weights = _taps(image.shape[1], height)
    columns, column_weights = _taps(image.shape[2], width)
    needed, place = np.unique(rows, return_inverse=True)
    strips = image[:, needed]
    across = _weighted([strips[:, :, column] for column in columns], column_weights)
    place = place.reshape(rows.shape)
    return _weighted([across[:, row] for row in place], row_weights[..., None])


def to_signed(pixels: Pixels) -> Float32:
    """uint8 [..., H, W, 3] → float32 [..., 3, H, W] in -1..1. diffusers' 2x - 1 and torchvision's (x - 0.5) / 0.5 give the same bits."""
    scaled = np.moveaxis(pixels, -1, -3).astype(np.float32) / np.float32(255)
    return scaled * np.float32(2) - np.float32(1)


def centre_cut(pixels: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """The middle `height` x `width` of [H, W, 3]; odd rests are rounded down."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _rgb(image: "Image") -> "Image":
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip at 255
        from PIL import Image

        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _check_extent(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height}: ")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"{path}: {width}x{height}: sides of at most {MAX_ASPECT} to 1", hint="cut the image first")


def _damaged(path: Path, cause: Exception) -> RequestError:
    return RequestError(f"{path}: cannot be read as an image: {cause}", hint="check the file; save it again as PNG")


def _too_large(path: Path, size: str = "") -> RequestError:
    return RequestError(f"{path}: {size}at most {MAX_PIXELS / 1e6:.0f} million pixels", hint="scale the image down first")


def _resized(pixels: Pixels, width: int, height: int, resampling: str) -> Pixels:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling[resampling]))


def _taps(extent: int, wanted: int) -> tuple[NDArray[np.int64], Float32]:
    """For each of `wanted` positions the four neighbours it is made of, [4, wanted], and their weights.

    Cubic convolution (Keys, 1981); in float32, in which torch computes them too.
    """
    scale = np.float32(extent) / np.float32(wanted)
    # One rounding for the product and the difference, as compiled torch has: two would move far pixels by 4e-5.
    position = (np.float64(scale) * (np.arange(wanted) + 0.5) - 0.5).astype(np.float32)
    first = np.floor(position)
    t = position - first
    neighbours = first.astype(np.int64) + np.arange(-1, 3)[:, None]
    weights = np.stack([_far(t + np.float32(1)), _near(t), _near(np.float32(1) - t), _far(np.float32(2) - t)])
    return np.clip(neighbours, 0, extent - 1), weights


def _near(x: Float32) -> Float32:
    """Weight at a distance of up to 1."""
    return ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1


def _far(x: Float32) -> Float32:
    """Weight at a distance from 1 to 2."""
    return ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC


def _weighted(parts: list[Float32], weights: Float32) -> Float32:
    total: Float32 = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part * weight
    return total
