"""Fills a bundle of engines with random weights at full size, so that whole runs can be timed without a checkpoint.

    python -m benchmarks.random_bundle BUNDLE

BUNDLE: made by `wanrt build-engines --engines-only`. Weights are drawn on a GPU where torch has one; every tensor is its own. Sizes,
layout and hashes are those of a real bundle; what it generates is noise.
"""

import argparse
import hashlib
import math
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.toy_tokenizer import write_tokenizer
from engines.store import BundleStore, content_key
from export.pack import PackedTensor, safetensors_header, weight_plan
from export.trace import TORCH_DTYPES
from runtime.errors import BundleError
from runtime.manifest import WeightFile
from runtime.precision import FP8_MAX, weight_of_scales
from runtime.specs import DType
from runtime.stages import network_components

_KEY = "random"


def fill_with_random_weights(folder: Path) -> None:
    """Give an engines-only bundle weights and a tokenizer.

    Raises:
        BundleError: no finished bundle is there.
        BuildError: the weights could not be written.
    """
    with BundleStore(folder) as store:
        manifest = store.manifest
        if manifest is None:
            raise BundleError(f"{folder}: no finished bundle", hint="build one with `wanrt build-engines --engines-only`")
        files = sorted(
            {
                (precision, network, component)
                for target in manifest.targets.values()
                for network, precision in target.precisions.items()
                for component in network_components(manifest.variant, network)
            }
        )
        weights: dict[str, dict[str, WeightFile]] = {}
        for precision, network, component in files:
            build = partial(_write, plan=weight_plan(manifest.variant, network, precision))
            path = f"weights/{precision}/{component}.safetensors"
            made = store.artefact(path, key=content_key(kind=_KEY, path=path), build=build)
            weights.setdefault(precision, {})[component] = made
        with TemporaryDirectory() as scratch:
            write_tokenizer(Path(scratch))
            source = Path(scratch) / "tokenizer.json"

            def copy(file: Path) -> None:
                shutil.copyfile(source, file)

            tokenizer = store.artefact(source.name, key=_KEY, build=copy)
        store.finish(replace(manifest, weights=weights, tokenizer=tokenizer.file, source=_KEY))


def draw(tensor: PackedTensor, fan_in: int, generator: torch.Generator) -> torch.Tensor:
    """Random values whose products keep their scale: deviation 1/sqrt(fan_in), norm weights around 1, FP8 over its whole range."""
    shape, device = tensor.shape, generator.device
    if tensor.row_scales:
        return torch.full(shape, 4 / FP8_MAX * fan_in**-0.5, device=device)
    gain = tensor.name.endswith("gamma") or ("norm" in tensor.name and tensor.name.endswith("weight"))
    spread = 0.1 if gain or len(shape) == 1 else fan_in**-0.5
    drawn = torch.empty(shape, device=device).normal_(0, spread, generator=generator)
    if tensor.dtype is DType.F8_E4M3:
        return (drawn / spread * (FP8_MAX / 4)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (drawn + gain).to(TORCH_DTYPES[tensor.dtype])


def _write(file: Path, plan: Sequence[PackedTensor]) -> dict[str, str]:
    """Write the tensors one after the other; a thread hashes and writes one while the next is drawn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    inputs = {tensor.name: math.prod(tensor.shape[1:]) for tensor in plan}
    whole = hashlib.sha256()
    with file.open("wb") as stream, ThreadPoolExecutor(1) as writer:

        def put(data: memoryview | bytes) -> None:
            whole.update(data)
            stream.write(data)

        pending = writer.submit(put, safetensors_header(plan))
        for tensor in plan:
            fan_in = max(1, inputs[weight_of_scales(tensor.name) or tensor.name])
            drawn = draw(tensor, fan_in, generator).contiguous().view(torch.uint8).cpu().numpy()
            pending.result()
            pending = writer.submit(put, drawn.reshape(-1).data)
        pending.result()
    return {"": whole.hexdigest()}


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
