"""What a bundle holds, whether this machine can run it, and whether its files are what the manifest says."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.backends import RUNTIME_TARGETS
from runtime.bundle import check_hash, open_bundle
from runtime.manifest import Manifest, Target
from runtime.stages import network_components


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInspection:
    """One target of a bundle. `obstacle` says why this machine cannot run it, None when it can; `note` what to know then."""

    name: str
    precision: str
    sizes: str
    num_engines: int
    engine_bytes: int
    tool_versions: dict[str, str]
    obstacle: str | None
    note: str


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
            state = f"runs here{target.note}" if target.obstacle is None else f"does not run here: {target.obstacle}"
            size = f"{target.num_engines} engines, {target.engine_bytes / 1e6:.2f} MB"
            rows.append((f"target {target.name}", f"{target.precision}, sizes {target.sizes}, {size}; {state}"))
        rows += [("weights", f"{name}  {size / 1e6:.1f} MB") for name, size in self.weight_bytes.items()]
        verdict = (
            "yes" if self.runs_here else "no target runs here" if self.weight_bytes else "no: it holds engines only, no weights"
        )
        rows.append(("can run here", verdict))
        width = max(len(name) for name, _ in rows) + 2
        return [f"{name:<{width}}{value}" for name, value in rows]


def inspect_bundle(folder: Path) -> Inspection:
    """Describe a bundle from its manifest.

    Raises:
        BundleError: it cannot be opened.
    """
    bundle = open_bundle(folder)
    manifest, variant = bundle.manifest, bundle.manifest.variant
    known = {target.name: target for target in RUNTIME_TARGETS}
    targets = tuple(
        TargetInspection(
            name=name,
            precision=target.precision,
            sizes=str(target.sizes) if target.sizes else "any",
            num_engines=len(target.engines),
            engine_bytes=sum(file.bytes for file in target.files()),
            tool_versions=target.tool_versions,
            obstacle=known[name].obstacle() if name in known else "this version of wanrt cannot run it",
            note=_memory_note(manifest, target),
        )
        for name, target in manifest.targets.items()
    )
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
    return f", but slowly: {max(sizes) / 1e9:.1f} GB of weights do not fit its memory of {memory / 1e9:.1f} GB"


def verify_bundle(folder: Path, *, on_file: Callable[[str], None] = lambda _: None) -> None:
    """Read every file of a bundle and compare its SHA-256 with the manifest's.

    Raises:
        BundleError: the first file that differs.
    """
    bundle = open_bundle(folder)
    for artefact in bundle.manifest.artefacts():
        check_hash(bundle, artefact)
        on_file(artefact.path)
