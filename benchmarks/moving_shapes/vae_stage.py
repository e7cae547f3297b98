"""Trains the VAE: sharp frames from latents that have unit variance and bear some noise, which is what a diffusion model leaves in them."""

from collections.abc import Hashable, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moving_shapes.data import ChunkStream, buckets
from benchmarks.moving_shapes.loop import Stage, StageLength, StageLog
from benchmarks.moving_shapes.recipe import VaeRecipe
from benchmarks.moving_shapes.render import SceneArrays, draw
from benchmarks.moving_shapes.vae import Vae
from benchmarks.moving_shapes.world import ClipSize

_SHAPE_WEIGHT = 5.0  # of an error on a shape or its outline, against one on the background
_EDGE_WEIGHT = 1.0  # of differences between neighbouring pixels
_STATISTICS_CHUNKS = 24


def train_vae(
    vae: Vae,
    recipe: VaeRecipe,
    *,
    length: StageLength,
    state_file: Path,
    seed: int,
    workers: int,
    resume: bool,
    scale: float = 1.0,
    graphs: bool = True,
    decoder_only: bool = False,
) -> StageLog:
    """Train until the stage is over; the VAE then has its moving averages and its latents' statistics.

    Args:
        decoder_only: leave the encoder and the latents' statistics as they are.
        scale: of the batches; less than 1 for a trial.
        graphs: replay steps as CUDA graphs on a GPU.
    """
    device = next(vae.parameters()).device

    def loss(kind: Hashable, batch: Sequence[Tensor]) -> Tensor:
        assert isinstance(kind, tuple)
        scenes, (size, window) = SceneArrays(*batch), kind
        drawn = draw(scenes if window is None else cut_windows(scenes, size, window), window or size, xp=torch)
        return _loss(vae, drawn, scenes.background, most_noise=recipe.most_noise, decoder_only=decoder_only)

    stage = Stage(
        {"decoder": vae.decode_chain} if decoder_only else {"vae": vae},
        loss,
        learning_rate=recipe.learning_rate,
        muon_rate=recipe.muon_rate,
        length=length,
        state_file=state_file,
        graphs=graphs,
    )
    if resume:
        stage.resume()
    choice = buckets(recipe.sizes, latent_places=int(recipe.latent_places * scale), windows_of=recipe.windows_of)
    with ChunkStream(seed, choice, first=stage.log.step, workers=workers) as stream:
        for number, chunk in enumerate(stream):
            if stage.done:
                break
            if number == 0:
                stage.restart_clock()
            stage.step((chunk.bucket.size, chunk.bucket.window), astuple(chunk.scenes.to_torch(device)))
    stage.finish()
    if not decoder_only:
        measure_latents(vae, recipe, seed=seed, scale=scale)
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
    corner = (track[rows, chosen, window.num_frames // 2] + offset) * side
    corner = corner - torch.tensor((window.width / 2, window.height / 2), device=rows.device)
    farthest = torch.tensor((size.width - window.width, size.height - window.height), device=rows.device)
    corner = torch.minimum(corner.round().clamp_min(0), farthest)
    return SceneArrays(
        background=scenes.background,
        rgb=scenes.rgb,
        shape=scenes.shape,
        radius=scenes.radius * (side / own_side),
        track=(track * side - corner[:, None, None]) / own_side,
    )


def _loss(vae: Vae, frames: Tensor, background: Tensor, *, most_noise: float, decoder_only: bool) -> Tensor:
    with torch.no_grad():
        plain = background[:, :, None, None, None] / 127.5 - 1
        shapes = ((frames - plain).abs().amax(dim=1, keepdim=True) > 0.02).float()
        weight = 1 + (_SHAPE_WEIGHT - 1) * F.max_pool3d(shapes, (1, 3, 3), stride=1, padding=(0, 1, 1))
    with torch.autocast(frames.device.type, torch.bfloat16, cache_enabled=False):
        if decoder_only:
            with torch.no_grad():
                latents = vae.encode(frames)
        else:
            moments = vae.moments(frames).float()
            variance, mean = torch.var_mean(moments, dim=(0, 2, 3, 4), keepdim=True)
            latents = (moments - mean) / torch.sqrt(variance + 1e-6)
        noise = most_noise * torch.rand(len(latents), 1, 1, 1, 1, device=frames.device)
        decoded = vae.decode(latents + noise * torch.randn_like(latents)).float()
    error = decoded - frames
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss: Tensor = (weight * error.abs()).mean() / weight.mean() + _EDGE_WEIGHT * edges
    return loss


@torch.no_grad()
def measure_latents(vae: Vae, recipe: VaeRecipe, *, seed: int, scale: float = 1.0) -> None:
    """Set the mean and deviation of each channel over fresh clips, whole ones where training saw windows."""
    device = next(vae.parameters()).device
    sizes = recipe.sizes
    if recipe.windows_of is not None:
        whole = recipe.windows_of
        sizes = ((whole.width, whole.height, whole.num_frames, 1.0),)
    choice = buckets(sizes, latent_places=int(recipe.latent_places * scale))
    seen = []
    with ChunkStream(seed + 1, choice, first=0, workers=0) as stream:
        for _, chunk in zip(range(_STATISTICS_CHUNKS), stream, strict=False):
            frames = draw(chunk.scenes.to_torch(device), chunk.bucket.size, xp=torch)
            seen.append(vae.moments(frames).float().transpose(0, 1).flatten(1))
    std, mean = torch.std_mean(torch.cat(seen, dim=1), dim=1)
    vae.mean.copy_(mean)
    vae.std.copy_(std.clamp_min(1e-3))
