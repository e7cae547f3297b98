"""The VAE at full size on one GPU: the `cuda` target and diffusers decode and encode the same data with the same random weights.

Measured with the result left on the device, and with it in host memory; and how far the two outputs are from each other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import OURS, Attempt, Options, Result, Suite, Timing, measure, relative_error
from benchmarks.vae_peers import count_tflop, open_diffusers, open_ours, random_network, weights_bytes
from export.layouts import vae_diffusers_names
from runtime.bundle import Bundle
from runtime.component import Component
from runtime.geometry import Float32, VideoSize, latent_shape
from runtime.specs import Precision
from runtime.stages.vae import DECODE_FIRST, DECODE_STEP, ENCODE_FIRST, ENCODE_STEP
from runtime.vae import decode_stream, encode_chunks, frame_chunks, unnormalise
from runtime.variants import VaeArch

NETWORKS = {"decode": "vae", "encode": "vae_encoder"}
REHEARSED_CHUNKS = 3  # as many as it takes until a step needs what the one before it needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    variant: str
    size: VideoSize


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeResult(Result):
    """`seconds` with the result on the device."""

    work: str  # decode or encode
    host_seconds: float  # median; float32 in host memory
    tflops: float
    difference: float | None  # relative, from the first baseline's output

    def notes(self) -> list[str]:
        """The copy to the host, and the difference."""
        difference = "" if self.difference is None else f", relative difference {self.difference:.2e}"
        return [f"to the host {self.host_seconds:.3f} s, output std {self.output_std:.3f}{difference}"]


def attempts(case: Case, options: Options) -> Iterator[Attempt]:
    """Decoding, then encoding: the baselines first, whose output this project's is compared with."""
    bundle = options.bundles[0]
    variant = bundle.manifest.variant
    network = random_network(variant)
    state = network.state_dict()
    tensors = {original: state[name] for original, name in vae_diffusers_names(variant.vae).items()}  # kept in float32
    network = network.to(torch.bfloat16)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(latent_shape(case.size, vae=variant.vae), np.float32)
    frames = 2 * rng.random((3, case.size.num_frames, case.size.height, case.size.width), np.float32) - 1
    for work, data in (("decode", latents), ("encode", frames)):
        outputs: list[Float32] = []
        for baseline in options.baselines:
            yield f"{work} {baseline}", partial(_theirs, case, bundle, work, baseline, network, data, options.seconds, outputs)
        for own in options.bundles:
            yield f"{work} {OURS} bf16", partial(_ours, case, own, work, tensors, data, options.seconds, outputs)


def _ours(
    case: Case,
    bundle: Bundle,
    work: str,
    tensors: Mapping[str, torch.Tensor],
    data: Float32,
    seconds: float,
    outputs: list[Float32],
) -> Result:
    variant = bundle.manifest.variant
    chunks = chunks_of(data, variant.vae, work)

    def drive(component: Component) -> None:
        on_device(component, work, chunks[:REHEARSED_CHUNKS])

    def whole(component: Component) -> Float32:
        made = decode_stream(component, data, variant.vae) if work == "decode" else encode_chunks(component, iter(chunks))
        return np.concatenate(list(made), axis=1)

    with open_ours(bundle, NETWORKS[work], tensors, drive) as (component, device):
        timing, _ = measure(partial(on_device, component, work, chunks), seconds=seconds, warmups=1, max_runs=20)
        host, output = measure(partial(whole, component), seconds=0, warmups=1, min_runs=2)
        peak = device.reserved_bytes + weights_bytes(bundle, NETWORKS[work])
    return _result(case, bundle, work, f"{OURS} bf16", (timing, host), peak, _difference(output, outputs, work))


def _theirs(
    case: Case, bundle: Bundle, work: str, baseline: str, network: Any, data: Float32, seconds: float, outputs: list[Float32]
) -> Result:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    source = unnormalise(data, bundle.manifest.variant.vae) if work == "decode" else data
    with open_diffusers(network, source, work, compiled=baseline.endswith("compile")) as (run, fetch):
        timing, _ = measure(run, seconds=seconds, warmups=1, max_runs=20)
        host, output = measure(fetch, seconds=0, warmups=1, min_runs=2)
    peak = torch.cuda.max_memory_reserved()
    difference = _difference(output, outputs, work)
    outputs.append(output)
    return _result(case, bundle, work, baseline, (timing, host), peak, difference)


def chunks_of(data: Float32, arch: VaeArch, work: str) -> list[Float32]:
    """What the steps of a stream take, one after the other: latent frames, not normalised, or groups of video frames."""
    if work == "encode":
        return [np.ascontiguousarray(chunk) for chunk in frame_chunks(data, arch)]
    source = unnormalise(data, arch)
    return [np.ascontiguousarray(source[:, i : i + 1]) for i in range(source.shape[1])]


def on_device(component: Component, work: str, chunks: list[Float32]) -> None:
    """The stream of `runtime.vae` without the copy of its results to the host."""
    given, made = ("latents", "frames") if work == "decode" else ("frames", "latents")
    stages = (DECODE_FIRST, DECODE_STEP) if work == "decode" else (ENCODE_FIRST, ENCODE_STEP)
    caches: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        outputs = component.run(stages[min(index, 1)], {given: component.backend.to_device(chunk), **caches})
        del outputs[made]
        caches = {name.removeprefix("next_"): cache for name, cache in outputs.items()}
    component.backend.device.synchronize()  # type: ignore[attr-defined]  # the cuda backend's


def _difference(output: Float32, outputs: list[Float32], work: str) -> float | None:
    """Relative, from the first output there is; diffusers clamps what it decodes."""
    if not outputs:
        return None
    return relative_error(np.clip(output, -1, 1) if work == "decode" else output, outputs[0])


def _result(
    case: Case, bundle: Bundle, work: str, peer: str, times: tuple[Timing, Timing], peak_bytes: int, difference: float | None
) -> Result:
    device, host = times
    tflop = count_tflop(bundle, NETWORKS[work], case.size)
    facts = asdict(device) | {"output_std": host.output_std, "case": case.name, "peer": peer, "work": work}
    return VaeResult(
        **facts,
        peak_memory_gib=peak_bytes / 2**30,
        tflop=tflop,
        tflops=tflop / device.seconds,
        host_seconds=host.seconds,
        difference=difference,
    )


SUITE = Suite(
    cases=(
        Case(name="480p", variant="wan2.1-t2v-1.3b", size=VideoSize(width=832, height=480, num_frames=81)),
        Case(name="720p", variant="wan2.1-t2v-1.3b", size=VideoSize(width=1280, height=720, num_frames=81)),
        Case(name="5b", variant="wan2.2-ti2v-5b", size=VideoSize(width=1280, height=704, num_frames=121)),
    ),
    precisions=(Precision.BF16,),
    baselines={"diffusers": ("diffusers",), "diffusers-compile": ("diffusers",)},
    attempts=attempts,
    takes=frozenset({"seconds"}),
)
