"""From measured runs to numbers and words: medians, paired ratios, a markdown table, and the block of a README that holds it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from runtime.errors import RequestError

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

Measured = Mapping[str, float]
"""Metric key → what one run measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Something measured in every run; less is better.

    Args:
        goal: the largest ratio to the baseline that this project is content with on a CPU.
        per_unit: divides the value for the table.
    """

    key: str
    title: str
    unit: str
    goal: float
    per_unit: int = 1


METRICS = (
    Metric(key="cold_start_s", title="cold start: process start to first denoised step", unit="s", goal=0.25),
    Metric(key="total_s", title="total: process start to exit, frames written", unit="s", goal=1.0),
    Metric(key="peak_memory_bytes", title="peak memory", unit="MiB", goal=0.5, per_unit=2**20),
)


def summarise(pairs: Sequence[tuple[Measured, Measured]]) -> dict[str, Any]:
    """Median and spread of every metric, for both peers and for their ratio.

    Args:
        pairs: what this project and the baseline measured, one after the other. A ratio is taken within a pair, so that what
            disturbs the machine for longer than a pair disturbs both sides of it.
    """
    return {
        metric.key: {
            "ours": spread([ours[metric.key] for ours, _ in pairs]),
            "baseline": spread([baseline[metric.key] for _, baseline in pairs]),
            "ratio": spread([ours[metric.key] / baseline[metric.key] for ours, baseline in pairs]),
            "goal": metric.goal,
        }
        for metric in METRICS
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def markdown_table(result: Mapping[str, Any]) -> str:
    """A result as a markdown table and the line that says what was measured, where and how."""
    baseline = result["baseline"]
    lines = [f"| | wanrt | {baseline} | ratio (min-max) | goal |", "|---|---|---|---|---|"]
    for metric in METRICS:
        found = result["summary"][metric.key]
        ours, theirs = (_number(found[peer]["median"], metric) for peer in ("ours", "baseline"))
        ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**found["ratio"])
        lines.append(f"| {metric.title} | {ours} | {theirs} | {ratio} | ≤ {found['goal']:g} |")
    return "\n".join([*lines, "", _caption(result)])


def _caption(result: Mapping[str, Any]) -> str:
    work, machine, versions = result["work"], result["machine"], result["versions"]
    arch = work["model"]["transformer"]
    count = len(result["pairs"])
    return (
        f"Medians of {count} {'pair' if count == 1 else 'pairs'} of fresh processes after {result['warm_up_pairs']} uncounted; "
        f"ratios within pairs. Random-weight toy (width {arch['dim']}, {arch['num_layers']} blocks), "
        f"{work['width']}x{work['height']}, {work['num_frames']} frames, {work['num_steps']} steps with guidance, fp32, "
        f"{work['num_threads']} threads; frames differ by at most {result['largest_frame_difference']} of 255. "
        f"{machine['cpu']}, {machine['cores']} cores; "
        f"wanrt {versions['wanrt']} on onnxruntime {versions.get('onnxruntime', '?')}, "
        f"diffusers {versions.get('diffusers', '?')} on torch {versions.get('torch', '?')}."
    )


def check_readme(path: Path) -> None:
    """See that a README has one block to rewrite.

    Raises:
        RequestError: it cannot be read, or the two marks are not there once each and in order.
    """
    replace_block(_read(path), "")


def rewrite_readme(path: Path, table: str, *, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Put a table into a README's block between two marks; everything else stays as it is.

    Raises:
        RequestError: as `check_readme`.
    """
    text = replace_block(_read(path), table, marks=marks)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def replace_block(text: str, table: str, *, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with what stands between the two marks replaced.

    Raises:
        RequestError: the marks are not there once each and in order.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end or marks[0] in rest or marks[1] in before + after:
        raise RequestError(
            f"the README needs one block from {marks[0]} to {marks[1]}", hint="put the two lines where the table belongs"
        )
    return f"{before}{marks[0]}\n{table}\n{marks[1]}{after}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise RequestError(f"{path}: not a readable text file: {exc}", hint="name the README to rewrite") from exc


def _number(value: float, metric: Metric) -> str:
    value /= metric.per_unit
    return f"{value:.0f} {metric.unit}" if value >= 100 else f"{value:.2f} {metric.unit}"
