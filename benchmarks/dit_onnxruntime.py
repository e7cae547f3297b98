"""The peer of `benchmarks.dit` that is ONNX Runtime's CUDA provider: the same stages in bf16, weights bound as inputs.

PyTorch owns the memory and the stream; ONNX Runtime works in both through IO binding, so nothing is copied between stages.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch

from benchmarks.dit_peers import CUDA_PROVIDER, PROMPT_TOKENS, TIMESTEP, Case, Forward
from benchmarks.ort_graphs import contributed_graph
from benchmarks.random_file import random_weight
from export.graphs import stage_graph
from export.trace import ONNX_DTYPES, TORCH_DTYPES
from runtime.component import Component
from runtime.geometry import latent_shape, patchify, unpatchify
from runtime.precision import in_precision
from runtime.schedulers import Conventions
from runtime.specs import DType, Precision, StageSpec, match_shapes, resolve
from runtime.stages import network_stages
from runtime.transformer import Transformer
from runtime.variants import TransformerArch, Variant

_ONLY_CUDNN_ATTENTION = "8"  # AttentionBackend::CUDNN_FLASH_ATTENTION, `contrib_ops/cpu/bert/attention_common.h`


class TorchEngine:
    """One stage in one session; a tensor is PyTorch's. Inputs of another floating-point type are cast."""

    def __init__(self, path: Path, stage: StageSpec, *, device: torch.device, dtype: DType, stream: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        provider: Any = "CPUExecutionProvider"
        if stream is not None:
            given = {"user_compute_stream": str(stream), "sdpa_kernel": _ONLY_CUDNN_ATTENTION}
            provider = (CUDA_PROVIDER, {**given, "arena_extend_strategy": "kSameAsRequested"})
        self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        if stream is not None and self._session.get_providers()[0] != CUDA_PROVIDER:
            raise RuntimeError(f"{CUDA_PROVIDER} could not be loaded: its CUDA libraries are missing or of another version")
        self._unsynchronised = onnxruntime.RunOptions()
        self._unsynchronised.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._stage, self._device, self._dtype = stage, device, dtype

    def run(self, tensors: Mapping[str, torch.Tensor], *, consumed: Collection[str] = ()) -> dict[str, torch.Tensor]:
        extents = match_shapes(self._stage, {tensor.name: tuple(tensors[tensor.name].shape) for tensor in self._stage.inputs})
        binding = self._session.io_binding()
        kept = []  # what was cast must live until the session has queued its work
        for tensor in (*self._stage.inputs, *self._stage.weights):
            dtype = self._dtype if tensor.dtype is DType.F32 else tensor.dtype
            kept.append(tensors[tensor.name].to(TORCH_DTYPES[dtype]).contiguous())
            self._bind(binding.bind_input, tensor.name, dtype, kept[-1])
        outputs = {}
        for tensor in self._stage.outputs:
            shape = [resolve(axis, extents) for axis in tensor.shape]
            outputs[tensor.name] = torch.empty(shape, dtype=TORCH_DTYPES[self._dtype], device=self._device)
            self._bind(binding.bind_output, tensor.name, self._dtype, outputs[tensor.name])
        self._session.run_with_iobinding(binding, self._unsynchronised)
        return outputs

    def _bind(self, bind: Callable[..., None], name: str, dtype: DType, tensor: torch.Tensor) -> None:
        bind(name, self._device.type, self._device.index or 0, ONNX_DTYPES[dtype], tuple(tensor.shape), tensor.data_ptr())

    def close(self) -> None:
        del self._session


class TorchBackend:
    """Runs stages whose engine files are `contributed_graph`s.

    Args:
        stream: CUDA stream of all work; None on the CPU.
        dtype: of every stage but those that are float32 in bf16, too.
    """

    name = "onnxruntime"

    def __init__(self, device: torch.device, *, stream: int | None, dtype: DType) -> None:
        self._device, self._stream, self._dtype = device, stream, dtype

    def open_engine(self, path: Path, stage: StageSpec) -> TorchEngine:
        dtype = stage_dtype(stage, self._dtype)
        return TorchEngine(path, stage, device=self._device, dtype=dtype, stream=self._stream)

    def to_device(self, array: Any, dtype: DType | None = None) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self._device)

    def to_host(self, tensor: torch.Tensor) -> Any:
        return tensor.float().cpu().numpy()

    def fetch(self, tensor: torch.Tensor) -> Callable[[], Any]:
        return lambda: self.to_host(tensor)

    def cut_patches(self, latents: Any, arch: TransformerArch) -> torch.Tensor:
        return self.to_device(patchify(latents, arch))

    def join_patches(self, patches: torch.Tensor, grid: tuple[int, int, int], arch: TransformerArch) -> torch.Tensor:
        return torch.from_numpy(unpatchify(self.to_host(patches), grid, arch))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held outside of engines and tensors."""


def stage_dtype(stage: StageSpec, dtype: DType) -> DType:
    """What a stage runs in: the time embedding stays in float32, as the peers keep it."""
    narrow = in_precision(stage, Precision.BF16)
    wide = all(tensor.dtype is DType.F32 for tensor in (*narrow.inputs, *narrow.weights, *narrow.outputs))
    return DType.F32 if wide else dtype


class RandomTensors:
    """Weights in PyTorch's memory, each drawn when first asked for."""

    def __init__(self, device: torch.device, dtype: DType) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)
        self._tensors: dict[str, torch.Tensor] = {}

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, torch.Tensor]:
        given = {}
        for weight in stage.weights:
            name = stage.weight_name(weight.name, block)
            if name not in self._tensors:
                shape = tuple(axis for axis in weight.shape if isinstance(axis, int))
                random = random_weight(name, shape, stage_dtype(stage, self._dtype))
                drawn = torch.empty(shape, device=self._device)
                drawn.normal_(random.center, random.spread, generator=self._generator)
                self._tensors[name] = drawn.to(TORCH_DTYPES[random.dtype])
            given[weight.name] = self._tensors[name]
        return given


def write_graphs(variant: Variant, folder: Path, dtype: DType) -> dict[str, Path]:
    """Trace the transformer's stages; a file for each, by stage name."""
    files = {}
    for stage in network_stages(variant, "transformer"):
        files[stage.name] = folder / f"{stage.name}.onnx"
        graph = contributed_graph(stage_graph(variant, stage), stage_dtype(stage, dtype))
        files[stage.name].write_bytes(graph.SerializeToString())
    return files


@contextmanager
def open_onnxruntime(variant: Variant, case: Case) -> Iterator[Forward]:
    """A forward of the variant's transformer with random weights, bf16, on the GPU."""
    device, dtype, arch = torch.device("cuda", torch.cuda.current_device()), DType.BF16, variant.transformer
    shape = latent_shape(case.size, vae=variant.vae)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(shape, np.float32)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with (
        TemporaryDirectory(prefix="wanrt-onnxruntime-") as folder,
        torch.cuda.stream(stream),
        TorchBackend(device, stream=stream.cuda_stream, dtype=dtype) as backend,
        Component(
            backend,
            network_stages(variant, "transformer"),
            write_graphs(variant, Path(folder), dtype),
            RandomTensors(device, dtype),
        ) as component,
    ):
        transformer = Transformer(component, arch, shape, conventions=Conventions.ORIGINAL)
        prompt = transformer.encode_text(rng.standard_normal((PROMPT_TOKENS, arch.text_dim), np.float32))
        yield Forward(lambda: transformer.predict(latents, TIMESTEP, [prompt])[0])
