"""What `pip install 'wanrt[cpu]'` puts on a disk."""

import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIMIT_MB = 400  # measured 2026-11, Linux x86-64, Python 3.11: see the assertion's message for the largest


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that `requirements` need, with all that those need."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(line), frozenset[str]()) for line in requirements]
    while waiting:
        requirement, asked_extras = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in asked_extras | {""}):
            continue
        node = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if node not in found:
            found.add(node)
            waiting += [(Requirement(line), node[1]) for line in distribution(node[0]).requires or ()]
    return {name for name, _ in found}


def installed_bytes(name: str) -> int:
    """Size of the files a distribution installed, bytecode included."""
    paths = {Path(str(file.locate())) for file in distribution(name).files or ()}
    return sum(path.stat().st_size for path in paths if path.is_file())


def test_closure_follows_requirements_of_requirements() -> None:
    assert {"tokenizers", "huggingface-hub"} <= closure(["tokenizers"])


def test_what_a_cpu_run_needs_installs_in_under_400_mb() -> None:
    names = closure([*project()["dependencies"], *project()["optional-dependencies"]["cpu"]])
    sizes = {name: installed_bytes(name) / 1e6 for name in names}
    sizes["wanrt"] = sum(path.stat().st_size for path in (ROOT / "runtime").rglob("*") if path.is_file()) / 1e6
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert all(sizes[name] > 0 for name in ("numpy", "av", "onnxruntime", "pillow", "tokenizers"))
    assert sum(sizes.values()) < LIMIT_MB, f"{sum(sizes.values()):.0f} MB, the largest: {largest}"


def test_a_cpu_run_needs_neither_torch_nor_onnx_nor_transformers() -> None:
    names = closure([*project()["dependencies"], *project()["optional-dependencies"]["cpu"]])
    assert not names & {"torch", "onnx", "onnxscript", "transformers", "diffusers"}


def test_only_the_cpu_extra_brings_onnxruntime() -> None:
    given = {"base": project()["dependencies"], **project()["optional-dependencies"]}
    bringing = {
        extra for extra, lines in given.items() if any(Requirement(line).name.startswith("onnxruntime") for line in lines)
    }
    assert bringing == {"cpu"}
