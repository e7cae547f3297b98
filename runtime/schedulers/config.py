"""diffusers' scheduler_config.json, read strictly: what is understood becomes a `DiffusersScheduler`, the rest is refused.

diffusers keeps settings of other scheduler classes in the file when one was made from another's config, and does not look at
them; neither does this reader, for the settings of the three classes it knows. Names and defaults: diffusers 0.42.1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import BundleError, RequestError
from runtime.schedulers.schedule import NUM_TRAIN_TIMESTEPS, SchedulerName
from runtime.schedulers.solver import WAN_SETTINGS, SolverSettings, SolverType


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersScheduler:
    """A diffusers scheduler as this runtime reproduces it."""

    name: SchedulerName
    shift: float
    settings: SolverSettings = WAN_SETTINGS


def parse_scheduler_config(config: Mapping[str, object]) -> DiffusersScheduler:
    """Read the contents of a scheduler_config.json; keys that begin with `_` are diffusers' own notes, all but `_class_name`.

    Raises:
        RequestError: the class, or a setting it looks at, is none that this runtime implements; the message names it.
        BundleError: a key is unknown or a value has the wrong type.
    """
    class_name = config.get("_class_name")
    reader = _READERS.get(str(class_name))
    if reader is None:
        raise RequestError(f"scheduler {class_name!r} is not supported; known are {', '.join(_READERS)}", hint=_HINT)
    unknown = sorted(key for key in config if not key.startswith("_") and key not in _ALL_KEYS)
    if unknown:
        raise BundleError(f"scheduler_config.json of {class_name}: unknown settings {', '.join(unknown)}", hint=_HINT)
    for key, (default, possible) in reader.fixed.items():
        value = config.get(key, default)
        if not any(value is option or (type(value) is type(option) and value == option) for option in possible):
            raise RequestError(
                f"{class_name} with {key}={value!r} is not supported; possible is {' or '.join(map(repr, possible))}",
                hint=_HINT,
            )
    return DiffusersScheduler(
        name=reader.name,
        shift=_shift(config, reader.shift_key),
        settings=_settings(config, reader.name),
    )


_HINT = "save the pipeline with one of Wan's own schedulers, or edit scheduler/scheduler_config.json"
_OFF = (False, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """How one class is read: settings by name with diffusers' default and the values that are possible here."""

    name: SchedulerName
    shift_key: str
    fixed: Mapping[str, tuple[object, tuple[object, ...]]]


_COMMON = {
    "num_train_timesteps": (NUM_TRAIN_TIMESTEPS, (NUM_TRAIN_TIMESTEPS,)),
    "use_dynamic_shifting": (False, _OFF),
    "use_karras_sigmas": (False, _OFF),
    "use_exponential_sigmas": (False, _OFF),
    "use_beta_sigmas": (False, _OFF),
}
_MULTISTEP = {
    **_COMMON,
    "prediction_type": ("epsilon", ("flow_prediction",)),
    "use_flow_sigmas": (False, (True,)),
    "thresholding": (False, _OFF),
    "final_sigmas_type": ("zero", ("zero",)),
    "solver_order": (2, (2, 1)),
}
_READERS = {
    "UniPCMultistepScheduler": _Reader(
        name=SchedulerName.UNIPC,
        shift_key="flow_shift",
        fixed={
            **_MULTISTEP,
            "predict_x0": (True, (True,)),
            "solver_p": (None, (None,)),
            "shift_terminal": (None, (None,)),
            # The other choice of these two makes diffusers itself divide by zero at the last step, to sigma 0.
            "lower_order_final": (True, (True,)),
            "solver_type": ("bh2", ("bh2", "midpoint", "heun", "logrho")),  # diffusers reads all four as bh2
        },
    ),
    "DPMSolverMultistepScheduler": _Reader(
        name=SchedulerName.DPMPP,
        shift_key="flow_shift",
        # lower_order_final and euler_at_final change nothing: to sigma 0 the last step is of order 1 anyway.
        fixed={
            **_MULTISTEP,
            "algorithm_type": ("dpmsolver++", ("dpmsolver++", "deis")),  # diffusers reads deis as dpmsolver++
            "use_lu_lambdas": (False, _OFF),
            # diffusers reads the last three as midpoint.
            "solver_type": ("midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2")),
        },
    ),
    "FlowMatchEulerDiscreteScheduler": _Reader(
        name=SchedulerName.EULER,
        shift_key="shift",
        fixed={
            **_COMMON,
            "invert_sigmas": (False, _OFF),
            "shift_terminal": (None, (None,)),
            "stochastic_sampling": (False, _OFF),
        },
    ),
}
_WITHOUT_EFFECT = {
    # of the noise schedules that flow sigmas replace
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "timestep_spacing", "steps_offset"),
    *("lambda_min_clipped", "variance_type"),
    # of features that are refused when switched on, and of a last step that does not end at sigma 0
    *("dynamic_thresholding_ratio", "sample_max_value", "time_shift_type", "sigma_min", "sigma_max", "euler_at_final"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
}
_ALL_KEYS = frozenset(
    {"shift", "flow_shift", "disable_corrector"}
    | _WITHOUT_EFFECT
    | {key for reader in _READERS.values() for key in reader.fixed}
)


def _shift(config: Mapping[str, object], key: str) -> float:
    shift = config.get(key, 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not (math.isfinite(shift) and shift > 0):
        raise BundleError(f"scheduler_config.json: {key}={shift!r}: need a positive number")
    return float(shift)


def _settings(config: Mapping[str, object], name: SchedulerName) -> SolverSettings:
    if name is SchedulerName.EULER:
        return WAN_SETTINGS
    steps = config.get("disable_corrector", [])
    if not isinstance(steps, list | tuple) or not all(type(step) is int for step in steps):
        raise BundleError(f"scheduler_config.json: disable_corrector={steps!r}: need a list of steps")
    return SolverSettings(
        solver_order=1 if config.get("solver_order", 2) == 1 else 2,
        solver_type=SolverType.HEUN if config.get("solver_type") == "heun" else SolverType.MIDPOINT,
        disable_corrector=tuple(steps),
    )
