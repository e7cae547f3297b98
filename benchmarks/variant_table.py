"""The README's table of variants, written from the variant table: what each takes, its defaults, and what it was compared with.

python -m benchmarks.variant_table README.md
"""

import argparse
from pathlib import Path

from benchmarks.table import rewrite_readme
from runtime.variants import VARIANTS, Presence, Variant

MARKS = ("<!-- variants:begin -->", "<!-- variants:end -->")
_HEADER = (
    "variant",
    "what it is",
    "takes, beside a prompt",
    "default size",
    "steps",
    "shift",
    "guidance",
    "compared with, on toys",
)


def variant_table() -> str:
    """The table as markdown."""
    rows = [_HEADER, ("---",) * len(_HEADER), *(_row(variant) for variant in VARIANTS.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _row(variant: Variant) -> tuple[str, ...]:
    defaults = variant.defaults
    shift = f"{defaults.shift:g}"
    if defaults.low_resolution_shift is not None:
        shift += f"; {defaults.low_resolution_shift:g} up to 832x480"
    guidance = ", ".join(f"{scale:g}" for scale in defaults.guidance)
    return (
        f"`{variant.name}`",
        variant.title,
        _inputs(variant),
        f"{defaults.width}x{defaults.height}, {defaults.num_frames} frames, {defaults.fps} fps",
        str(defaults.num_steps),
        shift,
        f"{guidance} (high, low noise)" if len(defaults.guidance) > 1 else guidance,
        ", ".join(f"`{oracle}`" for oracle in _oracles(variant)),
    )


def _inputs(variant: Variant) -> str:
    takes = variant.conditioning
    named = (("first image", takes.image), ("last image", takes.last_image), ("video", takes.video))
    marks = {Presence.REQUIRED: "", Presence.OPTIONAL: " (optional)"}
    return ", ".join(f"{name}{marks[presence]}" for name, presence in named if presence is not Presence.NONE)


def _oracles(variant: Variant) -> list[str]:
    """diffusers' pipelines that the tests hold a toy of this kind against, step by step."""
    takes = variant.conditioning
    found = ["WanPipeline"] if takes.image is not Presence.REQUIRED else []
    found += ["WanImageToVideoPipeline"] if takes.image is not Presence.NONE else []
    return found + (["WanVideoToVideoPipeline"] if takes.video is not Presence.NONE else [])


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variant_table", description="Rewrite a README's table of variants."
    )
    parser.add_argument("readme", type=Path)
    rewrite_readme(parser.parse_args().readme, variant_table(), marks=MARKS)


if __name__ == "__main__":
    main()
