"""scheduler_config.json is read as diffusers reads it, and what is not implemented is refused by name."""

import json
from collections.abc import Callable
from typing import Any

import diffusers
import pytest

from runtime.errors import BundleError, RequestError
from runtime.schedulers import SchedulerName, SolverSettings, SolverType, parse_scheduler_config

UNIPC, DPMPP, EULER = SchedulerName.UNIPC, SchedulerName.DPMPP, SchedulerName.EULER
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def saved_config(scheduler: Any) -> dict[str, object]:
    """What the scheduler's own scheduler_config.json says."""
    config = json.loads(scheduler.to_json_string())
    assert isinstance(config, dict)
    return config


def test_a_saved_config_of_another_class_is_read_as_diffusers_reads_it() -> None:
    unipc: Any = diffusers.UniPCMultistepScheduler
    dpmpp: Any = diffusers.DPMSolverMultistepScheduler
    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    saved = saved_config(unipc(**FLOW, flow_shift=7.0, solver_type="bh2"))
    saved = saved_config(dpmpp.from_config(saved))
    read = parse_scheduler_config(saved)
    assert (read.name, read.shift) == (DPMPP, 7.0)
    assert read.settings == SolverSettings(solver_type=SolverType.MIDPOINT)
    saved = saved_config(euler.from_config(saved, shift=4.0))
    assert saved["flow_shift"] == 7.0
    assert (parse_scheduler_config(saved).name, parse_scheduler_config(saved).shift) == (EULER, 4.0)


def _unipc(**settings: object) -> dict[str, object]:
    return {"_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.42.1", **FLOW, **settings}


def _dpmpp(**settings: object) -> dict[str, object]:
    return {**_unipc(**settings), "_class_name": "DPMSolverMultistepScheduler"}


def _euler(**settings: object) -> dict[str, object]:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", **settings}


@pytest.mark.parametrize("make", [_unipc, _dpmpp, _euler])
def test_the_smallest_config_takes_diffusers_defaults(make: Callable[..., dict[str, object]]) -> None:
    assert parse_scheduler_config(make()).shift == 1.0
    assert parse_scheduler_config(make()).settings == SolverSettings()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (_unipc(use_karras_sigmas=True), "use_karras_sigmas=True"),
        (_unipc(use_exponential_sigmas=True), "use_exponential_sigmas"),
        (_unipc(use_beta_sigmas=True), "use_beta_sigmas"),
        (_unipc(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (_unipc(shift_terminal=0.1), "shift_terminal"),
        (_unipc(use_flow_sigmas=False), "use_flow_sigmas=False"),
        (_unipc(prediction_type="v_prediction"), "prediction_type='v_prediction'"),
        (_unipc(predict_x0=False), "predict_x0"),
        (_unipc(thresholding=True), "thresholding"),
        (_unipc(solver_order=3), "solver_order=3"),
        (_unipc(solver_order=True), "solver_order=True"),
        (_unipc(solver_type="bh1"), "solver_type='bh1'"),
        (_unipc(lower_order_final=False), "lower_order_final"),
        (_unipc(final_sigmas_type="sigma_min"), "final_sigmas_type"),
        (_unipc(num_train_timesteps=500), "num_train_timesteps=500"),
        (_dpmpp(algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-dpmsolver"),
        (_dpmpp(use_lu_lambdas=True), "use_lu_lambdas"),
        (_dpmpp(solver_order=3), "solver_order=3"),
        (_euler(invert_sigmas=True), "invert_sigmas"),
        (_euler(stochastic_sampling=True), "stochastic_sampling"),
        (_euler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        ({"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is not supported"),
        ({}, "None is not supported"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(config: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_scheduler_config(config)
    assert named in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (_unipc(colour="blue"), "colour"),
        (_unipc(flow_shift="5"), "flow_shift='5'"),
        (_unipc(flow_shift=True), "flow_shift=True"),
        (_euler(shift=-1.0), "shift=-1.0"),
        (_unipc(disable_corrector=3), "disable_corrector=3"),
        (_unipc(disable_corrector=["0"]), "disable_corrector"),
    ],
    ids=str,
)
def test_a_damaged_config_is_refused(config: dict[str, object], named: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_scheduler_config(config)
    assert named in caught.value.message
