"""The two libraries: what they say reaches the log and the errors, and `tensorrt` builds for the GPU present, and says what is missing.

`tensorrt` itself is not installed where these tests were written: TensorRT-RTX, which has the same interface, stands in for it.
"""

import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import onnx
import pytest

from engines.plan import TARGETS, architectures
from engines.precision import functions
from engines.precision.typed import typed_graph
from engines.profiles import DEFAULT_SIZES, stage_profile
from engines.store import BundleStore
from engines.targets.tensorrt import layers
from engines.targets.tensorrt.build import _config, build_engine
from engines.targets.tensorrt.library import RTX, TENSORRT, Session
from engines.targets.tensorrt.network import make_network
from export.builder import Builder, BuildRequest
from runtime.backends.engine_file import read_file_header, read_header
from runtime.errors import BuildError, EngineError, RequestError
from runtime.precision import NOTHING_WIDE, in_precision
from runtime.specs import Precision
from tests.conftest import Refuses
from tests.typed_toys import TOY, stage_of, traced

has_rtx = pytest.mark.skipif(find_spec(RTX.module) is None, reason="tensorrt-rtx is not installed")
LOG = "wanrt.tensorrt"


class PresentGpu:
    """Stands in for the GPU of the machine."""

    arch = "sm_90"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes TensorRT-RTX answer as TensorRT, on a machine with a GPU."""
    monkeypatch.setitem(sys.modules, TENSORRT.module, import_module(RTX.module))
    monkeypatch.setattr("runtime.backends.cuda.device.Device", PresentGpu)
    monkeypatch.setattr("export.builder._tool_version", lambda name, plan: "any")


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(RTX) as opened:
        yield opened


def build(session: Session, name: str, precision: Precision, architecture: str = "sm_89") -> int:
    """The scratch memory of a toy stage's engine."""
    stage = stage_of(TOY, name)
    profile = stage_profile(stage, TOY, DEFAULT_SIZES)
    built = build_engine(
        session, traced(TOY, name), in_precision(stage, precision), architectures=(architecture,), profile=profile
    )
    return built.part.context_bytes


@has_rtx
@pytest.mark.usefixtures("stand_in")
def test_tensorrt_builds_for_the_gpu_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [stage_of(TOY, f"transformer.{name}") for name in ("block_in", "attention")]
    monkeypatch.setattr("export.builder.network_stages", lambda variant, network: stages)
    monkeypatch.setattr("export.builder.network_precisions", lambda *_: {"transformer": Precision.FP8})
    monkeypatch.setattr("export.graphs.stage_graph", lambda variant, stage: traced(variant, stage.name))
    request = BuildRequest(out=tmp_path, checkpoint=None, targets=("tensorrt",), precision=Precision.FP8)
    with BundleStore(tmp_path) as store:
        target = Builder(store, request, TOY, None, fp8_wide=NOTHING_WIDE, total=0, on_event=lambda event: None).target(
            TARGETS["tensorrt"]
        )
    assert (target.sizes, target.kernels, len(target.engines)) == (DEFAULT_SIZES, {}, 2)
    headers = {name: read_header(memoryview((tmp_path / file.path).read_bytes())) for name, file in target.engines.items()}
    assert {part.architectures for header in headers.values() for part in header.parts} == {("sm_90",)}
    assert [part.fp8_attention for part in headers["transformer.attention"].parts] == [False, True]
    assert {header.library for header in headers.values()} == {"tensorrt"}
    attention = tmp_path / target.engines["transformer.attention"].path
    assert (
        read_file_header(attention).scratch_bytes
        == max(part.context_bytes for part in headers["transformer.attention"].parts)
        > 0
    )


def test_without_a_gpu_tensorrt_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> None:
        raise EngineError("no CUDA device can be used here")

    monkeypatch.setattr("runtime.backends.cuda.device.Device", no_gpu)
    with pytest.raises(BuildError) as caught:
        architectures(TARGETS["tensorrt"], (), None)
    assert caught.value.message == "target tensorrt builds for the GPU present: no CUDA device can be used here"
    assert (
        caught.value.hint == "build on the machine that is to run it; --target rtx builds anywhere, for GeForce and RTX cards"
    )


def test_a_precision_that_the_gpu_present_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.cuda.device.Device", lambda: SimpleGpu("sm_80"))
    assert architectures(TARGETS["tensorrt"], (), None) == ("sm_80",)
    with pytest.raises(RequestError, match="precision fp8: target tensorrt builds for the GPU present, sm_80"):
        architectures(TARGETS["tensorrt"], (), Precision.FP8)
    with pytest.raises(RequestError, match="architecture sm_89: target tensorrt has sm_80 in bf16"):
        architectures(TARGETS["tensorrt"], ("sm_89",), None)


class SimpleGpu(PresentGpu):
    def __init__(self, arch: str) -> None:
        self.arch = arch


@pytest.mark.skipif(find_spec(TENSORRT.module) is not None, reason="tensorrt is installed")
def test_a_library_that_is_not_installed_is_named_with_the_remedy(refuses: Refuses, tmp_path: Path) -> None:
    command = ("build-engines", "--engines-only", "--variant", "wan2.1-t2v-1.3b", "--target", "tensorrt", "--out")
    said = refuses(
        *command, tmp_path / "bundle", code=4, message="target tensorrt is built with tensorrt, which is not installed"
    )
    assert '`pip install "wanrt[tensorrt,export]"`' in said
    with pytest.raises(BuildError, match="target tensorrt is built with tensorrt, which is not installed"):
        Session(TENSORRT)


@has_rtx
def test_neither_a_timing_cache_nor_tf32_changes_what_is_built(session: Session) -> None:
    config, flags = _config(session, ("sm_89",)), session.trt.BuilderFlag
    assert config.get_flag(flags.DISABLE_TIMING_CACHE) and not config.get_flag(flags.TF32)


@has_rtx
def test_what_the_builder_warns_of_ends_in_the_log(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    build(session, "text_encoder.block", Precision.BF16)
    said = [record.getMessage() for record in caplog.records if record.name == LOG]
    assert any("position_buckets" in line for line in said), said
    assert said == list(session.last_lines)


@has_rtx
def test_what_the_parser_refuses_names_the_stage_the_layer_and_the_last_lines(session: Session) -> None:
    stage = in_precision(stage_of(TOY, "transformer.embed"), Precision.BF16)
    graph = onnx.ModelProto()
    graph.CopyFrom(typed_graph(traced(TOY, stage.name), stage))
    graph.graph.node.append(onnx.helper.make_node("StringNormalizer", ["patches"], ["text"]))
    with pytest.raises(BuildError) as caught:
        make_network(session, graph, stage)
    first, *lines = caught.value.message.splitlines()
    assert first.startswith("transformer.embed: the parser refused text (StringNormalizer)")
    assert any("While parsing node number 2 [StringNormalizer" in line for line in lines)


@has_rtx
def test_what_the_builder_refuses_names_the_stage_the_layer_and_the_last_lines(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = functions.BODIES["LinearFp8"]
    broken = body.replace("DequantizeLinear (x_fp8, one_narrow)", "Cast <to = 16> (x_fp8)")
    monkeypatch.setitem(functions.BODIES, "LinearFp8", broken)
    with pytest.raises(BuildError) as caught:
        build(session, "transformer.block_in", Precision.FP8)
    first, *lines = caught.value.message.splitlines()
    assert first == "transformer.block_in: tensorrt_rtx built no engine for sm_89:"
    assert any("Tensor x_fp8" in line and "FP8" in line for line in lines)
    assert any(record.levelno == logging.ERROR and "Tensor x_fp8" in record.getMessage() for record in caplog.records)
    assert caught.value.hint == "`--verbose` shows what else tensorrt_rtx warned of"


@has_rtx
def test_each_refusal_has_its_own_lines_whichever_session_came_before() -> None:
    for name in ("transformer.block_out", "transformer.block_in"):
        with Session(RTX) as session, pytest.raises(BuildError, match=rf"{name}: .* for sm_75:\n.*fp8_e4m3") as caught:
            build(session, name, Precision.FP8, "sm_75")
        assert len(caught.value.message.splitlines()) == 2


@has_rtx
def test_scratch_memory_that_the_log_does_not_tell_is_asked_of_the_engine(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = build(session, "transformer.head", Precision.BF16)
    assert told > 0
    monkeypatch.setattr(layers, "_CONTEXT", layers._LAYER)  # never the line with the total
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda engine: SimpleNamespace(device_memory_size_v2=told))
    with monkeypatch.context() as patch:
        patch.setattr(session.trt, "Runtime", lambda logger: runtime)
        assert build(session, "transformer.head", Precision.BF16) == told
    monkeypatch.setattr(session.trt, "Runtime", lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda engine: None))
    with pytest.raises(BuildError, match=r"transformer\.head: tensorrt_rtx did not say how much scratch memory"):
        build(session, "transformer.head", Precision.BF16)
