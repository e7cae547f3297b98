"""Plans are prepared once for their arrays' sizes and run at whatever addresses these have: without a GPU, by what would be queued."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from runtime.backends.cuda import launch
from runtime.backends.cuda.arena import Pools
from runtime.backends.cuda.array import Buffer, DeviceArray, Unit, contiguous
from runtime.backends.cuda.calls import Calls, slot_address, symbol
from runtime.backends.cuda.cublaslt import Problem, Product, ProductPlan
from runtime.backends.cuda.cudnn import GraphCall
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.kernels import Kernels
from runtime.backends.cuda.libraries import Libraries
from runtime.backends.cuda.plan import PLAN_VERSION, Plan, Step, StepKind, View
from runtime.backends.cuda.plan import Buffer as PlanBuffer
from runtime.backends.cuda.prepared import CudaEngine, PreparedPlan
from runtime.backends.cuda.recent import recall
from runtime.errors import EngineError
from runtime.specs import DType, StageSpec, TensorSpec

BF16 = DType.BF16


class CountedDevice:
    """A device whose memory is addresses only."""

    arch, name, stream = "sm_90", "counted", 7

    def __init__(self) -> None:
        self._next = 1 << 30
        self.pools = Pools(self._take)
        self.calls = Calls()

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        return self.pools.empty(shape, dtype)

    def allocate(self, nbytes: int) -> Buffer:
        return self.pools.allocate(nbytes)

    def close(self) -> None: ...

    def _take(self, nbytes: int) -> int:
        self._next += nbytes
        return self._next - nbytes


class NotingDriver:
    """Takes kernels, all of them gated residuals: the name and the bytes of the arguments of each."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, bytes]] = []

    def cuModuleLoadData(self, cubin: bytes) -> tuple[int, int]:
        return 0, 1

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, str]:
        return 0, name.decode()

    def cuLaunchKernel(self, function: str, *arguments: Any) -> tuple[int]:
        (address,) = ctypes.cast(arguments[8], ctypes.POINTER(ctypes.c_void_p))[:1]
        self.launched.append((function, ctypes.string_at(address, ctypes.sizeof(launch.GATED_RESIDUAL))))
        return (0,)


class SmallBackend(CudaBackend):
    """The real backend with the transformer's kernels alone, on a counted device."""

    def _open_device(self) -> Device:
        self.counted = CountedDevice()
        return cast(Device, self.counted)

    def _open_libraries(self, kernels: Mapping[str, bytes]) -> Libraries:
        self.frames_attended: list[tuple[int, int]] = []
        libraries: dict[str, Any] = {
            name: _Nothing() for name in ("text", "clip", "linear", "attention_kernels", "self_attention", "vae")
        }
        libraries["vae"].frame_attention = lambda qkv, out: self.frames_attended.append((qkv.pointer, out.pointer))
        return cast(
            Libraries, SimpleNamespace(**libraries, kernels=Kernels(self.device, b""), check_attention=id, close=lambda: None)
        )


class _Nothing:
    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> NotingDriver:
    noting = NotingDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=noting))
    return noting


@pytest.fixture
def backend(driver: NotingDriver) -> Iterator[SmallBackend]:
    with SmallBackend({}) as opened:
        yield opened


STAGE = StageSpec(
    name="toy.stage",
    inputs=(TensorSpec("x", ("tokens", 64), BF16),),
    weights=(TensorSpec("w", (4, 64), BF16),),
    outputs=(TensorSpec("y", ("tokens", 32), BF16),),
)


def buffer(name: str, *shape: int | str, row_multiple: int = 1) -> PlanBuffer:
    return PlanBuffer(name=name, shape=shape, dtype=BF16, row_multiple=row_multiple)


def residual(a: str, b: str, out: str) -> Step:
    return Step(kind=StepKind.RESIDUAL, inputs={"residual": a, "x": b}, outputs={"out": out}, numbers={})


def plan(*steps: Step, buffers: tuple[PlanBuffer, ...], views: tuple[View, ...] = (), y: str = "y") -> Plan:
    return Plan(version=PLAN_VERSION, stage="toy.stage", buffers=buffers, views=views, steps=steps, outputs={"y": y})


HALVES = plan(
    residual("x", "x", "sum"),
    residual("left", "right", "y"),
    buffers=(buffer("sum", "tokens", 64), buffer("y", "tokens", 32)),
    views=(
        View(name="left", source="sum", axis=1, start=0, stop=32),
        View(name="right", source="sum", axis=1, start=32, stop=64),
    ),
)


def tensors(backend: SmallBackend, tokens: int, *, shift: int = 0) -> dict[str, DeviceArray]:
    """Inputs in memory of their own, `shift` columns into it."""
    wide = backend.device.empty((tokens, 64 + shift), BF16)
    return {"x": wide.columns(shift, 64 + shift), "w": backend.device.empty((4, 64), BF16)}


def executed(backend: SmallBackend, given: Mapping[str, DeviceArray], total: DeviceArray, y: DeviceArray) -> None:
    """The steps of HALVES, one by one, on these very arrays."""
    first, second = HALVES.steps
    backend.execute(first, {"residual": given["x"], "x": given["x"]}, {"out": total})
    backend.execute(second, {"residual": total.columns(0, 32), "x": total.columns(32, 64)}, {"out": y})


def test_a_prepared_plan_launches_what_its_steps_launch_on_each_runs_arrays(
    backend: SmallBackend, driver: NotingDriver
) -> None:
    engine = CudaEngine(HALVES, STAGE, backend)
    kept = [engine.run(tensors(backend, 5))["y"]]  # prepared here
    for _ in range(2):
        given = tensors(backend, 5)
        driver.launched.clear()
        kept.append(engine.run(given)["y"])
        queued = list(driver.launched)
        total_pointer = launch.GATED_RESIDUAL.from_buffer_copy(queued[0][1]).out.data
        driver.launched.clear()
        executed(backend, given, contiguous(total_pointer, (5, 64), BF16, None), kept[-1])
        assert queued == driver.launched
    assert len({array.pointer for array in kept}) == 3


def test_rows_that_begin_elsewhere_are_prepared_anew(backend: SmallBackend, driver: NotingDriver) -> None:
    engine = CudaEngine(HALVES, STAGE, backend)
    for shift, suffix in ((0, "_ragged"), (3, "_unaligned"), (8, "_ragged")):
        driver.launched.clear()
        engine.run(tensors(backend, 5, shift=shift))
        assert driver.launched[0][0] == f"gated_residual{suffix}"


def test_other_sizes_get_arrays_of_their_own_size(backend: SmallBackend) -> None:
    engine = CudaEngine(HALVES, STAGE, backend)
    assert [engine.run(tensors(backend, tokens))["y"].shape for tokens in (5, 9, 5)] == [(5, 32), (9, 32), (5, 32)]


def test_memory_is_held_by_what_still_needs_it(backend: SmallBackend) -> None:
    engine, pools = CudaEngine(HALVES, STAGE, backend), backend.counted.pools
    for _ in range(3):
        given = tensors(backend, 8)
        before = pools.used_bytes
        outputs = engine.run(given)
        assert pools.used_bytes == before + 8 * 32 * 2  # y alone
        del outputs
        assert pools.used_bytes == before
        given["w"].free()
        engine.run(given, consumed=("x",))
        assert pools.used_bytes == 0  # x went with its last reader, y with its array
        del given


def test_spare_rows_belong_to_the_array_and_to_its_memory(backend: SmallBackend) -> None:
    tiled = plan(residual("x", "x", "y"), buffers=(buffer("y", "tokens", 64, row_multiple=128),))
    engine = CudaEngine(tiled, replace(STAGE, outputs=(TensorSpec("y", ("tokens", 64), BF16),)), backend)
    given = tensors(backend, 100)
    before = backend.counted.pools.used_bytes
    for _ in range(2):
        y = engine.run(given)["y"]
        assert (y.shape, y.spare_rows) == ((100, 64), 28)
        assert backend.counted.pools.used_bytes - before == 128 * 64 * 2


def test_an_outputs_unit_lies_where_the_inputs_does(backend: SmallBackend) -> None:
    class Passing(SmallBackend):
        """Hands the input's unit to what it writes, as attention does."""

        def execute(self, step: Step, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> Any:
            return {"out": replace(outputs["out"], unit=inputs["x"].unit)}

    with Passing({}) as passing:
        engine = CudaEngine(HALVES, STAGE, passing)
        for _ in range(2):
            given = tensors(passing, 5)
            scale, offset = passing.device.empty((1,), DType.F32), passing.device.empty((64,), DType.F32)
            given["x"] = replace(given["x"], unit=Unit(scale, offset))
            engine_of_one = CudaEngine(plan(residual("x", "x", "y"), buffers=(buffer("y", "tokens", 32),)), STAGE, passing)
            unit = engine_of_one.run(given)["y"].unit
            assert unit == Unit(scale, offset)
        assert engine.run(tensors(passing, 5))["y"].unit is None


def centred(x: str, out: str) -> Step:
    return Step(
        kind=StepKind.QUANTIZE_CENTRED, inputs={"x": x}, outputs={"out": out, "scale": "scale", "offset": "offset"}, numbers={}
    )


CENTRED_BUFFERS = (
    PlanBuffer(name="narrow", shape=("tokens", 64), dtype=DType.F8_E4M3),
    PlanBuffer(name="scale", shape=(1,), dtype=DType.F32),
    PlanBuffer(name="offset", shape=(64,), dtype=DType.F32),
)


def test_an_outputs_unit_is_held_with_it(backend: SmallBackend) -> None:
    pools = backend.counted.pools
    engine = CudaEngine(plan(centred("x", "narrow"), buffers=CENTRED_BUFFERS, y="narrow"), STAGE, backend)
    for _ in range(2):
        given = tensors(backend, 8)
        before = pools.used_bytes
        outputs = engine.run(given)
        assert pools.used_bytes == before + 3 * 512  # 8 x 64 bytes, and the scale and the offset, each a unit of small arrays
        later = [backend.device.empty((size,), DType.F32).pointer for size in (1, 64)]
        unit = outputs["y"].unit
        assert unit is not None and not {unit.scale.pointer, unit.offset.pointer} & {*later}
        del outputs, unit
        assert pools.used_bytes == before


def test_a_unit_is_held_until_the_last_step_that_takes_what_is_in_it(backend: SmallBackend) -> None:
    """Attention's output has the unit of its values, which are gone by then."""
    attention = Step(
        kind=StepKind.ATTENTION, inputs=dict.fromkeys(("query", "key", "value"), "narrow"), outputs={"out": "mean"},
        numbers={"num_heads": 1},
    )  # fmt: skip
    restore = Step(kind=StepKind.RESTORE, inputs={"x": "mean"}, outputs={"out": "y"}, numbers={})
    buffers = (*CENTRED_BUFFERS, replace(CENTRED_BUFFERS[0], name="mean"), buffer("y", "tokens", 64))
    prepared = PreparedPlan(
        plan(centred("x", "narrow"), attention, restore, buffers=buffers), STAGE, backend, tensors(backend, 8)
    )
    narrow, scale, offset = (slot for slot, _ in prepared._turns[0].made)
    assert [turn.dropped for turn in prepared._turns] == [(), (narrow,), (scale, offset, narrow + 3)]


def test_what_allocates_by_itself_is_executed_each_time(backend: SmallBackend) -> None:
    step = Step(kind=StepKind.FRAME_ATTENTION, inputs={"qkv": "x"}, outputs={"out": "y"}, numbers={})
    engine = CudaEngine(plan(step, buffers=(buffer("y", "tokens", 32),)), STAGE, backend)
    for count in (1, 2, 3):
        given = tensors(backend, 4)
        y = engine.run(given)["y"]
        assert backend.frames_attended[count - 1 :] == [(given["x"].pointer, y.pointer)]


def test_arrays_that_do_not_fit_are_refused_in_every_run_and_nothing_is_noted_afterwards(
    backend: SmallBackend, driver: NotingDriver
) -> None:
    wrong = plan(residual("x", "w", "y"), buffers=(buffer("y", "tokens", 32),))
    engine = CudaEngine(wrong, STAGE, backend)
    given = tensors(backend, 5)
    for _ in range(2):
        with pytest.raises(EngineError, match="do not fit its steps"):
            engine.run(given)
    assert driver.launched == []
    executed(backend, given, backend.device.empty((5, 64), BF16), backend.device.empty((5, 32), BF16))
    assert len(driver.launched) == 2


def test_preparing_queues_nothing(backend: SmallBackend, driver: NotingDriver) -> None:
    PreparedPlan(HALVES, STAGE, backend, tensors(backend, 5))
    assert driver.launched == []
    assert backend.counted.pools.used_bytes == 0


def test_a_product_gets_each_runs_addresses() -> None:
    library = SimpleNamespace(matmul=lambda *given: seen.append(given), cuBLASLtError=ValueError)
    pointed: list[tuple[str, int]] = []
    product_plan = SimpleNamespace(point=lambda attribute, pointer: pointed.append((attribute, pointer)))
    seen: list[tuple[int, ...]] = []
    given = (1, symbol(0) + 512, 3, symbol(1, 0x1010))
    product = Product(
        library, cast(Problem, None), cast(ProductPlan, product_plan), {"bias": symbol(2), "scale": 99}, given, kept=None
    )
    for start in (0x10000, 0x50000):
        product.queue([slot_address(start), slot_address(start + 0x1010), start + 0x2000])
    assert seen == [(1, 0x10200, 3, 0x11010), (1, 0x50200, 3, 0x51010)]
    assert pointed == [("bias", 0x12000), ("scale", 99), ("bias", 0x52000), ("scale", 99)]


def test_a_graph_gets_each_runs_addresses() -> None:
    seen: list[dict[int, int]] = []
    call = GraphCall("a graph", lambda pointers: seen.append(dict(pointers)), {1: symbol(1), 2: 77, 3: symbol(0) + 64})
    call.queue([0x1000, 0x2000])
    call.queue([0x3000, 0x4000])
    assert seen == [{1: 0x2000, 2: 77, 3: 0x1040}, {1: 0x4000, 2: 77, 3: 0x3040}]


def test_what_was_not_asked_for_the_longest_time_is_forgotten() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        return -key

    known: dict[int, int] = {}
    assert [recall(known, key, make, most=2) for key in (1, 2, 1, 3, 1, 2)] == [-1, -2, -1, -3, -1, -2]
    assert made == [1, 2, 3, 2]
