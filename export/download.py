"""A folder, or a repository of a hub: what `build-engines` is given becomes a local checkpoint folder.

Only the files that `export.checkpoint` reads are fetched, the small config files first: a model of another kind is refused before
its weights are. Resuming, caching and checking of files are the hub clients' own.
"""

import errno
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from runtime.errors import ExportError

_WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index*.json")
_KIND_PATTERNS = ("model_index.json", "config.json", "high_noise_model/config.json", "low_noise_model/config.json")
_ORIGINAL_PATTERNS = (
    *_WEIGHTS,
    *(f"{folder}/{name}" for folder in ("high_noise_model", "low_noise_model") for name in _WEIGHTS),
    "models_t5_*.pth",
    "models_t5_*.safetensors",
    *(f"{name}.{ending}" for name in ("models_clip_*", "Wan2.[12]_VAE") for ending in ("pth", "safetensors")),
    "google/umt5-xxl/tokenizer.json",
)
_DIFFUSERS_PATTERNS = (
    *(f"{folder}/{name}" for folder in ("transformer", "transformer_2", "vae") for name in ("config.json", *_WEIGHTS)),
    "text_encoder/config.json",
    "text_encoder/model*.safetensors",
    "text_encoder/model*.safetensors.index*.json",
    "image_encoder/config.json",
    "image_encoder/model*.safetensors",
    "image_encoder/model*.safetensors.index*.json",
    "image_processor/preprocessor_config.json",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

log = logging.getLogger(__name__)


class Hub(StrEnum):
    """Where a hub id is looked up."""

    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"


_PACKAGES = {Hub.HUGGINGFACE: "huggingface-hub", Hub.MODELSCOPE: "modelscope"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadEvent:
    """Progress in bytes; `total_bytes` grows while the client is still finding out."""

    done_bytes: int
    total_bytes: int


OnProgress = Callable[[DownloadEvent], None]


def resolve_checkpoint(
    where: str, *, hub: Hub = Hub.HUGGINGFACE, cache: Path | None = None, on_progress: OnProgress = lambda _: None
) -> Path:
    """A local folder for `where`.

    Args:
        where: a folder, which is returned as it is, or a hub id such as `Wan-AI/Wan2.1-T2V-1.3B`.
        cache: where the hub's client keeps its files; its own place when None.
        on_progress: called as bytes arrive, possibly from other threads.

    Raises:
        ExportError: neither a folder nor a hub id, or the repository cannot be had or holds another kind of model.
    """
    path = Path(where).expanduser()
    if where and path.is_dir():
        return path
    if where and path.exists():
        raise ExportError(f"{where}: is a file, a checkpoint is a folder", hint="give the folder that holds it")
    if not _HUB_ID.fullmatch(where):
        raise ExportError(
            f"{where}: no such folder", hint="give a checkpoint's folder, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B"
        )
    return _download(where, hub, cache, on_progress)


def _download(repository: str, hub: Hub, cache: Path | None, on_progress: OnProgress) -> Path:
    from export.checkpoint import CheckpointFolder, Layout, check_kind, layout_of

    fetch = {Hub.HUGGINGFACE: _fetch_from_huggingface, Hub.MODELSCOPE: _fetch_from_modelscope}[hub]
    try:
        folder = CheckpointFolder(fetch(repository, _KIND_PATTERNS, cache, lambda _: None))
        if not any(folder.has(name) for name in _KIND_PATTERNS):
            raise ExportError(
                f"{repository}: the repository has neither model_index.json (diffusers) nor config.json (original)",
                hint="give a repository that holds a whole Wan checkpoint, such as Wan-AI/Wan2.1-T2V-1.3B",
            )
        check_kind(folder)
        rest = _DIFFUSERS_PATTERNS if layout_of(folder) is Layout.DIFFUSERS else _ORIGINAL_PATTERNS
        log.info("%s: downloading from %s", repository, hub)
        return fetch(repository, (*_KIND_PATTERNS, *rest), cache, on_progress)
    except ExportError:
        raise
    except ImportError as exc:
        raise ExportError(
            f"{repository}: not a folder here, and the client of {hub} is not installed", hint=f"pip install {_PACKAGES[hub]}"
        ) from exc
    except Exception as exc:  # each client has error classes of its own, several from its HTTP library
        raise _refusal(repository, hub, exc) from exc


def _fetch_from_huggingface(repository: str, patterns: Sequence[str], cache: Path | None, on_progress: OnProgress) -> Path:
    from huggingface_hub import snapshot_download

    counter = _byte_counter(on_progress)
    return Path(snapshot_download(repository, allow_patterns=list(patterns), cache_dir=cache, tqdm_class=counter))


def _fetch_from_modelscope(repository: str, patterns: Sequence[str], cache: Path | None, on_progress: OnProgress) -> Path:
    from modelscope.hub.snapshot_download import snapshot_download

    callback = _file_callback(on_progress)
    kept = str(cache) if cache else None
    return Path(snapshot_download(repository, allow_patterns=list(patterns), cache_dir=kept, progress_callbacks=[callback]))


def _byte_counter(on_progress: OnProgress) -> type[Any]:
    """A progress bar class that draws nothing and reports bytes.

    huggingface_hub makes several bars of it: of files, of bytes received and of bytes written; the fullest of bytes counts.
    """
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    bars: list[Any] = []

    class ByteCounter(tqdm):  # type: ignore[type-arg,misc,unused-ignore]
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # an option of huggingface_hub's own class
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})
            if self.unit == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self.unit == "B":
                fullest = max(bars, key=lambda bar: bar.n)
                on_progress(DownloadEvent(done_bytes=int(fullest.n), total_bytes=int(fullest.total or fullest.n)))
            return drawn

        def display(self, *_: Any, **__: Any) -> bool:
            return True

    return ByteCounter


def _file_callback(on_progress: OnProgress) -> type[Any]:
    """A class that modelscope makes one object of per file; together they report the sum."""
    from threading import Lock

    lock, done, total = Lock(), [0], [0]

    class FileCallback:
        def __init__(self, filename: str, file_size: int) -> None:
            with lock:
                total[0] += file_size

        def update(self, size: int) -> None:
            with lock:
                done[0] += size
                event = DownloadEvent(done_bytes=done[0], total_bytes=total[0])
            on_progress(event)

        def end(self) -> None:
            pass  # the last update said it all

    return FileCallback


def _refusal(repository: str, hub: Hub, error: Exception) -> ExportError:
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return ExportError(
            f"{repository}: neither a folder here nor a repository that {hub} lets you read",
            hint="check the spelling; a private or gated repository needs the hub's own login first",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ExportError(f"{repository}: the disk is full", hint="name a folder with more space for the download cache")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ExportError(
        f"{repository}: not a folder here, and {hub} did not deliver it: {reason}",
        hint="check the network and repeat the command: the download continues where it stopped; or give a folder",
    )
