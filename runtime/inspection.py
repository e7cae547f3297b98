"""What a bundle holds, whether this machine can run it, and whether its files are what the manifest says."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.backends import RUNTIME_TARGETS, RuntimeTarget
from runtime.backends.engine_file import EngineHeader
from runtime.bundle import Bundle, check_hash, open_bundle
from runtime.errors import DeviceMemoryError, RequestError
from runtime.manifest import Manifest, Target
from runtime.memory import LIBRARY_BYTES, gib, plan_memory, scratch_text
from runtime.needs import generation_needs
from runtime.opening import Opener, find_obstacle
from runtime.precision import wide_text
from runtime.request import GenerateRequest
from runtime.resolving import resolve_request
from runtime.stages import network_components
from runtime.variants import Presence, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInspection:
    """One target of a bundle. `obstacle` says why this machine cannot run it, None when it can; `note` what to know of it."""

    name: str
    precision: str
    sizes: str
    num_engines: int
    engine_bytes: int
    tool_versions: dict[str, str]
    obstacle: str | None
    note: str
    memory: str | None  # what the default generation takes of the device's memory; None where it has none of its own
    wide: str  # what of its fp8 is bf16; empty for nothing
    architectures: tuple[str, ...]  # of the GPUs it was built for; empty where that decides nothing
    scratch_bytes: dict[str, int]  # by stage, at the largest size; empty where engines have no scratch memory of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    variant: str
    bundle_sha256: str
    wanrt_version: str
    conventions: str
    architecture: dict[str, str]
    defaults: dict[str, str]
    targets: tuple[TargetInspection, ...]
    weight_bytes: dict[str, int]  # by "precision/component"
    runs_here: bool

    def lines(self) -> list[str]:
        """The inspection as aligned text."""
        rows = [
            ("variant", f"{self.variant} ({self.conventions} conventions)"),
            ("bundle", self.bundle_sha256),
            ("built by", self.wanrt_version),
        ]
        rows += list(self.architecture.items()) + list(self.defaults.items())
        for target in self.targets:
            state = "runs here" if target.obstacle is None else f"does not run here: {target.obstacle}"
            state += f"; {target.note}" if target.note else ""
            size = f"{target.num_engines} engines, {target.engine_bytes / 1e6:.2f} MB"
            precision = f"{target.precision} (bf16: {target.wide})" if target.wide else target.precision
            built_for = f" for {', '.join(target.architectures)}" if target.architectures else ""
            rows.append((f"target {target.name}", f"{precision}, sizes {target.sizes}, {size}{built_for}; {state}"))
            if target.scratch_bytes:
                rows.append(("scratch memory", f"for the largest shapes {scratch_text(target.scratch_bytes)}"))
            if target.memory is not None:
                rows.append(("device memory", target.memory))
        rows += [("weights", f"{name}  {size / 1e6:.1f} MB") for name, size in self.weight_bytes.items()]
        verdict = (
            "yes" if self.runs_here else "no target runs here" if self.weight_bytes else "no: it holds engines only, no weights"
        )
        rows.append(("can run here", verdict))
        width = max(len(name) for name, _ in rows) + 2
        return [f"{name:<{width}}{value}" for name, value in rows]


def inspect_bundle(folder: Path, *, vram: int | None = None) -> Inspection:
    """Describe a bundle from its manifest.

    Args:
        vram: bytes of device memory to plan the default generation for; None: as much as it takes.

    Raises:
        RequestError: a budget of device memory, but no target that has any.
        BundleError: it cannot be opened.
    """
    bundle = open_bundle(folder)
    manifest, variant = bundle.manifest, bundle.manifest.variant
    known = {target.name: target for target in RUNTIME_TARGETS}
    targets = tuple(_inspect_target(bundle, name, target, known.get(name), vram) for name, target in manifest.targets.items())
    if vram is not None and all(target.memory is None for target in targets):
        raise RequestError("--vram: no target of this bundle has device memory of its own", hint="leave it out")
    weights = {
        f"{precision}/{name}": file.file.bytes for precision, files in manifest.weights.items() for name, file in files.items()
    }
    dit, defaults = variant.transformer, variant.defaults
    return Inspection(
        variant=variant.name,
        bundle_sha256=bundle.sha256,
        wanrt_version=manifest.wanrt_version,
        conventions=manifest.conventions,
        architecture={
            "transformer": f"{dit.num_layers} blocks, width {dit.dim}, {dit.num_heads} heads, FFN {dit.ffn_dim}",
            "experts": ", ".join(f"{expert.component} from {expert.boundary}" for expert in variant.experts),
            "text encoder": f"{variant.text_encoder.num_layers} blocks, width {variant.text_encoder.dim}",
            **_image_architecture(variant),
            "VAE": f"base {variant.vae.base_dim}, {variant.vae.z_dim} latent channels",
        },
        defaults={
            "default size": f"{defaults.width}x{defaults.height}, {defaults.num_frames} frames at {defaults.fps} fps",
            "default steps": f"{defaults.num_steps}, shift {defaults.shift}, guidance {', '.join(map(str, defaults.guidance))}",
        },
        targets=targets,
        weight_bytes=weights,
        runs_here=bool(weights) and any(target.obstacle is None for target in targets),
    )


def _inspect_target(
    bundle: Bundle, name: str, target: Target, runtime_target: RuntimeTarget | None, vram: int | None
) -> TargetInspection:
    if runtime_target is None:
        obstacle: str | None = "this version of wanrt cannot run it"
        notes = []
    else:
        obstacle = find_obstacle(bundle, runtime_target)
        notes = [runtime_target.note, _memory_note(bundle.manifest, target) if obstacle is None else ""]
    headers = _headers(bundle, target, runtime_target)
    return TargetInspection(
        name=name,
        precision=target.precision,
        sizes=str(target.sizes) if target.sizes else "any",
        num_engines=len(target.engines),
        engine_bytes=sum(file.bytes for file in target.files()),
        tool_versions=target.tool_versions,
        obstacle=obstacle,
        note="; ".join(filter(None, notes)),
        memory=None if runtime_target is None else _device_memory(bundle, runtime_target, vram),
        wide=wide_text(bundle.manifest.fp8_wide, target.precision),
        architectures=tuple(target.kernels)
        or tuple(dict.fromkeys(name for header in headers.values() for name in header.architectures)),
        scratch_bytes={stage: header.scratch_bytes for stage, header in headers.items()},
    )


def _headers(bundle: Bundle, target: Target, runtime_target: RuntimeTarget | None) -> dict[str, EngineHeader]:
    if runtime_target is None or runtime_target.header is None:
        return {}
    return {stage: runtime_target.header(bundle.file(engine)) for stage, engine in target.engines.items()}


def _image_architecture(variant: Variant) -> dict[str, str]:
    """What concerns images and videos: the image encoder, and what a request may or must bring."""
    encoder, takes = variant.image_encoder, variant.conditioning
    found = {} if encoder is None else {"image encoder": f"{encoder.num_blocks} blocks, width {encoder.dim}"}
    inputs = {"image": takes.image, "last image": takes.last_image, "video": takes.video}
    named = [f"{name} ({presence})" for name, presence in inputs.items() if presence is not Presence.NONE]
    return found | ({"takes": ", ".join(named)} if named else {})


def _memory_note(manifest: Manifest, target: Target) -> str:
    """A warning when one network's weights alone exceed the machine's memory; empty otherwise, or where it is not known."""
    sizes = [
        files[component].file.bytes
        for network, precision in target.precisions.items()
        if (files := manifest.weights.get(precision)) is not None
        for component in network_components(manifest.variant, network)
        if component in files
    ]
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return ""
    if max(sizes, default=0) <= memory:
        return ""
    return f"slowly: {max(sizes) / 1e9:.1f} GB of weights do not fit its memory of {memory / 1e9:.1f} GB"


def _device_memory(bundle: Bundle, target: RuntimeTarget, vram: int | None) -> str | None:
    """The plan for a generation of the default size and with guidance; or why there is none."""
    if target.rehearse is None:
        return None
    variant = bundle.manifest.variant
    defaults, takes = variant.defaults, variant.conditioning
    blank = np.zeros((defaults.height, defaults.width, 3), np.uint8)
    request = GenerateRequest(
        prompt="",
        image=blank if takes.image is Presence.REQUIRED else None,
        last_image=blank if takes.last_image is Presence.REQUIRED else None,
    )
    opener = Opener(bundle, target, reason="inspected", num_threads=0)
    try:
        job = resolve_request(request, bundle.manifest, sizes=opener.target.sizes, attention=opener.attention)
    except RequestError as error:  # the default size is not among those the engines were built for
        return error.message
    needs = generation_needs(opener, job, target.rehearse)
    least = LIBRARY_BYTES + max(need.within(0).least_bytes for need in needs)  # in as many strips as there can be
    whole = LIBRARY_BYTES + sum(need.weight_bytes for need in needs) + max(need.work_bytes for need in needs)
    try:
        plan = plan_memory(needs, budget_bytes=whole if vram is None else vram, fixed_bytes=LIBRARY_BYTES)
    except DeviceMemoryError as error:
        return error.message
    return f"{job.size} runs in {gib(least)} or more; {plan}"


def verify_bundle(folder: Path, *, on_file: Callable[[str], None] = lambda _: None) -> None:
    """Read every file of a bundle and compare its SHA-256 with the manifest's.

    Raises:
        BundleError: the first file that differs.
    """
    bundle = open_bundle(folder)
    for artefact in bundle.manifest.artefacts():
        check_hash(bundle, artefact)
        on_file(artefact.path)
