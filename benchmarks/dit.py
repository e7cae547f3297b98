"""One forward of the diffusion transformer at full size on one GPU: the `cuda` target and diffusers, in the same run.

Random weights made on the GPU, every block its own; the same latents, text length and timestep for all. Reports seconds (median and
spread after warm-up), peak memory, FLOPs counted by formula and the share of the dense peak they make.

    python -m benchmarks.dit BUNDLE [BUNDLE …] --case 14b-480p … --baseline diffusers --baseline diffusers-compile --out result.json

BUNDLE: made by `wanrt build-engines --engines-only --variant … --target cuda --precision … --arch sm_90`; no weights needed.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.backends.cuda.device import DeviceArray
from runtime.backends.cuda.engine import CudaBackend
from runtime.bundle import open_bundle
from runtime.component import Component
from runtime.geometry import VideoSize, latent_shape, token_grid
from runtime.precision import FP8_MAX, in_precision
from runtime.schedulers import Conventions
from runtime.specs import DType, Precision, StageSpec
from runtime.stages import network_stages
from runtime.transformer import Transformer
from runtime.variants import TransformerArch, VaeArch

PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}
"""Dense peaks of one H200 (SXM) by NVIDIA's datasheet."""
PROMPT_TOKENS = 120


@dataclass(frozen=True)
class Case:
    name: str
    variant: str
    size: VideoSize


CASES = {
    case.name: case
    for case in (
        Case("1.3b-480p", "wan2.1-t2v-1.3b", VideoSize(width=832, height=480, num_frames=81)),
        Case("14b-480p", "wan2.1-t2v-14b", VideoSize(width=832, height=480, num_frames=81)),
        Case("14b-720p", "wan2.1-t2v-14b", VideoSize(width=1280, height=720, num_frames=81)),
    )
}


@dataclass(frozen=True)
class Result:
    case: str
    peer: str
    tokens: int
    seconds: float  # median
    fastest: float
    slowest: float
    runs: int
    warmups: int
    first_seconds: float  # the first forward, with everything that is set up by then
    peak_memory_gib: float
    tflop: float
    share_of_bf16_peak: float
    output_std: float  # of the last forward; everything in it was finite


def forward_tflop(arch: TransformerArch, tokens: int) -> float:
    """Floating-point operations of one forward, 2 per multiply-add: projections, attention, cross-attention, FFN."""
    d, f, s = arch.dim, arch.ffn_dim, arch.text_len
    block = 8 * tokens * d * d + 4 * tokens * tokens * d + 4 * tokens * d * d + 4 * s * tokens * d + 4 * tokens * d * f
    return arch.num_layers * block / 1e12


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


@contextmanager
def open_ours(folder: Path, case: Case, attention: Precision) -> Iterator[tuple[Callable[[], Any], CudaBackend]]:
    """A forward of the bundle's transformer with random weights."""
    bundle = open_bundle(folder)
    variant, target = bundle.manifest.variant, bundle.manifest.targets["cuda"]
    arch = variant.transformer
    kernels = {name: bundle.file(file).read_bytes() for name, file in target.kernels.items()}
    stages = [in_precision(stage, target.precision) for stage in network_stages(variant, "transformer")]
    files = {stage.name: bundle.file(target.engines[stage.name]) for stage in stages}
    shape = latent_shape(case.size, vae=variant.vae)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(shape, np.float32)
    with CudaBackend(kernels, attention=attention) as backend, Component(backend, stages, files, RandomWeights()) as component:
        transformer = Transformer(component, arch, shape, conventions=Conventions.ORIGINAL)
        prompt = transformer.encode_text(rng.standard_normal((PROMPT_TOKENS, arch.text_dim), np.float32))
        yield lambda: transformer.predict(latents, 731, [prompt])[0], backend


@contextmanager
def open_diffusers(arch: TransformerArch, case: Case, *, compiled: bool) -> Iterator[Callable[[], Any]]:
    """The same forward in diffusers, bf16."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=arch.num_heads,
            attention_head_dim=arch.head_dim,
            ffn_dim=arch.ffn_dim,
            num_layers=arch.num_layers,
        )
    network = network.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False).eval()
    for name, parameter in network.named_parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.normal_(0, spread)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
        if "time_embedder" in name or "scale_shift_table" in name or "norm" in name:
            parameter.data = parameter.data.float()  # as `from_pretrained` keeps them
    rope = type(network.rope)(arch.head_dim, (1, 2, 2), 1024)  # its tables are buffers that the meta device left empty
    network.rope = rope.to("cuda")
    if compiled:
        network.compile_repeated_blocks(fullgraph=True)
    latents = torch.randn(1, *latent_shape(case.size, vae=VaeArch()), device="cuda", dtype=torch.bfloat16)
    prompt = torch.randn(1, arch.text_len, arch.text_dim, device="cuda", dtype=torch.bfloat16)
    timestep = torch.tensor([731], device="cuda")

    def forward() -> Any:  # the copy to the host waits for the GPU, as the other peer's does
        return network(latents, timestep, prompt, return_dict=False)[0].float().cpu().numpy()

    with torch.no_grad():
        yield forward


def measure(
    case: Case, peer: str, arch: TransformerArch, forward: Callable[[], Any], *, seconds: float, peak: Callable[[], float]
) -> Result:
    """Time a forward: two warm-ups, then at least three runs and about `seconds`."""
    started = time.perf_counter()
    forward()
    first = time.perf_counter() - started
    forward()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        started = time.perf_counter()
        output = forward()
        times.append(time.perf_counter() - started)
    frames, rows, columns = token_grid(latent_shape(case.size, vae=VaeArch()), arch)
    tokens = frames * rows * columns
    median, tflop = statistics.median(times), forward_tflop(arch, tokens)
    if not np.isfinite(output).all() or not output.std() > 0:
        raise RuntimeError(
            "the output is constant or not finite: such data runs faster than real data, so its time means nothing"
        )
    result = Result(
        case=case.name,
        peer=peer,
        tokens=tokens,
        seconds=median,
        fastest=min(times),
        slowest=max(times),
        runs=len(times),
        warmups=2,
        first_seconds=first,
        peak_memory_gib=peak(),
        tflop=tflop,
        share_of_bf16_peak=tflop / median / PEAK_TFLOPS["bf16"],
        output_std=float(output.std()),
    )
    print(
        f"{result.case:<10} {result.peer:<34} {median:7.3f} s ({min(times):.3f}-{max(times):.3f}, {len(times)} runs, first {first:.1f}) "
        f"{tflop / median:6.0f} TFLOP/s {result.peak_memory_gib:6.1f} GiB, output std {result.output_std:.2f}",
        flush=True,
    )
    return result


def main() -> int:
    """Run the cases asked for; a peer that fails is reported and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--baseline", action="append", choices=["diffusers", "diffusers-compile"], default=[])
    parser.add_argument("--attention", action="append", choices=["bf16", "fp8"], help="for fp8 bundles (default: both)")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: list[Result] = []
    failures: dict[str, str] = {}
    for case in (CASES[name] for name in arguments.case or CASES):
        for peer, run in _peers(case, arguments):
            try:
                results.append(run())
            except Exception as error:
                failures[f"{case.name} {peer}"] = repr(error)
                print(f"{case.name} {peer}: {error!r}", file=sys.stderr, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "results": [asdict(result) for result in results],
        "failures": failures,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 1 if failures else 0


def _peers(case: Case, arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Result]]]:
    for folder in arguments.bundles:
        manifest = open_bundle(folder).manifest
        if manifest.variant.name != case.variant:
            continue
        precision = manifest.targets["cuda"].precision
        for attention in (arguments.attention or ["bf16", "fp8"]) if precision is Precision.FP8 else ["bf16"]:
            name = f"wanrt {precision}, attention {attention}"
            yield name, partial(_measure_ours, folder, case, Precision(attention), name, arguments)
    for baseline in arguments.baseline:
        yield baseline, partial(_measure_diffusers, case, baseline, arguments)


def _measure_ours(folder: Path, case: Case, attention: Precision, name: str, arguments: argparse.Namespace) -> Result:
    arch = open_bundle(folder).manifest.variant.transformer
    torch.cuda.reset_peak_memory_stats()
    with open_ours(folder, case, attention) as (forward, backend):

        def peak() -> float:  # the weights are torch's here, everything else the backend's
            return float(torch.cuda.max_memory_reserved() + backend.device.reserved_bytes) / 2**30

        return measure(case, name, arch, forward, seconds=arguments.seconds, peak=peak)


def _measure_diffusers(case: Case, baseline: str, arguments: argparse.Namespace) -> Result:
    arch = next(
        open_bundle(f).manifest.variant.transformer
        for f in arguments.bundles
        if open_bundle(f).manifest.variant.name == case.variant
    )
    torch.cuda.reset_peak_memory_stats()
    with open_diffusers(arch, case, compiled=baseline.endswith("compile")) as forward:
        return measure(
            case, baseline, arch, forward, seconds=arguments.seconds, peak=lambda: torch.cuda.max_memory_reserved() / 2**30
        )


if __name__ == "__main__":
    sys.exit(main())
