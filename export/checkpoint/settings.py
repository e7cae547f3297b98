"""A config file's values, read strictly: a value of another type or beyond what is supported is refused, never ignored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import ExportError

SUPPORTED = "text-to-video and image-to-video checkpoints of Wan2.1 and Wan2.2 are supported"


@dataclass(frozen=True, slots=True)
class Settings:
    """A config file's values, read strictly; `where` names the file in errors."""

    where: str
    values: Mapping[str, Any]

    def integer(self, key: str) -> int:
        """A positive whole number."""
        value = self._required(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ExportError(f"{self.where}: {key}={value!r}, expected a positive whole number")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A positive whole number; None where it is absent or null."""
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str) -> float:
        """A positive number."""
        value = self._required(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ExportError(f"{self.where}: {key}={value!r}, expected a positive number")
        return float(value)

    def sequence(self, key: str, kind: type[Any]) -> tuple[Any, ...]:
        """A list of one type; whole numbers pass as `float`."""
        values = self._required(key)
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(values, list) or not values or not all(type(value) in kinds for value in values):
            raise ExportError(f"{self.where}: {key}={values!r}, expected a list of {kind.__name__}")
        return tuple(kind(value) for value in values)

    def check_fixed(self, fixed: Mapping[str, tuple[Any, ...]], *, hint: str = SUPPORTED) -> None:
        """Refuse a value that is not among those supported; a key that is absent is fine."""
        for key, supported in fixed.items():
            if key in self.values and self.values[key] not in supported:
                raise ExportError(f"{self.where}: {key}={self.values[key]!r}, supported: {supported[0]!r}", hint=hint)

    def check_known(self, known: Iterable[str]) -> None:
        """Refuse a key nobody here knows, unless it is switched off; names with `_` in front are notes."""
        for key, value in self.values.items():
            if key not in set(known) and not key.startswith("_") and value not in (None, False, []):
                raise ExportError(f"{self.where}: unknown setting {key}={value!r}", hint=SUPPORTED)

    def _required(self, key: str) -> Any:
        if key not in self.values:
            raise ExportError(f"{self.where}: {key} is missing", hint="download the checkpoint again")
        return self.values[key]
