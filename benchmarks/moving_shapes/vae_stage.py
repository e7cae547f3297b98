"""Trains the VAE: an encoder that finds each block's code, and a decoder that makes sharp frames of codes with some noise, which is what a
diffusion model leaves in them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moving_shapes.codes import block_codes
from benchmarks.moving_shapes.data import ChunkStream, buckets
from benchmarks.moving_shapes.loop import Stage, StageLength, StageLog
from benchmarks.moving_shapes.recipe import VaeRecipe
from benchmarks.moving_shapes.render import SceneArrays, draw
from benchmarks.moving_shapes.vae import Vae
from benchmarks.moving_shapes.world import ClipSize

_SHAPE_WEIGHT = 5.0  # of an error on a shape or its outline, against one on the background
_EDGE_WEIGHT = 1.0  # of differences between neighbouring pixels

VaeHalf = Literal["encoder", "decoder"]


def train_half(
    vae: Vae,
    half: VaeHalf,
    recipe: VaeRecipe,
    *,
    length: StageLength,
    state_file: Path,
    seed: int,
    workers: int,
    resume: bool,
    scale: float = 1.0,
    graphs: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> StageLog:
    """Train one half of the VAE until the stage is over; it then has its moving averages. Codes lie between the halves, which never meet.

    Args:
        scale: of the batches; less than 1 for a trial.
        graphs: replay steps as CUDA graphs on a GPU.
        cancelled: see `Stage`.
    """
    device = next(vae.parameters()).device

    def loss(kind: Hashable, batch: Sequence[Tensor]) -> Tensor:
        assert isinstance(kind, tuple)
        scenes, (size, window) = SceneArrays(*batch), kind
        frames = draw(scenes if window is None else cut_windows(scenes, size, window), window or size, xp=torch)
        if half == "encoder":
            return _encoder_loss(vae, frames)
        return _decoder_loss(vae, frames, scenes.background, most_noise=recipe.most_noise)

    stage = Stage(
        {half: vae.encode_chain if half == "encoder" else vae.decode_chain},
        loss,
        learning_rate=recipe.learning_rate,
        muon_rate=recipe.muon_rate,
        length=length,
        state_file=state_file,
        graphs=graphs,
        cancelled=cancelled,
    )
    if resume:
        stage.resume()
    places = int(recipe.latent_places * scale)
    choice = buckets(recipe.sizes, latent_places=places, windows_of=recipe.windows_of, kinds=recipe.kinds)
    with ChunkStream(seed, choice, first=stage.log.step, workers=workers) as stream:
        for number, chunk in enumerate(stream):
            if stage.done:
                break
            if number == 0:
                stage.restart_clock()
            stage.step((chunk.bucket.size, chunk.bucket.window), astuple(chunk.scenes.to_torch(device)))
    stage.finish()
    return stage.log


def cut_windows(scenes: SceneArrays, size: ClipSize, window: ClipSize) -> SceneArrays:
    """Scenes of a part of each clip, in torch: what a window near one of its shapes sees of some of its frames."""
    batch, num_frames = len(scenes.track), scenes.track.shape[2]
    rows = torch.arange(batch, device=scenes.track.device)
    rand = torch.rand(5, batch, device=scenes.track.device)
    chosen = (rand[0] * (scenes.radius > 0).sum(dim=1)).long()
    chosen = torch.where(scenes.radius[:, 0] > 0, chosen, 1)
    start = (rand[1] * (num_frames - window.num_frames + 1)).long()
    frames = start[:, None] + torch.arange(window.num_frames, device=rows.device)
    track = scenes.track[rows[:, None], :, frames].transpose(1, 2)  # [B, K, T, 2]
    angle, reach = 2 * torch.pi * rand[2], 1.5 * torch.sqrt(rand[3]) * scenes.radius[rows, chosen]
    offset = torch.stack((reach * angle.cos(), reach * angle.sin()), dim=-1)
    side, own_side = min(size.width, size.height), min(window.width, window.height)
    centre = (track[rows, chosen, window.num_frames // 2] + offset) * side
    extents = ((size.width, window.width), (size.height, window.height))
    corner = torch.stack(
        [(centre[:, axis] - own / 2).round().clamp(0, whole - own) for axis, (whole, own) in enumerate(extents)], dim=-1
    )
    return SceneArrays(
        background=scenes.background,
        rgb=scenes.rgb,
        shape=scenes.shape,
        radius=scenes.radius * (side / own_side),
        track=(track * side - corner[:, None, None]) / own_side,
    )


def _encoder_loss(vae: Vae, frames: Tensor) -> Tensor:
    with torch.autocast(frames.device.type, torch.bfloat16, cache_enabled=False):
        return F.mse_loss(vae.encode(frames), block_codes(frames))


def _decoder_loss(vae: Vae, frames: Tensor, background: Tensor, *, most_noise: float) -> Tensor:
    with torch.no_grad():
        plain = background[:, :, None, None, None] / 127.5 - 1
        shapes = ((frames - plain).abs().amax(dim=1, keepdim=True) > 0.02).float()
        weight = 1 + (_SHAPE_WEIGHT - 1) * F.max_pool3d(shapes, (1, 3, 3), stride=1, padding=(0, 1, 1))
    codes = block_codes(frames)
    noise = most_noise * torch.rand(len(codes), 1, 1, 1, 1, device=frames.device)
    with torch.autocast(frames.device.type, torch.bfloat16, cache_enabled=False):
        decoded = vae.decode(codes + noise * torch.randn_like(codes)).float()
    error = decoded - frames
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss: Tensor = (weight * error.abs()).mean() / weight.mean() + _EDGE_WEIGHT * edges
    return loss
