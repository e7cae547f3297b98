"""A checkpoint's folder: finds the files of each component, reads their JSON, and remembers every file that was used."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.checkpoint.readers import PickleFile, SafetensorsFile, TensorFile
from runtime.errors import ExportError

_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})")
_COMPLETE = "download the checkpoint again; an interrupted download continues where it stopped"


@dataclass
class CheckpointFolder:
    """Files below `root`; `used` collects those that were opened, in order."""

    root: Path
    used: list[Path] = field(default_factory=list)

    def has(self, name: str) -> bool:
        """Whether the folder holds this file or folder."""
        return (self.root / name).exists()

    def file(self, name: str) -> Path:
        """A file that must be there.

        Raises:
            ExportError: it is not.
        """
        path = self.root / name
        if not path.is_file():
            raise ExportError(f"{self.root}: {name} is missing", hint=_COMPLETE)
        return self._use(path)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's object.

        Raises:
            ExportError: the file is missing, or not a JSON object.
        """
        path = self.file(name)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as exc:
            raise ExportError(f"{path}: not JSON: {exc}", hint=_COMPLETE) from exc
        if not isinstance(values, dict):
            raise ExportError(f"{path}: expected a JSON object, got {type(values).__name__}", hint=_COMPLETE)
        return values

    def weights(self, pattern: str) -> TensorFile:
        """The one `.pth` or `.safetensors` file whose name without ending fits `pattern`.

        Raises:
            ExportError: there is none or more than one, or it cannot be read.
        """
        paths = sorted(path for ending in (".pth", ".safetensors") for path in self.root.glob(pattern + ending))
        if not paths:
            raise ExportError(f"{self.root}: {pattern}.pth (or .safetensors) is missing", hint=_COMPLETE)
        if len(paths) > 1:
            raise ExportError(f"{self.root}: {_names(paths)} fit {pattern}", hint="keep only the one to use")
        path = self._use(paths[0])
        return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)

    def shards(self, folder: str, stem: str) -> list[TensorFile]:
        """The safetensors files of one model: a single file, or shards with or without their index.

        Raises:
            ExportError: a shard is missing or damaged, the index is wrong, or there is more than one model.
        """
        place = self.root / folder
        indexes = sorted(place.glob(f"{stem}*.safetensors.index*.json"))
        files = sorted(place.glob(f"{stem}*.safetensors"))
        if len(indexes) > 1:
            raise ExportError(f"{place}: more than one index: {_names(indexes)}", hint="keep only the model to use")
        if indexes:
            return self._indexed(indexes[0], files)
        if not files:
            raise ExportError(f"{place}: no {stem}*.safetensors", hint=_COMPLETE)
        _check_numbering(place, files)
        return [SafetensorsFile(self._use(path)) for path in files]

    def fingerprint(self, *facts: str) -> str:
        """Hash of `facts` and of every used file's place, size and time: the same folder, untouched, gives the same."""
        digest = hashlib.sha256()
        for fact in facts:
            digest.update(fact.encode() + b"\0")
        for path in sorted(set(self.used)):
            status = path.stat()
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def _use(self, path: Path) -> Path:
        self.used.append(path)
        return path

    def _indexed(self, index: Path, files: list[Path]) -> list[TensorFile]:
        weight_map = self.json(index.relative_to(self.root).as_posix()).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ExportError(f"{index}: expected a weight_map from tensors to files", hint=_COMPLETE)
        shards = sorted(set(weight_map.values()))
        for name in shards:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ExportError(f"{index}: names {name!r}, which is not a safetensors file beside it", hint=_COMPLETE)
            if not (index.parent / name).is_file():
                raise ExportError(f"{index}: names the shard {name}, which is missing", hint=_COMPLETE)
        if others := [path for path in files if path.name not in shards]:
            raise ExportError(f"{index.parent}: {_names(others)} not in {index.name}", hint="keep only the model to use")
        opened: list[TensorFile] = [SafetensorsFile(self._use(index.parent / name)) for name in shards]
        _check_index(index, weight_map, opened)
        return opened


def _check_index(index: Path, weight_map: dict[str, str], files: list[TensorFile]) -> None:
    held = {file.path.name: {tensor.name for tensor in file.tensors} for file in files}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise ExportError(f"{index}: puts {name} in {shard}, which does not hold it", hint=_COMPLETE)


def _check_numbering(place: Path, files: list[Path]) -> None:
    """Without an index, files must be one whole model: a single one, or all of `00001-of-n` … `n-of-n`."""
    numbers = [match.groups() for path in files if (match := _NUMBERED.search(path.name))]
    if len(files) == 1 and not numbers:
        return
    if len(numbers) != len(files) or len({total for _, total in numbers}) != 1 or len(set(numbers)) != len(numbers):
        raise ExportError(f"{place}: more than one model: {_names(files)}", hint="keep only the model to use")
    total = int(numbers[0][1])
    missing = sorted(set(range(1, total + 1)) - {int(number) for number, _ in numbers})
    if missing or len(files) != total:
        raise ExportError(f"{place}: shard {missing[0] if missing else total} of {total} is missing", hint=_COMPLETE)


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
