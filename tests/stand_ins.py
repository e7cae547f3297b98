"""Modules that stand in for packages that may not be installed."""

from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def package(name: str, **members: Any) -> ModuleType:
    """What is imported by name and found by `importlib.util.find_spec`."""
    made = ModuleType(name)
    vars(made).update(members, __spec__=ModuleSpec(name, None, is_package=True), __path__=[])
    return made
