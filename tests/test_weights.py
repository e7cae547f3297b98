"""Safetensors files as the runtime maps them: hostile headers, and the same file as the safetensors package reads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.errors import BundleError
from runtime.weights import map_safetensors
from tests.conftest import RUN, Refuses, Toy
from tests.test_hostile_bundles import EXPERT, forge

Header = dict[str, Any]


def pack(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_mapping_equals_the_safetensors_package(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array([1.5], np.float16),
        "none": np.zeros((0, 2), "f4"),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    mapped = map_safetensors(tmp_path / "a.safetensors")
    expected = load_file(tmp_path / "a.safetensors")
    assert mapped.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(mapped[name], array)
        assert mapped[name].dtype == array.dtype
        assert not mapped[name].flags.writeable


def test_tensors_at_odd_places_reach_the_engine_aligned(tmp_path: Path) -> None:
    content = pack({"x": tensor([1], 0, 1, "F8_E4M3"), "y": tensor([2], 1, 9)}, b"\0" + np.array([1.5, -2], "<f4").tobytes())
    (tmp_path / "a.safetensors").write_bytes(content)
    sent = OnnxRuntimeBackend().to_device(map_safetensors(tmp_path / "a.safetensors")["y"])
    assert sent.flags.aligned and sent.tolist() == [1.5, -2]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0\0",
        (0).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        pack(b"{"),
        pack(b"\xff\xff"),
        pack(b"[]"),
        pack(b"[" * 200_000),
        pack({"x": []}),
        pack({"x": {"dtype": "F32", "shape": [1]}}, bytes(4)),
        pack({"x": tensor([1], 0, 4, "PICKLE")}, bytes(4)),
        pack({"x": tensor([-1], 0, 4)}, bytes(4)),
        pack({"x": tensor([True], 0, 4)}, bytes(4)),
        pack({"x": tensor([1.0], 0, 4)}, bytes(4)),
        pack({"x": tensor([1], 0, "4")}, bytes(4)),
        pack({"x": tensor([1] * 100, 0, 4)}, bytes(4)),
        pack({"x": tensor([2**62, 4], 0, 0)}),
        pack({"x": tensor([2**40], 0, 2**42)}, bytes(4)),
        pack({"x": tensor([1], 4, 8)}, bytes(8)),
        pack({"x": tensor([1], 0, 4), "y": tensor([1], 0, 4)}, bytes(8)),
        pack({"x": tensor([2], 0, 8), "y": tensor([1], 4, 8)}, bytes(8)),
        pack({"x": tensor([1], 0, 4)}, bytes(8)),
        pack({"x": tensor([2], 0, 8)}, bytes(4)),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hostile.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"hostile\.safetensors") as caught:
        map_safetensors(tmp_path / "hostile.safetensors")
    assert caught.value.hint


def drop(header: Header) -> None:
    header["head.unknown"] = header.pop("head.modulation")


def reshape(header: Header) -> None:
    header["head.modulation"]["shape"].reverse()


def retype(header: Header) -> None:
    entry = header["head.modulation"]
    entry["dtype"], entry["shape"] = "F16", [*entry["shape"], 2]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, r"head\.modulation: missing, expected F32 \[2, 16\]"),
        (reshape, r"head\.modulation: float32 \[16, 2\], expected F32 \[2, 16\]"),
        (retype, r"head\.modulation: float16 \[2, 16, 2\], expected"),
    ],
)
def test_weights_that_do_not_fit_the_architecture_are_named(
    two_experts: Toy, tmp_path: Path, refuses: Refuses, edit: Callable[[Header], None], message: str
) -> None:
    bundle = Path(shutil.copytree(two_experts.original, tmp_path / "bundle"))
    content = (bundle / EXPERT).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    edit(header)
    forge(bundle, EXPERT, pack(header, content[start:]))
    refuses(
        "run", bundle, *RUN, "--out", tmp_path / "a.npy", code=5, message=rf"transformer_high_noise\.safetensors: {message}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
