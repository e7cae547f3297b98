"""Training data: endless chunks of scenes and captions, made by worker processes in a fixed order; frames are drawn where they are used."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from random import Random
from threading import Thread
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.moving_shapes.grammar import caption_of
from benchmarks.moving_shapes.render import SceneArrays, scene_arrays
from benchmarks.moving_shapes.tokenizer import build_tokenizer, token_ids
from benchmarks.moving_shapes.world import ClipSize, Kind, sample_scene

_FIRST_TRAINING_SEED = 1 << 32
"""Scenes of smaller seeds are for judging; training never sees them."""
_MOST_CLIPS = 1 << 16  # of a chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Clips of one size that are trained on together, and how often; of each only a window is used where there is one."""

    size: ClipSize
    batch: int
    weight: float
    window: ClipSize | None = None
    kinds: tuple[Kind, ...] = tuple(Kind)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Chunk:
    """One batch: scenes to draw, and their captions as tokens."""

    bucket: Bucket
    scenes: SceneArrays
    ids: NDArray[np.int64]  # [B, MAX_TOKENS]
    lengths: NDArray[np.int64]  # [B]


def buckets(
    sizes: Sequence[tuple[int, int, int, float]],
    *,
    latent_places: int,
    windows_of: ClipSize | None = None,
    kinds: tuple[Kind, ...] = tuple(Kind),
) -> tuple[Bucket, ...]:
    """Buckets of (width, height, frames, weight) whose batches have about so many latent places each.

    Args:
        windows_of: the clips' size, if `sizes` are those of windows in them.
        kinds: of the clips' scenes.
    """
    made = []
    for width, height, num_frames, weight in sizes:
        batch = max(1, latent_places // ((width // 8) * (height // 8) * ((num_frames - 1) // 4 + 1)))
        size = ClipSize(width=width, height=height, num_frames=num_frames)
        window = None if windows_of is None else size
        made.append(Bucket(size=windows_of or size, batch=batch, weight=weight, window=window, kinds=kinds))
    return tuple(made)


def make_chunk(seed: int, index: int, choice: tuple[Bucket, ...]) -> Chunk:
    """Chunk `index` of the endless stream of a seed."""
    bucket = Random(f"{seed} {index}").choices(choice, [bucket.weight for bucket in choice])[0]
    first = _FIRST_TRAINING_SEED * (1 + seed) + index * _MOST_CLIPS
    seeds = range(first, first + bucket.batch)
    scenes = [sample_scene(each, bucket.size, kinds=bucket.kinds) for each in seeds]
    ids, lengths = token_ids(_tokenizer(), [caption_of(scene, seed=each) for scene, each in zip(scenes, seeds, strict=True)])
    return Chunk(bucket=bucket, scenes=scene_arrays(scenes), ids=ids, lengths=lengths)


@cache
def _tokenizer() -> Any:
    return build_tokenizer()


def _follow_parent() -> None:
    """A worker gets no signal of its parent's group, and ends when the parent does."""
    os.setsid()
    Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class ChunkStream:
    """Chunks from a first one on. Use with `with`: it holds worker processes.

    Args:
        workers: processes that work ahead; 0 makes each chunk when it is asked for.
    """

    def __init__(self, seed: int, choice: tuple[Bucket, ...], *, first: int, workers: int) -> None:
        self._seed, self._choice, self._next = seed, choice, first
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
        self._ahead: deque[Future[Chunk]] = deque()
        self._depth = 3 * workers

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            yield self._take()

    def _take(self) -> Chunk:
        if self._pool is None:
            self._next += 1
            return make_chunk(self._seed, self._next - 1, self._choice)
        while len(self._ahead) < self._depth:
            self._ahead.append(self._pool.submit(make_chunk, self._seed, self._next, self._choice))
            self._next += 1
        return self._ahead.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
