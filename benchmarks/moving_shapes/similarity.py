"""How alike two videos are: PSNR, SSIM, and a distance of features in the manner of LPIPS.

LPIPS itself needs a network that was trained on photographs. What stands in for it here is a fixed convolutional network with random filters,
its features normalised and compared as LPIPS does: it says how much edges and corners differ, and nothing about people's judgement, so
its numbers are not LPIPS numbers.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Array = np.ndarray[Any, np.dtype[Any]]
_WIDTHS = (3, 16, 32, 64)
_SEED = 20260101
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # Wang et al., "Image quality assessment", 2004
_WINDOW, _SIGMA = 11, 1.5  # same source


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """Two videos compared; equal ones have a PSNR of infinity, an SSIM of 1 and a distance of 0."""

    psnr_db: float
    ssim: float
    feature_distance: float


def compare(frames: NDArray[np.uint8], reference: NDArray[np.uint8]) -> Similarity:
    """Compare two videos of one shape, uint8 RGB [T, H, W, 3], sides of at least 32 pixels.

    Raises:
        ValueError: the shapes differ.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"videos of {list(frames.shape)} and {list(reference.shape)}")
    a, b = frames.astype(np.float32), reference.astype(np.float32)
    error = float(((a - b) ** 2).mean())
    return Similarity(
        psnr_db=float("inf") if error == 0 else float(10 * np.log10(255**2 / error)),
        ssim=_ssim(a @ _LUMA, b @ _LUMA),
        feature_distance=_feature_distance(a / 127.5 - 1, b / 127.5 - 1),
    )


def _ssim(a: _Array, b: _Array) -> float:
    """Mean structural similarity of luminance, [T, H, W] of 255."""
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a, variance_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return float(((2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1) * structure).mean())


def _blurred(x: _Array) -> _Array:
    """A Gaussian window over each frame, only where it lies wholly inside."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), _WINDOW, axis=1) @ weights
    blurred: _Array = np.lib.stride_tricks.sliding_window_view(windows, _WINDOW, axis=2) @ weights
    return blurred


def _feature_distance(a: _Array, b: _Array) -> float:
    """Mean squared difference of unit feature vectors, summed over the levels of the network."""
    random = np.random.default_rng(_SEED)
    distance = 0.0
    for inputs, outputs in pairwise(_WIDTHS):
        filters = random.standard_normal((9 * inputs, outputs)).astype(np.float32) / np.sqrt(9 * inputs)
        a, b = (np.maximum(_patches(x) @ filters, 0) for x in (a, b))
        distance += float(((_unit(a) - _unit(b)) ** 2).sum(axis=-1).mean())
        a, b = (_halved(x) for x in (a, b))
    return distance


def _patches(x: _Array) -> _Array:
    """The 3x3 neighbourhood of each position as channels: [T, H, W, C] → [T, H-2, W-2, 9 C]."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return np.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)


def _unit(x: _Array) -> _Array:
    unit: _Array = x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)
    return unit


def _halved(x: _Array) -> _Array:
    """Means of 2x2 squares; an odd last row or column is left out."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    even: _Array = x[:, :height, :width].reshape(len(x), height // 2, 2, width // 2, 2, -1).mean(axis=(2, 4))
    return even
