"""Where the time of a forward goes on the `cuda` target: milliseconds of the device for each kind of step, by CUDA events."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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

    _marks: list[tuple[str, Any]] | None = None  # a step that begins, or "" where one ends, and its event

    def execute(self, step: Step, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> Mapping[str, DeviceArray]:
        self.device.calls.put(_Mark(self, _describe(step, inputs)))
        made = super().execute(step, inputs, outputs)
        self.device.calls.put(_Mark(self, ""))
        return made

    def step_times(self, forward: Callable[[], object]) -> list[StepTime]:
        """Run `forward` once; its steps, the longest first."""
        from cuda.bindings import driver

        self._marks = []
        try:
            forward()
            self.device.synchronize()
            totals: dict[str, list[float]] = defaultdict(list)
            for (name, begin), (_, end) in zip(self._marks[::2], self._marks[1::2], strict=True):
                totals[name].append(float(check("cuEventElapsedTime", driver.cuEventElapsedTime(begin, end))))
                for event in (begin, end):
                    driver.cuEventDestroy(event)
        finally:
            self._marks = None
        times = [StepTime(step=name, count=len(several), ms=sum(several)) for name, several in totals.items()]
        return sorted(times, key=lambda time: -time.ms)

    def mark(self, step: str) -> None:
        """Put an event on the stream, while `step_times` runs."""
        from cuda.bindings import driver

        if self._marks is not None:
            event = check("cuEventCreate", driver.cuEventCreate(0))
            check("cuEventRecord", driver.cuEventRecord(event, self.device.stream))
            self._marks.append((step, event))


class _Mark:
    """An event where a step begins or ends (`runtime.backends.cuda.calls.Call`): a prepared plan has it among its calls."""

    def __init__(self, backend: TimedBackend, step: str) -> None:
        self._backend, self._step = backend, step

    def queue(self, addresses: Sequence[int]) -> None:
        self._backend.mark(self._step)


def _describe(step: Step, inputs: Mapping[str, DeviceArray]) -> str:
    if step.kind is StepKind.LINEAR:
        fast = ", fast accumulation" if step.numbers.get("fast_accumulation") else ""
        return f"{step.kind} {list(inputs['weight'].shape)} {inputs['weight'].dtype}{fast}"
    if step.kind is StepKind.ATTENTION:
        return f"{step.kind} over {inputs['key'].shape[0]} keys, {inputs['key'].dtype}"
    shown = inputs.get("x") or next(iter(inputs.values()))
    return f"{step.kind} of {shown.shape[-1]} columns"
