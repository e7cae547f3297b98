"""Device memory as a budget: what a generation needs, component by component, and the peak that follows, before anything is allocated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from runtime.errors import DeviceMemoryError, RequestError
from runtime.residency import Ledger, Residency, Unit, choose_residency, least_bytes

LIBRARY_BYTES = 192 << 20
"""Room for what the libraries of a target work in: 64 MiB are cuBLASLt's, cuDNN asks for its own once it runs."""
SMALL_BYTES = 16 << 20
"""The least room for arrays below a MiB: at most 11.3 MiB at once in a rehearsal of VAE 2.1 with frames or tiles of 192 pixels, 4.2 MiB in
one of the text encoder, 1.4 MiB in one of the 14B's transformer. Narrow models have their text keys and values among them, and need more."""
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One piece of memory that holds all large arrays of some work, and from which size on they go to its upper end."""

    nbytes: int
    large_bytes: int | None
    small_bytes: int = 0
    """What its small arrays take, which lie elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one component of a generation needs: its weights, and room for what the work on them allocates."""

    network: str
    component: str
    units: tuple[Unit, ...]
    layout: Layout
    num_strips: int = 1
    """In how many strips of a frame the work is done; see `runtime.strips`."""
    most_strips: int = 1
    in_strips: Callable[[int], Layout] | None = None
    """The layout of the same work in so many strips; asked only where memory is short."""

    @property
    def work_bytes(self) -> int:
        return self.layout.nbytes + max(SMALL_BYTES, self.layout.small_bytes)

    @property
    def weight_bytes(self) -> int:
        return sum(unit.device_bytes for unit in self.units)

    @property
    def least_bytes(self) -> int:
        return self.work_bytes + least_bytes(self.units)

    def within(self, room: int) -> "Need":
        """The same in the least number of strips that needs no more than `room` bytes; in the most, where none does."""
        if self.least_bytes <= room or self.in_strips is None:
            return self
        most = self._cut(self.most_strips)
        if most.least_bytes > room:
            return min(self, most, key=lambda need: need.least_bytes)
        fewer = map(self._cut, range(2, self.most_strips))
        return next((need for need in fewer if need.least_bytes <= room), most)

    def _cut(self, num_strips: int) -> "Need":
        assert self.in_strips is not None
        return self if num_strips == 1 else replace(self, layout=self.in_strips(num_strips), num_strips=num_strips)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentPlan:
    """How one component runs within the budget."""

    need: Need
    residency: Residency
    peak_bytes: int  # while it runs, with what earlier components left behind

    def __str__(self) -> str:
        units, resident = self.need.units, self.residency.resident
        blocks = [i for i, unit in enumerate(units) if unit.block is not None and not unit.per_prompt]
        kept = f", {len(resident.intersection(blocks))} of {len(blocks)} blocks resident" if blocks else ""
        strips = f", in {self.need.num_strips} strips" if self.need.num_strips > 1 else ""
        return f"{self.need.component}: {gib(self.peak_bytes)}{kept}{strips}, {gib(self.need.work_bytes)} to work in"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """A generation within its budget, component by component in the order of their use."""

    budget_bytes: int
    fixed_bytes: int  # libraries' workspaces
    components: tuple[ComponentPlan, ...]

    @property
    def peak_bytes(self) -> int:
        """The most device memory in use at any time, the driver's own context not counted."""
        return max(component.peak_bytes for component in self.components)

    def __str__(self) -> str:
        return f"{gib(self.peak_bytes)} predicted within {gib(self.budget_bytes)}; " + "; ".join(map(str, self.components))

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(component.need.component for component in self.components)

    def find(self, component: str) -> ComponentPlan:
        return next(plan for plan in self.components if plan.need.component == component)

    def num_strips(self, component: str) -> int:
        """In how many strips of a frame a component works."""
        return self.find(component).need.num_strips


def plan_memory(needs: Sequence[Need], *, budget_bytes: int, fixed_bytes: int, held: Ledger | None = None) -> MemoryPlan:
    """Fit a generation into a budget.

    Args:
        needs: in the order of use.
        fixed_bytes: taken as long as the device is open.
        held: what lies on the device already.

    Raises:
        DeviceMemoryError: something cannot fit even with its blocks streamed; names what is possible.
    """
    needs = [need.within(budget_bytes - fixed_bytes) for need in needs]
    least = max(needs, key=lambda need: need.least_bytes)
    if fixed_bytes + least.least_bytes > budget_bytes:
        work = f"{gib(least.work_bytes)} to work in and {gib(least.least_bytes - least.work_bytes)} of weights"
        raise DeviceMemoryError(
            f"{least.component} needs {gib(fixed_bytes + least.least_bytes)} of device memory, {work}; {gib(budget_bytes)} may be used",
            hint=f"lower --size or --frames{', decode with --tile' if least.network == 'vae' else ''}, or give a larger --vram",
        )
    ledger = held.copy() if held is not None else Ledger()
    order = [need.component for need in needs]
    ledger.shrink(room=budget_bytes - fixed_bytes, order=order)
    plans = []
    for need in needs:
        room = budget_bytes - fixed_bytes - need.work_bytes
        residency = choose_residency(need.units, room)
        ledger.open(need.component, need.units, residency, room=room, order=order)
        peak = fixed_bytes + need.work_bytes + ledger.total_bytes + residency.slot_bytes
        plans.append(ComponentPlan(need=need, residency=residency, peak_bytes=peak))
    return MemoryPlan(budget_bytes=budget_bytes, fixed_bytes=fixed_bytes, components=tuple(plans))


def parse_bytes(text: str) -> int:
    """`--vram`: a number with a unit.

    Raises:
        RequestError: it is not.
    """
    number = text.rstrip("KMGiB")
    unit = text[len(number) :]
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if unit not in _UNITS or not 0 < value < 2**20:
        raise RequestError(
            f"{text!r} is no size of memory", hint=f"a number and a unit, as in 12GiB; units: {', '.join(_UNITS)}"
        )
    return int(value * _UNITS[unit])


def scratch_text(stages: Mapping[str, int]) -> str:
    """Scratch memory of a target's stages at their largest size, for people: what they share, and who asks for most."""
    most_first = sorted(stages.items(), key=lambda stage: -stage[1])
    named = ", ".join(f"{name} {gib(nbytes)}" for name, nbytes in most_first[:3])
    return f"{gib(max(stages.values(), default=0))}, which all stages share; most: {named}"


def gib(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"
