"""The image encoder's stages and the whole encoder against transformers' `CLIPVisionModel`, from either layout's tensors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from engines.targets.cuda.lower import lower_stage
from export.checkpoint.readers import PickleFile, SafetensorsFile, TensorFile
from export.checkpoint.sources import TensorSource, check_component
from export.graphs import stage_graph
from export.layouts import (
    image_encoder_diffusers_names,
    image_encoder_stored_names,
    image_encoder_tensors,
    image_encoder_unused,
)
from export.modules.image_encoder import IMAGE_ENCODER_MODULES
from runtime.backends.cuda.plan import Plan, StepKind
from runtime.backends.cuda.rehearsal import rehearse
from runtime.component import Component
from runtime.errors import BuildError, ExportError
from runtime.image_encoder import encode_images
from runtime.precision import in_precision
from runtime.specs import DType, Precision, StageSpec
from runtime.stages.image_encoder import image_encoder_stages
from runtime.strict_json import encode
from runtime.variants import VARIANTS, ImageEncoderArch, Variant
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES
from tests.toy_networks import TOY, ToyConfig, make_image_encoder, original_image_encoder_tensors

TOLERANCE = TOLERANCES["stage, fp32"]
CONFIGS = {
    "toy": replace(TOY, num_images=1),
    "wide heads": replace(
        TOY, num_images=1, clip_heads=3, clip_head_dim=20, clip_ffn_dim=52, clip_image_size=20, clip_patch_size=4
    ),
    "one patch": replace(
        TOY,
        num_images=1,
        clip_heads=1,
        clip_head_dim=7,
        clip_layers=4,
        clip_image_size=8,
        clip_patch_size=5,
        clip_quick_gelu=True,
    ),
}


class Toy(NamedTuple):
    arch: ImageEncoderArch
    network: Any
    component: Component
    folder: Path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Toy products gain nothing from more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def image_arch(config: ToyConfig) -> ImageEncoderArch:
    assert config.image_encoder is not None
    return config.image_encoder


def toy_variant(config: ToyConfig) -> Variant:
    return replace(VARIANTS["wan2.1-t2v-1.3b"], image_encoder=config.image_encoder)


def random_pixels(arch: ImageEncoderArch, num_images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_images)
    return torch.randn(num_images, 3, arch.image_size, arch.image_size, generator=generator)


def file_source(file: TensorFile, arch: ImageEncoderArch) -> TensorSource:
    unused = image_encoder_unused(arch, [stored.name for stored in file.tensors])
    return TensorSource("image_encoder", [file], names=image_encoder_stored_names(arch), ignored=unused)


def stored_in(layout: str, network: Any, arch: ImageEncoderArch, folder: Path) -> TensorSource:
    """The network written as each layout does and opened again; transformers before 5 put a prefix before the names."""
    if layout == "original":
        torch.save(original_image_encoder_tensors(network, arch), folder / "clip.pth")
        return file_source(PickleFile(folder / "clip.pth"), arch)
    prefix = "vision_model." if layout == "transformers 4" else ""
    save_file({prefix + name: tensor for name, tensor in network.state_dict().items()}, folder / "model.safetensors")
    return file_source(SafetensorsFile(folder / "model.safetensors"), arch)


@pytest.fixture(scope="module", params=list(CONFIGS))
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("engines")
    arch, network = image_arch(config), make_image_encoder(config, seed=3)
    source = stored_in("original", network, arch, folder)
    tensors = {name: source.read(name) for name in source.names()}
    with open_network(toy_variant(config), "image_encoder", tensors, folder) as component:
        yield Toy(arch, network, component, folder)


@pytest.mark.parametrize("num_images", [1, 2])
def test_features_are_the_hidden_states_before_the_last_layer(toy: Toy, num_images: int) -> None:
    pixels = random_pixels(toy.arch, num_images)
    theirs = toy.network(pixels, output_hidden_states=True).hidden_states[-2]  # [n, tokens, dim]
    ours = encode_images(toy.component, pixels.numpy(), toy.arch)
    assert ours.shape == (num_images * toy.arch.num_tokens, toy.arch.dim) and ours.dtype == np.float32
    assert relative_error(ours, theirs.flatten(0, 1)) < TOLERANCE


def test_every_stage_matches_what_transformers_computes_there(toy: Toy) -> None:
    arch, pixels = toy.arch, random_pixels(toy.arch, 1)
    theirs = toy.network(pixels, output_hidden_states=True).hidden_states
    cut = pixels[0].unfold(1, arch.patch_size, arch.patch_size).unfold(2, arch.patch_size, arch.patch_size)
    patches = cut.permute(1, 2, 0, 3, 4).reshape(arch.num_tokens - 1, -1).contiguous()
    embedded = toy.component.run("image_encoder.embed", {"patches": patches.numpy()})["hidden_states"]
    assert relative_error(embedded, theirs[0][0]) < TOLERANCE
    for block in range(arch.num_blocks):
        output = toy.component.run("image_encoder.block", {"hidden_states": theirs[block][0].numpy()}, block=block)
        assert relative_error(output["next_hidden_states"], theirs[block + 1][0]) < TOLERANCE


def test_the_gelu_is_not_approximated_by_tanh(toy: Toy) -> None:
    graph = onnx.load(toy.folder / "image_encoder.block.onnx").graph
    gelus = [node for node in graph.node if node.op_type == "Gelu"]
    assert len(gelus) == (0 if toy.arch.quick_gelu else 1)
    assert not [attribute for node in gelus for attribute in node.attribute if attribute.s == b"tanh"]


@pytest.mark.parametrize("layout", ["original", "transformers 4", "transformers 5"])
def test_every_layout_holds_the_same_tensors(layout: str, tmp_path: Path) -> None:
    config = CONFIGS["wide heads"]
    arch, network = image_arch(config), make_image_encoder(config, seed=3)
    source = stored_in(layout, network, arch, tmp_path)
    check_component(source, image_encoder_tensors(arch, original=layout == "original"))
    state, names = network.state_dict(), image_encoder_diffusers_names(arch)
    assert set(source.names()) == names.keys()
    for name, theirs in names.items():
        assert torch.equal(source.read(name).flatten(), state[theirs].flatten()), name


def cuda_plans(arch: ImageEncoderArch) -> dict[str, Plan]:
    """Each stage's plan for the `cuda` target in bf16."""
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], image_encoder=arch)
    stages = image_encoder_stages(arch)
    return {s.name: lower_stage(stage_graph(variant, s), in_precision(s, Precision.BF16)) for s in stages}


@pytest.mark.parametrize("arch", [image_arch(CONFIGS["toy"]), ImageEncoderArch()], ids=["toy", "true size"])
def test_the_cuda_plans_add_to_a_float32_stream_and_multiply_in_bf16(arch: ImageEncoderArch) -> None:
    plans = cuda_plans(arch)
    embed, block = plans["image_encoder.embed"], plans["image_encoder.block"]
    assert [step.kind.value for step in embed.steps] == ["linear", "embed_tokens"]
    assert {(buffer.shape, buffer.dtype) for buffer in embed.buffers} == {
        ((arch.num_tokens - 1, arch.dim), DType.F32),
        ((arch.num_tokens, arch.dim), DType.F32),
    }
    assert [step.kind.value for step in block.steps] == [
        *("layer_norm", "linear", "attention", "linear", "residual_layer_norm", "linear", "linear", "add"),
    ]
    buffers = {buffer.name: buffer for buffer in block.buffers}
    products = [step for step in block.steps if step.kind is StepKind.LINEAR]
    made = [buffers[step.outputs["out"]] for step in products]
    assert [(buffer.shape[1], buffer.dtype) for buffer in made] == [
        (3 * arch.dim, DType.BF16),
        (arch.dim, DType.F32),
        (arch.ffn_dim, DType.BF16),
        (arch.dim, DType.F32),
    ]
    assert [step.numbers["gelu"] for step in products] == [0, 0, 1, 0]
    dtypes = {weight.name: weight.dtype for stage in bf16_stages(arch) for weight in stage.weights}
    assert all(dtypes[step.inputs["bias"]] is buffer.dtype for step, buffer in zip(products, made, strict=True))


def test_the_cuda_target_refuses_an_activation_it_has_no_kernel_for() -> None:
    with pytest.raises(BuildError, match=r"image_encoder\.block: .* GELU only, not x · sigmoid"):
        cuda_plans(replace(image_arch(CONFIGS["toy"]), quick_gelu=True))


def test_memory_on_a_gpu_is_predicted_from_the_plans(tmp_path: Path) -> None:
    arch = ImageEncoderArch()
    files = {}
    for name, plan in cuda_plans(arch).items():
        files[name] = tmp_path / f"{name}.plan.json"
        files[name].write_text(encode(plan))
    pixels = np.zeros((2, 3, arch.image_size, arch.image_size), np.float32)

    def features(component: Component) -> None:
        assert encode_images(component, pixels, arch).shape == (2 * arch.num_tokens, arch.dim)

    layout = rehearse(bf16_stages(arch), files, features, attention=Precision.BF16)
    hidden_states, ffn = arch.num_tokens * arch.dim * 4, arch.num_tokens * arch.ffn_dim * 2
    assert 3 * hidden_states + ffn <= layout.nbytes <= 7 * hidden_states + ffn


def bf16_stages(arch: ImageEncoderArch) -> tuple[StageSpec, ...]:
    return tuple(in_precision(stage, Precision.BF16) for stage in image_encoder_stages(arch))


def test_one_layer_at_true_dimensions_matches_transformers() -> None:
    arch = ImageEncoderArch(num_layers=2)
    true = replace(TOY, num_images=1, clip_heads=16, clip_head_dim=80, clip_ffn_dim=5120, clip_layers=2)
    network = make_image_encoder(replace(true, clip_image_size=224, clip_patch_size=14), seed=5)
    assert arch.num_tokens == 257 and network.config.num_hidden_layers == 2
    hidden = torch.randn(257, 1280, generator=torch.Generator().manual_seed(0))
    layer = network.encoder.layers[0]
    state = layer.state_dict()
    qkv = {kind: torch.cat([state[f"self_attn.{part}_proj.{kind}"] for part in "qkv"]) for kind in ("weight", "bias")}
    parts = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2", "mlp.0": "mlp.fc1"}
    weights = {f"attn.qkv.{kind}": tensor for kind, tensor in qkv.items()}
    for ours, theirs in {**parts, "mlp.2": "mlp.fc2"}.items():
        weights |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    with torch.device("meta"):
        module = IMAGE_ENCODER_MODULES["image_encoder.block"](arch)
    given = torch.func.functional_call(module, weights, (hidden,))
    assert relative_error(given, layer(hidden[None], None)[0]) < TOLERANCE


def test_joined_q_k_and_v_of_another_height_are_refused(tmp_path: Path) -> None:
    arch = image_arch(CONFIGS["toy"])
    tensors = original_image_encoder_tensors(make_image_encoder(CONFIGS["toy"], seed=3), arch)
    tensors["visual.transformer.0.attn.to_qkv.weight"] = torch.zeros(3 * arch.dim + 1, arch.dim)
    save_file(tensors, tmp_path / "clip.safetensors")
    source = file_source(SafetensorsFile(tmp_path / "clip.safetensors"), arch)
    with pytest.raises(ExportError, match=r"blocks\.0\.attn\.q\.weight .*to_qkv"):
        check_component(source, image_encoder_tensors(arch, original=True))
