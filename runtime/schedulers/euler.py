"""Euler's method on the flow: one straight stretch per step."""

from runtime.schedulers.schedule import Schedule
from runtime.schedulers.solver import WAN_SETTINGS, Latents, Scalar, SolverSettings


class Euler:
    """x' = x + v·(σ_next − σ). Holds no state between steps."""

    def __init__(self, schedule: Schedule, settings: SolverSettings = WAN_SETTINGS) -> None:
        self._sigmas = [Scalar(sigma) for sigma in schedule.sigmas]

    def step(self, noise_pred: Latents, step_index: int, latents: Latents) -> Latents:
        sigma, next_sigma = self._sigmas[step_index : step_index + 2]
        return latents + (next_sigma - sigma) * noise_pred
