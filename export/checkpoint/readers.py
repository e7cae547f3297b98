"""Files of tensors, safetensors and `.pth`: their headers read once, their tensors one at a time.

No mapping is held for long: it counts every page it has touched, so that reading a model through one costs a model's memory
(measured on a 300 MB file: peak +297 MB when held, +14 MB when renewed for each tensor).
"""

import pickle
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from export.layouts import Shape
from runtime.errors import ExportError
from runtime.specs import DType

if TYPE_CHECKING:
    from torch import Tensor

DOWNLOAD_AGAIN = "the file is damaged or its download was cut short; download it again"
_RENEW_AFTER_BYTES = 64 << 20  # opening a .pth anew costs about 10 ms, whatever its size


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is: its file, its name there, its shape, and its element type by its safetensors name.

    It may be one of several `parts` of equal shape that lie there as one tensor, joined along the first axis.
    """

    file: "TensorFile"
    name: str
    shape: Shape
    dtype: str
    part: int = 0
    parts: int = 1


class TensorFile(Protocol):
    """One file of tensors, whose header was read and found sound."""

    path: Path

    @property
    def tensors(self) -> Collection[StoredTensor]: ...

    def read(self, name: str) -> "Tensor":
        """The tensor stored as `name`, on the CPU, in its stored dtype."""
        ...

    def close(self) -> None:
        """Release what the file keeps in memory."""
        ...


class SafetensorsFile:
    """A safetensors file.

    Raises:
        ExportError: the file cannot be read, or its header and its size do not agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 (not a dict)
            self.tensors = tuple(StoredTensor(self, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices)

    def read(self, name: str) -> "Tensor":
        from safetensors import SafetensorError

        try:
            with self._open() as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except SafetensorError as exc:
            raise _changed(self.path, name) from exc

    def close(self) -> None:
        pass  # nothing outlives a read

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError, ValueError) as exc:
            raise ExportError(f"{self.path}: not a whole safetensors file: {exc}", hint=DOWNLOAD_AGAIN) from exc


class PickleFile:
    """A `torch.save` file of a dictionary of tensors, read with `weights_only`: it cannot run code.

    The dictionary may lie under `model_state`. A file of the zip format, which all published ones are, is mapped; one of the older
    format is kept in memory until `close`.

    Raises:
        ExportError: the file is truncated, holds anything but tensors, or wants to run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_zip = zipfile.is_zipfile(path)
        self._loaded: dict[str, Tensor] | None = self._load()
        self._bytes_read = 0
        self.tensors = tuple(
            StoredTensor(self, name, tuple(tensor.shape), _dtype_name(tensor)) for name, tensor in self._loaded.items()
        )

    def read(self, name: str) -> "Tensor":
        if self._loaded is None or (self._is_zip and self._bytes_read > _RENEW_AFTER_BYTES):
            self._loaded, self._bytes_read = self._load(), 0
        if name not in self._loaded:
            raise _changed(self.path, name)
        self._bytes_read += self._loaded[name].nbytes
        return self._loaded[name]

    def close(self) -> None:
        self._loaded = None

    def _load(self) -> "dict[str, Tensor]":
        import torch

        if not self._is_zip and self._starts_as_zip():
            raise ExportError(f"{self.path}: not a whole .pth file: its end is missing", hint=DOWNLOAD_AGAIN)
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._is_zip)
        except pickle.UnpicklingError as exc:
            raise ExportError(
                f"{self.path}: holds more than tensors, or other bytes: {_first_line(exc)}",
                hint="only files that torch.load(weights_only=True) takes are read, because others can run code",
            ) from exc
        except Exception as exc:  # torch raises whatever the damaged bytes lead to
            raise ExportError(f"{self.path}: not a whole .pth file: {_first_line(exc)}", hint=DOWNLOAD_AGAIN) from exc
        if isinstance(loaded, dict) and isinstance(loaded.get("model_state"), dict):
            loaded = loaded["model_state"]
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
        ):
            raise ExportError(
                f"{self.path}: expected a dictionary of tensors, got {type(loaded).__name__} of other things",
                hint="take the file of the original repository, or a safetensors file of the same tensors",
            )
        return loaded

    def _starts_as_zip(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(2) == b"PK"


def _changed(path: Path, name: str) -> ExportError:
    return ExportError(
        f"{path}: {name}, which it held when opened, is gone", hint="leave the checkpoint alone while it is being read"
    )


def _dtype_name(tensor: "Tensor") -> str:
    import torch

    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    names = {torch.float32: DType.F32, torch.float16: DType.F16, torch.bfloat16: DType.BF16, torch.float8_e4m3fn: DType.F8_E4M3}
    return names.get(tensor.dtype, str(tensor.dtype))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
