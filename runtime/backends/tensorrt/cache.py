"""What a library compiles on this machine, kept from one process to the next: a file beside the bundle for each GPU and driver.

It holds machine code, so it is outside of the bundle, which may come from a stranger, and only a file of this user's is read, whole: a
digest of the rest comes first. The library itself refuses one of another version, GPU or driver.
"""

import hashlib
import logging
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.backends.tensorrt.library import OpenLibrary

log = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_name(opened: OpenLibrary, *, gpu: str, architecture: str, driver: int) -> str:
    """The file for one library, GPU and driver; `driver` as CUDA counts versions."""
    parts = (opened.library.distribution, opened.version, gpu, architecture, f"driver-{driver}")
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip("-.") for part in parts) + ".bin"


class RuntimeCache:
    """The library's cache, filled from a file and written back. Nothing that goes wrong with the file stops a generation.

    Args:
        file: None to keep nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._cache: Any = None
        self._known = b""

    def attach(self, config: Any) -> None:
        """Let what is compiled under a runtime configuration go through the one cache."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._fill()
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file, whole or not at all, if anything was added."""
        if self._cache is None or self._file is None:
            return
        data = bytes(self._cache.serialize() or b"")
        if not data or data == self._known:
            return
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}.partial")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(partial, self._file)
            self._known = data
        except OSError as exc:
            log.warning("%s: what was compiled is not kept: %s", self._file, exc.strerror or exc)
            with suppress(OSError):
                partial.unlink()

    def _fill(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        try:
            if not _is_own(self._file):
                log.warning("%s: not read, as others than this user may write it", self._file)
                return
            data = self._file.read_bytes()
        except OSError as exc:
            log.warning("%s: cannot be read: %s", self._file, exc.strerror or exc)
            return
        digest, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            log.warning("%s: damaged; made anew", self._file)
        elif self._cache.deserialize(data):
            self._known = data
        else:
            log.info("%s: of another version, GPU or driver; made anew", self._file)


def _is_own(file: Path) -> bool:
    """Whether nobody else could have written the file, nor put it there."""
    if not hasattr(os, "getuid"):  # Windows, where the user's folders are the user's
        return True
    states = (os.lstat(file), os.stat(file.parent))
    return all(state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH) for state in states)
