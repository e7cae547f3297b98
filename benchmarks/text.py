"""The text encoder at full size on one GPU: the `cuda` target and transformers' `UMT5EncoderModel`, in the same run.

Random weights made on the GPU, the same for both and for the fp32 module that says how far each is off. Prompts are not padded for either;
diffusers, which runs transformers' class, would pad every prompt to 512 tokens. Measured: latency (ids or embedded rows in, embeddings on
the host out), and for the `cuda` target the time the GPU alone takes, with its queue filled beforehand.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import OURS, Attempt, Options, Result, Suite, Timing, cuda_engines, cuda_kernels, measure, relative_error
from export.layouts import text_encoder_diffusers_names, text_encoder_tensors
from export.modules.text_encoder import TEXT_ENCODER_MODULES
from export.pack import pack_plan
from runtime.backends.cuda.device import DeviceArray
from runtime.backends.cuda.engine import CudaBackend
from runtime.bundle import Bundle
from runtime.component import Component
from runtime.specs import DType, Precision, StageSpec
from runtime.stages.text_encoder import text_encoder_stages
from runtime.text_encoder import encode_prompts, relative_position_buckets
from runtime.variants import TextEncoderArch

RUNS = 20
_THEIRS = "transformers bf16"
_SLEEP_CYCLES = 60_000_000  # about 30 ms, longer than the host takes to queue all blocks
_TORCH_TYPES = {DType.BF16: torch.bfloat16, DType.F32: torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    tokens: int
    variant: str = "wan2.1-t2v-1.3b"  # the encoder is the same for all


@dataclass(frozen=True, slots=True, kw_only=True)
class TextResult(Result):
    latency_ms: float  # median
    fastest_ms: float
    slowest_ms: float
    gpu_ms: float | None  # of the blocks alone; None where it was not measured
    weight_gb_per_s: float | None
    relative_error: float  # against the fp32 module

    def notes(self) -> list[str]:
        """The error, and what the GPU alone takes."""
        alone = "" if self.gpu_ms is None else f"; GPU alone {self.gpu_ms:.2f} ms, {self.weight_gb_per_s:.0f} GB/s of weights"
        return [f"relative error {self.relative_error:.2e}{alone}"]


def attempts(case: Case, options: Options) -> Iterator[Attempt]:
    """This project, then transformers, on the same weights."""
    arch = options.bundles[0].manifest.variant.text_encoder
    with torch.no_grad():
        weights = SharedWeights(arch)
        rows = torch.randn(case.tokens, arch.dim, device="cuda").bfloat16()
        expected = encode_fp32(arch, weights, rows)
        for bundle in options.bundles:
            yield f"{OURS} bf16", partial(_ours, case, bundle, weights, rows, expected)
        for _ in options.baselines:
            yield _THEIRS, partial(_theirs, case, arch, weights, rows, expected)


def _ours(case: Case, bundle: Bundle, weights: "SharedWeights", rows: torch.Tensor, expected: Any) -> Result:
    arch = bundle.manifest.variant.text_encoder
    _forget_peak()
    with open_ours(bundle, weights) as (component, backend):
        table, ids = rows.cpu().view(torch.uint16).numpy(), np.arange(case.tokens)
        gpu_ms = blocks_gpu_ms(component, arch, backend, case.tokens)
        timing, output = _time(lambda: encode_prompts(component, table, [ids], arch)[0])
        reserved = torch.cuda.max_memory_reserved() + backend.device.reserved_bytes  # the weights are torch's here
    return _result(case, f"{OURS} bf16", arch, timing, relative_error(output, expected), reserved, gpu_ms)


def _theirs(case: Case, arch: TextEncoderArch, weights: "SharedWeights", rows: torch.Tensor, expected: Any) -> Result:
    _forget_peak()
    with torch.no_grad(), open_transformers(arch, weights) as encode:
        timing, output = _time(lambda: encode(rows))
    return _result(case, _THEIRS, arch, timing, relative_error(output, expected), torch.cuda.max_memory_reserved(), None)


def _time(encode: Callable[[], Any]) -> tuple[Timing, Any]:
    return measure(encode, seconds=0, warmups=3, min_runs=RUNS)


def _forget_peak() -> None:
    """The fp32 module's memory is nobody's."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _result(
    case: Case, peer: str, arch: TextEncoderArch, timing: Timing, error: float, peak_bytes: int, gpu_ms: float | None
) -> Result:
    return TextResult(
        **asdict(timing),
        case=case.name,
        peer=peer,
        peak_memory_gib=peak_bytes / 2**30,
        tflop=forward_tflop(arch, case.tokens),
        tokens=case.tokens,
        latency_ms=timing.seconds * 1e3,
        fastest_ms=timing.fastest * 1e3,
        slowest_ms=timing.slowest * 1e3,
        gpu_ms=gpu_ms,
        weight_gb_per_s=None if gpu_ms is None else block_bytes(arch) / gpu_ms / 1e6,
        relative_error=error,
    )


class SharedWeights:
    """One set of weights for every peer: bf16 numbers, tensors fused as the stages want them."""

    def __init__(self, arch: TextEncoderArch) -> None:
        self.fused: dict[str, torch.Tensor] = {}
        self.original: dict[str, torch.Tensor] = {}  # views of the fused ones
        generator = torch.Generator("cuda").manual_seed(0)
        shapes = text_encoder_tensors(arch)
        stages = text_encoder_stages(arch)
        for packed in pack_plan(stages, num_blocks=arch.num_layers):
            parts = []
            for name in packed.sources:
                spread = 0.1 if len(shapes[name]) == 1 else 1.0 if "pos_embedding" in name else shapes[name][-1] ** -0.5
                if name.endswith("attn.q.weight"):  # the logits are not scaled
                    spread *= (arch.attention_dim // arch.num_heads) ** -0.5
                drawn = torch.empty(shapes[name], device="cuda").normal_(float("norm" in name), spread, generator=generator)
                parts.append(drawn.to(torch.bfloat16))
            self.fused[packed.name] = torch.cat(parts)
            rows = torch.split(self.fused[packed.name], [len(part) for part in parts])
            self.original |= dict(zip(packed.sources, rows, strict=True))
        torch.cuda.synchronize()  # drawn on torch's stream, read on the backend's
        self._given: dict[str, torch.Tensor] = {}

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceArray]:
        given = {}
        for weight in stage.weights:
            name = stage.weight_name(weight.name, block)
            if name not in self._given:
                self._given[name] = self.fused[name].to(_TORCH_TYPES[weight.dtype])
                torch.cuda.synchronize()
            tensor = self._given[name]
            stride = tensor[0].numel() if tensor.ndim > 1 else 1
            given[weight.name] = DeviceArray(tensor.data_ptr(), tuple(tensor.shape), weight.dtype, stride, None)
        return given


def encode_fp32(arch: TextEncoderArch, weights: SharedWeights, rows: torch.Tensor) -> Any:
    """The stages' modules in fp32, a block's weights widened at a time."""
    buckets = relative_position_buckets(len(rows), num_buckets=arch.num_buckets, max_distance=arch.max_distance)
    positions = torch.from_numpy(buckets).cuda()
    block_stage, norm_stage = text_encoder_stages(arch)
    hidden_states = rows.float()
    for stage, blocks in ((block_stage, range(arch.num_layers)), (norm_stage, (None,))):
        with torch.device("meta"):
            module = TEXT_ENCODER_MODULES[stage.name](arch)
        for block in blocks:
            own = {weight.name: weights.fused[stage.weight_name(weight.name, block)].float() for weight in stage.weights}
            inputs = (hidden_states, positions)[: len(stage.inputs)]
            hidden_states = torch.func.functional_call(module, own, inputs)
    return hidden_states.cpu().numpy()


@contextmanager
def open_transformers(arch: TextEncoderArch, weights: SharedWeights) -> Iterator[Callable[[torch.Tensor], Any]]:
    """The peer in bf16, on the same tensors."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=8,  # rows are given already embedded
        d_model=arch.dim,
        d_kv=arch.attention_dim // arch.num_heads,
        d_ff=arch.ffn_dim,
        num_layers=arch.num_layers,
        num_heads=arch.num_heads,
        relative_attention_num_buckets=arch.num_buckets,
        relative_attention_max_distance=arch.max_distance,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        network = UMT5EncoderModel(config)
    names = text_encoder_diffusers_names(arch)
    tensors = {names[name]: tensor for name, tensor in weights.original.items()}
    missing, unknown = network.load_state_dict(tensors, assign=True, strict=False)
    if unknown or any("embed_tokens" not in name and "shared" not in name for name in missing):
        raise RuntimeError(f"transformers names its tensors otherwise: {missing[:3]}, {unknown[:3]}")
    network.eval().requires_grad_(False)

    def encode(rows: torch.Tensor) -> Any:
        return network(inputs_embeds=rows[None]).last_hidden_state[0].float().cpu().numpy()

    yield encode


@contextmanager
def open_ours(bundle: Bundle, weights: SharedWeights) -> Iterator[tuple[Component, CudaBackend]]:
    """The bundle's text encoder on the shared weights."""
    stages, files = cuda_engines(bundle, "text_encoder")
    with CudaBackend(cuda_kernels(bundle)) as backend, Component(backend, stages, files, weights) as component:
        yield component, backend


def blocks_gpu_ms(component: Component, arch: TextEncoderArch, backend: CudaBackend, tokens: int) -> float:
    """Milliseconds the GPU takes for all blocks once the host has queued them: it sleeps until then."""
    buckets = relative_position_buckets(tokens, num_buckets=arch.num_buckets, max_distance=arch.max_distance)
    first = backend.to_device(np.random.default_rng(0).standard_normal((tokens, arch.dim), np.float32))
    positions = backend.to_device(buckets)

    def run_blocks() -> None:
        hidden = first
        for block in range(arch.num_layers):
            inputs = {"hidden_states": hidden, "position_buckets": positions}
            hidden = component.run("text_encoder.block", inputs, block=block)["next_hidden_states"]

    cuda: Any = torch.cuda  # what follows has no types
    stream = cuda.ExternalStream(backend.device.stream)
    times = []
    for _ in range(RUNS):
        with torch.cuda.stream(stream):
            cuda._sleep(_SLEEP_CYCLES)
        times.append(backend.device.elapsed_ms(run_blocks))
    return statistics.median(times)


def forward_tflop(arch: TextEncoderArch, tokens: int) -> float:
    """Floating-point operations of one prompt, 2 per multiply-add: projections, attention, FFN."""
    block = (
        8 * tokens * arch.dim * arch.attention_dim + 4 * tokens**2 * arch.attention_dim + 6 * tokens * arch.dim * arch.ffn_dim
    )
    return arch.num_layers * block / 1e12


def block_bytes(arch: TextEncoderArch) -> int:
    """Bytes of the blocks' matrices in bf16: what must be read however few tokens there are."""
    return 2 * arch.num_layers * (4 * arch.dim * arch.attention_dim + 3 * arch.dim * arch.ffn_dim)


SUITE = Suite(
    cases=tuple(Case(name=f"{tokens}-tokens", tokens=tokens) for tokens in (512, 120, 40)),
    precisions=(Precision.BF16,),
    baselines={"diffusers": ("transformers",)},
    attempts=attempts,
)
