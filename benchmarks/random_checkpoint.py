"""A variant's checkpoint as diffusers lays it out, with random weights at full size and in bf16: what a peer can be timed on.

Its experts are the same files under two names, which a peer still loads twice; what it generates is noise.
"""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.diffusers_configs import (
    TRANSFORMERS,
    TRANSFORMERS_WEIGHTS_FILE,
    WEIGHTS_FILE,
    takes_image,
    write_diffusers_configs,
)
from benchmarks.machine import num_cores
from benchmarks.random_file import check_room, random_weight, write_random_file
from benchmarks.toy_tokenizer import write_tokenizer
from export.layouts import (
    Table,
    text_encoder_diffusers_names,
    text_encoder_tensors,
    transformer_diffusers_names,
    transformer_tensors,
    vae_diffusers_names,
    vae_tensors,
)
from export.pack import PackedTensor, safetensors_header
from runtime.errors import BuildError
from runtime.specs import DType
from runtime.variants import Variant

_DTYPE = DType.BF16


def write_random_checkpoint(folder: Path, variant: Variant) -> None:
    """Write a text-to-video variant's checkpoint into `folder`, which must exist.

    Raises:
        RequestError: the disk has no room for it.
        BuildError: it could not be written.
    """
    if takes_image(variant.transformer):
        raise ValueError(f"{variant.name}: only text-to-video variants are written")
    check_room(folder, checkpoint_bytes(variant), f"a checkpoint of {variant.name} in {_DTYPE}")
    try:
        _write(folder, variant)
    except OSError as exc:
        raise BuildError(f"a random checkpoint could not be written: {exc.strerror or exc}", hint="free some space") from exc


def checkpoint_bytes(variant: Variant) -> int:
    """Size of the weights, the experts' counted once."""
    shapes = (shape for _, table, _ in _networks(variant) for shape in table.values())
    return sum(math.prod(shape) for shape in shapes) * _DTYPE.itemsize


def _write(folder: Path, variant: Variant) -> None:
    write_diffusers_configs(
        folder,
        transformer=variant.transformer,
        text_encoder=variant.text_encoder,
        image_encoder=None,
        vae=variant.vae,
        experts=len(variant.experts),
        boundary=variant.experts[0].boundary,
        shift=variant.defaults.shift,
    )
    write_tokenizer(folder / "tokenizer")
    with ThreadPoolExecutor(num_cores()) as threads:
        for seed, (place, table, names) in enumerate(_networks(variant)):
            tensors = [random_weight(name, shape, _DTYPE) for name, shape in table.items()]
            header = _header([PackedTensor(names[name], (), shape, _DTYPE) for name, shape in table.items()])
            write_random_file(folder / place, header, tensors, threads, seed=seed, hashed=False)
    first, *others = TRANSFORMERS[: len(variant.experts)]
    for place in others:
        (folder / place / WEIGHTS_FILE).symlink_to(Path("..", first, WEIGHTS_FILE))


def _networks(variant: Variant) -> Iterator[tuple[str, Table, dict[str, str]]]:
    """Weight file, its tensors in original naming, and what diffusers calls them."""
    arch, text, vae = variant.transformer, variant.text_encoder, variant.vae
    yield f"{TRANSFORMERS[0]}/{WEIGHTS_FILE}", transformer_tensors(arch), transformer_diffusers_names(arch)
    yield f"text_encoder/{TRANSFORMERS_WEIGHTS_FILE}", text_encoder_tensors(text), text_encoder_diffusers_names(text)
    yield f"vae/{WEIGHTS_FILE}", vae_tensors(vae), vae_diffusers_names(vae)


def _header(plan: list[PackedTensor]) -> bytes:
    """As a bundle's, with what transformers wants to read in it."""
    entries = json.loads(safetensors_header(plan)[8:])
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
