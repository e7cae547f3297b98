"""Files of TensorRT engines from strangers: what no build writes is refused before anything is made of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.backends.engine_file import EngineHeader, EnginePart, Extent, pack_engines, read_file_header, read_header
from runtime.errors import BundleError

PART = EnginePart(architectures=("sm_89", "sm_120"), bytes=3, context_bytes=7, fp8_attention=False)
HEADER = EngineHeader(
    stage="transformer.head",
    library="tensorrt-rtx",
    library_version="1.7.1",
    profile={"tokens": Extent(smallest=1, usual=2, largest=3)},
    parts=(PART,),
)


def packed(header: EngineHeader) -> memoryview:
    return memoryview(pack_engines(header, [b"x" * part.bytes for part in header.parts]))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (replace(HEADER, parts=()), "no engine, or one for no architecture"),
        (replace(HEADER, parts=(replace(PART, architectures=()),)), "no engine, or one for no architecture"),
        (replace(HEADER, parts=(PART, replace(PART, architectures=("sm_120",)))), "two engines for one architecture"),
        (replace(HEADER, parts=(replace(PART, architectures=("sm_89", "sm_89")),)), "two engines for one architecture"),
        (replace(HEADER, parts=(replace(PART, context_bytes=-1),)), "negative scratch memory"),
        (
            replace(HEADER, profile={"tokens": Extent(smallest=2, usual=1, largest=3)}),
            "no order in the extents of tokens: 2, 1, 3",
        ),
        (replace(HEADER, profile={"tokens": Extent(smallest=0, usual=1, largest=3)}), "no order in the extents of tokens"),
    ],
)
def test_a_header_that_no_build_writes_is_refused(header: EngineHeader, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read_header(packed(header))


def test_both_forms_of_attention_may_be_for_one_architecture() -> None:
    both = replace(HEADER, parts=(PART, replace(PART, fp8_attention=True)))
    assert read_header(packed(both)) == both


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "null",
        '{"stage": "s"}',
        '{"stage": "s", "library": "l", "library_version": "1", "profile": {}, "parts": [], "more": 1}',
        '{"stage": "s", "library": "l", "library_version": "1", "profile": {}, "parts": [{"architectures": ["sm_89"], "bytes": 1e3}]}',
    ],
)
def test_a_header_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BundleError):
        read_header(memoryview(len(text).to_bytes(8, "little") + text.encode() + b"xxx"))


def test_a_header_that_says_it_is_larger_than_the_file_is_refused_unread() -> None:
    for length in (0, 4, 1 << 20, (1 << 64) - 1):
        with pytest.raises(BundleError, match="not a file of engines"):
            read_header(memoryview(length.to_bytes(8, "little") + b"{}"))


def test_scratch_memory_is_that_of_the_most_demanding_engine(tmp_path: Path) -> None:
    file = tmp_path / "head.engine"
    file.write_bytes(packed(replace(HEADER, parts=(PART, replace(PART, fp8_attention=True, context_bytes=9)))))
    header = read_file_header(file)
    assert (header.scratch_bytes, header.architectures) == (9, ("sm_89", "sm_120"))


def test_scratch_memory_of_a_file_that_is_missing_or_empty_is_an_error_of_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty.engine").touch()
    for name in ("empty.engine", "missing.engine"):
        with pytest.raises(BundleError, match=f"{name}: cannot be read"):
            read_file_header(tmp_path / name)
