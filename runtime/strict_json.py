"""JSON to frozen dataclasses and back, strictly: an unknown, missing or mistyped key is an error that names its place."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


def encode(value: object) -> str:
    """JSON text of a dataclass tree; keys keep their declared order."""
    return json.dumps(dataclasses.asdict(value), ensure_ascii=False, indent=1)  # type: ignore[call-overload]


def decode(kind: type[T], text: str, *, error: Callable[[str], Exception]) -> T:
    """Parse `text` into the dataclass `kind`.

    Args:
        error: makes the exception to raise from a message such as `"targets.cpu.precision: expected one of …"`.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as exc:
        raise error(f"not JSON: {exc}") from exc
    try:
        return typing.cast(T, _build(kind, data, ""))
    except _Mismatch as exc:
        raise error(str(exc)) from exc


class _Mismatch(Exception):
    pass


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number here")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else typing.cast(float, _refuse_constant(digits))


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    items: dict[str, object] = {}
    for name, item in pairs:
        if name in items:
            raise ValueError(f"{name!r} is there twice")
        items[name] = item
    return items


def _build(kind: Any, data: object, at: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), data, at)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        fitting = [argument for argument in kinds if isinstance(argument, type) and type(data) is argument]
        return _build((fitting or kinds)[0], data, at)
    if origin is tuple:
        items = _expect(list, data, at)
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(items):
            raise _Mismatch(f"{at or 'top'}: expected {len(kinds)} items, got {len(items)}")
        return tuple(
            _build(item_kind, item, f"{at}[{i}]") for i, (item_kind, item) in enumerate(zip(kinds, items, strict=True))
        )
    if origin is dict:
        return {
            _expect(str, key, at): _build(arguments[1], item, f"{at}.{key}") for key, item in _expect(dict, data, at).items()
        }
    if isinstance(kind, type) and issubclass(kind, Enum):
        if data not in [member.value for member in kind]:
            raise _Mismatch(f"{at}: expected one of {[member.value for member in kind]}, got {data!r}")
        return kind(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return _finite_float(data, at)
    return _expect(kind, data, at)


def _build_dataclass(kind: type, data: object, at: str) -> Any:
    items = _expect(dict, data, at)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if missing := [name for name in names if name not in items]:
        raise _Mismatch(f"{at or 'top'}: missing {missing}")
    if unknown := [name for name in items if name not in names]:
        raise _Mismatch(f"{at or 'top'}: unknown {unknown}")
    return kind(**{name: _build(hints[name], items[name], f"{at}.{name}".lstrip(".")) for name in names})


def _expect(kind: type[T], data: object, at: str) -> T:
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise _Mismatch(f"{at or 'top'}: expected {kind.__name__}, got {type(data).__name__}")
    if isinstance(data, str) and any("\ud800" <= character <= "\udfff" for character in data):
        raise _Mismatch(f"{at or 'top'}: {data!r} is not Unicode text")
    return data


def _finite_float(number: int, at: str) -> float:
    try:
        return float(number)
    except OverflowError:
        raise _Mismatch(f"{at}: the number is too large") from None
