"""The transformer's stages and the whole network against diffusers' `WanTransformer3DModel`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from export.layouts import transformer_diffusers_names
from export.modules.transformer import TRANSFORMER_MODULES
from export.pack import pack_plan
from runtime.component import Component
from runtime.geometry import VideoSize, latent_shape, patchify, rope_tables, token_grid, unpatchify
from runtime.schedulers.schedule import Conventions
from runtime.stages.transformer import transformer_stages
from runtime.transformer import Transformer, timestep_features
from runtime.variants import VARIANTS, TransformerArch, Variant
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES
from tests.toys import TOYS, ToyConfig, make_transformer, original_tensors

TOLERANCE = TOLERANCES["stage, fp32"]
LATENTS = {"landscape": (16, 2, 6, 10), "portrait": (16, 3, 10, 4), "one frame": (16, 1, 4, 4), "one token": (16, 1, 2, 2)}


def toy_variant(config: ToyConfig) -> Variant:
    return replace(
        VARIANTS["wan2.1-t2v-1.3b"], transformer=config.transformer, text_encoder=config.text_encoder, vae=config.vae
    )


@pytest.fixture(scope="module", params=list(TOYS))
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ToyConfig, Any, Component]]:
    config = TOYS[request.param]
    network = make_transformer(config, seed=5)
    tensors = original_tensors(network, transformer_diffusers_names(config.transformer))
    with open_network(toy_variant(config), "transformer", tensors, tmp_path_factory.mktemp("engines")) as component:
        yield config, network, component


def prompt_and_latents(config: ToyConfig, shape: tuple[int, ...], seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(7, config.text_dim, generator=generator)
    return prompt, torch.randn(shape, generator=generator)


def padded(prompt: torch.Tensor) -> torch.Tensor:
    return torch.cat([prompt, prompt.new_zeros(512 - len(prompt), prompt.shape[1])])


@pytest.mark.parametrize("shape", LATENTS.values(), ids=list(LATENTS))
def test_whole_network_matches_diffusers(toy: tuple[ToyConfig, Any, Component], shape: tuple[int, ...]) -> None:
    config, network, component = toy
    prompt, latents = prompt_and_latents(config, shape)
    other, _ = prompt_and_latents(config, shape, seed=1)
    transformer = Transformer(component, config.transformer, shape, conventions=Conventions.DIFFUSERS)
    prompts = [transformer.encode_text(text.numpy()) for text in (prompt, other)]
    for timestep in (999, 437.5, 0):
        predicted = transformer.predict(latents.numpy(), timestep, prompts)
        for text, ours in zip((prompt, other), predicted, strict=True):
            theirs = network(latents[None], torch.tensor([timestep]), padded(text)[None], return_dict=False)[0][0]
            assert relative_error(ours, theirs) < TOLERANCE


def test_every_stage_matches_what_diffusers_computes_there(toy: tuple[ToyConfig, Any, Component]) -> None:
    config, network, component = toy
    shape = LATENTS["landscape"]
    prompt, latents = prompt_and_latents(config, shape)
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: (inputs, output)})

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if name in {"patch_embedding", "condition_embedder", "blocks.0", "blocks.1"}
        or name in {"blocks.1.attn1.to_out.0", "blocks.1.attn2.norm_k", "blocks.1.attn2.to_v"}
    ]
    network(latents[None], torch.tensor([500]), padded(prompt)[None], return_dict=False)
    for hook in hooks:
        hook.remove()
    temb, timestep_proj, context, _ = seen["condition_embedder"][1]

    ours = component.run("transformer.embed", {"patches": patchify(latents.numpy(), config.transformer)})
    assert relative_error(ours["hidden_states"], seen["patch_embedding"][1][0].flatten(1).T) < TOLERANCE
    features = timestep_features(500, config.freq_dim, conventions=Conventions.DIFFUSERS)
    time = component.run("transformer.time_embed", {"timestep_features": features})
    assert relative_error(time["temb"], temb) < TOLERANCE
    assert relative_error(time["time_modulation"].ravel(), timestep_proj[0]) < TOLERANCE
    ours = component.run("transformer.text_embed", {"encoder_hidden_states": padded(prompt).numpy()})
    assert relative_error(ours["context"], context[0]) < TOLERANCE
    if config.num_layers < 2:
        return
    kv = component.run("transformer.text_kv", {"context": context[0].numpy()}, block=1)
    assert relative_error(kv["text_key"], seen["blocks.1.attn2.norm_k"][1][0]) < TOLERANCE
    assert relative_error(kv["text_value"], seen["blocks.1.attn2.to_v"][1][0]) < TOLERANCE
    hidden = seen["blocks.0"][1][0].numpy()
    rope = dict(zip(("rope_cos", "rope_sin"), rope_tables(token_grid(shape, config.transformer), config.head_dim), strict=True))
    modulation = {"time_modulation": timestep_proj[0].reshape(6, -1).numpy()}
    qkv = component.run("transformer.block_in", {"hidden_states": hidden, **rope, **modulation}, block=1)
    attended = component.run("transformer.attention", qkv)
    assert relative_error(attended["attention_output"], seen["blocks.1.attn1.to_out.0"][0][0][0]) < TOLERANCE
    inputs = {"hidden_states": hidden, **attended, **modulation, **kv}
    ours = component.run("transformer.block_out", inputs, block=1)
    assert relative_error(ours["next_hidden_states"], seen["blocks.1"][1][0]) < TOLERANCE


def test_one_block_at_true_14b_dimensions_matches_diffusers(tmp_path: Path) -> None:
    arch = replace(VARIANTS["wan2.1-t2v-14b"].transformer, num_layers=1)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        block = WanTransformerBlock(arch.dim, arch.ffn_dim, arch.num_heads, "rms_norm_across_heads", True, arch.eps)
    block.to_empty(device="cpu").requires_grad_(False)
    for parameter in block.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
        parameter.copy_(torch.empty_like(parameter).uniform_(-spread, spread, generator=generator))
    names = transformer_diffusers_names(arch)
    state = block.state_dict()
    tensors = {old: state[new.removeprefix("blocks.0.")] for old, new in names.items() if new.startswith("blocks.0.")}
    grid = (2, 2, 3)
    hidden, context = torch.randn(12, arch.dim, generator=generator), torch.randn(512, arch.dim, generator=generator)
    modulation = torch.randn(6, arch.dim, generator=generator) * 0.3
    cos, sin = rope_tables(grid, arch.head_dim)
    doubled = [torch.from_numpy(table).repeat_interleave(2, dim=1)[None, :, None] for table in (cos, sin)]
    theirs = block(hidden[None], context[None], modulation[None], tuple(doubled))[0]

    weights = {
        packed.name: torch.cat([tensors[name] for name in packed.sources])
        for packed in pack_plan(block_stages(arch), num_blocks=1)
    }
    stages = {stage.name.partition(".")[2]: run_eagerly(stage, arch, weights) for stage in block_stages(arch)}
    key, value = stages["text_kv"](context)
    query_key_value = stages["block_in"](hidden, modulation, torch.from_numpy(cos), torch.from_numpy(sin))
    ours = stages["block_out"](hidden, stages["attention"](*query_key_value), modulation, key, value)
    assert relative_error(ours, theirs) < TOLERANCE


def block_stages(arch: TransformerArch) -> list[Any]:
    return [stage for stage in transformer_stages(arch) if stage.per_block or stage.name == "transformer.attention"]


def run_eagerly(stage: Any, arch: TransformerArch, weights: dict[str, torch.Tensor]) -> Any:
    with torch.device("meta"):
        module = TRANSFORMER_MODULES[stage.name](arch)
    own = {weight.name: weights[stage.weight_name(weight.name, 0)].reshape(weight.shape) for weight in stage.weights}
    return lambda *inputs: torch.func.functional_call(module, own, inputs)


def test_unpatchify_puts_channels_fastest_as_the_head_does() -> None:
    arch = VARIANTS["wan2.1-t2v-1.3b"].transformer
    grid = (1, 1, 1)
    patches = np.arange(64, dtype=np.float32)[None]  # value = (row * 2 + column) * 16 + channel
    latents = unpatchify(patches, grid, arch)
    assert latents.shape == (16, 1, 2, 2)
    assert latents[3, 0, 1, 0] == (1 * 2 + 0) * 16 + 3


def test_latent_shape_of_the_default_size() -> None:
    size = VideoSize(width=832, height=480, num_frames=81)
    variant = VARIANTS["wan2.1-t2v-1.3b"]
    assert latent_shape(size, vae=variant.vae) == (16, 21, 60, 104)
    assert token_grid((16, 21, 60, 104), variant.transformer) == (21, 30, 52)
