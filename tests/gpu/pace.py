"""How far the host is ahead of the GPU. A kernel that may start before the one in front has ended does so only while calls wait in line;
small networks compute faster than they are queued, so their calls never do.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from runtime.backends.cuda.cublaslt import Product
from runtime.backends.cuda.cudnn import GraphCall
from runtime.backends.cuda.device import check
from runtime.backends.cuda.launch import Clearing, Launch
from runtime.backends.cuda.prepared import PreparedPlan

_BUSY_BYTES, _BUSY_TIMES = 1 << 27, 128  # some four milliseconds of an H200
_NOT_READY = 600  # CUDA_ERROR_NOT_READY


def one_by_one(patch: pytest.MonkeyPatch) -> None:
    """From now on the GPU has done each call before the next is queued."""
    from cuda.bindings import driver

    def waiting(queue: Callable[[Any, Sequence[int]], None]) -> Callable[[Any, Sequence[int]], None]:
        def queue_and_wait(call: Any, addresses: Sequence[int]) -> None:
            queue(call, addresses)
            check("cuCtxSynchronize", driver.cuCtxSynchronize())

        return queue_and_wait

    for kind in (Launch, Clearing, GraphCall, Product):
        patch.setattr(kind, "queue", waiting(kind.queue))


def far_ahead(patch: pytest.MonkeyPatch) -> Counter[bool]:
    """From now on the GPU is kept busy until about all calls of a stage are in line. Counts the stages, by whether they were."""
    from cuda.bindings import driver

    run, in_line = PreparedPlan.run, Counter[bool]()

    def run_behind(plan: Any, *given: Any, **options: Any) -> Any:
        stream = plan._executor.device.stream
        busy = check("cuMemAllocAsync", driver.cuMemAllocAsync(_BUSY_BYTES, stream))
        for _ in range(_BUSY_TIMES):
            check("cuMemsetD8Async", driver.cuMemsetD8Async(busy, 0, _BUSY_BYTES, stream))
        end = check("cuEventCreate", driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        check("cuEventRecord", driver.cuEventRecord(end, stream))
        try:
            return run(plan, *given, **options)
        finally:
            in_line[int(driver.cuEventQuery(end)[0]) == _NOT_READY] += 1
            check("cuEventDestroy", driver.cuEventDestroy(end))
            check("cuMemFreeAsync", driver.cuMemFreeAsync(busy, stream))

    patch.setattr(PreparedPlan, "run", run_behind)
    return in_line
