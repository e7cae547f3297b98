"""The peers of the `dit` suite compute what they should, as far as a CPU can tell."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from benchmarks.dit_onnxruntime import RandomTensors, TorchBackend, stage_dtype
from benchmarks.dit_peers import Case, open_diffusers
from benchmarks.offload_diffusers import open_group_offload
from benchmarks.ort_graphs import contributed_graph
from export.graphs import stage_graph
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.bundle import open_bundle
from runtime.component import Component
from runtime.geometry import VideoSize, latent_shape
from runtime.schedulers import Conventions
from runtime.specs import DType, StageSpec
from runtime.stages import network_stages
from runtime.transformer import Transformer
from runtime.variants import VARIANTS
from tests.conftest import Toy
from tests.harness import relative_error
from tests.test_random_file import tiny_variant
from tests.tolerances import TOLERANCES

CPU = torch.device("cpu")
BFLOAT16 = onnx.TensorProto.BFLOAT16


class AsNumpy:
    """The same random weights for the `cpu` target."""

    def __init__(self, weights: RandomTensors) -> None:
        self._weights = weights

    def stage_weights(self, stage: StageSpec, block: int | None) -> dict[str, Any]:
        return {name: tensor.numpy() for name, tensor in self._weights.stage_weights(stage, block).items()}


def test_contributed_operators_predict_the_same_noise(one_expert: Toy, tmp_path: Path) -> None:
    bundle = open_bundle(one_expert.original)
    variant, engines = bundle.manifest.variant, bundle.manifest.targets["cpu"].engines
    stages = network_stages(variant, "transformer")
    ours = {stage.name: bundle.file(engines[stage.name]) for stage in stages}
    theirs = {}
    for name, file in ours.items():
        theirs[name] = tmp_path / name
        theirs[name].write_bytes(contributed_graph(onnx.load(file), DType.F32).SerializeToString())
    weights = RandomTensors(CPU, DType.F32)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((16, 2, 6, 10), np.float32)
    prompt = rng.standard_normal((7, variant.transformer.text_dim), np.float32)
    predicted = []
    for backend, files, source in (
        (OnnxRuntimeBackend(num_threads=1), ours, AsNumpy(weights)),
        (TorchBackend(CPU, stream=None, dtype=DType.F32), theirs, weights),
    ):
        with Component(backend, stages, files, source) as component:
            transformer = Transformer(component, variant.transformer, latents.shape, conventions=Conventions.ORIGINAL)
            predicted.append(transformer.predict(latents, 731, [transformer.encode_text(prompt)])[0])
    assert relative_error(predicted[1], predicted[0]) < TOLERANCES["stage, fp32"]


def test_a_graph_in_bf16_has_no_float32_left_and_no_function() -> None:
    variant = tiny_variant()
    block_in = next(stage for stage in network_stages(variant, "transformer") if stage.name == "transformer.block_in")
    graph = contributed_graph(stage_graph(variant, block_in), DType.BF16)
    assert {value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)} == {BFLOAT16}
    assert not graph.functions
    operators = {(node.domain, node.op_type) for node in graph.graph.node}
    assert {("com.microsoft", "RotaryEmbedding"), ("", "SimplifiedLayerNormalization")} <= operators
    assert not any(domain == "wanrt" for domain, _ in operators)


def test_only_the_time_embedding_stays_in_float32() -> None:
    stages = network_stages(VARIANTS["wan2.1-t2v-14b"], "transformer")
    assert [s.name for s in stages if stage_dtype(s, DType.BF16) is DType.F32] == ["transformer.time_embed"]


def test_a_graph_with_float_constants_is_refused() -> None:
    graph = onnx.ModelProto()
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "one"))
    with pytest.raises(ValueError, match="float constants"):
        contributed_graph(graph, DType.BF16)


def test_diffusers_blocks_in_host_memory_give_what_they_give_on_the_device() -> None:
    variant = tiny_variant()
    case = Case("tiny", variant.name, VideoSize(width=64, height=64, num_frames=5))
    torch.manual_seed(0)
    with open_diffusers(variant, case, compiled=False, device="cpu") as forward:
        expected = forward()
    torch.manual_seed(0)
    with open_group_offload(variant, case, device="cpu") as forward_both:
        first, second = forward_both()
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)


def test_diffusers_forward_has_the_latents_shape_and_moves() -> None:
    variant = tiny_variant()
    size = VideoSize(width=64, height=64, num_frames=5)
    with open_diffusers(variant, Case("tiny", variant.name, size), compiled=False, device="cpu") as forward:
        predicted = forward()
    assert predicted.shape == (1, *latent_shape(size, vae=variant.vae))
    assert np.isfinite(predicted).all()
    assert predicted.std() > 0
