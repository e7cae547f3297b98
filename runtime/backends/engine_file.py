"""The file that holds a stage's TensorRT engines: a header that says what they are, then one engine after the other.

One engine serves several GPU architectures where that costs none of them a fusion; those it would cost have one of their own. What a
machine needs to know before it reads weights (library, version, architectures, sizes) is in the header.

The header is data, from whomever it comes. An engine is code: reading a stranger's is running a stranger's program, says NVIDIA
(https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/security.html).
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import BundleError
from runtime.strict_json import decode, encode

_LENGTH_BYTES = 8
_MAX_HEADER = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What a symbolic extent may be in one profile; the engine is tuned for `usual`."""

    smallest: int
    usual: int
    largest: int


Profile = dict[str, Extent]
"""The extents of an optimization profile, by symbol of the stage's spec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePart:
    """One engine: the architectures it runs on, its size, and the scratch memory that the largest shapes of its profile need.

    The stage of self-attention has two, one of them with `fp8_attention`, for architectures that can.
    """

    architectures: tuple[str, ...]
    bytes: int
    context_bytes: int
    fp8_attention: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHeader:
    """What a file of engines holds, its parts in the order in which they follow."""

    stage: str
    library: str
    library_version: str
    profile: Profile
    parts: tuple[EnginePart, ...]

    @property
    def architectures(self) -> tuple[str, ...]:
        """The GPU architectures that some engine runs on."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.architectures))

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory of the most demanding engine at the largest shapes of its profile."""
        return max(part.context_bytes for part in self.parts)


def pack_engines(header: EngineHeader, engines: list[bytes]) -> bytes:
    """The file's bytes: the header's length in 8 bytes, the header as JSON, the engines."""
    assert [part.bytes for part in header.parts] == [len(engine) for engine in engines]
    text = encode(header).encode()
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *engines])


def read_header(data: memoryview) -> EngineHeader:
    """The header of a file.

    Raises:
        BundleError: it is not such a file, or does not hold what its header says.
    """
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if not 0 < length <= min(_MAX_HEADER, len(data) - _LENGTH_BYTES):
        raise BundleError("not a file of engines", hint="build it again")
    try:
        text = bytes(data[_LENGTH_BYTES : _LENGTH_BYTES + length]).decode()
    except UnicodeDecodeError as exc:
        raise BundleError("the header of the engines is not text", hint="build it again") from exc
    header = decode(EngineHeader, text, error=BundleError)
    held = len(data) - _LENGTH_BYTES - length
    if any(part.bytes < 1 for part in header.parts) or sum(part.bytes for part in header.parts) != held:
        raise BundleError(f"{header.stage}: {held} bytes of engines do not match their header", hint="build it again")
    if flaw := _flaw(header):
        raise BundleError(f"{header.stage}: the header of its engines has {flaw}", hint="build it again")
    return header


def _flaw(header: EngineHeader) -> str | None:
    """What no build writes into a header."""
    forms = [(name, part.fp8_attention) for part in header.parts for name in part.architectures]
    if not header.parts or not all(part.architectures for part in header.parts):
        return "no engine, or one for no architecture"
    if len(set(forms)) < len(forms):
        return "two engines for one architecture"
    if any(part.context_bytes < 0 for part in header.parts):
        return "negative scratch memory"
    for name, extent in header.profile.items():
        if not 1 <= extent.smallest <= extent.usual <= extent.largest:
            return f"no order in the extents of {name}: {extent.smallest}, {extent.usual}, {extent.largest}"
    return None


def read_file_header(file: Path) -> EngineHeader:
    """The header of a file on disk, of which nothing else is read.

    Raises:
        BundleError: as `read_header`, or the file cannot be read.
    """
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as data,
        ):
            return read_header(data)
    except (OSError, ValueError) as exc:  # ValueError: an empty file cannot be mapped
        raise BundleError(f"{file.name}: cannot be read: {exc}", hint="copy the bundle again or rebuild it") from exc


def engine_for(
    header: EngineHeader, data: memoryview, architecture: str, *, fp8_attention: bool = False
) -> tuple[EnginePart, memoryview] | None:
    """The part of a file for one architecture and its engine, of attention in the form asked for; None when there is none.

    Args:
        header: what `read_header` gives of `data`.
    """
    end = len(data)
    for part in reversed(header.parts):
        if architecture in part.architectures and part.fp8_attention == fp8_attention:
            return part, data[end - part.bytes : end]
        end -= part.bytes
    return None
