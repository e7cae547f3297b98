"""The quality suite's reference videos in a file, so that runs on other machines and of other days compare with the same ones."""

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.moving_shapes.measure import Frames
from benchmarks.moving_shapes.world import ClipSize
from runtime.errors import RequestError

_AGAIN = "let a run with an fp32 bundle write another one: name a file that is not there yet"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reference:
    """What every row is compared with.

    Args:
        case: the row that made it.
        videos: of all prompts in order, uint8 [T, H, W, 3] each.
    """

    case: str
    videos: Sequence[Frames]


def write_reference(path: Path, reference: Reference, captions: Sequence[str], clip: ClipSize) -> None:
    """Write the videos; the file appears whole.

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
        raise RequestError(f"{path}: cannot be written: {exc.strerror}", hint="choose another file with --reference") from exc


def read_reference(path: Path, captions: Sequence[str], clip: ClipSize) -> Reference:
    """Read what `write_reference` wrote.

    Raises:
        RequestError: the file cannot be read, or has videos of other prompts or another size.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            about, videos = json.loads(str(stored["about"])), stored["videos"]
            case, its_captions, its_clip = about["case"], about["captions"], ClipSize(**about["clip"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as exc:
        raise RequestError(f"{path}: not a file of reference videos", hint=_AGAIN) from exc
    if its_clip != clip or its_captions != list(captions) or len(videos) != len(captions):
        raise RequestError(
            f"{path}: has {len(videos)} videos of {its_clip}, not these {len(captions)} prompts at {clip}", hint=_AGAIN
        )
    return Reference(case=case, videos=videos)
