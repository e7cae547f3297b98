"""Stands in for `cuda.core`, that is for NVRTC: g++ compiles the kernels' source for the CPU.

The text is rewritten in two places: a kernel takes its arguments by reference and says how large they are, and an `asm` statement
becomes a call of the function of device_code.h that does what the instruction does. What is not known is refused. The "cubin" that
comes out is the path of a library.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / "build" / "emulator"
_LANGUAGE = Path(__file__).with_name("device_code.h")
_COMPILER = (
    *("g++", "-std=c++17", "-O1", "-march=native", "-ffp-contract=fast", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all", "-static-libubsan"),
)  # a vector read at an address that no GPU would take ends the process
_INSTRUCTIONS: Mapping[str, str] = {
    "cvt.rn.bf16x2.f32": "ptx_bf16_pair",
    "cvt.rn.satfinite.e4m3x2.f32": "ptx_e4m3_pair",
    "cvt.rn.f16x2.e4m3x2": "ptx_halves_of_e4m3",
    "{ .reg .b16 low, high; mov.b32 {low, high},": "ptx_floats_of_halves",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "ptx_mma",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": "ptx_ldmatrix_transposed",
}  # by an instruction's text up to its first operand
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
_ENTRY = re.compile(r'extern "C" __global__ void __launch_bounds__\((\w+),.*\) (\w+)\(const __grid_constant__ (\w+) (\w+)\)')
_ENTRY_ON_A_CPU = r'extern "C" { extern const unsigned \2##_launch[2] = {sizeof(\3), \1}; } extern "C" void \2(const \3& \4)'
_ASM = re.compile(r"\basm(?: volatile)?(?=\()")
_OPERAND = re.compile(r'"[=+]?\w"(?=\()')


def obstacle() -> str | None:
    """Why kernels cannot be compiled for the CPU here; None when they can."""
    if not sys.platform.startswith("linux"):
        return "the emulated GPU needs Linux"
    return None if shutil.which("g++") else "the emulated GPU needs g++"


@dataclass(frozen=True)
class ProgramOptions:
    name: str
    arch: str
    std: str
    include_path: str


@dataclass(frozen=True)
class ObjectCode:
    code: bytes
    """Where the library is."""


class Program:
    """A source that is compiled once and found in `CACHE` ever after."""

    def __init__(self, code: str, code_type: str, options: ProgramOptions) -> None:
        self._source = code
        self._options = options

    def compile(self, target_type: str) -> ObjectCode:
        """Raises RuntimeError: g++ refused the source, or something in it is unknown here."""
        options = self._options
        arch = int(options.arch.removeprefix("sm_").rstrip("af")) * 10
        source = translate(joined(self._source, Path(options.include_path)))
        source = f"#define __CUDA_ARCH__ {arch}\n{_LANGUAGE.read_text(encoding='utf-8')}\n{source}"
        digest = hashlib.sha256("\0".join((*_COMPILER, source)).encode()).hexdigest()
        library = CACHE / f"{digest[:24]}.so"
        if not library.exists():
            _compile(source, library)
        return ObjectCode(str(library).encode())


class KernelLibrary:
    """Compiled kernels, found by name."""

    def __init__(self, image: bytes) -> None:
        self._library = ctypes.CDLL(image.decode())

    def find(self, name: str) -> "Kernel | None":
        """None: there is no such kernel."""
        try:
            entry = getattr(self._library, name)
            argument_bytes, most_threads = (ctypes.c_uint * 2).in_dll(self._library, f"{name}_launch")
        except (AttributeError, ValueError):
            return None
        return Kernel(name, argument_bytes, most_threads, ctypes.cast(entry, ctypes.c_void_p), self._library)


@dataclass(frozen=True)
class Kernel:
    name: str
    argument_bytes: int
    most_threads: int
    entry: ctypes.c_void_p
    library: ctypes.CDLL

    def run(self, arguments: bytes, *, num_blocks: int, num_threads: int) -> None:
        """Run it here and now. Only one kernel runs at any time."""
        held = ctypes.create_string_buffer(len(arguments) + _ALIGNMENT)
        start = ctypes.addressof(held)
        start += -start % _ALIGNMENT
        ctypes.memmove(start, arguments, len(arguments))
        self.library.run_grid(self.entry, ctypes.c_void_p(start), num_blocks, num_threads)


def joined(source: str, folder: Path) -> str:
    """The source with its headers in the place of the first `#include` of each."""
    seen: set[str] = set()

    def text_of(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _INCLUDE.sub(text_of, (folder / match[1]).read_text(encoding="utf-8").replace("#pragma once", ""))

    return _INCLUDE.sub(text_of, source)


def translate(source: str) -> str:
    """CUDA C++ as device_code.h understands it.

    Raises:
        RuntimeError: a kernel or an instruction is written in a way that this does not know.
    """
    source = _ENTRY.sub(_ENTRY_ON_A_CPU, source)
    if "__global__" in source:
        raise RuntimeError(
            f"the emulator does not know how this kernel is declared: {_line(source, source.index('__global__'))}"
        )
    parts, position = [], 0
    for match in _ASM.finditer(source):
        end = _closing(source, match.end())
        parts += [source[position : match.start()], _call(source[match.end() + 1 : end])]
        position = end + 1
    return "".join((*parts, source[position:]))


def _call(statement: str) -> str:
    """`"instruction" : "=r"(output) : "f"(input)` as a call of the function for that instruction."""
    text = re.match(r'\s*"([^"]*)"', statement)
    instruction = re.split(r"\s*[{\[]?%", text[1], maxsplit=1)[0] if text else ""
    if text is None or instruction not in _INSTRUCTIONS:
        raise RuntimeError(f"the emulator does not know the instruction: {_line(statement, 0)}")
    return f"{_INSTRUCTIONS[instruction]}({', '.join(_operands(statement[text.end() :]))})"


def _operands(statement: str) -> Iterator[str]:
    position = 0
    while found := _OPERAND.search(statement, position):
        position = _closing(statement, found.end())
        yield statement[found.end() + 1 : position]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed; instructions have none of their own."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise RuntimeError(f"a parenthesis is never closed: {_line(text, start)}")


def _line(text: str, position: int) -> str:
    return text[text.rfind("\n", 0, position) + 1 :].split("\n", 1)[0].strip()


def _compile(source: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = (*_COMPILER, "-x", "c++", "-", "-o", str(made))
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        os.replace(made, library)


_ALIGNMENT = 64
