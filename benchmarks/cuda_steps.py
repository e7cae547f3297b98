"""Where the time of a forward goes on the `cuda` target: milliseconds of the device for each kind of step, by CUDA events."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.backends.cuda.device import DeviceArray, check
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.plan import Step, StepKind


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """All steps of one kind and shape in one forward."""

    step: str
    count: int
    ms: float  # of all of them


class TimedBackend(CudaBackend):
    """A backend that can put events around its steps; without `step_times` it is as fast as any."""

    _marks: list[tuple[str, Any, Any]] | None = None

    def execute(self, step: Step, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> Mapping[str, DeviceArray]:
        if self._marks is None:
            return super().execute(step, inputs, outputs)
        begin = self._mark()
        made = super().execute(step, inputs, outputs)
        self._marks.append((_describe(step, inputs), begin, self._mark()))
        return made

    def step_times(self, forward: Callable[[], object]) -> list[StepTime]:
        """Run `forward` once; its steps, the longest first."""
        from cuda.bindings import driver

        self._marks = []
        try:
            forward()
            self.device.synchronize()
            totals: dict[str, list[float]] = defaultdict(list)
            for name, begin, end in self._marks:
                totals[name].append(float(check("cuEventElapsedTime", driver.cuEventElapsedTime(begin, end))))
                for event in (begin, end):
                    driver.cuEventDestroy(event)
        finally:
            self._marks = None
        times = [StepTime(step=name, count=len(several), ms=sum(several)) for name, several in totals.items()]
        return sorted(times, key=lambda time: -time.ms)

    def _mark(self) -> Any:
        from cuda.bindings import driver

        event = check("cuEventCreate", driver.cuEventCreate(0))
        check("cuEventRecord", driver.cuEventRecord(event, self.device.stream))
        return event


def _describe(step: Step, inputs: Mapping[str, DeviceArray]) -> str:
    if step.kind is StepKind.LINEAR:
        fast = ", fast accumulation" if step.numbers.get("fast_accumulation") else ""
        return f"{step.kind} {list(inputs['weight'].shape)} {inputs['weight'].dtype}{fast}"
    if step.kind is StepKind.ATTENTION:
        return f"{step.kind} over {inputs['key'].shape[0]} keys, {inputs['key'].dtype}"
    shown = inputs.get("x") or next(iter(inputs.values()))
    return f"{step.kind} of {shown.shape[-1]} columns"
