"""Compiles the fused CUDA kernels ahead of time, for any architecture and on a machine without a GPU.

What comes out is a cubin that `runtime.backends.cuda.kernels` loads; which kernels exist is said in kernels.cu beside this file.
"""

from pathlib import Path

from runtime.errors import BuildError

SOURCE = Path(__file__).parent / "kernels.cu"
SMALLEST_ARCH = 80  # bf16 conversion in one instruction; FP8 kernels are left out below 89


def compile_kernels(arch: str) -> bytes:
    """The cubin of every kernel for one GPU architecture.

    Args:
        arch: `"sm_90"`, or with the suffix of an architecture-specific target, `"sm_90a"`.

    Raises:
        BuildError: the architecture is unknown or too old, NVRTC is not installed or it refused the source.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as exc:
        raise BuildError("compiling CUDA kernels needs cuda-core and NVRTC", hint="pip install 'wanrt[cuda]'") from exc
    digits = arch.removeprefix("sm_").rstrip("af")
    if not arch.startswith("sm_") or not digits.isdecimal() or int(digits) < SMALLEST_ARCH:
        raise BuildError(f"--arch {arch}: possible are sm_{SMALLEST_ARCH} and later, such as sm_80, sm_89, sm_90a or sm_120")
    options = ProgramOptions(name=SOURCE.name, arch=arch, std="c++17", include_path=str(SOURCE.parent))
    try:
        code = Program(SOURCE.read_text(encoding="utf-8"), "c++", options).compile("cubin").code
    except Exception as exc:  # NVRTC's error type moved between releases of cuda-core
        raise BuildError(f"NVRTC refused the kernels for {arch}: {exc}") from exc
    return bytes(code)
