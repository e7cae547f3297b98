"""Flow-matching schedulers: sigmas (`schedule`), steps (`unipc`, `dpmpp`, `euler`), diffusers' names for them (`config`)."""

from runtime.schedulers.config import DiffusersScheduler, parse_scheduler_config
from runtime.schedulers.dpmpp import Dpmpp
from runtime.schedulers.euler import Euler
from runtime.schedulers.schedule import Conventions, Schedule, SchedulerName, make_schedule
from runtime.schedulers.solver import Solver, SolverSettings, SolverType
from runtime.schedulers.unipc import UniPC

SOLVERS: dict[SchedulerName, type[Solver]] = {
    SchedulerName.UNIPC: UniPC,
    SchedulerName.DPMPP: Dpmpp,
    SchedulerName.EULER: Euler,
}

__all__ = [
    "SOLVERS",
    "Conventions",
    "DiffusersScheduler",
    "Schedule",
    "SchedulerName",
    "Solver",
    "SolverSettings",
    "SolverType",
    "make_schedule",
    "parse_scheduler_config",
]
