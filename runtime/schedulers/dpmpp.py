"""DPM-Solver++ of order 1 and 2, multistep, on the predicted clean sample.

Formulas: Lu et al., "DPM-Solver++" (arXiv 2211.01095), with alpha = 1 - sigma for flow matching; orders of the first and last
step as in Wan's `FlowDPMSolverMultistepScheduler` and diffusers' `DPMSolverMultistepScheduler`.
"""

import math

from runtime.schedulers.schedule import Schedule
from runtime.schedulers.solver import WAN_SETTINGS, Latents, Scalar, SolverSettings, SolverType, in_order, log_snr


class Dpmpp:
    """DPM-Solver++(2M); the first and the last step are of order 1."""

    def __init__(self, schedule: Schedule, settings: SolverSettings = WAN_SETTINGS) -> None:
        self._sigmas = [Scalar(sigma) for sigma in schedule.sigmas]
        self._log_snr = [log_snr(sigma) for sigma in self._sigmas]
        self._settings = settings
        self._steps_done = 0
        self._previous_x0: Latents | None = None

    def step(self, noise_pred: Latents, step_index: int, latents: Latents) -> Latents:
        in_order(step_index, expected=self._steps_done)
        sigma, next_sigma = self._sigmas[step_index : step_index + 2]
        x0: Latents = latents - sigma * noise_pred
        gain = (1 - next_sigma) * self._decay(step_index)
        result = (next_sigma / sigma) * latents - gain * x0
        if self._settings.solver_order == 2 and 0 < step_index < len(self._sigmas) - 2:
            result += self._curvature(x0, step_index)
        self._previous_x0 = x0
        self._steps_done = step_index + 1
        return result

    def _curvature(self, x0: Latents, step_index: int) -> Latents:
        """Second-order term, from the difference between this step's clean sample and the last one's."""
        assert self._previous_x0 is not None
        h, previous_h = self._step_length(step_index), self._step_length(step_index - 1)
        alpha, decay = 1 - self._sigmas[step_index + 1], self._decay(step_index)
        slope = (1 / (previous_h / h)) * (x0 - self._previous_x0)  # 0 after the infinitely long step from pure noise
        if self._settings.solver_type is SolverType.HEUN:
            return (alpha * (decay / h + 1)) * slope
        return Scalar(-0.5) * (alpha * decay) * slope

    def _step_length(self, step_index: int) -> Scalar:
        """h > 0, the step in log-SNR; infinite from pure noise and to sigma 0."""
        return self._log_snr[step_index + 1] - self._log_snr[step_index]

    def _decay(self, step_index: int) -> Scalar:
        return Scalar(math.exp(-self._step_length(step_index))) - 1
