"""One forward of the diffusion transformer at full size on one GPU: the `cuda` target and its peers, in the same run.

Weights are random and made on the GPU, every block its own; text length and timestep are the same for all. The output is copied to
the host by every peer.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.cuda_steps import StepTime
from benchmarks.dit_peers import (
    Build,
    Case,
    Forward,
    Opened,
    check_onnxruntime,
    open_diffsynth,
    open_diffusers,
    open_ours,
)
from benchmarks.dit_torch_tensorrt import check_torch_tensorrt, open_torch_tensorrt
from benchmarks.flops import forward_tflop, num_tokens
from benchmarks.gpu import OURS, Attempt, Options, Result, Suite, attentions, measure, precisions_text
from benchmarks.gpu_pace import Pace, watched
from runtime.bundle import Bundle
from runtime.geometry import VideoSize
from runtime.specs import Precision
from runtime.variants import Variant

SHOWN_STEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class DitResult(Result):
    build: Build | None = None  # apart from every time of a forward
    pace: Pace | None = None  # while forwards were timed
    steps: list[StepTime] = field(default_factory=list)  # of one forward more, with --profile

    def notes(self) -> list[str]:
        """How it was built, how fast the GPU ran, and the longest kinds of steps."""
        return [*self._build_notes(), *([str(self.pace)] if self.pace else [])] + [
            f"{s.step:<60} {s.count:4} x {s.ms / s.count:8.3f} ms = {s.ms:8.1f} ms" for s in self.steps[:SHOWN_STEPS]
        ]

    def _build_notes(self) -> list[str]:
        if self.build is None:
            return []
        left = Counter(self.build.left_to_pytorch)
        outside = ", ".join(f"{count} x {name}" for name, count in left.most_common()) or "nothing"
        return [f"built in {self.build.seconds:.0f} s; engines: {self.build.engines}; left to PyTorch: {outside}"]


def attempts(case: Case, options: Options) -> Iterator[Attempt]:
    """This project's bundles in every precision of attention, then the baselines."""
    for bundle in options.bundles:
        for attention in attentions(bundle, options.attention):
            peer = f"{OURS} {precisions_text(bundle, attention)}"
            yield peer, partial(_ours, case, peer, bundle, attention, options)
    for baseline in options.baselines:
        yield baseline, partial(_theirs, case, baseline, options)


def _ours(case: Case, peer: str, bundle: Bundle, attention: Precision, options: Options) -> Result:
    torch.cuda.reset_peak_memory_stats()
    with open_ours(bundle, case, attention) as (forward, backend):
        timed = _timed(forward, options)
        reserved = torch.cuda.max_memory_reserved() + backend.device.reserved_bytes  # the weights are torch's here
        steps = backend.step_times(forward) if options.profile else []
    facts = _facts(case, bundle.manifest.variant)
    return DitResult(**timed, **facts, peer=peer, peak_memory_gib=reserved / 2**30, steps=steps)


def _theirs(case: Case, peer: str, options: Options) -> Result:
    variant = options.bundles[0].manifest.variant
    torch.cuda.reset_peak_memory_stats()
    free_before = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    with _OPENERS[peer](variant, case) as forward:
        timed = _timed(forward, options)
        build = forward.build
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    peak = torch.cuda.max_memory_reserved()
    if peer in _WITH_OWN_MEMORY:
        peak += free_before - free
    return DitResult(**timed, **_facts(case, variant), peer=peer, peak_memory_gib=peak / 2**30, build=build)


def _timed(forward: Callable[[], Any], options: Options) -> dict[str, Any]:
    """A result's times, and its pace."""
    with watched(_gpu()) as watch:
        timing, _ = measure(forward, seconds=options.seconds)
    return {**asdict(timing), "pace": watch.pace}


def _gpu() -> str:
    """The GPU in use, as nvidia-smi names it."""
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def _facts(case: Case, variant: Variant) -> dict[str, Any]:
    tokens = num_tokens(variant, case.size)
    return {"case": case.name, "tokens": tokens, "tflop": forward_tflop(variant.transformer, tokens)}


def _open_onnxruntime(variant: Variant, case: Case) -> AbstractContextManager[Forward]:
    from benchmarks.dit_onnxruntime import open_onnxruntime  # traces graphs, which no other peer needs

    return open_onnxruntime(variant, case)


_OPENERS: dict[str, Opened] = {
    "diffusers": partial(open_diffusers, compiled=False),
    "diffusers-compile": partial(open_diffusers, compiled=True),
    "diffsynth": open_diffsynth,
    "onnxruntime": _open_onnxruntime,
    "torch-tensorrt": open_torch_tensorrt,
}
_WITH_OWN_MEMORY = frozenset({"onnxruntime", "torch-tensorrt"})
"""Peers that hold memory beside PyTorch's until they are closed."""
_480P = VideoSize(width=832, height=480, num_frames=81)
SUITE = Suite(
    cases=(
        Case("1.3b-480p", "wan2.1-t2v-1.3b", _480P),
        Case("14b-480p", "wan2.1-t2v-14b", _480P),
        Case("5b-720p", "wan2.2-ti2v-5b", VideoSize(width=1280, height=704, num_frames=121)),
        Case("14b-720p", "wan2.1-t2v-14b", VideoSize(width=1280, height=720, num_frames=81)),
    ),
    precisions=(Precision.BF16, Precision.FP8),
    baselines={
        "diffusers": ("diffusers",),
        "diffusers-compile": ("diffusers",),
        "diffsynth": ("diffsynth",),
        "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
        "torch-tensorrt": ("torch_tensorrt", "diffusers"),
    },
    checks={"onnxruntime": check_onnxruntime, "torch-tensorrt": check_torch_tensorrt},
    attempts=attempts,
    takes=frozenset({"attention", "seconds", "profile"}),
)
