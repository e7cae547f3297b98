"""The VAE of both peers at full size, with the same random weights: diffusers' network, and ours opened on the `cuda` target."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.gpu import cuda_engines, cuda_kernels
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.plan import Plan
from runtime.backends.cuda.rehearsal import rehearse
from runtime.bundle import Bundle
from runtime.component import Component
from runtime.errors import EngineError
from runtime.geometry import Float32, VideoSize
from runtime.specs import DType, Precision, StageSpec, resolve
from runtime.stages.vae import COLOURS, DECODE_HIGH, DECODE_LOW, ENCODE_HIGH, ENCODE_LOW
from runtime.strict_json import decode
from runtime.variants import VaeArch, Variant

FIRST = {pair[0] for pair in (DECODE_LOW, DECODE_HIGH, ENCODE_HIGH, ENCODE_LOW)}
"""Stages that run once a video; the others, once for each further latent frame."""


class BoundWeights:
    """Weights of a network as a target's stages declare them, made from tensors on the GPU."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._bound: dict[str, torch.Tensor] = {}

    def stage_weights(self, stage: StageSpec, block: int | None) -> dict[str, DeviceArray]:
        bound = {}
        for weight in stage.weights:
            shape = tuple(int(axis) for axis in weight.shape)
            if weight.name not in self._bound:
                tensor = self._tensors[weight.name]
                if weight.channels_last:
                    tensor = tensor.movedim(1, -1) if tensor.ndim > 1 else tensor
                    margins = [wanted - given for given, wanted in zip(tensor.shape, shape, strict=True)]
                    tensor = functional.pad(tensor, [side for margin in reversed(margins) for side in (0, margin)])
                wide = weight.dtype is DType.F32
                self._bound[weight.name] = tensor.to(torch.float32 if wide else torch.bfloat16).contiguous()
                torch.cuda.synchronize()
            row = int(np.prod(shape[1:]))
            bound[weight.name] = DeviceArray(self._bound[weight.name].data_ptr(), shape, weight.dtype, row, None)
        return bound


def random_network(variant: Variant) -> Any:
    """diffusers' VAE with weights that keep the spread of activations about one."""
    from diffusers import AutoencoderKLWan

    arch = variant.vae
    with torch.device("cuda"):
        network = AutoencoderKLWan(**diffusers_config(arch)).requires_grad_(False).eval()
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in network.named_parameters():
        if "gamma" in name:
            parameter.uniform_(0.8, 1.2, generator=generator)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.normal_(0, fan_in**-0.5, generator=generator)
    return network


def diffusers_config(arch: VaeArch) -> dict[str, Any]:
    """The constructor's arguments for an architecture."""
    colours = 3 * arch.patch_size**2
    return {
        "base_dim": arch.base_dim,
        "decoder_base_dim": arch.decoder_base_dim,
        "z_dim": arch.z_dim,
        "dim_mult": list(arch.dim_mult),
        "num_res_blocks": arch.num_res_blocks,
        "temperal_downsample": list(arch.temporal_downsample),
        "latents_mean": list(arch.latents_mean),
        "latents_std": list(arch.latents_std),
        "is_residual": arch.residual_levels,
        "in_channels": colours,
        "out_channels": colours,
        "patch_size": arch.patch_size if arch.patch_size > 1 else None,
        "scale_factor_temporal": arch.temporal_stride,
        "scale_factor_spatial": arch.spatial_stride,
    }


@contextmanager
def open_ours(
    bundle: Bundle, network: str, tensors: Mapping[str, torch.Tensor], drive: Callable[[Component], object]
) -> Iterator[tuple[Component, Device]]:
    """A network of the `cuda` target; memory is laid out for what `drive` does with it."""
    stages, files = cuda_engines(bundle, network)
    with CudaBackend(cuda_kernels(bundle)) as backend:
        backend.device.reserve(rehearse(stages, files, drive, attention=Precision.BF16))
        with Component(backend, stages, files, BoundWeights(tensors)) as component:
            yield component, backend.device


@contextmanager
def open_diffusers(
    network: Any, data: Float32, work: str, *, compiled: bool
) -> Iterator[tuple[Callable[[], None], Callable[[], Float32]]]:
    """What leaves diffusers' result on the device, and what brings it to the host.

    Args:
        data: latents, not normalised, to decode, or frames to encode.
    """
    given = torch.from_numpy(data).to("cuda", torch.bfloat16)[None]
    parts = {name: getattr(network, name) for name in ("decoder", "encoder")}

    def compute() -> torch.Tensor:
        with torch.no_grad():
            return network.decode(given).sample if work == "decode" else network.encode(given).latent_dist.mean  # type: ignore[no-any-return]

    def run() -> None:
        compute()
        torch.cuda.synchronize()

    try:
        for name, part in parts.items() if compiled else ():
            setattr(network, name, torch.compile(part))
        yield run, lambda: compute()[0].float().cpu().numpy()
    finally:
        for name, part in parts.items():
            setattr(network, name, part)


def weights_bytes(bundle: Bundle, network: str) -> int:
    """Bytes of a network's weights on the device."""
    weights = {weight.name: weight for stage in cuda_engines(bundle, network)[0] for weight in stage.weights}
    return sum(int(np.prod([int(axis) for axis in w.shape])) * w.dtype.itemsize for w in weights.values())


def count_tflop(bundle: Bundle, network: str, size: VideoSize) -> float:
    """Floating-point operations of the convolutions of a whole video, 2 per multiply-add, counted from the plans."""
    arch = bundle.manifest.variant.vae
    extents = {"height": size.height // arch.spatial_stride, "width": size.width // arch.spatial_stride}
    steps = (size.num_frames - 1) // arch.temporal_stride
    total = 0.0
    stages, files = cuda_engines(bundle, network)
    for stage in stages:
        if stage.name == COLOURS:
            continue
        repeats = 1 if stage.name in FIRST else steps
        plan = decode(Plan, files[stage.name].read_text(encoding="utf-8"), error=EngineError)
        shapes = {buffer.name: [resolve(axis, extents) for axis in buffer.shape] for buffer in plan.buffers}
        weights = {weight.name: weight.shape for weight in stage.weights}
        for step in plan.steps:
            if step.kind == "convolution":
                kernel = [int(axis) for axis in weights[step.inputs["weight"]]]
                total += repeats * 2.0 * float(np.prod(shapes[step.outputs["out"]])) * float(np.prod(kernel[1:]))
    return total / 1e12
