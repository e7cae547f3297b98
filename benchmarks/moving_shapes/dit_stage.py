"""Trains text encoder and transformer together: flow matching on the VAE's latents, with Wan's shift, and text dropped out for guidance."""

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

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


Encoded = tuple[Hashable, list[Tensor]]
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
    cache: Path | None = None,
    every_seconds: float = float("inf"),
    on_look: Callable[[StageLog], None] = lambda _: None,
) -> StageLog:
    """Train until the stage is over; both networks then have their moving averages.

    Args:
        scale: of the batches; less than 1 for a trial.
        graphs: replay steps as CUDA graphs on a GPU.
        cache: a folder that keeps what was encoded, for the next run with the same VAE.
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
    )
    if resume:
        stage.resume()
    looked = stage.log.seconds
    choice = buckets(recipe.sizes, latent_places=int(recipe.latent_places * scale), kinds=recipe.kinds)
    taken = recipe.first_chunks + stage.log.step // recipe.uses  # chunks so far; what is kept depends on the step alone
    first = max(0, taken - recipe.kept_chunks)
    latents = _Cache(cache, networks, (seed, choice))
    kept: deque[Encoded] = deque(maxlen=recipe.kept_chunks)
    with ChunkStream(seed + 2, choice, first=first, workers=workers) as stream:
        encoded = (latents.encoded(index, chunk) for index, chunk in enumerate(stream, start=first))
        for _ in range(taken - first):
            kept.append(next(encoded))
        stage.restart_clock()
        while not stage.done:
            stage.step(*kept[Random(f"{seed} {stage.log.step}").randrange(len(kept))])
            if stage.log.step % recipe.uses == 0:
                kept.append(next(encoded))
            if stage.log.seconds - looked > every_seconds:
                looked = stage.log.seconds
                stage.save()
                with stage.averaged():
                    on_look(stage.log)
                stage.restart_clock()
    stage.finish()
    return stage.log


class _Cache:
    """Encoded chunks of one stream and one VAE, a file each; latents rest in half precision.

    Args:
        folder: what several of them share; None keeps nothing.
        stream: what the chunks depend on beside the VAE.
    """

    def __init__(self, folder: Path | None, networks: Networks, stream: object) -> None:
        self._networks, self._folder = networks, None
        if folder is not None:
            digest = hashlib.sha256(repr(stream).encode())
            for tensor in networks.vae.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
            self._folder = folder / digest.hexdigest()[:16]
            self._folder.mkdir(parents=True, exist_ok=True)

    def encoded(self, index: int, chunk: Chunk) -> Encoded:
        """What training needs of chunk `index` of the stream."""
        if self._folder is None:
            return _encoded(self._networks, chunk)
        file = self._folder / f"{index}.pt"
        if not file.exists():
            latents, *text = _encoded(self._networks, chunk)[1]
            torch.save([latents.half(), *text], file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)
        latents, *text = torch.load(file, map_location=self._networks.vae.mean.device, weights_only=True)
        return chunk.bucket.size, [latents.float(), *text]


@torch.no_grad()
def _encoded(networks: Networks, chunk: Chunk) -> Encoded:
    device = next(networks.vae.parameters()).device
    frames = draw(chunk.scenes.to_torch(device), chunk.bucket.size, xp=torch)
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        latents = networks.vae.encode(frames)
    ids, lengths = (torch.from_numpy(array).to(device, non_blocking=True) for array in (chunk.ids, chunk.lengths))
    return chunk.bucket.size, [latents.contiguous(), ids, lengths]


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
