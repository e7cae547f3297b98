"""The VAE at full size on one GPU: the `cuda` target and diffusers decode and encode the same data with the same random weights.

Measured with the result left on the device, and with it in host memory; and how far the two outputs are from each other. In strips the
work goes over the host, so that there is only one time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu import OURS, Attempt, Options, Result, Suite, Timing, checked_std, measure, relative_error
from benchmarks.vae_peers import count_tflop, open_diffusers, open_ours, random_network, weights_bytes
from export.layouts import vae_diffusers_names
from runtime.bundle import Bundle
from runtime.component import Component
from runtime.geometry import Float32, VideoSize, latent_shape
from runtime.specs import Precision
from runtime.vae import decode_colours, decode_steps, decode_stream, encode_steps, encode_stream, frame_chunks, unnormalise
from runtime.variants import VaeArch

NETWORKS = {"decode": "vae", "encode": "vae_encoder"}
REHEARSED_CHUNKS = 3  # as many as it takes until a step needs what the one before it needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    variant: str
    size: VideoSize
    strips: tuple[int, ...] = ()
    """Numbers of strips of a frame that are measured too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeResult(Result):
    """`seconds` with the result on the device."""

    work: str  # decode or encode
    host_seconds: float  # median; in host memory: latents, or frames as each peer gives them, float32 or 8 bits
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
            for strips in (1, *case.strips):
                name = f"{work} {OURS} bf16" + (f" in {strips} strips" if strips > 1 else "")
                yield name, partial(_ours, case, own, work, strips, tensors, data, options.seconds, outputs)


def _ours(
    case: Case,
    bundle: Bundle,
    work: str,
    num_strips: int,
    tensors: Mapping[str, torch.Tensor],
    data: Float32,
    seconds: float,
    outputs: list[Float32],
) -> Result:
    arch = bundle.manifest.variant.vae
    few = REHEARSED_CHUNKS if work == "decode" else 1 + (REHEARSED_CHUNKS - 1) * arch.temporal_stride

    def drive(component: Component) -> None:
        _to_host(component, work, data[:, :few], arch, num_strips)

    with open_ours(bundle, NETWORKS[work], tensors, drive) as (component, device):
        in_host = partial(_to_host, component, work, data, arch, num_strips)
        host, _ = measure(in_host, seconds=0 if num_strips == 1 else seconds, warmups=1, min_runs=2)
        timing = host  # strips go over the host
        if num_strips == 1:
            timing, _ = measure(partial(on_device, component, work, data, arch), seconds=seconds, warmups=1, max_runs=20)
        output = _as_theirs(component, work, data, arch, num_strips)
        peak = device.reserved_bytes + weights_bytes(bundle, NETWORKS[work])
    peer = f"{OURS} bf16" if num_strips == 1 else f"{OURS} bf16 in {num_strips} strips"
    return _result(case, bundle, work, peer, (timing, host), peak, output, outputs)


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
    result = _result(case, bundle, work, baseline, (timing, host), peak, output, outputs)
    outputs.append(output)
    return result


def on_device(component: Component, work: str, data: Float32, arch: VaeArch) -> None:
    """The whole work without the copy of its results to the host."""
    made = (
        decode_steps(component, unnormalise(data, arch))
        if work == "decode"
        else encode_steps(component, frame_chunks(data, arch))
    )
    for outputs in made:
        outputs.clear()
    component.backend.device.synchronize()  # type: ignore[attr-defined]  # the cuda backend's


def _to_host(component: Component, work: str, data: Float32, arch: VaeArch, num_strips: int) -> NDArray[Any]:
    """The whole work as a generation does it: colours of 8 bits, or latents."""
    if work == "encode":
        return encode_stream(component, data, arch, num_strips=num_strips)
    return np.concatenate(list(decode_colours(component, data, arch, num_strips=num_strips)))


def _as_theirs(component: Component, work: str, data: Float32, arch: VaeArch, num_strips: int) -> Float32:
    """The result as diffusers gives it: decoded colours as float32, latents on their own scale."""
    if work == "encode":
        return unnormalise(encode_stream(component, data, arch, num_strips=num_strips), arch)
    return np.concatenate(list(decode_stream(component, data, arch, num_strips=num_strips)), axis=1)


def _difference(output: Float32, outputs: list[Float32], work: str) -> float | None:
    """Relative, from the first output there is; diffusers clamps what it decodes."""
    if not outputs:
        return None
    return relative_error(np.clip(output, -1, 1) if work == "decode" else output, outputs[0])


def _result(
    case: Case,
    bundle: Bundle,
    work: str,
    peer: str,
    times: tuple[Timing, Timing],
    peak_bytes: int,
    output: Float32,
    outputs: list[Float32],
) -> Result:
    device, host = times
    tflop = count_tflop(bundle, NETWORKS[work], case.size)
    facts = asdict(device) | {"output_std": checked_std(output), "case": case.name, "peer": peer, "work": work}
    return VaeResult(
        **facts,
        peak_memory_gib=peak_bytes / 2**30,
        tflop=tflop,
        tflops=tflop / device.seconds,
        host_seconds=host.seconds,
        difference=_difference(output, outputs, work),
    )


SUITE = Suite(
    cases=(
        Case(name="480p", variant="wan2.1-t2v-1.3b", size=VideoSize(width=832, height=480, num_frames=81)),
        Case(name="720p", variant="wan2.1-t2v-1.3b", size=VideoSize(width=1280, height=720, num_frames=81), strips=(2,)),
        Case(name="5b", variant="wan2.2-ti2v-5b", size=VideoSize(width=1280, height=704, num_frames=121)),
    ),
    precisions=(Precision.BF16,),
    baselines={"diffusers": ("diffusers",), "diffusers-compile": ("diffusers",)},
    attempts=attempts,
    takes=frozenset({"seconds"}),
)
