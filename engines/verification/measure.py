"""The one number that says how far an array is from another."""

import numpy as np

from runtime.backends.base import Array


def relative_error(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; of zeros, the norm of what was found. NaN where something is not finite."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(difference)) / (size or 1.0)
