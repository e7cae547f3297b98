"""The quality suite's reference videos in a file: runs of other days and on other machines compare with the same ones."""

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.moving_shapes.measure import Frames
from benchmarks.moving_shapes.world import ClipSize
from runtime.errors import RequestError

_OTHER = "choose another file with --reference"
_AGAIN = "let a run with an fp32 bundle write one: name a file that is not there yet"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reference:
    """What every row is compared with.

    Args:
        case: the row that made it.
        videos: of all prompts in order, uint8 [T, H, W, 3] each.
    """

    case: str
    videos: Sequence[Frames]


def check_place(path: Path) -> None:
    """See that a reference can go there, before any video is made.

    Raises:
        RequestError: its folder is not there or not writable.
    """
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise RequestError(f"{path}: {path.parent} is no folder that can be written to", hint=_OTHER)


def write_reference(path: Path, reference: Reference, captions: Sequence[str], clip: ClipSize) -> None:
    """Write the videos; the file appears whole or not at all.

    Raises:
        RequestError: the file cannot be written.
    """
    about = json.dumps({"case": reference.case, "captions": list(captions), "clip": asdict(clip)})
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, about=np.array(about), videos=np.stack(list(reference.videos)))
        os.replace(partial, path)
    except OSError as exc:
        raise RequestError(f"{path}: cannot be written: {exc.strerror}", hint=_OTHER) from exc
    finally:
        partial.unlink(missing_ok=True)


def read_reference(path: Path, captions: Sequence[str], clip: ClipSize) -> Reference:
    """Read what `write_reference` wrote. That it is of the same checkpoint is the caller's word.

    Raises:
        RequestError: the file cannot be read, or has videos of other prompts or another size.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            about, videos = json.loads(str(stored["about"])), stored["videos"]
        case, found, size = str(about["case"]), list(about["captions"]), ClipSize(**about["clip"])
        whole = videos.dtype == np.uint8 and videos.shape == (len(found), size.num_frames, size.height, size.width, 3)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as exc:
        raise RequestError(f"{path}: cannot be read: {exc.strerror}", hint=_OTHER) from exc
    except (
        OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
    ) as exc:  # fmt: skip
        raise RequestError(f"{path}: not a file of reference videos", hint=_AGAIN) from exc
    if not whole:
        raise RequestError(f"{path}: not a file of reference videos", hint=_AGAIN)
    if size != clip or found != list(captions):
        raise RequestError(
            f"{path}: has {len(found)} videos of {size}, not these {len(captions)} prompts at {clip}", hint=_AGAIN
        )
    return Reference(case=case, videos=videos)
