"""Trains the VAE: sharp frames from latents that have unit variance and bear some noise, which is what a diffusion model leaves in them."""

from collections.abc import Hashable, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moving_shapes.data import ChunkStream, buckets
from benchmarks.moving_shapes.loop import Stage, StageLength, StageLog
from benchmarks.moving_shapes.render import SceneArrays, draw
from benchmarks.moving_shapes.vae import Vae
from benchmarks.moving_shapes.world import ClipSize

_SIZES = ((64, 64, 5, 0.5), (64, 64, 9, 0.3), (64, 64, 17, 0.1), (128, 96, 5, 0.1))
_LATENT_PLACES = 32 * 128  # a batch: 32 clips of 64x64 and 5 frames
_MOST_NOISE = 0.25
_SHAPE_WEIGHT = 5.0  # of an error on a shape or its outline, against one on the background
_EDGE_WEIGHT = 1.0  # of differences between neighbouring pixels
_LEARNING_RATE = 2e-3
_MUON_RATE = 0.02
_STATISTICS_CHUNKS = 24


def train_vae(
    vae: Vae,
    *,
    length: StageLength,
    state_file: Path,
    seed: int,
    workers: int,
    resume: bool,
    scale: float = 1.0,
    graphs: bool = True,
) -> StageLog:
    """Train until the stage is over; the VAE then has its moving averages and its latents' statistics.

    Args:
        scale: of the batches; less than 1 for a trial.
        graphs: replay steps as CUDA graphs on a GPU.
    """
    device = next(vae.parameters()).device

    def loss(kind: Hashable, batch: Sequence[Tensor]) -> Tensor:
        assert isinstance(kind, ClipSize)
        return _loss(vae, SceneArrays(*batch), kind)

    stage = Stage(
        {"vae": vae},
        loss,
        learning_rate=_LEARNING_RATE,
        muon_rate=_MUON_RATE,
        length=length,
        state_file=state_file,
        graphs=graphs,
    )
    if resume:
        stage.resume()
    choice = buckets(_SIZES, latent_places=int(_LATENT_PLACES * scale))
    with ChunkStream(seed, choice, first=stage.log.step, workers=workers) as stream:
        for number, chunk in enumerate(stream):
            if stage.done:
                break
            if number == 0:
                stage.restart_clock()
            stage.step(chunk.bucket.size, astuple(chunk.scenes.to_torch(device)))
    stage.finish()
    _measure_latents(vae, seed, scale)
    return stage.log


def _loss(vae: Vae, scenes: SceneArrays, size: ClipSize) -> Tensor:
    with torch.no_grad():
        frames = draw(scenes, size, xp=torch)
        background = scenes.background[:, :, None, None, None] / 127.5 - 1
        shapes = ((frames - background).abs().amax(dim=1, keepdim=True) > 0.02).float()
        weight = 1 + (_SHAPE_WEIGHT - 1) * F.max_pool3d(shapes, (1, 3, 3), stride=1, padding=(0, 1, 1))
    with torch.autocast(frames.device.type, torch.bfloat16, cache_enabled=False):
        moments = vae.moments(frames).float()
        variance, mean = torch.var_mean(moments, dim=(0, 2, 3, 4), keepdim=True)
        latents = (moments - mean) / torch.sqrt(variance + 1e-6)
        noise = _MOST_NOISE * torch.rand(len(latents), 1, 1, 1, 1, device=frames.device)
        decoded = vae.decode(latents + noise * torch.randn_like(latents)).float()
    error = decoded - frames
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss: Tensor = (weight * error.abs()).mean() / weight.mean() + _EDGE_WEIGHT * edges
    return loss


@torch.no_grad()
def _measure_latents(vae: Vae, seed: int, scale: float) -> None:
    """Set the mean and deviation of each channel over fresh clips."""
    device = next(vae.parameters()).device
    choice = buckets(_SIZES, latent_places=int(_LATENT_PLACES * scale))
    seen = []
    with ChunkStream(seed + 1, choice, first=0, workers=0) as stream:
        for _, chunk in zip(range(_STATISTICS_CHUNKS), stream, strict=False):
            frames = draw(chunk.scenes.to_torch(device), chunk.bucket.size, xp=torch)
            seen.append(vae.moments(frames).float().transpose(0, 1).flatten(1))
    std, mean = torch.std_mean(torch.cat(seen, dim=1), dim=1)
    vae.mean.copy_(mean)
    vae.std.copy_(std.clamp_min(1e-3))
