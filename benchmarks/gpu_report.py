"""What a GPU suite's report says: the machine and its software, results as rows, the table."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu import OURS, Result
from benchmarks.machine import versions
from runtime.errors import RequestError

PEAK_TFLOPS = {"NVIDIA H200": {"bf16": 989.0, "fp8": 1979.0}}
"""Dense peaks by NVIDIA's datasheets (SXM), by the name the driver gives."""
_DISTRIBUTIONS = (
    "torch", "diffusers", "diffsynth", "transformers", "cuda-bindings", "nvidia-cublas", "nvidia-cudnn-cu13", "nvmath-python",
    "torch-tensorrt", "tensorrt", "onnxruntime-gpu",
)  # fmt: skip


def gpu_facts() -> dict[str, Any]:
    """The GPU and the software a result was measured with. Names no machine.

    Raises:
        EngineError: there is no GPU to use.
    """
    from runtime.backends.cuda.device import Device

    with Device() as device:
        facts: dict[str, Any] = {"gpu": device.name, "arch": device.arch}
    driver = Path("/sys/module/nvidia/version")
    if driver.exists():
        facts["driver"] = driver.read_text(encoding="utf-8").strip()
    return facts | {"versions": versions(_DISTRIBUTIONS)}


def torch_facts() -> dict[str, Any]:
    """Versions that PyTorch knows.

    Raises:
        RequestError: it is not installed, or has no GPU.
    """
    hint = "install PyTorch's CUDA build beside wanrt's `cuda`, `export` and `dev` extras"
    try:
        import torch
    except ImportError as exc:
        raise RequestError("this suite makes its weights with PyTorch, not installed here", hint=hint) from exc
    if not torch.cuda.is_available():
        raise RequestError(f"this suite makes its weights with PyTorch, and torch {torch.__version__} sees no GPU", hint=hint)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn}


def as_row(result: Result, gpu: str) -> dict[str, Any]:
    """A result as JSON holds it: case and peer first, then what was measured, and its share of the GPU's peaks where known."""
    fields = asdict(result)
    row = {"case": fields.pop("case"), "peer": fields.pop("peer"), **fields}
    for precision, peak in PEAK_TFLOPS.get(gpu, {}).items():
        row[f"share_of_{precision}_peak"] = None if result.tflop is None else result.tflop / result.seconds / peak
    return row


def markdown_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Results as a markdown table; a ratio is to the case's first row that is not this project's."""
    rows = list(rows)
    bases: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if not row["peer"].startswith(OURS):
            bases.setdefault(_work(row), row)
    lines = [
        "| case | peer | tokens | median (spread), runs | ratio | TFLOP/s | of bf16, fp8 peak | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = bases.get(_work(row))
        ratio = "–" if base is None else f"{row['seconds'] / base['seconds']:.2f}"
        speed = "–" if row["tflop"] is None else f"{row['tflop'] / row['seconds']:.0f}"
        shares = [row.get(f"share_of_{precision}_peak") for precision in ("bf16", "fp8")]
        memory = row["peak_memory_gib"]
        cells = [
            _work(row),
            row["peer"],
            "–" if row["tokens"] is None else f"{row['tokens']:,}",
            f"{_time(row['seconds'])} ({_time(row['fastest'])}-{_time(row['slowest'])}), {row['runs']}",
            ratio,
            speed,
            ", ".join(f"{share:.0%}" for share in shares if share is not None) or "–",
            "–" if memory is None else f"{memory:.1f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _work(row: Mapping[str, Any]) -> str:
    """What a row measured: rows of one work can be compared."""
    return f"{row['case']} {row['work']}" if "work" in row else str(row["case"])


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"
