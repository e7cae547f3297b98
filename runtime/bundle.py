"""The bundle: a folder whose `manifest.json`, written last, says everything about it.

Bundles from strangers are data: paths must stay inside the folder, sizes are checked before anything is mapped, and a folder
without a manifest is an unfinished build and says so.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from runtime import strict_json
from runtime.bundle_checks import check_manifest
from runtime.errors import BundleError
from runtime.manifest import SCHEMA_VERSION, Artefact, Manifest

MANIFEST = "manifest.json"
JOURNAL = "build.json"
"""The manifest's name while a build is under way: the artefacts finished so far."""
_MAX_MANIFEST_BYTES = 64 << 20
_COPY_AGAIN = "the bundle is incomplete or damaged; copy it again or rebuild it"


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
            hint="run the same `wanrt build-engines` command again; it continues where it stopped"
            if unfinished
            else "give a folder that `wanrt build-engines` made",
        )
    text = _read_manifest(path)
    bundle = Bundle(folder=folder, manifest=parse_manifest(text, where=path), sha256=hashlib.sha256(text).hexdigest())
    for artefact in bundle.manifest.artefacts():
        _check_file(bundle, artefact)
    return bundle


def check_hash(bundle: Bundle, artefact: Artefact) -> None:
    """Read an artefact and compare its SHA-256 with the manifest's.

    Raises:
        BundleError: it differs, or the file cannot be read.
    """
    try:
        found = file_sha256(bundle.file(artefact))
    except OSError as exc:
        raise BundleError(f"{artefact.path}: cannot be read: {exc.strerror or exc}", hint=_COPY_AGAIN) from exc
    if found != artefact.sha256:
        raise BundleError(f"{artefact.path}: SHA-256 is {found}, the manifest says {artefact.sha256}", hint=_COPY_AGAIN)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    check_manifest(manifest, refuse)
    return manifest


def _read_manifest(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: {size} bytes; a manifest has at most {_MAX_MANIFEST_BYTES}", hint="rebuild the bundle")
        return path.read_bytes()
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read: {exc.strerror or exc}", hint="check its permissions") from exc


def _check_file(bundle: Bundle, artefact: Artefact) -> None:
    """Check that an artefact is a file of the stated size inside the bundle's folder."""
    file = bundle.file(artefact)
    try:
        inside = file.resolve().is_relative_to(bundle.folder.resolve())
        size = file.stat().st_size if file.is_file() else None
    except (OSError, RuntimeError) as exc:  # a name too long, a folder without access; a loop of links before Python 3.13
        raise BundleError(f"{artefact.path}: cannot be reached: {exc}", hint=_COPY_AGAIN) from exc
    if not inside:
        raise BundleError(
            f"{artefact.path}: leaves the bundle's folder through a link", hint="put the file itself in the link's place"
        )
    if size != artefact.bytes:
        state = "missing" if size is None else f"{size} bytes"
        raise BundleError(f"{artefact.path}: {state}, the manifest says {artefact.bytes} bytes", hint=_COPY_AGAIN)


def _schema_version(text: str) -> int | None:
    """The schema version, before the rest is understood; None when the text does not even have one."""
    import json

    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    version = data.get("schema_version") if isinstance(data, dict) else None
    return version if type(version) is int else None
