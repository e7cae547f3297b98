"""What every backend must do, whichever library it is: the same tests for each one this machine can execute."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.plan import TARGETS, EngineOptions, TargetPlan
from export.graphs import stage_graph
from export.modules.transformer import Head
from runtime.backends import RUNTIME_TARGETS, BackendOptions
from runtime.backends.base import Backend, Engine
from runtime.backends.cuda import device
from runtime.backends.engine_file import Extent
from runtime.errors import EngineError
from runtime.geometry import patchify, unpatchify
from runtime.precision import in_precision
from runtime.specs import DType, Precision, StageSpec
from runtime.stages import network_stages
from runtime.variants import VARIANTS, TransformerArch
from tests.harness import relative_error
from tests.tolerances import TOLERANCES

ARCH = TransformerArch(dim=128, ffn_dim=256, num_heads=1, num_layers=1, text_dim=32, freq_dim=32)
VARIANT = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=ARCH)
TARGETS_AND_DOUBLES = [*(target.name for target in RUNTIME_TARGETS), "rtx on a double of its library"]


@dataclass(frozen=True)
class Opened:
    """The head stage, open on one backend: it takes token rows and modulation, and gives what the host reads."""

    backend: Backend
    engine: Engine
    stage: StageSpec
    file: Path
    precision: Precision

    def tensors(self, num_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Inputs and weights in float32, all of them numbers that bf16 holds."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            t.name: [a if isinstance(a, int) else num_tokens for a in t.shape]
            for t in (*self.stage.inputs, *self.stage.weights)
        }
        return {name: torch.randn(shape, generator=generator).div(4).bfloat16().float() for name, shape in shapes.items()}

    def send(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        dtypes = {tensor.name: tensor.dtype for tensor in (*self.stage.inputs, *self.stage.weights)}
        return {name: self.send_one(tensor, dtypes[name]) for name, tensor in tensors.items()}

    def send_one(self, tensor: torch.Tensor, dtype: DType) -> Any:
        host = tensor.bfloat16().view(torch.uint16).numpy() if dtype is DType.BF16 else tensor.numpy()
        return self.backend.to_device(host, dtype)


@pytest.fixture(scope="module", params=TARGETS_AND_DOUBLES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    name, _, double = request.param.partition(" ")
    with ExitStack() as stack:
        if double:
            pytest.importorskip("onnxruntime")
            from tests.fake_machine import on_a_double

            stack.enter_context(on_a_double())
        yield from _open(name, tmp_path_factory.mktemp(name))


def _open(name: str, folder: Path) -> Iterator[Opened]:
    runtime_target = next(target for target in RUNTIME_TARGETS if target.name == name)
    if obstacle := runtime_target.obstacle():
        pytest.skip(obstacle)
    plan = TARGETS[name]
    network = plan.networks["transformer"]
    fp32 = next(stage for stage in network_stages(VARIANT, "transformer") if stage.name == "transformer.head")
    stage = in_precision(fp32, network.precisions[0])
    file = folder / f"head{network.suffix}"
    file.write_bytes(network.build_engine(stage_graph(VARIANT, fp32), stage, _options(plan, stage)))
    session = runtime_target.open_session(BackendOptions(num_threads=1, read_kernels=_kernels(plan)))
    with closing(session), session.backend("transformer") as backend:
        engine = backend.open_engine(file, stage)
        yield Opened(backend, engine, stage, file, network.precisions[0])
        engine.close()


@pytest.mark.parametrize("num_tokens", [1, 2, 37])
def test_outputs_are_those_of_the_module(opened: Opened, num_tokens: int) -> None:
    tensors = opened.tensors(num_tokens)
    given = opened.backend.to_host(opened.engine.run(opened.send(tensors))["noise_patches"])
    with torch.device("meta"):
        module = Head(ARCH)
    weights = {weight.name: tensors[weight.name] for weight in opened.stage.weights}
    expected = torch.func.functional_call(module, weights, (tensors["hidden_states"], tensors["temb"]))
    tolerance = TOLERANCES["stage, fp32" if opened.precision is Precision.FP32 else f"stage, cuda {opened.precision}"]
    assert given.dtype == np.float32
    assert relative_error(given, expected) < tolerance


def test_the_same_inputs_give_the_same_bits(opened: Opened) -> None:
    tensors = opened.send(opened.tensors(5))
    first, again = (opened.backend.to_host(opened.engine.run(tensors)["noise_patches"]) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_what_goes_to_the_device_comes_back(opened: Opened) -> None:
    array = np.random.default_rng(0).standard_normal((7, 24), np.float32)
    np.testing.assert_array_equal(opened.backend.to_host(opened.backend.to_device(array)), array)


def test_what_is_fetched_is_what_was_there_when_it_was_asked_for(opened: Opened) -> None:
    arrays = [np.random.default_rng(seed).standard_normal((7, 24), np.float32) for seed in range(4)]
    waiting = []
    for array in arrays:
        tensor = opened.backend.to_device(array.copy())
        waiting.append(opened.backend.fetch(tensor))
        del tensor  # its memory goes to the next
    for fetched, array in zip(waiting, arrays, strict=True):
        np.testing.assert_array_equal(fetched(), array)


def test_a_slice_of_an_array_can_be_sent(opened: Opened) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    np.testing.assert_array_equal(opened.backend.to_host(opened.backend.to_device(array)), array)


def test_latents_are_cut_and_patches_joined_as_on_the_host(opened: Opened) -> None:
    rng, backend = np.random.default_rng(0), opened.backend
    latents, patches = rng.standard_normal((16, 2, 6, 4), np.float32), rng.standard_normal((12, 64), np.float32)
    np.testing.assert_array_equal(backend.to_host(backend.cut_patches(latents, ARCH)), patchify(latents, ARCH))
    joined = backend.join_patches(backend.to_device(patches), (2, 3, 2), ARCH)
    np.testing.assert_array_equal(backend.to_host(joined), unpatchify(patches, (2, 3, 2), ARCH))


def test_an_input_of_another_width_is_refused_by_name(opened: Opened) -> None:
    tensors = opened.send(opened.tensors(5))
    tensors["hidden_states"] = opened.send_one(torch.zeros(5, ARCH.dim + 8), opened.stage.inputs[0].dtype)
    with pytest.raises(EngineError, match=r"transformer\.head: hidden_states has shape \[5, 136\]"):
        opened.engine.run(tensors)


def test_a_file_that_is_no_engine_is_refused(opened: Opened, tmp_path: Path) -> None:
    damaged = tmp_path / opened.file.name
    damaged.write_bytes(opened.file.read_bytes()[:100])
    with pytest.raises(EngineError, match=r"transformer\.head"):
        opened.backend.open_engine(damaged, opened.stage)


def test_an_engine_of_another_stage_is_refused(opened: Opened) -> None:
    other = next(stage for stage in network_stages(VARIANT, "transformer") if stage.name == "transformer.embed")
    with pytest.raises(EngineError):
        opened.backend.open_engine(opened.file, in_precision(other, opened.precision))


def _options(plan: TargetPlan, stage: StageSpec) -> EngineOptions:
    """An engine for this machine's GPU and every number of tokens that is tried, where engines are for some only."""
    if plan.sizes is None:
        return EngineOptions()
    tried = Extent(smallest=1, usual=37, largest=64)
    return EngineOptions(architectures=(device.find_architecture(),), profile=dict.fromkeys(stage.symbols, tried))


def _kernels(plan: Any) -> Callable[[], dict[str, bytes]]:
    return lambda: {name: plan.compile_kernels(name) for name in plan.architectures}
