"""One GPU for as long as a pipeline is open, whichever target runs on it: its libraries, and what stays on it from network to network.

Weights of earlier components stay while nobody needs their room, so a second generation does not load again what still lies there.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from runtime.backends.base import Backend, MemoryUse
from runtime.backends.cuda.copies import CopyStream, free_host_bytes
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.loading import Loader, TensorBytes
from runtime.backends.cuda.streaming import Store, StreamedWeights
from runtime.errors import DeviceMemoryError
from runtime.memory import LIBRARY_BYTES, ComponentPlan, Layout, MemoryPlan, Need, gib, plan_memory
from runtime.residency import Ledger, Residency, Unit, weight_units
from runtime.specs import Precision, StageSpec
from runtime.weights import WeightFile

log = logging.getLogger(__name__)

MARGIN_BYTES = 1 << 30
"""Left to others when no budget is given: to the driver, which loads kernels when they are first used, and to the desktop."""
_NO_LAYOUT = Layout(nbytes=0, large_bytes=None)


class DeviceBackend(Backend, Protocol):
    """A backend whose arrays lie on a `Device`, on whose one stream everything is queued."""

    device: Device
    attention: Precision

    def close(self) -> None:
        """Release the device and everything on it."""
        ...


class CudaSession:
    """One GPU shared by all networks and generations of a pipeline. Use with `close`.

    Args:
        backend, copies: the device's; closed with the session.
        vram: bytes that weights, activations and libraries may take together; None: what is free, less a margin.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        copies: CopyStream,
        *,
        vram: int | None = None,
        available_host_bytes: Callable[[], int] = free_host_bytes,
    ) -> None:
        self._backend, self._copies = backend, copies
        self._device = backend.device
        self.vram = vram
        """See above; may be changed between generations."""
        self._available_host_bytes = available_host_bytes
        self._stores: dict[str, Store] = {}
        self._ledger = Ledger()
        self._plan: MemoryPlan | None = None
        self._driver_bytes = 0
        self._staged: set[str] = set()
        self._loader = Loader(self._copies)

    @contextmanager
    def backend(self, network: str) -> Iterator[DeviceBackend]:
        """The one backend of all networks."""
        yield self._backend

    def prepare(self, needs: Sequence[Need], *, attention: Precision) -> MemoryPlan:
        """Fit the next generation into the budget; what was planned before is forgotten.

        Raises:
            DeviceMemoryError: it cannot fit, or others hold the memory.
        """
        self._copies.use_here()  # generations may come from another thread than the one that opened the session
        device = self._device
        device.trim()
        free, total = device.memory()
        available = free + device.reserved_bytes
        budget = max(0, available - MARGIN_BYTES) if self.vram is None else self.vram
        if budget > available:
            raise DeviceMemoryError(
                f"{device.name}: a budget of {gib(budget)}, but only {gib(available)} of {gib(total)} are free for this process",
                hint="give a smaller --vram, or end what else uses this GPU",
            )
        fixed = max(LIBRARY_BYTES, device.reserved_bytes - self._ledger.total_bytes)
        self._plan = plan_memory(needs, budget_bytes=budget, fixed_bytes=fixed, held=self._ledger)
        for component, unit in self._ledger.shrink(room=budget - fixed, order=self._plan.order):
            self._stores[component].evict(unit)
        device.limit_bytes = budget
        device.peak_bytes = device.reserved_bytes
        self._driver_bytes = total - free
        self._staged.clear()
        self._backend.attention = attention
        for planned in self._plan.components:
            log.info("%s", planned)
        return self._plan

    @contextmanager
    def weights(
        self, component: str, file: Path | TensorBytes, stages: Sequence[StageSpec], *, num_blocks: int
    ) -> Iterator[StreamedWeights]:
        """A component's weights, within its share of the plan; all of them resident where nothing was planned.

        Args:
            file: the component's file, or what stands for it.

        Raises:
            BundleError: a declared weight is missing or misshapen.
            DeviceMemoryError: somebody else took the memory meanwhile.
        """
        store = self._stores.get(component)
        if store is None:
            source = WeightFile(file, stages, num_blocks=num_blocks) if isinstance(file, Path) else file
            store = self._stores[component] = Store(weight_units(stages, num_blocks=num_blocks), source)
        planned = (
            next((plan for plan in self._plan.components if plan.need.component == component), None) if self._plan else None
        )
        residency = planned.residency if planned else _everything(store.units)
        try:
            self._make_room(component, store, residency, planned)
            opened = StreamedWeights(store, residency, stages, device=self._device, copies=self._copies, loader=self._loader)
        except BaseException:
            self._drop(component)
            raise
        try:
            yield opened
            free, total = self._device.memory()
            self._driver_bytes = max(self._driver_bytes, total - free)
        finally:
            opened.close()

    def memory_use(self) -> MemoryUse | None:
        """What the generation since `prepare` was predicted to take, and took."""
        if self._plan is None:
            return None
        return MemoryUse(
            device=self._device.name,
            budget_bytes=self._plan.budget_bytes,
            predicted_peak_bytes=self._plan.peak_bytes,
            peak_bytes=self._device.peak_bytes,
            driver_bytes=self._driver_bytes,
            components=tuple(str(component) for component in self._plan.components),
            staged=tuple(sorted(self._staged)),
        )

    def close(self) -> None:
        """End the thread and release the device with everything on it."""
        self._loader.close()
        try:
            self._copies.close()
        finally:
            self._backend.close()

    def _make_room(self, component: str, store: Store, residency: Residency, planned: ComponentPlan | None) -> None:
        """Give up what has to go, then take the memory of this component: its arrays', then its resident units'."""
        room = None
        order: Sequence[str] = (component,)
        if planned is not None and self._plan is not None:
            room = self._plan.budget_bytes - self._plan.fixed_bytes - planned.need.work_bytes
            order = self._plan.order
        for name, unit in self._ledger.open(component, store.units, residency, room=room, order=order):
            self._stores[name].evict(unit)
        self._device.reserve(planned.need.layout if planned else _NO_LAYOUT)
        for unit in sorted(residency.resident - store.slabs.keys()):
            store.slabs[unit] = self._device.slab(store.units[unit].nbytes)
        self._pin(component, store, residency)

    def _pin(self, component: str, store: Store, residency: Residency) -> None:
        streamed = [unit for unit in range(len(store.units)) if unit not in residency.resident]
        store.pin(streamed, self._copies, available_bytes=self._available_host_bytes())
        if any(unit not in store.pinned for unit in streamed):
            self._loader.settle()
            for name, other in self._stores.items():
                if name != component:
                    other.unpin(self._copies)
            store.pin(streamed, self._copies, available_bytes=self._available_host_bytes())
        if any(unit not in store.pinned for unit in streamed):
            self._staged.add(component)
        self._loader.fill_ahead(
            [(store.units[unit], store.source, store.pinned[unit]) for unit in streamed if unit in store.pinned]
        )

    def _drop(self, component: str) -> None:
        """Forget a component that could not be opened whole."""
        store = self._stores[component]
        self._loader.settle()
        for unit in list(store.slabs):
            store.evict(unit)
        self._ledger.held.pop(component, None)


def _everything(units: Sequence[Unit]) -> Residency:
    return Residency(resident=frozenset(range(len(units))), resident_bytes=sum(unit.device_bytes for unit in units), slots=())
