"""The `cuda` target's transformer against the fp32 module on the CPU: every stage, and whole predictions."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.layouts import transformer_tensors
from export.modules.transformer import TRANSFORMER_MODULES
from export.pack import pack_plan
from runtime.component import Component
from runtime.precision import in_precision
from runtime.schedulers import Conventions
from runtime.specs import DType, Precision, StageSpec, TensorSpec
from runtime.stages.transformer import transformer_stages
from runtime.transformer import Transformer
from runtime.variants import VARIANTS, TransformerArch
from tests.gpu.bits import from_bits
from tests.gpu.networks import open_cuda
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

TOY = TransformerArch(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64)
ARCHS = {
    "toy": TOY,
    "narrow": TransformerArch(dim=384, ffn_dim=896, num_heads=3, num_layers=2, text_dim=48, freq_dim=64),
    "timestep per token": replace(TOY, num_layers=2, per_token_timesteps=True),
    "image": replace(TOY, num_layers=2, image_dim=96, image_tokens=20, image_positions=True),
}
LATENTS = (16, 3, 10, 14)


def random_weights(arch: TransformerArch, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in transformer_tensors(arch).items():
        noise = torch.randn(shape, generator=generator)
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        spread = 0.3 if name.endswith("modulation") else fan_in**-0.5 if name.endswith("weight") and len(shape) > 1 else 0.1
        tensors[name] = noise * spread + float(name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")))
    return tensors


@pytest.fixture(scope="module", params=[Precision.BF16, Precision.FP8])
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture(scope="module", params=list(ARCHS))
def networks(
    request: pytest.FixtureRequest, precision: Precision, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TransformerArch, Component, Component]]:
    arch = ARCHS[request.param]
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=arch)
    tensors = random_weights(arch, seed=3)
    folder = tmp_path_factory.mktemp("networks")
    with (
        open_network(variant, "transformer", tensors, folder / "cpu") as cpu,
        open_cuda(variant, "transformer", tensors, folder, precision=precision) as gpu,
    ):
        yield arch, cpu, gpu


def test_whole_prediction_matches_the_cpu(
    networks: tuple[TransformerArch, Component, Component], precision: Precision, record_property: Any
) -> None:
    arch, cpu, gpu = networks
    generator = np.random.default_rng(0)
    latents = generator.standard_normal(LATENTS, np.float32)
    prompts = [generator.standard_normal((length, arch.text_dim), np.float32) for length in (5, 11)]
    results = []
    for component in (cpu, gpu):
        transformer = Transformer(component, arch, LATENTS, conventions=Conventions.ORIGINAL)
        encoded = [transformer.encode_text(prompt) for prompt in prompts]
        results.append(transformer.predict(latents, 731, encoded, **conditions(transformer, arch)))
    for ours, expected in zip(results[1], results[0], strict=True):
        error = relative_error(ours, expected)
        record_property(f"transformer {precision}", error)
        assert error < TOLERANCES[f"transformer, cuda {precision}"]


def test_every_stage_matches_its_fp32_module(
    networks: tuple[TransformerArch, Component, Component], precision: Precision, record_property: Any
) -> None:
    arch, _, gpu = networks
    for stage in transformer_stages(arch):
        inputs = {tensor.name: random_input(tensor, seed=i) for i, tensor in enumerate(stage.inputs)}
        weights = random_weights(arch, seed=3)
        expected = run_module(stage, arch, weights, inputs)
        narrow = in_precision(stage, precision)
        sent = {tensor.name: to_device(gpu, inputs[tensor.name], tensor.dtype) for tensor in narrow.inputs}
        given = gpu.run(stage.name, sent, block=1)
        for tensor, theirs in zip(narrow.outputs, expected, strict=True):
            error = relative_error(to_float(gpu.backend.to_host(given[tensor.name]), tensor.dtype), theirs)
            record_property(f"{stage.name} {tensor.name} {precision}", error)
            assert error < TOLERANCES[f"stage, cuda {precision}"], (stage.name, tensor.name, error)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_stages_around_fp8_attention_match_their_fp32_modules(
    tmp_path: Path, precision: Precision, record_property: Any
) -> None:
    for name, error in errors_around_fp8_attention(TOY, tmp_path, precision, tokens=300):
        record_property(f"{name} {precision} fp8 attention", error)
        assert error < TOLERANCES["stage, cuda fp8"], (name, error)


def test_fp8_attention_stays_near_bf16_attention(tmp_path: Path) -> None:
    arch = TOY
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=arch)
    tensors = random_weights(arch, seed=3)
    latents = np.random.default_rng(2).standard_normal(LATENTS, np.float32)
    results = []
    for attention in (Precision.BF16, Precision.FP8):
        with open_cuda(variant, "transformer", tensors, tmp_path, precision=Precision.FP8, attention=attention) as gpu:
            transformer = Transformer(gpu, arch, LATENTS, conventions=Conventions.ORIGINAL)
            prompt = transformer.encode_text(np.ones((3, arch.text_dim), np.float32))
            results.append(transformer.predict(latents, 500, [prompt])[0])
    assert 0 < relative_error(results[1], results[0]) < TOLERANCES["transformer, cuda fp8"]


def test_same_inputs_give_the_same_bits(networks: tuple[TransformerArch, Component, Component]) -> None:
    arch, _, gpu = networks
    latents = np.random.default_rng(1).standard_normal(LATENTS, np.float32)
    transformer = Transformer(gpu, arch, LATENTS, conventions=Conventions.ORIGINAL)
    prompt = transformer.encode_text(np.ones((3, arch.text_dim), np.float32))
    given = conditions(transformer, arch)
    first, second = (transformer.predict(latents, 500, [prompt], **given)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def errors_around_fp8_attention(
    arch: TransformerArch, folder: Path, precision: Precision, *, tokens: int
) -> Iterator[tuple[str, float]]:
    """Every output from the queries to the block's end, each stage given what the last one gave, against the fp32 modules."""
    variant, weights = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=arch), random_weights(arch, seed=3)
    weights["blocks.1.self_attn.v.bias"] += 2 * torch.randn(
        arch.dim, generator=torch.Generator().manual_seed(9)
    )  # columns with a mean
    names = ("transformer.block_in", "transformer.attention", "transformer.block_out")
    stages = {stage.name: stage for stage in transformer_stages(arch)}
    options = {"precision": precision, "attention": Precision.FP8}
    with open_cuda(variant, "transformer", weights, folder, only=names, **options) as gpu:
        known: dict[str, Any] = {}  # what the stages gave, by name, on the device
        for name in names:
            stage = in_precision(stages[name], precision)
            inputs = {
                tensor.name: read(gpu, known[tensor.name], tensor.dtype)
                if tensor.name in known
                else random_input(tensor, seed=i, tokens=tokens)
                for i, tensor in enumerate(stage.inputs)
            }
            sent = {t.name: known.get(t.name) or to_device(gpu, inputs[t.name], t.dtype) for t in stage.inputs}
            known |= gpu.run(name, sent, block=1 if stage.per_block else None)
            for tensor, theirs in zip(stage.outputs, run_module(stages[name], arch, weights, inputs), strict=True):
                error = relative_error(read(gpu, known[tensor.name], tensor.dtype), theirs)
                yield f"{name} {tensor.name}", error


def conditions(transformer: Transformer, arch: TransformerArch) -> dict[str, Any]:
    """What `predict` takes besides the prompts: an image, or a clean first frame, where the architecture has such a thing."""
    if arch.image_dim is None:
        return {"clean_frames": int(arch.per_token_timesteps)}
    features = np.random.default_rng(5).standard_normal((arch.image_tokens, arch.image_dim), np.float32)
    return {"image": transformer.encode_image(features)}


def random_input(tensor: TensorSpec, *, seed: int, tokens: int = 37) -> torch.Tensor:
    if tensor.dtype is DType.I64:
        return torch.tensor([tokens // 3])  # num_clean
    fixed = [extent if isinstance(extent, int) else tokens for extent in tensor.shape]
    return torch.randn(fixed, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def run_module(
    stage: StageSpec, arch: TransformerArch, weights: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> Any:
    with torch.device("meta"):
        module = TRANSFORMER_MODULES[stage.name](arch)
    packed = {tensor.name: tensor for tensor in pack_plan([stage], num_blocks=arch.num_layers)}
    own = {}
    for weight in stage.weights:
        tensor = packed[stage.weight_name(weight.name, 1)]
        own[weight.name] = torch.cat([weights[name] for name in tensor.sources]).reshape(tensor.shape)
    outputs = torch.func.functional_call(module, own, tuple(inputs.values()))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def to_device(component: Component, tensor: torch.Tensor, dtype: DType) -> Any:
    if dtype is DType.BF16:
        return component.backend.to_device(tensor.bfloat16().view(torch.uint16).numpy(), dtype)
    return component.backend.to_device(tensor.numpy(), dtype)


def to_float(array: Any, dtype: DType) -> Any:
    return torch.from_numpy(array).view(torch.bfloat16).float().numpy() if dtype is DType.BF16 else array


def read(component: Component, array: Any, dtype: DType) -> torch.Tensor:
    """What an array stands for: fp8 attention's with their unit, if they have one."""
    host = component.backend.to_host(array)
    if array.dtype is not DType.F8_E4M3:
        return torch.from_numpy(to_float(host, dtype))
    values = torch.from_numpy(from_bits(host, array.dtype)).float()
    if array.unit is None:
        return values
    scale, offset = (torch.from_numpy(component.backend.to_host(part)) for part in (array.unit.scale, array.unit.offset))
    return values * scale + offset
