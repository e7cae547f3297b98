"""What importing and running wanrt drags in, seen from fresh interpreters."""

import ast
import json
import pkgutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import engines
import runtime

ROOT = Path(__file__).parents[1]
EXPORT_HALF = {"torch", "onnx", "onnxscript", "transformers", "diffusers", "export", "engines"}
HEAVY = {"av", "onnxruntime", "tokenizers"}
RUNTIME_MODULES = ["runtime", *(module.name for module in pkgutil.walk_packages(runtime.__path__, "runtime."))]
ENGINES_MODULES = ["engines", *(module.name for module in pkgutil.walk_packages(engines.__path__, "engines."))]

# Runs the command line as a process would, then writes down which packages the process has loaded.
RUN_AND_LIST = """
import json, sys
import cli
listing, sys.argv = sys.argv[1], ["wanrt", *sys.argv[2:]]
try:
    status = cli.main()
except SystemExit as exit:
    status = exit.code
with open(listing, "w") as file:
    json.dump(sorted({name.partition(".")[0] for name in sys.modules}), file)
sys.exit(status)
"""


def loaded_by(statements: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `statements`."""
    listing = 'import sys, json; print(json.dumps([*{name.partition(".")[0] for name in sys.modules}]))'
    done = subprocess.run([sys.executable, "-c", f"{statements}\n{listing}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def wanrt(*arguments: str | Path, listing: Path) -> set[str]:
    """Top-level packages loaded by a whole `wanrt` call."""
    command = [sys.executable, "-c", RUN_AND_LIST, str(listing), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(json.loads(listing.read_text()))


def test_the_walk_sees_nested_modules() -> None:
    assert {"runtime.errors", "runtime.stages.transformer", "runtime.backends.base"} <= set(RUNTIME_MODULES)


@pytest.mark.parametrize("module", ["runtime", "cli"])
def test_importing_the_front_door_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import {module}") & (EXPORT_HALF | HEAVY)


def test_every_runtime_module_imports_without_the_export_half() -> None:
    assert not loaded_by("\n".join(f"import {name}" for name in RUNTIME_MODULES)) & EXPORT_HALF


def test_engines_import_without_torch() -> None:
    assert not loaded_by("\n".join(f"import {name}" for name in ENGINES_MODULES)) & {"torch", "transformers", "diffusers"}


@pytest.mark.slow
def test_a_whole_run_loads_neither_torch_nor_onnx_nor_transformers(tmp_path: Path) -> None:
    from benchmarks.toy_checkpoint import ToyModel, write_toy_checkpoint
    from runtime.variants import TransformerArch, VaeArch

    arch = TransformerArch(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=64)
    write_toy_checkpoint(tmp_path / "checkpoint", ToyModel(transformer=arch, vae=VaeArch(base_dim=8, num_res_blocks=1)))
    building = wanrt("build-engines", tmp_path / "checkpoint", "--out", tmp_path / "bundle", listing=tmp_path / "build.json")
    running = wanrt(
        "run", tmp_path / "bundle", "--prompt", "a red fox", "--size", "32x16", "--frames", "5", "--steps", "2",
        "--out", tmp_path / "video.mp4", listing=tmp_path / "run.json",
    )  # fmt: skip
    assert (tmp_path / "video.mp4").stat().st_size > 0
    assert "torch" in building  # so the listing does see what a call loads
    assert {"onnxruntime", "tokenizers", "av"} <= running
    assert not running & EXPORT_HALF


# Distributions of packages that may not be installed here and are called otherwise.
DISTRIBUTIONS = {"cuda": ["cuda-bindings"], "cudnn": ["nvidia-cudnn-frontend"], "nvmath": ["nvmath-python"]}


def test_what_the_runtime_imports_is_declared_in_the_base_or_a_target_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        canonicalize_name(Requirement(line).name)
        for line in [*project["dependencies"], *(line for name in ("cpu", "cuda", "rtx", "tensorrt") for line in extras[name])]
    }
    distributions = {**DISTRIBUTIONS, **packages_distributions()}
    for path in (ROOT / "runtime").rglob("*.py"):
        for package in imported_packages(path) - sys.stdlib_module_names - {"runtime"}:
            providers = {canonicalize_name(name) for name in distributions.get(package, [package])}
            assert providers & declared, f"{path.relative_to(ROOT)} imports {package}, which wanrt does not require"


def imported_packages(path: Path) -> set[str]:
    """Top-level packages named by import statements anywhere in a file."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and node.level == 0}
    return {name.partition(".")[0] for name in plain | named}
