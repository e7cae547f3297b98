"""The latents that the VAE is trained to make: the strongest cosine components of each block of 4 frames of 8x8 pixels.

A VAE of its own latents has to be there, and to encode every clip, before a transformer can learn; these need no network, and are local and
linear, so that they change evenly when a shape moves (decision 14).
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_FRAMES, _SIDE = 4, 8  # of a block: the VAE's strides
_COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))  # brightness, red against blue, both against green

# Colour, and half waves over time, height and width; mean and scale. They are the strongest over clips of the world, but for the third
# colour's change over time, in whose place its corners are. The scale of plain colours is their deviation; of all others, which are rare and
# strong, twice theirs.
_COMPONENTS = (
    (0, (0, 0, 0), -0.9, 12.2), (1, (0, 0, 0), 0.3, 10.7), (2, (0, 0, 0), 0.3, 6.1),
    (0, (0, 0, 1), 0.0, 3.08), (1, (0, 0, 1), 0.0, 2.66), (2, (0, 0, 1), 0.0, 1.48),
    (0, (0, 1, 0), 0.0, 3.08), (1, (0, 1, 0), 0.0, 2.66), (2, (0, 1, 0), 0.0, 1.48),
    (0, (0, 1, 1), 0.0, 1.52), (1, (0, 1, 1), 0.0, 1.26), (2, (0, 1, 1), 0.0, 0.74),
    (0, (1, 0, 0), 0.0, 1.38), (1, (1, 0, 0), 0.0, 1.18),
    (0, (0, 0, 2), 0.0, 1.30), (0, (0, 2, 0), 0.0, 1.30),
)  # fmt: skip


def block_codes(frames: Tensor) -> Tensor:
    """Frames [B, 3, T, H, W] in [-1, 1] → float32 [B, 16, t, h, w] of mean 0; the first frame counts as four alike."""
    kernels, mean, scale = _tables(frames.device)
    frames = torch.cat((frames[:, :, :1].expand(-1, -1, _FRAMES - 1, -1, -1), frames), dim=2).float()
    batch, _, num_frames, height, width = frames.shape
    grid = num_frames // _FRAMES, height // _SIDE, width // _SIDE
    blocks = frames.view(batch, 3, grid[0], _FRAMES, grid[1], _SIDE, grid[2], _SIDE).permute(0, 2, 4, 6, 1, 3, 5, 7)
    coefficients = blocks.reshape(-1, kernels.shape[1]) @ kernels.T
    return ((coefficients - mean) / scale).view(batch, *grid, -1).permute(0, 4, 1, 2, 3).contiguous()


@cache  # a captured CUDA graph may not copy from the host
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal kernels [16, 3·4·8·8], means and scales [16]."""
    colours = F.normalize(torch.tensor(_COLOURS, dtype=torch.float64), dim=1)
    kernels = [
        torch.einsum("c,t,y,x->ctyx", colours[colour], _wave(_FRAMES, time), _wave(_SIDE, down), _wave(_SIDE, across))
        for colour, (time, down, across), _, _ in _COMPONENTS
    ]
    mean, scale = (torch.tensor([row[column] for row in _COMPONENTS], device=device) for column in (2, 3))
    return torch.stack(kernels).flatten(1).float().to(device), mean, scale


def _wave(length: int, half_waves: int) -> Tensor:
    wave = torch.cos(math.pi * half_waves * (torch.arange(length, dtype=torch.float64) + 0.5) / length)
    return F.normalize(wave, dim=0)
