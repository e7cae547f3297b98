"""The peers of `benchmarks.dit`, each opened as a forward to call: the `cuda` target of a bundle, diffusers, DiffSynth-Studio.

Weights are random and made on the GPU, every block its own. Modules of their own have ONNX Runtime (`benchmarks.dit_onnxruntime`) and
Torch-TensorRT (`benchmarks.dit_torch_tensorrt`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.cuda_steps import TimedBackend
from benchmarks.flops import num_tokens
from benchmarks.gpu import cuda_engines, cuda_kernels
from runtime.backends.cuda.device import DeviceArray
from runtime.bundle import Bundle
from runtime.component import Component
from runtime.errors import RequestError
from runtime.geometry import VideoSize, latent_shape
from runtime.precision import FP8_MAX
from runtime.schedulers import Conventions
from runtime.specs import DType, Precision, StageSpec
from runtime.transformer import Transformer
from runtime.variants import Variant

PROMPT_TOKENS = 120
TIMESTEP = 731
CUDA_PROVIDER = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Case:
    name: str
    variant: str
    size: VideoSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What compiling a network took, before its first forward, and what came of it."""

    seconds: float
    engines: int
    left_to_pytorch: tuple[str, ...]  # operators that no engine has, each as often as it runs


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward that returns its output on the host."""

    run: Callable[[], Any]
    build: Build | None = None  # None where nothing is compiled ahead of the first forward

    def __call__(self) -> Any:
        return self.run()


Opened = Callable[[Variant, Case], AbstractContextManager[Forward]]
"""Opens a peer."""


class RandomWeights:
    """Weights of a component, drawn on the GPU when first asked for."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cuda").manual_seed(0)
        self._tensors: dict[str, torch.Tensor] = {}

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceArray]:
        given = {}
        for weight in stage.weights:
            name = stage.weight_name(weight.name, block)
            if name not in self._tensors:
                self._tensors[name] = self._draw(weight.name, weight.shape, weight.dtype)
                torch.cuda.synchronize()  # drawn on torch's stream, read on the backend's
            tensor = self._tensors[name]
            stride = tensor[0].numel() if tensor.ndim else 1
            given[weight.name] = DeviceArray(tensor.data_ptr(), tuple(tensor.shape), weight.dtype, stride, None)
        return given

    def _draw(self, name: str, shape: tuple[Any, ...], dtype: DType) -> torch.Tensor:
        spread = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        if name.endswith("_scale"):
            return torch.full(shape, 4 * shape[0] ** -0.5 / FP8_MAX, device="cuda")
        drawn = torch.empty(shape, device="cuda").normal_(0, spread, generator=self._generator) + offset
        if dtype is DType.F8_E4M3:
            return (drawn / spread * (FP8_MAX / 4)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return drawn.to(torch.bfloat16 if dtype is DType.BF16 else torch.float32)


def check_onnxruntime() -> None:
    """See that the installed ONNX Runtime has a CUDA provider.

    Raises:
        RequestError: it has not.
    """
    import onnxruntime

    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise RequestError(
            f"baseline onnxruntime needs {CUDA_PROVIDER}; onnxruntime {onnxruntime.__version__} here has "
            f"{', '.join(onnxruntime.get_available_providers())}",
            hint="pip uninstall onnxruntime, then pip install onnxruntime-gpu: both are the same module",
        )


@contextmanager
def open_ours(bundle: Bundle, case: Case, attention: Precision) -> Iterator[tuple[Callable[[], Any], TimedBackend]]:
    """A forward of the bundle's transformer with random weights."""
    variant = bundle.manifest.variant
    arch = variant.transformer
    stages, files = cuda_engines(bundle, "transformer")
    shape = latent_shape(case.size, vae=variant.vae)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(shape, np.float32)
    with (
        TimedBackend(cuda_kernels(bundle), attention=attention) as backend,
        Component(backend, stages, files, RandomWeights()) as component,
    ):
        transformer = Transformer(component, arch, shape, conventions=Conventions.ORIGINAL)
        prompt = transformer.encode_text(rng.standard_normal((PROMPT_TOKENS, arch.text_dim), np.float32))
        yield lambda: transformer.predict(latents, TIMESTEP, [prompt])[0], backend


@contextmanager
def open_diffusers(variant: Variant, case: Case, *, compiled: bool, device: str = "cuda") -> Iterator[Forward]:
    """The same forward in diffusers, bf16."""
    network = diffusers_network(variant, device)
    if compiled:
        network.compile_repeated_blocks(fullgraph=True)
    inputs = diffusers_inputs(variant, case, device)

    def forward() -> Any:  # the copy to the host waits for the GPU, as the other peer's does
        return network(*inputs, return_dict=False)[0].float().cpu().numpy()

    with torch.no_grad():
        yield Forward(forward)


def diffusers_network(variant: Variant, device: str) -> Any:
    """diffusers' transformer with random weights: bf16, but for what `from_pretrained` keeps in float32."""
    from diffusers import WanTransformer3DModel

    arch = variant.transformer
    with torch.device("meta"):
        network = WanTransformer3DModel(
            in_channels=arch.in_channels,
            out_channels=arch.out_channels,
            num_attention_heads=arch.num_heads,
            attention_head_dim=arch.head_dim,
            text_dim=arch.text_dim,
            ffn_dim=arch.ffn_dim,
            num_layers=arch.num_layers,
        )
    network = network.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    _draw_parameters(network)
    for name, parameter in network.named_parameters():
        if "time_embedder" in name or "scale_shift_table" in name or "norm" in name:
            parameter.data = parameter.data.float()
    rope = type(network.rope)(arch.head_dim, (1, 2, 2), 1024)  # its tables are buffers that the meta device left empty
    network.rope = rope.to(device)
    return network


def diffusers_inputs(variant: Variant, case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timestep and prompt in the order of its `forward`; a timestep for every token where its pipeline does that
    (`expand_timesteps`)."""
    latents, prompt, timestep = _inputs(variant, case, device)
    if variant.transformer.per_token_timesteps:
        timestep = timestep.expand(1, num_tokens(variant, case.size)).contiguous()  # as Torch-TensorRT asks
    return latents, timestep, prompt


@contextmanager
def open_diffsynth(variant: Variant, case: Case, *, device: str = "cuda") -> Iterator[Forward]:
    """The same forward in DiffSynth-Studio, bf16 as its pipeline loads it, with the attention that it finds installed."""
    from diffsynth.models.wan_video_dit import WanModel, precompute_freqs_cis_3d
    from diffsynth.pipelines.wan_video import model_fn_wan_video

    arch = variant.transformer
    with torch.device("meta"):
        network = WanModel(
            dim=arch.dim,
            in_dim=arch.in_channels,
            ffn_dim=arch.ffn_dim,
            out_dim=arch.out_channels,
            text_dim=arch.text_dim,
            freq_dim=arch.freq_dim,
            eps=arch.eps,
            patch_size=arch.patch_size,
            num_heads=arch.num_heads,
            num_layers=arch.num_layers,
            has_image_input=False,
            seperated_timestep=arch.per_token_timesteps,  # so spelt there
        )
    network = network.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    network.freqs = precompute_freqs_cis_3d(arch.head_dim)  # no parameters or buffers: the meta device left them empty
    _draw_parameters(network)
    latents, prompt, timestep = _inputs(variant, case, device)

    def forward() -> Any:
        made = model_fn_wan_video(dit=network, latents=latents, timestep=timestep.to(torch.bfloat16), context=prompt)
        return made.float().cpu().numpy()

    with torch.no_grad():
        yield Forward(forward)


def _draw_parameters(network: torch.nn.Module) -> None:
    """Weights whose products keep their scale."""
    for name, parameter in network.named_parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.normal_(0, spread)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)


def _inputs(variant: Variant, case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, a prompt padded as the peers pad it, and the timestep."""
    arch = variant.transformer
    latents = torch.randn(1, *latent_shape(case.size, vae=variant.vae), device=device, dtype=torch.bfloat16)
    prompt = torch.randn(1, arch.text_len, arch.text_dim, device=device, dtype=torch.bfloat16)
    return latents, prompt, torch.tensor([TIMESTEP], device=device)
