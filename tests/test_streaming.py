"""Weights within a budget on a fake GPU: what is computed with is what was asked for, however the two streams run against each other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

from runtime.backends.base import Array, StoredWeights
from runtime.backends.cuda import loading
from runtime.backends.cuda.copies import CopyStream
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.session import CudaSession
from runtime.errors import BundleError, CudaError, DeviceMemoryError
from runtime.memory import LIBRARY_BYTES, SMALL_BYTES, Layout, Need
from runtime.residency import PAGE_BYTES, least_bytes, weight_units
from runtime.specs import DType, Precision, StageSpec, TensorSpec
from tests.fake_gpu import FakeEvent, FakeGpu

StepOf = Callable[[int], None]
BLOCKS = 6
ROWS = 3 * PAGE_BYTES // 2 // 4 // 8  # of 8 floats: a block takes two pages


def stage(name: str, *weights: str, per_block: bool = False, per_prompt: bool = False) -> StageSpec:
    tensors = tuple(TensorSpec(f"{weight}.weight", (ROWS if per_block else 4, 8)) for weight in weights)
    return StageSpec(
        name=f"transformer.{name}", inputs=(), weights=tensors, outputs=(), per_block=per_block, per_prompt=per_prompt
    )


TEXT, EMBED, BLOCK, HEAD = (
    stage("text", "kv", per_block=True, per_prompt=True),
    stage("embed", "embed"),
    stage("block", "qkv", per_block=True),
    stage("head", "head"),
)
STAGES = (TEXT, EMBED, BLOCK, HEAD)
UNITS = weight_units(STAGES, num_blocks=BLOCKS)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Weights of two experts: every tensor holds its own number."""
    paths = {}
    for expert in ("high", "low"):
        names = [tensor.name for unit in UNITS for tensor in unit.tensors]
        tensors = {name: np.full(shape_of(name), 100 * (expert == "low") + i, np.float32) for i, name in enumerate(names)}
        paths[expert] = tmp_path / f"{expert}.safetensors"
        save_file(tensors, paths[expert])
    return paths


def shape_of(name: str) -> tuple[int, ...]:
    return (ROWS if "blocks" in name or "time" in name else 4, 8)


@contextmanager
def open_session(gpu: FakeGpu, **options: Any) -> Iterator[CudaSession]:
    session = CudaSession(cast(CudaBackend, gpu), cast(CopyStream, gpu), **options)
    try:
        yield session
    finally:
        session.close()
        assert gpu.closed


def needs(*components: str, work: int = 1) -> list[Need]:
    layout = Layout(nbytes=work * PAGE_BYTES, large_bytes=None)
    return [Need(network="transformer", component=name, units=UNITS, layout=layout) for name in components]


def budget(pages: int, work: int = 1) -> int:
    return LIBRARY_BYTES + SMALL_BYTES + (pages + work) * PAGE_BYTES


def use(gpu: FakeGpu, weights: StoredWeights, stage: StageSpec, block: int | None = None) -> None:
    for name, array in weights.stage_weights(stage, block).items():
        gpu.compute(array, weights.host_tensor(stage.weight_name(name, block)))


def generate(gpu: FakeGpu, weights: StoredWeights, *, steps: int = 3) -> None:
    """The order in which a generation asks: two prompts, then step after step with both prompts going through each block."""
    for _ in range(2):
        for block in range(BLOCKS):
            use(gpu, weights, TEXT, block)
    for _ in range(steps):
        use(gpu, weights, EMBED)
        for block in range(BLOCKS):
            use(gpu, weights, BLOCK, block)
            use(gpu, weights, BLOCK, block)
        use(gpu, weights, HEAD)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("host_bytes", [1 << 40, 0], ids=["page-locked", "staged"])
@pytest.mark.parametrize("pages", [6, 17, 40])
def test_computing_never_sees_another_units_weights(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, pages: int, host_bytes: int, seed: int
) -> None:
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1 << 20)
    gpu = FakeGpu(seed=seed)
    with open_session(gpu, vram=budget(pages), available_host_bytes=lambda: host_bytes) as session:
        for _ in range(2):
            session.prepare(needs("high", "low"), attention=Precision.BF16)
            for component, file in files.items():
                with session.weights(component, file, STAGES, num_blocks=BLOCKS) as weights:
                    generate(gpu, weights)
                    gpu.finish()
        use_of_memory = session.memory_use()
        assert use_of_memory is not None
        assert use_of_memory.peak_bytes + LIBRARY_BYTES + SMALL_BYTES <= use_of_memory.predicted_peak_bytes <= budget(pages)
        assert use_of_memory.staged == (("high", "low") if not host_bytes and pages < 26 else ())


LARGE = replace(BLOCK, name="transformer.block_wide", weights=(TensorSpec("qkv.weight", (2 * ROWS, 8)),), blocks=(0,))


@contextmanager
def large_first(tmp_path: Path, blocks: int, *, pages: int, seed: int) -> Iterator[tuple[FakeGpu, Any, StepOf]]:
    """A component whose first block takes three pages where the others take two, open; its weights, and what uses a block's."""
    stages = (EMBED, LARGE, replace(BLOCK, blocks=tuple(range(1, blocks))))
    units = weight_units(stages, num_blocks=blocks)
    assert [unit.device_bytes // PAGE_BYTES for unit in units] == [1, 3, *[2] * (blocks - 1)]
    assert least_bytes(units) == (1 + 3 + 2) * PAGE_BYTES
    tensors = [tensor for unit in units for tensor in unit.tensors]
    file = tmp_path / "weights.safetensors"
    save_file({tensor.name: np.full(tensor.shape, i, np.float32) for i, tensor in enumerate(tensors)}, file)
    gpu, need = FakeGpu(seed=seed), replace(*needs("high"), units=units)
    with open_session(gpu, vram=budget(pages), available_host_bytes=lambda: 1 << 40) as session:
        session.prepare([need], attention=Precision.BF16)
        with session.weights("high", file, stages, num_blocks=blocks) as weights:
            yield gpu, weights, lambda block: use(gpu, weights, stages[min(block, 1) + 1], block)
            gpu.finish()
        use_of_memory = session.memory_use()
        assert use_of_memory is not None and use_of_memory.peak_bytes <= use_of_memory.predicted_peak_bytes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spare_pages", [0, 1, 4])
@pytest.mark.parametrize("blocks", [5, 6])
def test_a_larger_first_block_streams_through_the_larger_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, spare_pages: int, seed: int
) -> None:
    """Every block is asked for while what is before it computes."""
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1 << 20)
    with large_first(tmp_path, blocks, pages=6 + spare_pages, seed=seed) as (gpu, weights, run):
        assert weights._residency.resident - {0} == {0: set(), 1: set(), 4: {1, blocks}}[spare_pages]
        late = []
        for step in range(3):
            use(gpu, weights, EMBED)
            for block in range(blocks):
                if block + 1 not in weights._residency.resident and block + 1 not in [slot.unit for slot in weights._slots]:
                    late.append((step, block))
                run(block)
    assert not late


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("left_at", range(1, 5))
def test_a_step_that_is_broken_off_leaves_the_larger_slot_to_the_larger_block(tmp_path: Path, left_at: int, seed: int) -> None:
    with large_first(tmp_path, 6, pages=6, seed=seed) as (_, _, run):
        for block in (*range(left_at), *range(6)):
            run(block)


def test_resident_units_are_copied_once_and_streamed_ones_once_a_step(files: dict[str, Path]) -> None:
    gpu = FakeGpu()
    with open_session(gpu, vram=budget(2 + 4 + 3 * 2), available_host_bytes=lambda: 1 << 40) as session:
        session.prepare(needs("high"), attention=Precision.BF16)
        with session.weights("high", files["high"], STAGES, num_blocks=BLOCKS) as weights:
            generate(gpu, weights, steps=4)
            gpu.finish()
            blocks = [size for size in gpu.copied if size > PAGE_BYTES // 2]
            # 6 text blocks for each of two prompts and perhaps two fetched in vain; 3 resident blocks; 3 streamed ones in each of 4
            # steps and the next two ahead
            assert 12 + 3 + 12 <= len(blocks) <= 12 + 2 + 3 + 12 + 2


def test_a_second_generation_copies_nothing_where_everything_fits(files: dict[str, Path]) -> None:
    gpu = FakeGpu()
    with open_session(gpu, available_host_bytes=lambda: 0) as session:
        for _ in range(2):
            session.prepare(needs("high", "low"), attention=Precision.BF16)
            for component, file in files.items():
                with session.weights(component, file, STAGES, num_blocks=BLOCKS) as weights:
                    generate(gpu, weights)
                    gpu.finish()
        assert sum(gpu.copied) == 2 * sum(unit.nbytes for unit in UNITS)


def test_a_smaller_budget_counts_from_the_beginning_of_the_next_generation(files: dict[str, Path]) -> None:
    gpu = FakeGpu()
    with open_session(gpu, available_host_bytes=lambda: 0) as session:
        for session.vram in (None, budget(9)):
            session.prepare(needs("high"), attention=Precision.BF16)
            with session.weights("high", files["high"], STAGES, num_blocks=BLOCKS) as weights:
                generate(gpu, weights, steps=1)
                gpu.finish()
        memory_use = session.memory_use()
        assert memory_use is not None and memory_use.peak_bytes <= memory_use.predicted_peak_bytes <= budget(9)


def test_earlier_weights_are_released_before_the_next_components_memory_is_taken(files: dict[str, Path]) -> None:
    gpu = FakeGpu()
    plan = [*needs("high"), *needs("low", work=20)]
    with open_session(gpu, vram=budget(26 + 4), available_host_bytes=lambda: 1 << 40) as session:
        session.prepare(plan, attention=Precision.BF16)
        for component, file in files.items():
            with session.weights(component, file, STAGES, num_blocks=BLOCKS) as weights:
                generate(gpu, weights, steps=1)
                gpu.finish()
        reserved = gpu.log.index(f"reserve {20 * PAGE_BYTES}")
        assert (
            gpu.log[:reserved].count(f"free {2 * PAGE_BYTES}") == 12
        )  # all of high's blocks, so that the rest fits beside 20 pages
        assert gpu.peak_bytes <= budget(26 + 4)


class Broken:
    """A file that cannot be read any more."""

    def tensor(self, name: str) -> Array:
        raise BundleError(f"{name}: the disk is gone", hint="look at it")


@pytest.mark.parametrize("host_bytes", [1 << 40, 0], ids=["page-locked", "staged"])
def test_a_file_that_fails_while_streaming_is_an_error_where_it_is_needed(files: dict[str, Path], host_bytes: int) -> None:
    gpu = FakeGpu()
    with open_session(gpu, vram=budget(9), available_host_bytes=lambda: host_bytes) as session:
        session.prepare(needs("high"), attention=Precision.BF16)
        with session.weights("high", files["high"], STAGES, num_blocks=BLOCKS) as weights:
            session._stores["high"].source = Broken()
            with pytest.raises(BundleError, match="the disk is gone"):
                generate(gpu, weights)


@pytest.mark.parametrize("pages", [9, 40])
@pytest.mark.parametrize("host_bytes", [1 << 40, 0], ids=["page-locked", "staged"])
def test_a_generation_after_one_that_could_not_read_reads_again(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, host_bytes: int, pages: int
) -> None:
    gpu = FakeGpu()
    with open_session(gpu, vram=budget(pages), available_host_bytes=lambda: host_bytes) as session:
        for source in (Broken(), None):
            session.prepare(needs("high"), attention=Precision.BF16)
            if source is None:
                monkeypatch.undo()
            with (
                pytest.raises(BundleError, match="the disk is gone") if source else nullcontext(),
                session.weights("high", files["high"], STAGES, num_blocks=BLOCKS) as weights,
            ):
                if source:
                    monkeypatch.setattr(session._stores["high"], "source", source)
                generate(gpu, weights)
                gpu.finish()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("pages", "passes"), [(26, True), (6, True), (28, False)])
def test_what_is_needed_before_the_steps_passes_among_the_arrays(tmp_path: Path, pages: int, passes: bool, seed: int) -> None:
    time = StageSpec(
        name="transformer.time", inputs=(), weights=(TensorSpec("time.weight", (ROWS, 8)),), outputs=(), per_prompt=True
    )
    units = weight_units((time, *STAGES), num_blocks=BLOCKS)
    names = [tensor.name for unit in units for tensor in unit.tensors]
    file = tmp_path / "weights.safetensors"
    save_file({name: np.full(shape_of(name), i + 1, np.float32) for i, name in enumerate(names)}, file)
    gpu = FakeGpu(seed=seed)
    (need,) = (replace(need, units=units) for need in needs("high", work=3))
    with open_session(gpu, vram=budget(pages, work=3), available_host_bytes=lambda: 1 << 40) as session:
        for _ in range(2):
            plan = session.prepare([need], attention=Precision.BF16)
            assert (0 in plan.find("high").residency.resident) is not passes
            with session.weights("high", file, (time, *STAGES), num_blocks=BLOCKS) as weights:
                before = gpu.empty((ROWS, 8), DType.F32)  # where the weight will lie, if it passes
                gpu.compute(before, np.zeros((ROWS, 8), np.float32))
                del before
                for _ in range(3):
                    use(gpu, weights, time)
                assert bool(gpu.used_bytes) is passes
                generate(gpu, weights)
                assert not gpu.used_bytes
                gpu.finish()
        use_of_memory = session.memory_use()
        assert use_of_memory is not None and use_of_memory.peak_bytes <= use_of_memory.predicted_peak_bytes


def test_events_do_not_accumulate_from_generation_to_generation(files: dict[str, Path]) -> None:
    gpu, made = FakeGpu(), []
    new_event = gpu.new_event

    def counted() -> FakeEvent:
        made.append(1)
        return new_event()

    gpu.new_event = counted  # type: ignore[method-assign]
    counts = []
    with open_session(gpu, vram=budget(9), available_host_bytes=lambda: 0) as session:
        for _ in range(3):
            session.prepare(needs("high", "low"), attention=Precision.BF16)
            for component, file in files.items():
                with session.weights(component, file, STAGES, num_blocks=BLOCKS) as weights:
                    generate(gpu, weights, steps=2)
                    gpu.finish()
            counts.append(len(made))
    assert counts[0] == counts[1] == counts[2] > 0


def test_an_interrupted_step_ends_threads_and_leaves_nothing_behind(files: dict[str, Path]) -> None:
    gpu = FakeGpu()
    with open_session(gpu, vram=budget(9), available_host_bytes=lambda: 1 << 40) as session:
        loader = session._loader
        resident = session.prepare(needs("high"), attention=Precision.BF16).find("high").residency.resident_bytes
        with pytest.raises(KeyboardInterrupt), session.weights("high", files["high"], STAGES, num_blocks=BLOCKS) as weights:
            use(gpu, weights, EMBED)
            use(gpu, weights, BLOCK, 0)
            raise KeyboardInterrupt
        assert sum(map(len, gpu.memory_of.values())) == resident  # the slots are gone
    assert not loader._thread.is_alive()


def test_a_lost_device_still_gets_its_slots_back_and_says_what_failed_first(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu()

    def lost() -> tuple[int, int]:
        raise CudaError("cuMemGetInfo failed with 700")

    with open_session(gpu, vram=budget(9), available_host_bytes=lambda: 0) as session:
        resident = session.prepare(needs("high"), attention=Precision.BF16).find("high").residency.resident_bytes
        with (
            pytest.raises(CudaError, match="cuStreamSynchronize"),
            session.weights("high", files["high"], STAGES, num_blocks=BLOCKS),
        ):
            monkeypatch.setattr(gpu, "memory", lost)
            raise CudaError("cuStreamSynchronize failed with 700")
        assert sum(map(len, gpu.memory_of.values())) == resident


def test_page_locked_memory_of_other_components_goes_where_this_one_streams_other_units(files: dict[str, Path]) -> None:
    gpu, available = FakeGpu(), 1 << 40
    with open_session(gpu, available_host_bytes=lambda: available) as session:
        session.vram = budget(26 - 4)
        session.prepare(needs("high", "low"), attention=Precision.BF16)
        for component in ("low", "high"):
            with session.weights(component, files[component], STAGES, num_blocks=BLOCKS) as weights:
                use(gpu, weights, TEXT, 0)
                gpu.finish()
        before = len(gpu.page_locked_bytes)
        assert session._stores["low"].pinned and session._stores["high"].pinned
        session.vram, available = budget(9), 0
        session.prepare(needs("high"), attention=Precision.BF16)
        with session.weights("high", files["high"], STAGES, num_blocks=BLOCKS):
            assert not session._stores["low"].pinned
        assert len(gpu.page_locked_bytes) < before


def test_memory_that_others_hold_is_refused_before_anything_is_read() -> None:
    with open_session(FakeGpu(total_bytes=budget(9)), vram=budget(20)) as session:
        with pytest.raises(DeviceMemoryError, match="a budget of") as caught:
            session.prepare(needs("high"), attention=Precision.BF16)
        assert "--vram" in caught.value.hint


def test_a_component_that_finds_no_memory_is_forgotten_and_can_be_opened_later(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu()
    with open_session(gpu, available_host_bytes=lambda: 0) as session:
        session.prepare(needs("high"), attention=Precision.BF16)
        calls: list[int] = []
        slab = gpu.slab

        def failing(nbytes: int) -> Any:
            calls.append(nbytes)
            if len(calls) == 5:
                raise DeviceMemoryError("taken meanwhile")
            return slab(nbytes)

        monkeypatch.setattr(gpu, "slab", failing)
        with pytest.raises(DeviceMemoryError), session.weights("high", files["high"], STAGES, num_blocks=BLOCKS):
            raise AssertionError("opened")
        assert not gpu.memory_of
        with session.weights("high", files["high"], STAGES, num_blocks=BLOCKS) as weights:
            generate(gpu, weights, steps=1)
            gpu.finish()


def test_a_dtype_travels_as_its_bits(files: dict[str, Path]) -> None:
    with open_session(FakeGpu(), available_host_bytes=lambda: 0) as session:
        session.prepare(needs("high"), attention=Precision.BF16)
        with session.weights("high", files["high"], STAGES, num_blocks=BLOCKS) as weights:
            (array,) = weights.stage_weights(BLOCK, 3).values()
            assert (array.shape, array.dtype, array.row_stride) == ((ROWS, 8), DType.F32, 8)
