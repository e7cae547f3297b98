"""What every solver offers and what may be chosen about it. Solvers know sigmas; they know neither model nor guidance."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from runtime.schedulers.schedule import Schedule

Latents = np.ndarray[Any, np.dtype[np.float32]]


class SolverType(StrEnum):
    """How DPM++ of order 2 weighs its second-order term. (UniPC is always of the kind bh2.)"""

    MIDPOINT = "midpoint"
    HEUN = "heun"


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverSettings:
    """Choices within a solver; the defaults are Wan's."""

    solver_order: int = 2
    """1 or 2; Euler has no other than 1 and ignores it."""
    solver_type: SolverType = SolverType.MIDPOINT
    disable_corrector: tuple[int, ...] = ()
    """UniPC: steps whose result is not corrected at the step after."""

    def without_first(self, steps: int) -> "SolverSettings":
        """The settings for a schedule that begins `steps` steps later."""
        return replace(self, disable_corrector=tuple(step - steps for step in self.disable_corrector))


WAN_SETTINGS = SolverSettings()


class Solver(Protocol):
    """Steps latents down a schedule. One object serves one run; it remembers earlier predictions."""

    def __init__(self, schedule: Schedule, settings: SolverSettings = WAN_SETTINGS) -> None: ...

    def step(self, noise_pred: Latents, step_index: int, latents: Latents) -> Latents:
        """Latents at `sigmas[step_index]` and the model's flow prediction there → latents at `sigmas[step_index + 1]`.

        Steps are taken in order, beginning with 0, which forgets whatever was before.
        """
        ...


Scalar = np.float32
"""Solvers compute their coefficients in float32, in the order in which the peers do, because these keep log-SNRs of up to 14 in
float32: that rounding alone moves a step by 5e-7. Against float64 coefficients the peers' trajectories differ by up to 1.5e-6,
against these by up to 8e-7 (1 to 50 steps, shifts 1 to 12); what is left comes from the last bit of torch's logarithm."""


def log_snr(sigma: Scalar) -> Scalar:
    """ln(alpha) - ln(sigma) with alpha = 1 - sigma: -inf at pure noise, +inf at none."""
    if not 0 < sigma < 1:
        return Scalar(-math.inf if sigma >= 1 else math.inf)
    return Scalar(math.log(1 - sigma)) - Scalar(math.log(sigma))


def in_order(step_index: int, *, expected: int) -> None:
    """Check that a multistep solver is not made to skip or repeat a step."""
    if step_index not in (0, expected):
        raise ValueError(f"step_index={step_index}: the next step is {expected}")
