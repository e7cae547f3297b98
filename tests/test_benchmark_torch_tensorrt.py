"""The baseline torch-tensorrt, as far as a machine without a GPU can tell: Torch-TensorRT is stood in for."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from benchmarks import dit, dit_torch_tensorrt, gpu_suites
from benchmarks.dit_peers import Case, diffusers_inputs, diffusers_network
from benchmarks.gpu import Options
from benchmarks.gpu_report import as_row
from runtime.errors import RequestError
from runtime.geometry import VideoSize
from runtime.variants import Variant
from tests.test_random_file import tiny_variant

COMPILE_SECONDS = 1000.0


def one_block(**changes: Any) -> Variant:
    variant = tiny_variant()
    return replace(variant, transformer=replace(variant.transformer, num_layers=1, **changes))


def tiny_case(variant: Variant) -> Case:
    return Case("tiny", variant.name, VideoSize(width=64, height=64, num_frames=5))


class StandIn:
    """Torch-TensorRT in two parts: an "engine" that is the exported program, and a doubling that PyTorch is left with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = ("_run_on_acc_0", "_run_on_gpu_1")
        self.took = 0.0
        clock = time.perf_counter
        monkeypatch.setattr(time, "perf_counter", lambda: clock() + self.took)
        module = ModuleType("torch_tensorrt")
        module.dynamo = SimpleNamespace(compile=self.compile)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch_tensorrt", module)

    def compile(
        self, program: Any, *, arg_inputs: list[torch.Tensor], truncate_double: bool, min_block_size: int
    ) -> GraphModule:
        assert isinstance(program, torch.export.ExportedProgram)
        assert all(tensor.is_contiguous() for tensor in arg_inputs)  # as Torch-TensorRT asks
        assert (truncate_double, min_block_size) == (True, 1)
        self.took += COMPILE_SECONDS
        inner = Graph()
        inner.output(inner.call_function(torch.ops.aten.mul.Tensor, (inner.placeholder("x"), 2)))
        outer = Graph()
        given = tuple(outer.placeholder(f"x{index}") for index in range(len(arg_inputs)))
        outer.output(outer.call_module(self.names[1], (outer.call_module(self.names[0], given),)))
        engine, left = program.module(), GraphModule(torch.nn.Module(), inner)
        return GraphModule({self.names[0]: engine, self.names[1]: left}, outer)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_compiled_network_is_diffusers_own_whatever_the_timesteps(stand_in: StandIn, per_token: bool) -> None:
    variant = one_block(per_token_timesteps=per_token)
    inputs = diffusers_inputs(variant, tiny_case(variant), "cpu")
    with torch.no_grad():
        network = diffusers_network(variant, "cpu")
        expected = network(*inputs, return_dict=False)[0]
        compiled, build = dit_torch_tensorrt.compile_network(network, inputs)
        assert torch.equal(compiled(*inputs), 2 * expected)
    assert build.engines == 1
    assert len(build.left_to_pytorch) == 1


def test_the_rotation_exports_without_writing_into_strided_channels(stand_in: StandIn) -> None:
    variant = one_block()
    inputs = diffusers_inputs(variant, tiny_case(variant), "cpu")
    with torch.no_grad():
        compiled, _ = dit_torch_tensorrt.compile_network(diffusers_network(variant, "cpu"), inputs)
    targets = {str(node.target) for node in compiled.get_submodule("_run_on_acc_0").graph.nodes}  # type: ignore[attr-defined]
    assert "aten.scaled_dot_product_attention.default" in targets
    assert not {target for target in targets if "copy_" in target or "scatter" in target or "empty" in target}


def test_compiling_is_reported_apart_from_the_forwards(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("max_memory_reserved", 2**30), ("memory_reserved", 0), ("mem_get_info", (2**30, 2**31))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(dit, "_gpu", lambda: "0")
    monkeypatch.setitem(
        dit._OPENERS, "torch-tensorrt", lambda *given: dit_torch_tensorrt.open_torch_tensorrt(*given, device="cpu")
    )
    variant = one_block()
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(variant=variant))
    options = Options(bundles=(bundle,), scratch=tmp_path, seconds=0.0)
    result = dit._theirs(tiny_case(variant), "torch-tensorrt", options)
    row = as_row(result, "a GPU")
    assert row["build"]["seconds"] >= COMPILE_SECONDS
    assert row["build"]["engines"] == 1
    assert max(row["first_seconds"], row["slowest"]) < COMPILE_SECONDS
    (note,) = result.notes()
    assert note.startswith("built in 100")
    assert note.endswith(" s; engines: 1; left to PyTorch: 1 x aten.mul.Tensor")


def test_a_network_without_an_engine_is_not_measured(stand_in: StandIn) -> None:
    variant = one_block()
    stand_in.names = ("_run_on_gpu_0", "_run_on_gpu_1")
    with torch.no_grad(), pytest.raises(RuntimeError, match="made no engine"):
        dit_torch_tensorrt.compile_network(
            diffusers_network(variant, "cpu"), diffusers_inputs(variant, tiny_case(variant), "cpu")
        )


def test_without_torch_tensorrt_the_baseline_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch_tensorrt" else object())
    with pytest.raises(RequestError, match="baseline torch-tensorrt needs torch_tensorrt, not installed here") as raised:
        gpu_suites.check_baselines("dit", dit.SUITE, ["torch-tensorrt"])
    assert raised.value.hint == "pip install torch_tensorrt"


def test_without_a_gpu_the_baseline_says_so_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match=r"baseline torch-tensorrt needs a GPU, and torch .* sees none") as raised:
        gpu_suites.check_baselines("dit", dit.SUITE, ["torch-tensorrt"])
    assert "PyTorch's CUDA build" in str(raised.value.hint)


def test_a_torch_tensorrt_of_another_pytorch_names_the_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(name: str) -> None:
        raise OSError("Could not load this library: libtorchtrt.so")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.import_module", unfit)
    with pytest.raises(RequestError, match=r"torch-tensorrt cannot be imported beside torch .*: Could not load") as raised:
        dit_torch_tensorrt.check_torch_tensorrt()
    release = ".".join(torch.__version__.split(".")[:2])
    assert f"torch-tensorrt=={release}.*" in str(raised.value.hint)
