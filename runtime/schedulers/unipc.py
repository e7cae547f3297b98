"""UniPC of order 1 and 2, multistep, on the predicted clean sample: a corrector on arrival at a sigma, then a predictor.

Formulas: Zhao et al., "UniPC" (arXiv 2302.04867), with alpha = 1 - sigma for flow matching; orders and bookkeeping as in Wan's
`FlowUniPCMultistepScheduler` and diffusers' `UniPCMultistepScheduler`.
"""

import math
from dataclasses import dataclass

from runtime.schedulers.schedule import Schedule
from runtime.schedulers.solver import WAN_SETTINGS, Latents, Scalar, SolverSettings, in_order, log_snr


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a step leaves to the next one."""

    latents: Latents
    """Where the predictor set out, after correction."""
    x0: Latents
    """Clean sample predicted there, before correction."""
    older_x0: Latents | None
    order: int


class UniPC:
    """UniPC-2; the first and the last step are of order 1."""

    def __init__(self, schedule: Schedule, settings: SolverSettings = WAN_SETTINGS) -> None:
        self._sigmas = [Scalar(sigma) for sigma in schedule.sigmas]
        self._log_snr = [log_snr(sigma) for sigma in self._sigmas]
        self._settings = settings
        self._steps_done = 0
        self._memory: _Memory | None = None

    def step(self, noise_pred: Latents, step_index: int, latents: Latents) -> Latents:
        in_order(step_index, expected=self._steps_done)
        if step_index == 0:
            self._memory = None
        previous = self._memory
        x0 = latents - self._sigmas[step_index] * noise_pred
        if previous is not None and step_index - 1 not in self._settings.disable_corrector:
            latents = self._correct(previous, x0, step_index)
        order = min(self._settings.solver_order, len(self._sigmas) - 1 - step_index, step_index + 1)
        self._memory = _Memory(latents, x0, previous.x0 if previous else None, order)
        self._steps_done = step_index + 1
        return self._predict(self._memory, step_index)

    def _predict(self, here: _Memory, step_index: int) -> Latents:
        """From `sigmas[step_index]` to the next."""
        result, gain = self._advance(here, step_index)
        if here.order == 2:
            result -= gain * (Scalar(0.5) * self._slope(here, step_index))
        return result

    def _correct(self, start: _Memory, x0: Latents, step_index: int) -> Latents:
        """The predictor's step to `sigmas[step_index]` again, now that the clean sample there is known."""
        result, gain = self._advance(start, step_index - 1)
        older_weight, newer_weight = self._corrector_weights(start.order, step_index - 1)
        change = newer_weight * (x0 - start.x0)
        if start.order == 2:
            change += older_weight * self._slope(start, step_index - 1)
        result -= gain * change
        return result

    def _advance(self, start: _Memory, step_index: int) -> tuple[Latents, Scalar]:
        """First-order step from `sigmas[step_index]` to the next, and the gain α·B(h) of all x0 terms, B of the kind bh2."""
        sigma, next_sigma = self._sigmas[step_index : step_index + 2]
        gain = (1 - next_sigma) * _expm1(-self._step_length(step_index))
        return (next_sigma / sigma) * start.latents - gain * start.x0, gain

    def _slope(self, start: _Memory, step_index: int) -> Latents:
        assert start.older_x0 is not None
        return (start.older_x0 - start.x0) / self._ratio(step_index)

    def _corrector_weights(self, order: int, step_index: int) -> tuple[Scalar, Scalar]:
        """Weights ρ of the older and the newer difference: ρ₁ + ρ₂ = b₁ and r·ρ₁ + ρ₂ = b₂."""
        if order == 1:
            return Scalar(0), Scalar(0.5)
        h, r = self._step_length(step_index), self._ratio(step_index)
        phi_1 = _expm1(-h)
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - Scalar(0.5)
        b_1, b_2 = phi_2 / phi_1, phi_3 * 2 / phi_1
        newer_weight = (b_2 - r * b_1) / (1 - r)
        return b_1 - newer_weight, newer_weight

    def _step_length(self, step_index: int) -> Scalar:
        """h > 0, the step in log-SNR; infinite to sigma 0."""
        return self._log_snr[step_index + 1] - self._log_snr[step_index]

    def _ratio(self, step_index: int) -> Scalar:
        """r < 0, the step before this one in units of this one."""
        return (self._log_snr[step_index - 1] - self._log_snr[step_index]) / self._step_length(step_index)


def _expm1(x: Scalar) -> Scalar:
    return Scalar(math.expm1(x))
