"""Fills a bundle of engines with random weights at full size, so that whole runs can be timed without a checkpoint.

    python -m benchmarks.random_bundle BUNDLE

BUNDLE: made by `wanrt build-engines --engines-only`. Every tensor is its own, the two experts' too. Sizes, layout and hashes are
those of a real bundle; what it generates is noise.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from benchmarks.machine import num_cores
from benchmarks.random_file import RandomTensor, check_room, random_weight, write_random_file
from benchmarks.toy_tokenizer import write_tokenizer
from engines.store import BundleStore, content_key
from export.pack import PackedTensor, safetensors_header, weight_plan
from runtime.errors import BuildError, BundleError
from runtime.manifest import Manifest, WeightFile
from runtime.precision import weight_of_scales
from runtime.specs import Precision
from runtime.stages import network_components

K = TypeVar("K")
_KEY = "random"


def fill_with_random_weights(folder: Path) -> None:
    """Give an engines-only bundle weights and a tokenizer.

    Raises:
        BundleError: no finished bundle is there.
        RequestError: the disk has no room for them.
        BuildError: they could not be written.
    """
    with BundleStore(folder) as store:
        manifest = store.manifest
        if manifest is None:
            raise BundleError(f"{folder}: no finished bundle", hint="build one with `wanrt build-engines --engines-only`")
        plans = _plans(manifest)
        check_room(folder, sum(_num_bytes(plan) for plan in plans.values()), "the random weights of this bundle")
        weights: dict[str, dict[str, WeightFile]] = {}
        with TemporaryDirectory(prefix=".filling-", dir=folder) as scratch:
            for (precision, component), (file, digest) in _write_files(plans, Path(scratch)).items():

                def move(place: Path, file: Path = file, digest: str = digest) -> dict[str, str]:
                    file.replace(place)
                    return {"": digest}

                path = f"weights/{precision}/{component}.safetensors"
                made = store.artefact(path, key=content_key(kind=_KEY, path=path), build=move)
                weights.setdefault(precision, {})[component] = made
            write_tokenizer(Path(scratch))

            def copy(place: Path) -> None:
                shutil.copyfile(Path(scratch) / "tokenizer.json", place)

            tokenizer = store.artefact("tokenizer.json", key=_KEY, build=copy)
        store.finish(replace(manifest, weights=weights, tokenizer=tokenizer.file, source=_KEY))


def num_weight_bytes(manifest: Manifest) -> int:
    """Size of all weights that the targets of a bundle read."""
    return sum(_num_bytes(plan) for plan in _plans(manifest).values())


def _plans(manifest: Manifest) -> dict[tuple[Precision, str], list[PackedTensor]]:
    """What each weight file holds, by precision and component."""
    return {
        (precision, component): weight_plan(manifest.variant, network, precision, wide=manifest.fp8_wide)
        for target in manifest.targets.values()
        for network, precision in target.precisions.items()
        for component in network_components(manifest.variant, network)
    }


def _num_bytes(plan: Sequence[PackedTensor]) -> int:
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in plan)


def _write_files(plans: dict[K, list[PackedTensor]], folder: Path) -> dict[K, tuple[Path, str]]:
    """Write all files at the same time; each with its SHA-256, which one thread a file computes."""
    with ThreadPoolExecutor(num_cores()) as threads, ThreadPoolExecutor(len(plans)) as writers:

        def write(number: int, plan: list[PackedTensor]) -> tuple[Path, str]:
            file = folder / str(number)
            header, tensors = safetensors_header(plan), random_weights(plan)
            return file, write_random_file(file, header, tensors, threads, seed=number, hashed=True)

        try:
            return dict(zip(plans, writers.map(write, range(len(plans)), plans.values()), strict=True))
        except OSError as exc:
            raise BuildError(f"random weights could not be written: {exc.strerror or exc}", hint="free some space") from exc


def random_weights(plan: Sequence[PackedTensor]) -> list[RandomTensor]:
    """The tensors of a weight file as random ones; the scales of FP8 rows go with their weight's width."""
    inputs = {tensor.name: math.prod(tensor.shape[1:]) for tensor in plan}
    return [
        random_weight(
            tensor.name,
            tensor.shape,
            tensor.dtype,
            fan_in=inputs[weight_of_scales(tensor.name) or tensor.name],
            scales_fp8=tensor.row_scales,
        )
        for tensor in plan
    ]


def main() -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_bundle", description="Fill a bundle with random weights."
    )
    parser.add_argument("bundle", type=Path)
    fill_with_random_weights(parser.parse_args().bundle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
