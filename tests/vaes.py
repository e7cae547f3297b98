"""The VAE's oracle and this project's modules side by side: chunk by chunk, with toy numbers of both VAEs."""

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from export.modules.vae import VAE_MODULES
from runtime.specs import StageSpec
from runtime.variants import VARIANTS, VaeArch, Variant
from tests.toys import ToyConfig

CONFIGS = {
    "wan's levels": ToyConfig(),
    "few levels": ToyConfig(vae_base_dim=12, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False)),
    "late time": ToyConfig(num_res_blocks=1, temporal_downsample=(True, True, False)),
    "no time": ToyConfig(dim_mult=(1, 3), num_res_blocks=1, temporal_downsample=(False,)),
    "wan 2.2's levels": ToyConfig(vae_2_2=True, num_res_blocks=1),
    "few 2.2 levels": ToyConfig(
        vae_2_2=True, vae_base_dim=12, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False)
    ),
    "narrowing 2.2 levels": ToyConfig(vae_2_2=True, dim_mult=(2, 1, 1), num_res_blocks=2, temporal_downsample=(False, True)),
}


def toy_variant(arch: VaeArch) -> Variant:
    return replace(VARIANTS["wan2.1-t2v-1.3b"], vae=arch)


def random_latents(arch: VaeArch, num_frames: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(arch.z_dim, num_frames, *size, generator=torch.Generator().manual_seed(num_frames))


def random_frames(arch: VaeArch, num_latents: int, size: tuple[int, int]) -> torch.Tensor:
    """Frames in -1..1 that encode to that many latent frames of that size."""
    num_frames = 1 + (num_latents - 1) * arch.temporal_stride
    height, width = (extent * arch.spatial_stride for extent in size)
    return torch.rand(3, num_frames, height, width, generator=torch.Generator().manual_seed(num_latents)) * 2 - 1


def frame_groups(frames: torch.Tensor, arch: VaeArch) -> list[torch.Tensor]:
    starts = range(1, frames.shape[1], arch.temporal_stride)
    return [frames[:, :1], *(frames[:, start : start + arch.temporal_stride] for start in starts)]


def diffusers_decoded(network: Any, latents: torch.Tensor) -> list[torch.Tensor]:
    """What diffusers' decoder gives for each latent frame, before it clamps."""
    network.clear_cache()
    hidden = network.post_quant_conv(latents[None])
    chunks = []
    for index in range(latents.shape[1]):
        network._conv_idx = [0]
        frame = hidden[:, :, index : index + 1]
        chunk = network.decoder(frame, feat_cache=network._feat_map, feat_idx=network._conv_idx, first_chunk=index == 0)
        chunks.append(unpatchify(chunk, patch_size=network.config.patch_size or 1)[0])
    return chunks


def diffusers_encoded(network: Any, groups: list[torch.Tensor]) -> list[torch.Tensor]:
    """The mean that diffusers' encoder gives for each group of frames."""
    network.clear_cache()
    chunks = []
    for group in groups:
        network._enc_conv_idx = [0]
        folded = patchify(group[None], patch_size=network.config.patch_size or 1)
        hidden = network.encoder(folded, feat_cache=network._enc_feat_map, feat_idx=network._enc_conv_idx)
        chunks.append(network.quant_conv(hidden)[0, : network.config.z_dim])
    return chunks


def eager_stages(arch: VaeArch, stages: tuple[StageSpec, ...], tensors: dict[str, torch.Tensor]) -> dict[str, torch.nn.Module]:
    """The modules of the stages with their weights, by the stages' names."""
    modules = {}
    for stage in stages:
        modules[stage.name] = module = VAE_MODULES[stage.name](arch).requires_grad_(False)
        module.load_state_dict({weight.name: tensors[weight.name] for weight in stage.weights})
    return modules


class EagerBackend:
    """NumPy arrays in and out."""

    def to_device(self, array: Any, dtype: Any = None) -> Any:
        return array

    def to_host(self, tensor: Any) -> Any:
        return tensor

    def fetch(self, tensor: Any) -> Any:
        return lambda: tensor


class EagerVae:
    """Runs a network's modules where a `Component` would run its engines; nothing is traced or built."""

    def __init__(
        self,
        arch: VaeArch,
        stages: tuple[StageSpec, ...],
        tensors: dict[str, torch.Tensor],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.backend = EagerBackend()
        self._stages = {stage.name: stage for stage in stages}
        self._modules = {name: module.to(dtype) for name, module in eager_stages(arch, stages, tensors).items()}

    def stage(self, name: str) -> StageSpec:
        return self._stages[name]

    def run(self, stage: str, inputs: dict[str, Any]) -> dict[str, Any]:
        given = (torch.from_numpy(inputs[tensor.name]) for tensor in self._stages[stage].inputs)
        made = self._modules[stage](*given)
        outputs = made if isinstance(made, tuple) else (made,)
        return {tensor.name: output.numpy() for tensor, output in zip(self._stages[stage].outputs, outputs, strict=True)}
