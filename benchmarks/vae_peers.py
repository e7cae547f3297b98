"""The VAE of both peers at full size, with the same random weights: diffusers' network, and ours opened on the `cuda` target."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from engines.targets.cuda.lower import lower_stage
from export import graphs
from runtime.backends.cuda.device import DeviceArray
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.rehearsal import rehearse
from runtime.component import Component
from runtime.precision import in_precision
from runtime.specs import DType, Precision, StageSpec, resolve
from runtime.stages import network_stages
from runtime.strict_json import encode
from runtime.variants import VaeArch, Variant


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
    variant: Variant,
    network: str,
    tensors: Mapping[str, torch.Tensor],
    kernels: bytes,
    drive: Callable[[Component], object] | None = None,
) -> Iterator[Component]:
    """A network of the `cuda` target, its plans made on the spot; memory is laid out for what `drive` does with it."""
    with tempfile.TemporaryDirectory() as folder, CudaBackend({gpu_arch(): kernels}) as backend:
        stages, files = [], {}
        for fp32 in network_stages(variant, network):
            stages.append(in_precision(fp32, Precision.BF16))
            files[fp32.name] = Path(folder) / f"{fp32.name}.plan.json"
            files[fp32.name].write_text(encode(lower_stage(graphs.stage_graph(variant, fp32), stages[-1])), encoding="utf-8")
        if drive is not None:
            backend.device.reserve(rehearse(tuple(stages), files, drive, attention=Precision.BF16))
        with Component(backend, stages, files, BoundWeights(tensors)) as component:
            yield component


def weights_bytes(variant: Variant, network: str) -> int:
    """Bytes of a network's weights on the device."""
    weights = {w.name: w for stage in network_stages(variant, network) for w in in_precision(stage, Precision.BF16).weights}
    return sum(int(np.prod([int(axis) for axis in w.shape])) * w.dtype.itemsize for w in weights.values())


def count_tflop(variant: Variant, network: str, *, width: int, height: int, num_frames: int) -> float:
    """Floating-point operations of the convolutions of a whole video, 2 per multiply-add, counted from the plans."""
    stride = variant.vae.spatial_stride
    extents = {"height": height // stride, "width": width // stride}
    steps = (num_frames - 1) // variant.vae.temporal_stride
    total = 0.0
    for repeats, fp32 in zip((1, steps), network_stages(variant, network), strict=True):
        stage = in_precision(fp32, Precision.BF16)
        plan = lower_stage(graphs.stage_graph(variant, fp32), stage)
        shapes = {b.name: [resolve(axis, extents) for axis in b.shape] for b in plan.buffers}
        weights = {w.name: w.shape for w in stage.weights}
        for step in plan.steps:
            if step.kind == "convolution":
                kernel = [int(axis) for axis in weights[step.inputs["weight"]]]
                total += repeats * 2.0 * float(np.prod(shapes[step.outputs["out"]])) * float(np.prod(kernel[1:]))
    return total / 1e12


def gpu_arch() -> str:
    """The GPU's architecture, as compilers spell it."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
