"""Writes the model card of a trained checkpoint from what its training left behind.

python -m benchmarks.moving_shapes.card DIR/training.json --out MODEL_CARD.md
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from torch import Tensor

from benchmarks.moving_shapes.model import SIZES, new_networks
from benchmarks.moving_shapes.recipe import RECIPES, DitRecipe
from benchmarks.moving_shapes.world import COLOURS, DIRECTIONS, SHAPES, SPEEDS
from benchmarks.moving_shapes.world import SIZES as SHAPE_SIZES

_CURVE_POINTS = 12
_WIDTH = 140


def card(report: dict[str, Any]) -> str:
    """The card as markdown.

    Args:
        report: what `training.json` holds; `note` and `limits` are a person's words about it.
    """
    settings, machine, stages = report["settings"], report["machine"], report["stages"]
    sizes = SIZES[settings["size"]]
    dit, text = sizes.transformer, sizes.text_encoder
    found = report["accuracy"]
    lines = [
        "# Moving shapes: a small Wan2.1",
        "",
        "A text-to-video model of exactly Wan2.1's architecture and file layout, small enough to ship.",
        "It was trained on generated clips and nothing else.",
        "Licence: this project's, Apache-2.0.",
        "",
        "## Sizes",
        "",
        f"- Transformer: width {dit.dim} ({dit.num_heads} heads of {dit.head_dim}), {dit.num_layers} blocks, "
        f"feed-forward {dit.ffn_dim}; float16.",
        f"- Text encoder (UMT5): width {text.dim}, {text.num_layers} blocks, {text.vocab_size} tokens; bfloat16.",
        f"- VAE 2.1: base width {sizes.vae.base_dim}, {sizes.vae.z_dim} latent channels, Wan's own latent statistics; float16.",
        f"- {sum(each.numel() for each in _parameters(settings['size'])):,} parameters in all.",
        "",
        "## Data",
        "",
        f"Clips of one or two shapes, drawn by `render.py`: {', '.join(SHAPES)}; colours {', '.join(COLOURS)}; {', '.join(SHAPE_SIZES)};",
        f"{', '.join(SPEEDS)}; {len(DIRECTIONS)} directions.",
        f"{_clips(RECIPES[settings['recipe']].dit)} Captions: `grammar.py`. The judged scenes are never trained on.",
        "",
        "## Training",
        "",
        f"{machine['device']}, torch {machine['torch']}, {machine['at']}; seed {settings['seed']}. "
        "`python -m benchmarks.moving_shapes.train --out DIR --compile --workers 8` trains such a model from the beginning.",
        *([report["note"]] if "note" in report else []),
        "",
        "| stage | steps | minutes | result |",
        "|---|---|---|---|",
        *(
            f"| {name} | {stage['steps']:,} | {stage['seconds'] / 60:.1f} | {_result(stage)} |"
            for name, stage in stages.items()
        ),
        "",
        *(line for name, stage in stages.items() for line in (f"Loss of `{name}` by step: {_curve(stage)}", "")),
        "## What it does",
        "",
        f"Of {found['clips']} clips of captions that training never saw, measured from their frames alone; "
        f"{settings['sample_steps']} Euler steps:",
        "",
        "| attribute | right |",
        "|---|---|",
        *(f"| {name} | {share:.1%} |" for name, share in found.items() if name not in ("clips", "step")),
        "",
        "![Captions, and five frames of each clip](samples.png)",
        "",
        "## Limits",
        "",
        "It knows the words of its grammar and nothing else; other words count as unknown. Sizes and lengths beyond the trained ones are not",
        "what it was made for. It is for demonstrations and for measuring what precision, caches and few steps do to a real model's videos.",
        *([report["limits"]] if "limits" in report else []),
        "",
    ]
    return "\n".join(line if line.startswith(("|", "-")) else fill(line, _WIDTH, break_long_words=False) for line in lines)


def _parameters(size: str) -> Iterator[Tensor]:
    networks = new_networks(SIZES[size], seed=0)
    for network in (networks.text_encoder, networks.transformer, networks.vae):
        yield from network.parameters()


def _clips(recipe: DitRecipe) -> str:
    sizes = ", ".join(f"{width}x{height} with {num_frames} frames" for width, height, num_frames, _ in recipe.sizes)
    return f"Scenes: {', '.join(recipe.kinds)}. Clips: {sizes}."


def _result(stage: dict[str, Any]) -> str:
    if "relative_error" in stage:
        return f"relative error {stage['relative_error']:.1%}"
    if "psnr_db" in stage:
        return f"{stage['psnr_db']:.1f} dB, SSIM {stage['ssim']:.3f}"
    return f"loss {stage['loss'][-1][2]:.4f}"


def _curve(stage: dict[str, Any]) -> str:
    entries = stage["loss"]
    shown = entries[:: max(1, len(entries) // _CURVE_POINTS)]
    return ", ".join(f"{step:,}: {loss:.4f}" for step, _, loss in [*shown, entries[-1]])


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving_shapes.card", description="Write a model card.")
    parser.add_argument("training", type=Path, help="training.json")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.write_text(card(json.loads(asked.training.read_text(encoding="utf-8"))), encoding="utf-8")
    print(asked.out)


if __name__ == "__main__":
    main()
