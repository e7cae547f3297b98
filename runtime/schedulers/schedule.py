"""Noise levels of a sampling run: which sigmas a scheduler visits and which timesteps the model is given.

The peers lay out their grids differently, so a schedule is asked for by scheduler and conventions; how a step is made is the
solvers' matter. Sources: Wan-Video/Wan2.2 `wan/utils/fm_solvers*.py` and `wan/text2video.py` (42bf4cfa), diffusers 0.42.1
`schedulers/`, DiffSynth-Studio `diffsynth/diffusion/flow_match.py` (fed7b18f).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from runtime.errors import RequestError

NUM_TRAIN_TIMESTEPS = 1000
"""Timestep of pure noise; sigma 1. Every Wan model is trained with it."""

_Sigmas = np.ndarray[Any, np.dtype[np.float64]]


class SchedulerName(StrEnum):
    UNIPC = "unipc"
    DPMPP = "dpmpp"
    EULER = "euler"


class Conventions(StrEnum):
    """Whose behaviour is followed where the peers differ.

    ORIGINAL is the Wan repositories' (for Euler, which they lack, DiffSynth-Studio's), DIFFUSERS is `WanPipeline`'s.
    """

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The noise levels of one run of n steps."""

    sigmas: np.ndarray[Any, np.dtype[np.float64]]
    """[n+1], falling, the last 0. float64 numbers that float32 holds exactly, because the peers' solvers start from float32."""
    timesteps: np.ndarray[Any, np.dtype[Any]]
    """[n], exactly what the model is given: int64 where the peer truncates, float32 where it does not."""

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def without_first(self, steps: int) -> "Schedule":
        """The schedule of a run that begins `steps` steps later, from latents that hold less noise."""
        return Schedule(self.sigmas[steps:], self.timesteps[steps:])


def make_schedule(scheduler: SchedulerName, *, conventions: Conventions, num_steps: int, shift: float) -> Schedule:
    """The schedule of `num_steps` steps: an even grid of sigmas bent by `shift` towards pure noise.

    Raises:
        RequestError: `num_steps` or `shift` is out of range, or so large that two sigmas coincide.
    """
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise RequestError(f"num_steps={num_steps}: need 1 to {NUM_TRAIN_TIMESTEPS}", hint="Wan's own defaults are 40 and 50")
    if not (math.isfinite(shift) and shift > 0):
        raise RequestError(f"shift={shift}: need a positive number", hint="Wan's own defaults lie between 3 and 16")
    grid = _GRIDS[scheduler, conventions](num_steps, float(shift))
    sigmas = np.append(grid, 0.0).astype(np.float32).astype(np.float64)
    if not np.all(np.diff(sigmas) < 0) or (scheduler is SchedulerName.UNIPC and sigmas[0] == 1):
        raise RequestError(f"shift={shift} with num_steps={num_steps}: sigmas coincide in float32", hint="lower the shift")
    if scheduler is SchedulerName.EULER:
        return Schedule(sigmas, sigmas[:-1].astype(np.float32) * np.float32(NUM_TRAIN_TIMESTEPS))
    return Schedule(
        sigmas, (grid * NUM_TRAIN_TIMESTEPS).astype(np.int64)
    )  # truncated from float64, before the sigmas are rounded


def _shifted(sigmas: _Sigmas, shift: float) -> _Sigmas:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _original_unipc(num_steps: int, shift: float) -> _Sigmas:
    # The class takes its largest sigma from a float32 table of 1 - 1/1000.
    largest = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS))
    return _shifted(np.linspace(largest, 0, num_steps + 1)[:-1], shift)


def _from_one(num_steps: int, shift: float) -> _Sigmas:
    return _shifted(np.linspace(1, 0, num_steps + 1)[:-1], shift)


def _diffusers_unipc(num_steps: int, shift: float) -> _Sigmas:
    sigmas = _shifted(np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1], shift)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # keeps log(1 - sigma) finite
    return sigmas


def _diffusers_dpmpp(num_steps: int, shift: float) -> _Sigmas:
    ascending = 1.0 - np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)
    return _shifted(ascending, shift)[:0:-1].copy()


def _diffusers_euler(num_steps: int, shift: float) -> _Sigmas:
    # The class shifts its float32 training table, takes the ends of that, and shifts the grid between them once more.
    ends = np.array([1, 1 / NUM_TRAIN_TIMESTEPS], np.float32)
    ends = np.float32(shift) * ends / (np.float32(1) + np.float32(shift - 1) * ends)
    largest, smallest = (float(end) * NUM_TRAIN_TIMESTEPS for end in ends)
    return _shifted(np.linspace(largest, smallest, num_steps) / NUM_TRAIN_TIMESTEPS, shift)


_GRIDS: dict[tuple[SchedulerName, Conventions], Callable[[int, float], _Sigmas]] = {
    (SchedulerName.UNIPC, Conventions.ORIGINAL): _original_unipc,
    (SchedulerName.DPMPP, Conventions.ORIGINAL): _from_one,
    (SchedulerName.EULER, Conventions.ORIGINAL): _from_one,
    (SchedulerName.UNIPC, Conventions.DIFFUSERS): _diffusers_unipc,
    (SchedulerName.DPMPP, Conventions.DIFFUSERS): _diffusers_dpmpp,
    (SchedulerName.EULER, Conventions.DIFFUSERS): _diffusers_euler,
}
