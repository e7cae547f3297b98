"""Trains text encoder and transformer together: flow matching on blocks' codes, with Wan's shift, and text dropped out for guidance."""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from benchmarks.moving_shapes.codes import block_codes
from benchmarks.moving_shapes.data import Chunk, ChunkStream, buckets
from benchmarks.moving_shapes.loop import Stage, StageLength, StageLog
from benchmarks.moving_shapes.model import Networks
from benchmarks.moving_shapes.recipe import DitRecipe
from benchmarks.moving_shapes.render import draw
from benchmarks.moving_shapes.tokenizer import build_tokenizer, token_ids
from runtime.variants import SHARED_NEGATIVE_PROMPT

_NULL_PROMPTS = (
    "",
    SHARED_NEGATIVE_PROMPT,
)  # what guidance leads away from: diffusers' default, and the original repositories'
_DROPPED = 0.1  # of the captions
_SHIFT = 5.0  # Wan2.1's, for half of the clips; the others' noise levels are spread more evenly, for the details
_EVEN_SHIFT = 1.5

Coded = tuple[Hashable, list[Tensor]]
"""What shapes depend on; latents, token ids and their lengths."""


def train_dit(
    networks: Networks,
    recipe: DitRecipe,
    *,
    length: StageLength,
    state_file: Path,
    seed: int,
    workers: int,
    resume: bool,
    scale: float = 1.0,
    graphs: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
    every_seconds: float = float("inf"),
    on_look: Callable[[StageLog], None] = lambda _: None,
) -> StageLog:
    """Train until the stage is over; both networks then have their moving averages.

    Args:
        scale: of the batches; less than 1 for a trial.
        graphs: replay steps as CUDA graphs on a GPU.
        cancelled: see `Stage`.
        on_look: called every so many seconds, while the networks have their moving averages.
    """
    device = next(networks.transformer.parameters()).device
    modules = {"text_encoder": networks.text_encoder, "transformer": networks.transformer}
    stage = Stage(
        modules,
        _loss_of(networks, device),
        learning_rate=recipe.learning_rate,
        muon_rate=recipe.muon_rate,
        # UMT5 does not scale its logits: with Muon's steps they had a deviation of 30 to 90 after 1,000 (4 without), all on one token.
        without_muon=("text_encoder",),
        length=length,
        state_file=state_file,
        graphs=graphs,
        cancelled=cancelled,
    )
    if resume:
        stage.resume()
    looked = stage.log.seconds
    choice = buckets(recipe.sizes, latent_places=int(recipe.latent_places * scale), kinds=recipe.kinds)
    taken = recipe.first_chunks + stage.log.step // recipe.uses  # chunks so far; what is kept depends on the step alone
    first = max(0, taken - recipe.kept_chunks)
    kept: deque[Coded] = deque(maxlen=recipe.kept_chunks)
    with ChunkStream(seed + 2, choice, first=first, workers=workers) as stream:
        coded = (_coded(chunk, device) for chunk in stream)
        for _ in range(taken - first):
            kept.append(next(coded))
        stage.restart_clock()
        while not stage.done:
            stage.step(*kept[Random(f"{seed} {stage.log.step}").randrange(len(kept))])
            if stage.log.step % recipe.uses == 0:
                kept.append(next(coded))
            if stage.log.seconds - looked > every_seconds:
                looked = stage.log.seconds
                stage.save()
                with stage.averaged():
                    on_look(stage.log)
                stage.restart_clock()
    stage.finish()
    return stage.log


@torch.no_grad()
def _coded(chunk: Chunk, device: torch.device) -> Coded:
    frames = draw(chunk.scenes.to_torch(device), chunk.bucket.size, xp=torch)
    ids, lengths = (torch.from_numpy(array).to(device, non_blocking=True) for array in (chunk.ids, chunk.lengths))
    return chunk.bucket.size, [block_codes(frames), ids, lengths]


def _loss_of(networks: Networks, device: torch.device) -> Callable[[Hashable, Sequence[Tensor]], Tensor]:
    null_ids, null_lengths = (torch.from_numpy(array).to(device) for array in token_ids(build_tokenizer(), _NULL_PROMPTS))

    def loss(kind: Hashable, batch: Sequence[Tensor]) -> Tensor:
        latents, ids, lengths = batch
        count = len(latents)
        dropped = torch.rand(count, device=device) < _DROPPED
        null = torch.randint(len(null_ids), (count,), device=device)
        ids = torch.where(dropped[:, None], null_ids[null], ids)
        lengths = torch.where(dropped, null_lengths[null], lengths)
        if device.type == "cpu":  # a GPU's graphs need one shape
            ids = ids[:, : int(lengths.max())]
        sigma = _sigmas(count, device)
        noise = torch.randn_like(latents)
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            text = networks.text_encoder(ids, lengths)
            flow = networks.transformer((1 - level) * latents + level * noise, 1000 * sigma, text, lengths)
        error: Tensor = ((flow - (noise - latents)) ** 2).mean()
        return error

    return loss


def _sigmas(count: int, device: torch.device) -> Tensor:
    even = torch.rand(count, device=device)
    shift = torch.where(torch.rand(count, device=device) < 0.5, _SHIFT, _EVEN_SHIFT)
    return shift * even / (1 + (shift - 1) * even)
