"""The bundle while it is being built: artefacts appear whole, and one whose key is known is not built again.

While a build is under way the folder holds a journal in place of its manifest, so a half bundle is never opened. A killed build
leaves the journal; the next one takes over every artefact whose key still holds.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime import strict_json
from runtime.bundle import JOURNAL, MANIFEST, file_sha256, parse_manifest
from runtime.bundle_checks import check_path
from runtime.errors import BuildError, BundleError
from runtime.manifest import Artefact, Manifest, WeightFile

log = logging.getLogger(__name__)
_PLACES = ("engines", "weights")  # folders that belong to the bundle alone
_PARTIAL = ".partial"
_BUNDLE_NAMES = {MANIFEST, JOURNAL, "engines", "weights", "tokenizer.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Journal:
    """The artefacts finished so far, by their path."""

    artefacts: dict[str, WeightFile]


class BundleStore:
    """Artefacts of one bundle folder, kept by content key. Use with `with`: one process builds a bundle at a time.

    Where the system has no `flock` (Windows), nothing keeps two builds of one folder apart.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder / MANIFEST)
        """The manifest of a finished bundle already there, or None."""
        self._known = _known_artefacts(self.manifest, folder / JOURNAL)
        self._building = False
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

    def has(self, path: str, *, key: str) -> bool:
        """Whether the artefact at `path` is there with content key `key`."""
        known = self._known.get(path)
        return known is not None and known.file.key == key and _has_size(self.folder / path, known.file.bytes)

    def artefact(self, path: str, *, key: str, build: Callable[[Path], dict[str, str] | None]) -> WeightFile:
        """The artefact at `path` with content key `key`, built only when it is not there yet.

        Args:
            path: relative to the bundle, forward slashes.
            build: writes the file it is given; may return digests of the file's parts.

        Raises:
            BuildError: the file could not be written.
        """
        if self.has(path, key=key):
            return self._known[path]
        self._begin()
        if self._known.pop(path, None) is not None:
            self._save_journal()  # forgotten before its file is replaced: a journal never vouches for other bytes
        final = self.folder / path
        partial = final.with_name(final.name + _PARTIAL)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            parts = build(partial) or {}
            sha256 = parts.pop("", None) or file_sha256(partial)
            made = WeightFile(file=Artefact(path=path, bytes=partial.stat().st_size, sha256=sha256, key=key), tensors=parts)
            os.replace(partial, final)
        except OSError as exc:
            raise BuildError(
                f"{path}: could not be written: {exc.strerror or exc}", hint="free some space and run it again"
            ) from exc
        finally:
            partial.unlink(missing_ok=True)
        self._known[path] = made
        self._save_journal()
        return made

    def finish(self, manifest: Manifest) -> bool:
        """Write the manifest, last of all, and remove what no longer belongs to the bundle.

        Returns:
            False when the bundle already was exactly this.
        """
        if not self._building and manifest == self.manifest:
            return False
        self._begin()
        _write_whole(self.folder / MANIFEST, strict_json.encode(manifest))
        (self.folder / JOURNAL).unlink(missing_ok=True)
        kept = {self.folder / artefact.path for artefact in manifest.artefacts()}
        for place in _PLACES:
            for file in (self.folder / place).rglob("*"):
                if file.is_file() and file not in kept:
                    file.unlink()
        return True

    def _begin(self) -> None:
        """Turn the folder into an unfinished build: from here on it cannot be opened until `finish`."""
        if self._building:
            return
        try:
            _check_folder(self.folder, self.manifest)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(_locked(self.folder))
            self._check_unchanged()
            self._building = True
            self._save_journal()
            (self.folder / MANIFEST).unlink(missing_ok=True)
            for stale in self.folder.rglob("*" + _PARTIAL):
                stale.unlink()
        except OSError as exc:
            raise BuildError(
                f"{self.folder}: cannot be written: {exc.strerror or exc}", hint="choose another --out folder"
            ) from exc

    def _check_unchanged(self) -> None:
        """Refuse to go on from what another build has replaced since this one read it: files of other content may have the same size."""
        manifest = _read_manifest(self.folder / MANIFEST)
        if (manifest, _known_artefacts(manifest, self.folder / JOURNAL)) != (self.manifest, self._known):
            raise BuildError(f"{self.folder}: another build has changed it meanwhile", hint="run the same command again")

    def _save_journal(self) -> None:
        _write_whole(self.folder / JOURNAL, strict_json.encode(_Journal(artefacts=self._known)))


def content_key(**facts: Any) -> str:
    """Hash of everything that determines an artefact's content; facts are JSON values."""
    import json

    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system releases however the process ends."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise BuildError(
                f"{folder}: another build is writing it", hint="wait until it is done, or choose another --out folder"
            ) from exc
        yield
    finally:
        os.close(descriptor)


def _check_folder(folder: Path, manifest: Manifest | None) -> None:
    """Refuse a folder that holds something else: other software calls its files manifest.json, too."""
    if manifest is not None or not folder.is_dir():
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name.removesuffix(_PARTIAL) not in _BUNDLE_NAMES)
    if foreign:
        raise BuildError(
            f"{folder}: holds {foreign[0]!r} and is not a bundle", hint="choose another --out folder, or empty this one"
        )


def _read_manifest(path: Path) -> Manifest | None:
    if not path.is_file():
        return None
    try:
        return parse_manifest(path.read_bytes(), where=path)
    except (BundleError, OSError) as exc:  # of another version, or damaged: its artefacts are not trusted, all is built anew
        log.warning("the bundle there is not reused: %s", exc)
        return None


def _known_artefacts(manifest: Manifest | None, journal: Path) -> dict[str, WeightFile]:
    if manifest is not None:
        whole = {artefact.path: WeightFile(file=artefact, tensors={}) for artefact in manifest.artefacts()}
        return whole | {weights.file.path: weights for files in manifest.weights.values() for weights in files.values()}
    if not journal.is_file():
        return {}
    try:
        artefacts = strict_json.decode(_Journal, journal.read_text(encoding="utf-8"), error=BundleError).artefacts
        for path in artefacts:
            check_path(path, BundleError)
        return artefacts
    except (BundleError, OSError, UnicodeDecodeError) as exc:
        log.warning("the journal of an unfinished build is not usable, all is built anew: %s", exc)
        return {}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        raise BuildError(
            f"{path}: could not be written: {exc.strerror or exc}", hint="free some space and run it again"
        ) from exc
