"""Makes clips with the networks in training: plain Euler with guidance, many prompts at once. `wanrt run` is what everybody else uses."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.moving_shapes.grammar import caption_of
from benchmarks.moving_shapes.measure import Frames
from benchmarks.moving_shapes.model import Networks
from benchmarks.moving_shapes.render import to_uint8
from benchmarks.moving_shapes.score import ClipScore, score_clip
from benchmarks.moving_shapes.tokenizer import build_tokenizer, token_ids
from benchmarks.moving_shapes.world import ClipSize, Kind, sample_scene


def prompts(count: int, size: ClipSize, *, kinds: tuple[Kind, ...] = tuple(Kind)) -> list[str]:
    """Captions of scenes that training never sees, each with all that can be said."""
    return [caption_of(sample_scene(seed, size, kinds=kinds)) for seed in range(count)]


@torch.no_grad()
def sample(
    networks: Networks, captions: Sequence[str], size: ClipSize, *, num_steps: int = 25, guidance: float = 5.0, seed: int = 0
) -> NDArray[np.uint8]:
    """Clips of captions, uint8 [B, T, H, W, 3]."""
    device = next(networks.transformer.parameters()).device
    ids, lengths = (
        torch.from_numpy(array).to(device) for array in token_ids(build_tokenizer(), [*captions, *("" for _ in captions)])
    )
    shape = (len(captions), 16, (size.num_frames - 1) // 4 + 1, size.height // 8, size.width // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    text = networks.text_encoder(ids, lengths)
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    sigmas = (5 * even / (1 + 4 * even)).tolist()
    for sigma, following in pairwise(sigmas):
        timesteps = torch.full((2 * len(captions),), 1000 * sigma, device=device)
        guided, unguided = networks.transformer(torch.cat((latents, latents)), timesteps, text, lengths).chunk(2)
        latents = latents + (following - sigma) * (unguided + guidance * (guided - unguided))
    return to_uint8(_decoded(networks, latents).float().cpu().numpy())


def _decoded(networks: Networks, latents: Tensor, *, at_once: int = 64) -> Tensor:
    return torch.cat([networks.vae.decode(part) for part in torch.split(latents, at_once)])


def judge(
    networks: Networks, size: ClipSize, *, count: int, num_steps: int = 25, kinds: tuple[Kind, ...] = tuple(Kind)
) -> tuple[list[str], Frames, list[ClipScore]]:
    """Captions, clips and their scores."""
    captions = prompts(count, size, kinds=kinds)
    clips = sample(networks, captions, size, num_steps=num_steps)
    return captions, clips, [score_clip(clip, caption) for clip, caption in zip(clips, captions, strict=True)]


def write_sheet(path: Path, captions: Sequence[str], clips: Frames, scores: Sequence[ClipScore], *, rows: int = 12) -> None:
    """A PNG of some clips: a caption and five frames of each; what the scorer found wrong is named."""
    from PIL import Image, ImageDraw

    chosen = sorted(Random(0).sample(range(len(clips)), min(rows, len(clips))))
    scale, (num_frames, height, width) = 2, clips.shape[1:4]
    shown = np.linspace(0, num_frames - 1, 5).round().astype(int)
    row_height = scale * height + 16
    sheet: Any = Image.new("RGB", (max(5 * scale * width, 640), row_height * len(chosen)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, index in enumerate(chosen):
        wrong = [name for name, right in scores[index].right.items() if not right]
        pen.text((2, row * row_height + 2), captions[index] + (f"   WRONG: {', '.join(wrong)}" if wrong else ""), fill="black")
        strip = Image.fromarray(np.concatenate(list(clips[index][shown]), axis=1))
        sheet.paste(
            strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST), (0, row * row_height + 16)
        )
    sheet.save(path)
