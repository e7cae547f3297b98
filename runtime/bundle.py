"""The bundle: a folder whose `manifest.json`, written last, says everything about it.

Bundles from strangers are data: paths must stay inside the folder, sizes are checked before anything is mapped, and a folder
without a manifest is an unfinished build and says so.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runtime import strict_json
from runtime.errors import BundleError
from runtime.geometry import SizeRange
from runtime.schedulers import Conventions, DiffusersScheduler
from runtime.specs import Precision
from runtime.variants import Variant

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "build.json"
"""The manifest's name while a build is under way: the artefacts finished so far."""
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_EXTENT = 1 << 20  # no width, depth or count of a network comes near


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """One file of a bundle. `key` hashes all that determined its content, so a known key need not be built again."""

    path: str  # relative to the bundle, with forward slashes
    bytes: int
    sha256: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A component's weights, and the SHA-256 of each tensor's bytes."""

    file: Artefact
    tensors: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Engines of one target: an artefact per stage, in one precision, for a range of sizes (None: any size)."""

    precision: Precision
    sizes: SizeRange | None
    engines: dict[str, Artefact]
    tool_versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    schema_version: int
    wanrt_version: str
    variant: Variant
    conventions: Conventions
    scheduler: DiffusersScheduler | None
    targets: dict[str, Target]
    weights: dict[str, dict[str, WeightFile]]  # precision → component → file; empty for a bundle of engines only
    tokenizer: Artefact | None
    source: str  # name of the checkpoint; for people

    def artefacts(self) -> tuple[Artefact, ...]:
        """Every file the manifest names."""
        engines = [engine for target in self.targets.values() for engine in target.engines.values()]
        weights = [weights.file for files in self.weights.values() for weights in files.values()]
        return (*engines, *weights, *([self.tokenizer] if self.tokenizer else []))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle: its folder, manifest, and the SHA-256 of the manifest, which names it."""

    folder: Path
    manifest: Manifest
    sha256: str

    def file(self, artefact: Artefact) -> Path:
        """Full path of an artefact of this bundle."""
        return self.folder / artefact.path


def open_bundle(folder: Path) -> Bundle:
    """Read and check a bundle's manifest, and that every file it names is there with the size it states.

    Raises:
        BundleError: no such folder, unfinished build, other schema version, manifest damaged or hostile, file missing or
            of another size.
    """
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder", hint="make one: `wanrt build-engines CHECKPOINT --out BUNDLE`")
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = (folder / JOURNAL).is_file()
        raise BundleError(
            f"{folder}: {'an unfinished build' if unfinished else 'not a bundle'}: it has no {MANIFEST}",
            hint="run the same `wanrt build-engines` command again; it continues where it stopped" if unfinished else "",
        )
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: {path.stat().st_size} bytes; a manifest has at most {_MAX_MANIFEST_BYTES}")
    text = path.read_bytes()
    bundle = Bundle(folder=folder, manifest=parse_manifest(text, where=path), sha256=hashlib.sha256(text).hexdigest())
    for artefact in bundle.manifest.artefacts():
        file = bundle.file(artefact)
        if not file.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{path}: {artefact.path!r} leaves the bundle through a link")
        size = file.stat().st_size if file.is_file() else None
        if size != artefact.bytes:
            state = "missing" if size is None else f"{size} bytes"
            raise BundleError(
                f"{artefact.path}: {state}, the manifest says {artefact.bytes} bytes",
                hint="the bundle is incomplete; copy it again or rebuild it",
            )
    return bundle


def parse_manifest(text: bytes, *, where: Path) -> Manifest:
    """Parse and check a manifest's text, schema version first.

    Raises:
        BundleError: other schema version, unknown or missing keys, absurd numbers, or paths that leave the folder.
    """

    def refuse(message: str) -> BundleError:
        return BundleError(f"{where}: {message}", hint="the manifest is damaged; rebuild the bundle")

    try:
        decoded = text.decode()
    except UnicodeDecodeError as exc:
        raise refuse(f"not UTF-8: {exc}") from exc
    version = _schema_version(decoded)
    if version is not None and version != SCHEMA_VERSION:
        raise BundleError(
            f"{where}: schema version {version}; this wanrt reads version {SCHEMA_VERSION}",
            hint="rebuild the bundle with this wanrt, or run it with the one that built it",
        )
    manifest = strict_json.decode(Manifest, decoded, error=refuse)
    for artefact in manifest.artefacts():
        pure = PurePosixPath(artefact.path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in artefact.path or ":" in artefact.path or not pure.parts:
            raise refuse(f"path {artefact.path!r} leaves the bundle's folder")
        if artefact.bytes < 0:
            raise refuse(f"{artefact.path}: {artefact.bytes} bytes")
    _check_numbers(manifest.variant, refuse)
    return manifest


def _schema_version(text: str) -> int | None:
    """The schema version, before the rest is understood; None when the text does not even have one."""
    import json

    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    version = data.get("schema_version") if isinstance(data, dict) else None
    return version if isinstance(version, int) else None


def _check_numbers(variant: Variant, refuse: Callable[[str], BundleError]) -> None:
    """Refuse architecture numbers no network has, before any shape is computed from them."""
    for component in (variant.transformer, variant.text_encoder, variant.vae):
        for name, value in dataclasses.asdict(component).items():
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, int) and not isinstance(number, bool) and not 0 < number <= _MAX_EXTENT:
                    raise refuse(f"variant: {type(component).__name__}.{name}={value} is not a size of any network")
    arch = variant.transformer
    if arch.dim % arch.num_heads or arch.head_dim % 2:
        raise refuse(f"variant: width {arch.dim} does not split into {arch.num_heads} heads of even size")
    if not variant.experts or len({expert.component for expert in variant.experts}) != len(variant.experts):
        raise refuse("variant: experts must be named, each once")
    if len(variant.vae.latents_mean) != variant.vae.z_dim or len(variant.vae.latents_std) != variant.vae.z_dim:
        raise refuse(f"variant: latent statistics must have {variant.vae.z_dim} values")
