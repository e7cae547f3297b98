"""Where a benchmark's JSON goes, and how it gets there whole."""

import json
import os
from pathlib import Path
from typing import Any

from runtime.errors import RequestError

RESULTS = Path("benchmarks") / "results"


def result_file(out: Path | None, name: str) -> Path:
    """The file for a result called `name`: `out` itself if it is a `.json`, else one in the folder `out`, which is made.

    Args:
        out: None for benchmarks/results/ below the current folder.

    Raises:
        RequestError: the folder cannot be made.
    """
    place = out or RESULTS
    file = place if place.suffix == ".json" else place / f"{name}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise RequestError(f"{file.parent}: cannot be made: {exc.strerror}", hint="choose another place with --out") from exc
    return file


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
