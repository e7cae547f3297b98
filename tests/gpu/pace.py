"""How far the host is ahead of the GPU. A kernel that may start before the one in front has ended does so only while calls wait in line;
small networks compute faster than they are queued, so their calls never do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from runtime.backends.cuda.cublaslt import Product
from runtime.backends.cuda.cudnn import GraphCall
from runtime.backends.cuda.device import check
from runtime.backends.cuda.launch import Clearing, Launch
from runtime.backends.cuda.prepared import PreparedPlan

_BUSY_BYTES, _BUSY_TIMES = 1 << 27, 64  # some two milliseconds of an H200


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


def far_ahead(patch: pytest.MonkeyPatch) -> None:
    """From now on the GPU is kept busy until about all calls of a stage are in line."""
    from cuda.bindings import driver

    run = PreparedPlan.run

    def run_behind(plan: Any, *given: Any, **options: Any) -> Any:
        stream = plan._executor.device.stream
        busy = check("cuMemAllocAsync", driver.cuMemAllocAsync(_BUSY_BYTES, stream))
        for _ in range(_BUSY_TIMES):
            check("cuMemsetD8Async", driver.cuMemsetD8Async(busy, 0, _BUSY_BYTES, stream))
        check("cuMemFreeAsync", driver.cuMemFreeAsync(busy, stream))
        return run(plan, *given, **options)

    patch.setattr(PreparedPlan, "run", run_behind)
