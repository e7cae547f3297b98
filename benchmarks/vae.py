"""The VAE at full size on one GPU: the `cuda` target and diffusers decode the same latents with the same random weights, in one run.

Reports seconds with the frames left on the device and with them in host memory (median and spread after warm-up), peak memory, FLOPs
counted by formula, and how far the two outputs are from each other.

    python -m benchmarks.vae --case 480p --case 720p --baseline diffusers --out result.json

Needs a machine with the GPU, NVRTC and cuda-core, or `--kernels CUBIN` compiled elsewhere; PyTorch only for the baseline and the weights.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.vae_peers import count_tflop, gpu_arch, open_ours, random_network, weights_bytes
from export.layouts import vae_diffusers_names
from runtime.component import Component
from runtime.stages import network_stages
from runtime.vae import decode_stream, encode_chunks, unnormalise
from runtime.variants import VARIANTS


@dataclass(frozen=True)
class Case:
    name: str
    variant: str
    width: int
    height: int
    num_frames: int


CASES = {
    case.name: case
    for case in (
        Case("480p", "wan2.1-t2v-1.3b", 832, 480, 81),
        Case("720p", "wan2.1-t2v-1.3b", 1280, 720, 81),
        Case("5b", "wan2.2-ti2v-5b", 1280, 704, 121),
    )
}


@dataclass(frozen=True)
class Result:
    case: str
    peer: str
    work: str  # decode or encode
    seconds: float  # median; the result stays on the device
    fastest: float
    slowest: float
    runs: int
    host_seconds: float  # median; float32 in host memory
    first_seconds: float
    peak_memory_gib: float
    tflop: float
    tflops: float
    output_std: float
    difference: float | None  # relative, from the baseline's output


def on_device(component: Component, stages: tuple[str, str], chunks: list[np.ndarray[Any, Any]], given: str, made: str) -> None:
    """The stream of `runtime.vae` without the copy of its results to the host."""
    caches: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        outputs = component.run(stages[min(index, 1)], {given: component.backend.to_device(chunk), **caches})
        del outputs[made]
        caches = {name.removeprefix("next_"): cache for name, cache in outputs.items()}
    component.backend.device.synchronize()  # type: ignore[attr-defined]  # the cuda backend's


def timed(work: Callable[[], Any], *, seconds: float, runs: int, warm: bool = False) -> tuple[list[float], float, Any]:
    """Times of at least so many runs, and that of a first one, before which everything was cold, unless `warm` says otherwise."""
    started = time.perf_counter()
    if not warm:
        work()
    first = time.perf_counter() - started
    times: list[float] = []
    output = None
    while len(times) < runs or (sum(times) < seconds and len(times) < 20):
        started = time.perf_counter()
        output = work()
        times.append(time.perf_counter() - started)
    return times, first, output


def report(case: Case, peer: str, work: str, device_times: list[float], host: tuple[list[float], Any], first: float, peak: float,
           tflop: float, reference: Any) -> Result:  # fmt: skip
    """One line, printed and returned.

    Raises:
        RuntimeError: the output is constant or not finite; such data runs faster than real data.
    """
    host_times, output = host
    if not np.isfinite(output).all() or not output.std() > 0:
        raise RuntimeError("the output is constant or not finite: its time means nothing")
    median = statistics.median(device_times)
    difference = None if reference is None else _difference(output, reference, clamped=work == "decode")
    result = Result(
        case=case.name, peer=peer, work=work, seconds=median, fastest=min(device_times), slowest=max(device_times),
        runs=len(device_times), host_seconds=statistics.median(host_times), first_seconds=first, peak_memory_gib=peak, tflop=tflop,
        tflops=tflop / median, output_std=float(output.std()), difference=difference,
    )  # fmt: skip
    print(
        f"{case.name:<6} {work} {peer:<20} {median:6.3f} s ({min(device_times):.3f}-{max(device_times):.3f}, {len(device_times)} runs,"
        f" first {first:.1f}), to host {result.host_seconds:.3f} s, {result.tflops:5.0f} TFLOP/s, {peak:5.2f} GiB,"
        f" std {result.output_std:.3f}, difference {difference}",
        flush=True,
    )
    return result


def measure_ours(case: Case, work: str, tensors: Mapping[str, torch.Tensor], data: Any, kernels: bytes, seconds: float,
                 reference: Any) -> Result:  # fmt: skip
    variant = VARIANTS[case.variant]
    arch = variant.vae
    decode = work == "decode"
    network = "vae" if decode else "vae_encoder"
    names = [stage.name for stage in network_stages(variant, network)]
    source = unnormalise(data, arch) if decode else data
    stride = 1 if decode else arch.temporal_stride
    parts = [source[:, :1], *(source[:, i : i + stride] for i in range(1, source.shape[1], stride))]
    chunks = [np.ascontiguousarray(part) for part in parts]
    ends = ("latents", "frames") if decode else ("frames", "latents")

    def whole(component: Component) -> Any:
        made = decode_stream(component, data, arch) if decode else encode_chunks(component, iter(chunks))
        return np.concatenate(list(made), axis=1)

    def drive(component: Component) -> None:
        on_device(component, (names[0], names[1]), chunks[:3], *ends)

    with open_ours(variant, network, tensors, kernels, drive) as component:
        run = partial(on_device, component, (names[0], names[1]), chunks, *ends)
        times, first, _ = timed(run, seconds=seconds, runs=3)
        host_times, _, output = timed(lambda: whole(component), seconds=0, runs=2, warm=True)
        device = component.backend.device  # type: ignore[attr-defined]
        peak = (device.reserved_bytes + weights_bytes(variant, network)) / 2**30
        print(
            f"       peak in use {device.peak_bytes / 2**30:.2f} GiB of {device.reserved_bytes / 2**30:.2f} reserved, weights apart"
        )
        tflop = count_tflop(variant, network, width=case.width, height=case.height, num_frames=case.num_frames)
        return report(case, "wanrt bf16", work, times, (host_times, output), first, peak, tflop, reference)


def measure_diffusers(case: Case, work: str, network: Any, data: Any, seconds: float, *, compiled: bool) -> tuple[Result, Any]:
    arch = VARIANTS[case.variant].vae
    decode = work == "decode"
    torch.cuda.reset_peak_memory_stats()
    given = torch.from_numpy(unnormalise(data, arch) if decode else data).to("cuda", torch.bfloat16)[None]
    if compiled:
        network.decoder = torch.compile(network.decoder)
        network.encoder = torch.compile(network.encoder)

    def run() -> torch.Tensor:
        made = network.decode(given).sample if decode else network.encode(given).latent_dist.mean
        torch.cuda.synchronize()
        return made  # type: ignore[no-any-return]

    times, first, _ = timed(run, seconds=seconds, runs=3)
    host_times, _, output = timed(lambda: run()[0].float().cpu().numpy(), seconds=0, runs=2, warm=True)
    peak = torch.cuda.max_memory_reserved() / 2**30
    name = "diffusers, compiled" if compiled else "diffusers"
    tflop = count_tflop(
        VARIANTS[case.variant],
        "vae" if decode else "vae_encoder",
        width=case.width,
        height=case.height,
        num_frames=case.num_frames,
    )
    return report(case, name, work, times, (host_times, output), first, peak, tflop, None), output


def _difference(output: Any, reference: Any, *, clamped: bool) -> float:
    """Relative difference; diffusers clamps what it decodes."""
    given = np.clip(output, -1, 1) if clamped else output
    return float(np.linalg.norm(given - reference) / np.linalg.norm(reference))


def _kernels(path: Path | None) -> bytes:
    from engines.targets.cuda.compile import compile_kernels

    return path.read_bytes() if path else compile_kernels(gpu_arch())


def write_report(path: Path, results: list[Result], failures: dict[str, str]) -> None:
    """Everything measured so far, as JSON."""
    summary = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "results": [asdict(result) for result in results],
        "failures": failures,
    }
    path.write_text(json.dumps(summary, indent=1), encoding="utf-8")


def main() -> int:
    """Run the cases asked for; a peer that fails is reported and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--work", action="append", choices=["decode", "encode"])
    parser.add_argument("--baseline", action="append", choices=["diffusers", "diffusers-compile"], default=[])
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kernels = _kernels(arguments.kernels)
    results: list[Result] = []
    failures: dict[str, str] = {}
    for case in (CASES[name] for name in arguments.case or CASES):
        variant = VARIANTS[case.variant]
        arch = variant.vae
        network = random_network(variant)
        names = vae_diffusers_names(arch)
        state = network.state_dict()
        tensors = {original: state[name] for original, name in names.items()}
        rng = np.random.default_rng(0)
        size = (case.height // arch.spatial_stride, case.width // arch.spatial_stride)
        latents = rng.standard_normal((arch.z_dim, (case.num_frames - 1) // arch.temporal_stride + 1, *size), np.float32)
        frames = 2 * rng.random((3, case.num_frames, case.height, case.width), np.float32) - 1
        network = network.to(torch.bfloat16)
        for work in arguments.work or ["decode"]:
            data, reference = latents if work == "decode" else frames, None
            for baseline in (*arguments.baseline, None):
                try:
                    if baseline is None:
                        results.append(measure_ours(case, work, tensors, data, kernels, arguments.seconds, reference))
                    else:
                        compiled = baseline.endswith("compile")
                        with torch.no_grad():
                            result, output = measure_diffusers(case, work, network, data, arguments.seconds, compiled=compiled)
                        results.append(result)
                        reference = output if reference is None else reference
                except Exception as error:
                    failures[f"{case.name} {work} {baseline or 'wanrt'}"] = repr(error)
                    print(f"{case.name} {work} {baseline or 'wanrt'}: {error!r}", file=sys.stderr, flush=True)
                gc.collect()
                torch.cuda.empty_cache()
                if arguments.out:
                    write_report(arguments.out, results, failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
