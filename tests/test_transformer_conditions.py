"""The image branch and timesteps per token against diffusers' `WanTransformer3DModel`: each stage, and whole predictions."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from export.graphs import stage_graph
from export.layouts import transformer_diffusers_names
from export.modules.transformer import TRANSFORMER_MODULES
from export.pack import pack_plan
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.geometry import rope_tables
from runtime.schedulers.schedule import Conventions
from runtime.stages.transformer import transformer_stages
from runtime.transformer import ImageKeyValues, Transformer
from runtime.variants import VARIANTS, TransformerArch, Variant
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES
from tests.toy_networks import NARROW_TOY, TOY, WIDE_TOY, ToyConfig, make_transformer

TOLERANCE = TOLERANCES["stage, fp32"]
CONFIGS = {
    "one image": replace(TOY, in_channels=36, num_images=1, clip_head_dim=1),
    "two images": replace(WIDE_TOY, in_channels=36, num_images=2, clip_heads=3, clip_head_dim=7, num_layers=2),
    "clean frames": replace(NARROW_TOY, num_heads=3, in_channels=48, out_channels=48, per_token_timesteps=True),
    "image and clean frames": replace(TOY, head_dim=14, num_layers=1, num_images=1, per_token_timesteps=True),
}
TRACED = ("two images", "clean frames")  # run as engines; the others, to spare time, as the modules they are traced from
GRIDS = {"landscape": (2, 6, 10), "portrait": (3, 10, 4), "one token": (1, 2, 2)}
TRUE_FLF2V = VARIANTS["wan2.1-flf2v-14b"].transformer
TRUE_TI2V = VARIANTS["wan2.2-ti2v-5b"].transformer


class Toy(NamedTuple):
    config: ToyConfig
    arch: TransformerArch
    network: Any
    component: Any


class Inputs(NamedTuple):
    latents: torch.Tensor
    prompt: torch.Tensor
    features: torch.Tensor | None


class EagerComponent:
    """Runs a transformer's modules in place of its engines, with weights given by original name."""

    def __init__(self, arch: TransformerArch, tensors: Mapping[str, torch.Tensor]) -> None:
        self.backend = OnnxRuntimeBackend(num_threads=1)
        self._arch, self._tensors = arch, tensors
        self._stages = {stage.name: stage for stage in transformer_stages(arch)}

    def run(self, stage: str, inputs: Mapping[str, Any], *, block: int | None = None, consumed: Any = ()) -> dict[str, Any]:
        spec = self._stages[stage]
        packed = {tensor.name: tensor for tensor in pack_plan([spec], num_blocks=self._arch.num_layers)}
        own = {}
        for weight in spec.weights:
            sources = packed[spec.weight_name(weight.name, block)].sources
            joined = torch.cat([self._tensors[source] for source in sources])
            own[weight.name] = joined.reshape([int(axis) for axis in weight.shape])
        with torch.device("meta"):
            module = TRANSFORMER_MODULES[stage](self._arch)
        given = tuple(torch.from_numpy(inputs[tensor.name]) for tensor in spec.inputs)
        outputs = torch.func.functional_call(module, own, given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {tensor.name: output.detach().numpy() for tensor, output in zip(spec.outputs, outputs, strict=True)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Toy products gain nothing from more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def variant_of(arch: TransformerArch) -> Variant:
    return replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=arch)


@pytest.fixture(scope="module", params=list(CONFIGS))
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    config = CONFIGS[request.param]
    arch, network = config.transformer, make_transformer(config, seed=6)
    state = network.state_dict()
    tensors = {name: state[theirs].contiguous() for name, theirs in transformer_diffusers_names(arch).items()}
    if request.param not in TRACED:
        yield Toy(config, arch, network, EagerComponent(arch, tensors))
        return
    with open_network(variant_of(arch), "transformer", tensors, tmp_path_factory.mktemp("engines")) as component:
        yield Toy(config, arch, network, component)


def inputs_of(arch: TransformerArch, grid: tuple[int, int, int]) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((arch.in_channels, *grid), generator=generator)
    prompt = torch.zeros(arch.text_len, arch.text_dim)
    prompt[:7] = torch.randn(7, arch.text_dim, generator=generator)
    if arch.image_dim is None:
        return Inputs(latents, prompt, None)
    return Inputs(latents, prompt, torch.randn(arch.image_tokens, arch.image_dim, generator=generator))


def oracle(toy: Toy, inputs: Inputs, timestep: Any, num_images: int) -> Any:
    """What diffusers predicts; it takes features as [images, tokens, width]."""
    features = inputs.features
    if features is not None:
        features = features.reshape(num_images, -1, features.shape[-1])
    return toy.network(inputs.latents[None], timestep, inputs.prompt[None], features, return_dict=False)[0][0]


def encoded_image(transformer: Transformer, inputs: Inputs) -> ImageKeyValues | None:
    return None if inputs.features is None else transformer.encode_image(inputs.features.numpy())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_prediction_with_one_timestep_for_all_tokens_matches_diffusers(toy: Toy, grid: tuple[int, int, int]) -> None:
    inputs = inputs_of(toy.arch, grid)
    transformer = Transformer(toy.component, toy.arch, inputs.latents.shape, conventions=Conventions.DIFFUSERS)
    prompts, image = [transformer.encode_text(inputs.prompt[:7].numpy())], encoded_image(transformer, inputs)
    for timestep in (999, 437.5, 0):
        (ours,) = transformer.predict(inputs.latents.numpy(), timestep, prompts, image=image)
        theirs = oracle(toy, inputs, torch.tensor([timestep]), toy.config.num_images)
        assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize("clean_frames", [0, 1, 2, 3])
def test_tokens_of_clean_frames_are_at_timestep_zero(toy: Toy, grid: tuple[int, int, int], clean_frames: int) -> None:
    inputs = inputs_of(toy.arch, grid)
    transformer = Transformer(toy.component, toy.arch, inputs.latents.shape, conventions=Conventions.DIFFUSERS)
    prompts, image = [transformer.encode_text(inputs.prompt[:7].numpy())], encoded_image(transformer, inputs)
    if not toy.arch.per_token_timesteps and clean_frames:
        with pytest.raises(ValueError, match="one timestep for all tokens"):
            transformer.predict(inputs.latents.numpy(), 500, prompts, image=image, clean_frames=clean_frames)
    elif clean_frames <= grid[0]:
        (ours,) = transformer.predict(inputs.latents.numpy(), 500, prompts, image=image, clean_frames=clean_frames)
        timesteps = torch.full((grid[0], grid[1] * grid[2] // 4), 500.0)
        timesteps[:clean_frames] = 0
        theirs = oracle(toy, inputs, timesteps.reshape(1, -1), toy.config.num_images)
        assert relative_error(ours, theirs) < TOLERANCE


def test_image_stages_match_what_diffusers_computes_there(toy: Toy) -> None:
    if toy.arch.image_dim is None:
        assert not [stage for stage in transformer_stages(toy.arch) if "image" in stage.name]
        return
    seen: dict[str, Any] = {}
    block = f"blocks.{toy.arch.num_layers - 1}"
    watched = ("condition_embedder.image_embedder", f"{block}.attn2.norm_added_k", f"{block}.attn2.add_v_proj")

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output})

    hooks = [toy.network.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    inputs = inputs_of(toy.arch, GRIDS["landscape"])
    oracle(toy, inputs, torch.tensor([500]), toy.config.num_images)
    for hook in hooks:
        hook.remove()
    assert inputs.features is not None
    given = {"encoder_hidden_states_image": inputs.features.numpy()}
    context = toy.component.run("transformer.image_embed", given)
    pair = toy.component.run("transformer.image_kv", context, block=toy.arch.num_layers - 1)
    for name, ours in zip(watched, (context["image_context"], pair["image_key"], pair["image_value"]), strict=True):
        assert relative_error(ours, seen[name][0]) < TOLERANCE


def test_an_image_is_required_by_an_image_branch_and_refused_without_one(toy: Toy) -> None:
    inputs = inputs_of(toy.arch, GRIDS["one token"])
    transformer = Transformer(toy.component, toy.arch, inputs.latents.shape, conventions=Conventions.DIFFUSERS)
    prompts = [transformer.encode_text(inputs.prompt[:7].numpy())]
    if toy.arch.image_dim is None:
        with pytest.raises(ValueError, match="no image branch"):
            transformer.encode_image(np.zeros((4, 4), np.float32))
        with pytest.raises(ValueError, match="image given"):
            transformer.predict(inputs.latents.numpy(), 500, prompts, image=ImageKeyValues((), ()))
    else:
        with pytest.raises(ValueError, match="image missing"):
            transformer.predict(inputs.latents.numpy(), 500, prompts)


@pytest.mark.parametrize("arch", [TRUE_FLF2V, TRUE_TI2V], ids=["image branch", "clean frames"])
def test_stages_trace_at_true_dimensions(arch: TransformerArch) -> None:
    own = {"image_embed", "image_kv", "block_out"} if arch.image_dim else {"block_in", "block_out"}
    for stage in transformer_stages(arch):
        if stage.name.partition(".")[2] in own:
            graph = stage_graph(variant_of(arch), stage)
            assert [value.name for value in graph.graph.input][: len(stage.inputs)] == [tensor.name for tensor in stage.inputs]


def test_one_block_at_true_5b_dimensions_matches_diffusers() -> None:
    arch = replace(TRUE_TI2V, num_layers=1)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        block = WanTransformerBlock(arch.dim, arch.ffn_dim, arch.num_heads, "rms_norm_across_heads", True, arch.eps)
    block.to_empty(device="cpu").requires_grad_(False)
    for parameter in block.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
        parameter.copy_(torch.empty_like(parameter).uniform_(-spread, spread, generator=generator))
    hidden, context = (torch.randn(rows, arch.dim, generator=generator) for rows in (12, arch.text_len))
    time_modulation = torch.randn(2, 6 * arch.dim, generator=generator) * 0.3
    cos, sin = rope_tables((2, 2, 3), arch.head_dim)
    doubled = tuple(torch.from_numpy(table).repeat_interleave(2, dim=1)[None, :, None] for table in (cos, sin))
    per_token = time_modulation.view(2, 6, arch.dim).repeat_interleave(6, dim=0)  # [N, 6, D], six tokens a frame
    theirs = block(hidden[None], context[None], per_token[None], doubled)[0]

    names = {old: new.removeprefix("blocks.0.") for old, new in transformer_diffusers_names(arch).items()}
    state = block.state_dict()
    ours = EagerComponent(arch, {old: state[new] for old, new in names.items() if old.startswith("blocks.")})
    shared = {"time_modulation": time_modulation.numpy(), "num_clean": np.array([6]), "hidden_states": hidden.numpy()}
    qkv = ours.run("transformer.block_in", {**shared, "rope_cos": cos, "rope_sin": sin}, block=0)
    text = ours.run("transformer.text_kv", {"context": context.numpy()}, block=0)
    given = {**shared, **ours.run("transformer.attention", qkv), **text}
    assert relative_error(ours.run("transformer.block_out", given, block=0)["next_hidden_states"], theirs) < TOLERANCE
