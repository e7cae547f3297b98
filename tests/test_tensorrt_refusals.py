"""What the runtime half of `rtx` and `tensorrt` refuses, before a weight is read: GPUs, drivers, versions, files, sizes."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from engines.targets.tensorrt.build import build_engine
from engines.targets.tensorrt.library import RTX as BUILD_RTX
from engines.targets.tensorrt.library import Session
from runtime.backends.cuda.device import find_obstacle as find_gpu_obstacle
from runtime.backends.engine_file import Extent, Profile, engine_for, pack_engines, read_header
from runtime.backends.tensorrt.engine import TensorRtBackend
from runtime.backends.tensorrt.library import RTX, TENSORRT, OpenLibrary, find_engine_obstacle, find_obstacle
from runtime.bundle import open_bundle
from runtime.errors import BundleError, EngineError
from runtime.opening import choose_target
from runtime.precision import in_precision
from runtime.specs import DType, Precision
from runtime.stages import network_stages
from tests import fake_tensorrt
from tests.fake_gpu import ComputingGpu
from tests.fake_machine import Machine
from tests.typed_toys import TOY, stage_of, traced


def test_hopper_is_refused_by_rtx_with_what_can_be_used(rtx_bundle: Path, rtx_machine: Machine) -> None:
    rtx_machine.plug(ComputingGpu(arch="sm_90"))
    obstacle = find_obstacle(RTX)
    assert obstacle is not None and "this GPU is sm_90" in obstacle and "cuda or tensorrt" in obstacle
    assert choose_target(open_bundle(rtx_bundle), target=None).name == "cpu", "the next best that runs"
    with pytest.raises(EngineError, match=r"this machine does not run rtx: .*sm_90") as caught:
        choose_target(open_bundle(rtx_bundle), target="rtx")
    assert "leave --target out" in caught.value.hint


def engine_files(bundle: Path) -> list[Path]:
    opened = open_bundle(bundle)
    return [opened.file(engine) for engine in opened.manifest.targets["rtx"].engines.values()]


def test_engines_of_another_version_are_refused_with_the_version_to_install(rtx_bundle: Path, rtx_machine: Machine) -> None:
    rtx_machine.library.__version__ = "1.8.0"
    obstacle = find_engine_obstacle(RTX, engine_files(rtx_bundle))
    assert obstacle is not None and f"pip install tensorrt-rtx=={fake_tensorrt.VERSION}" in obstacle
    with pytest.raises(EngineError, match=r"1\.8\.0 is installed"):
        choose_target(open_bundle(rtx_bundle), target="rtx")


def test_engines_for_other_gpus_are_refused_with_the_architecture_to_build_for(
    rtx_bundle: Path, rtx_machine: Machine, tmp_path: Path
) -> None:
    data = memoryview(engine_files(rtx_bundle)[0].read_bytes())
    header = read_header(data)
    found = engine_for(header, data, "sm_89")
    assert found is not None
    only = replace(header, parts=(replace(header.parts[0], architectures=("sm_80",)),))
    file = tmp_path / "ampere.engine"
    file.write_bytes(pack_engines(only, [bytes(found[1])]))
    assert find_engine_obstacle(RTX, [file]) == "its engines are for sm_80; this GPU is sm_89: rebuild it with --arch sm_89"
    rtx_machine.plug(ComputingGpu(arch="sm_75"))
    assert "rebuild it with --arch sm_75 --precision fp16" in str(find_engine_obstacle(RTX, [file]))
    here = replace(TENSORRT, module=RTX.module, distribution=RTX.distribution)
    assert "rebuild it on this machine" in str(find_engine_obstacle(here, [file]))


@pytest.mark.parametrize("diagnosis", list(fake_tensorrt.EngineInvalidityDiagnostics))
def test_the_librarys_own_diagnosis_is_said_with_its_remedy(rtx_bundle: Path, rtx_machine: Machine, diagnosis: int) -> None:
    rtx_machine.library.diagnosis = int(diagnosis)
    with pytest.raises(EngineError, match="refuses its engines: ") as caught:
        choose_target(open_bundle(rtx_bundle), target="rtx")
    if diagnosis is fake_tensorrt.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER:
        assert "install a newer driver" in caught.value.message
    assert not rtx_machine.gpu.copied


def test_a_library_that_is_not_installed_is_named(rtx_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(TENSORRT, module="no_such_module")
    assert find_obstacle(missing) == 'tensorrt is not installed; `pip install "wanrt[tensorrt]"`'


def test_a_library_that_does_not_start_leaves_the_next_target(rtx_bundle: Path, rtx_machine: Machine) -> None:
    def refuse(logger: Any) -> None:
        logger.log(fake_tensorrt.Severity.ERROR, "no driver")
        raise TypeError("the factory gave nothing")

    rtx_machine.library.Runtime = refuse
    assert choose_target(open_bundle(rtx_bundle), target=None).name == "cpu"
    with pytest.raises(EngineError, match="does not start: no driver; install a newer driver"):
        choose_target(open_bundle(rtx_bundle), target="rtx")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_the_library_itself_refuses_what_is_no_engine_of_its_version() -> None:
    refusal = OpenLibrary(RTX).refusal(memoryview(b"no engine, whatever it is called" * 9), "sm_89")
    assert refusal is not None and "refuses its engines: they are damaged or of another version" in refusal


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.skipif(find_gpu_obstacle() is None, reason="there is a GPU with its driver")
def test_without_a_driver_the_librarys_own_words_are_the_refusal_of_its_engine() -> None:
    stage, tokens = stage_of(TOY, "transformer.head"), Extent(smallest=1, usual=8, largest=16)
    with Session(BUILD_RTX) as session:
        narrow, graph = in_precision(stage, Precision.BF16), traced(TOY, stage.name)
        engine = build_engine(session, graph, narrow, architectures=("sm_89",), profile={"tokens": tokens}).data
    library = OpenLibrary(RTX)
    refusal = library.refusal(memoryview(engine), "sm_89")
    assert refusal is not None and "CUDA driver version is insufficient" in refusal and "\n" not in refusal
    with pytest.raises(EngineError, match="CUDA driver version is insufficient") as caught:
        library.load(memoryview(engine), stage.name)
    assert "install a newer driver" in caught.value.hint


@pytest.fixture
def backend(rtx_machine: Machine) -> Iterator[TensorRtBackend]:
    with TensorRtBackend(RTX) as backend:
        yield backend


def head(bundle: Path) -> tuple[Path, Any]:
    variant = open_bundle(bundle).manifest.variant
    stage = next(stage for stage in network_stages(variant, "transformer") if stage.name == "transformer.head")
    file = next(file for file in engine_files(bundle) if file.name.startswith("transformer.head"))
    return file, in_precision(stage, Precision.BF16)


def test_a_size_outside_of_the_profile_is_refused_with_what_was_built(rtx_bundle: Path, backend: TensorRtBackend) -> None:
    file, stage = head(rtx_bundle)
    engine = backend.open_engine(file, stage)
    profile: Profile = read_header(memoryview(file.read_bytes())).profile
    tensors = {
        tensor.name: backend.device.empty(tuple(a if isinstance(a, int) else 200_000 for a in tensor.shape), tensor.dtype)
        for tensor in (*stage.inputs, *stage.weights)
    }
    with pytest.raises(
        EngineError, match=f"tokens=200000: this engine was built for 1 to {profile['tokens'].largest}"
    ) as caught:
        engine.run(tensors)
    assert "--size" in caught.value.hint


def test_an_engine_of_another_architecture_of_the_network_is_refused(rtx_bundle: Path, backend: TensorRtBackend) -> None:
    file, stage = head(rtx_bundle)
    first, *rest = stage.inputs
    wider = replace(stage, inputs=(replace(first, shape=(*first.shape[:-1], 8 + int(first.shape[-1]))), *rest))
    with pytest.raises(EngineError, match="the engine has hidden_states"):
        backend.open_engine(file, wider)
    narrow = replace(stage, inputs=(replace(first, dtype=DType.F16), *rest))
    with pytest.raises(EngineError, match="the engine has hidden_states"):
        backend.open_engine(file, narrow)


def test_an_engine_that_would_read_a_tensor_on_the_host_gets_no_pointer_of_the_gpu(
    rtx_bundle: Path, backend: TensorRtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = fake_tensorrt.TensorLocation.HOST
    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "get_tensor_location", lambda engine, name: place)
    with pytest.raises(EngineError, match="the engine has hidden_states in the host's memory"):
        backend.open_engine(*head(rtx_bundle))


def test_an_engine_that_the_library_does_not_open_is_refused_with_its_log(
    rtx_bundle: Path, backend: TensorRtBackend, tmp_path: Path
) -> None:
    file, stage = head(rtx_bundle)
    header = read_header(memoryview(file.read_bytes()))
    damaged = tmp_path / "damaged.engine"
    damaged.write_bytes(pack_engines(replace(header, parts=(replace(header.parts[0], bytes=9),)), [b"no engine"]))
    with pytest.raises(
        EngineError, match=r"transformer\.head: tensorrt-rtx [\d.]+ does not open the engine:\n  cannot deserialise"
    ):
        backend.open_engine(damaged, stage)
    damaged.write_bytes(b"")
    with pytest.raises(EngineError, match=r"transformer\.head"):
        backend.open_engine(damaged, stage)


def test_a_file_that_is_missing_or_none_of_engines_is_a_damaged_bundle(rtx_machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        find_engine_obstacle(RTX, [tmp_path / "missing.engine"])
    (tmp_path / "text.engine").write_text("not a file of engines, whatever it is called")
    with pytest.raises(BundleError, match="not a file of engines"):
        find_engine_obstacle(RTX, [tmp_path / "text.engine"])
