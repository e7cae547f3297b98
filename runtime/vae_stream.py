"""How a part of the VAE runs over a video: latent frame after latent frame with its caches, over whole frames or strip after strip.

The caches go from step to step without being looked at, so memory does not grow with the length of the video.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from runtime.backends.base import Array, DeviceTensor
from runtime.component import Component
from runtime.specs import TensorSpec, symbol_of
from runtime.stages.vae import Pair
from runtime.strips import Strip

Tensors = dict[str, DeviceTensor]
Fetch = Callable[[Tensors], Callable[[], Array]]
"""Queues the copy of what a step made to the host, and gives what waits for it."""


def run_steps(component: Component, stages: Pair, given: Iterable[Tensors]) -> Iterator[Tensors]:
    """Run the first of two stages on the first tensors and the second on the others, each with the caches of the one before.

    Args:
        given: what each step takes besides its caches; emptied once it ran, since nobody else needs the memory.

    Yields:
        What a step makes besides its caches, still on the device.

    Raises:
        EngineError: an engine failed.
    """
    caches: Tensors = {}
    for index, inputs in enumerate(given):
        outputs = component.run(stages[min(index, 1)], {**inputs, **caches})
        inputs.clear()  # others hold the same dict, `enumerate` among them: this lets go of the memory
        caches = {name.removeprefix("next_"): outputs.pop(name) for name in list(outputs) if name.startswith("next_")}
        yield outputs
        del outputs


def upload(component: Component, stages: Pair, chunks: Iterable[Mapping[str, Array]]) -> Iterator[Tensors]:
    """Chunks on the host → what the steps of these stages take."""
    dtypes = {tensor.name: tensor.dtype for tensor in component.stage(stages[0]).inputs}
    for chunk in chunks:
        yield {name: component.backend.to_device(np.ascontiguousarray(array), dtypes[name]) for name, array in chunk.items()}


def fetch_in_turn(steps: Iterator[Tensors], fetch: Fetch) -> Iterator[Array]:
    """Bring what each step makes to the host, and hand it on once the next step is queued: the device works while others take."""
    waiting: Callable[[], Array] | None = None
    for outputs in steps:
        queued = fetch(outputs)
        outputs.clear()
        if waiting is not None:
            yield waiting()
        waiting = queued
    if waiting is not None:
        yield waiting()


def run_in_strips(
    component: Component,
    stages: Pair,
    chunks: Sequence[Mapping[str, Array]],
    strips: Sequence[Strip],
    *,
    axis: str,
    made: TensorSpec,
    fetch: Fetch,
) -> Iterator[Array]:
    """`fetch_in_turn` of `run_steps`, each strip over all chunks before the next begins: only one strip's caches exist at a time.

    Args:
        chunks: the tensors of whole frames, on the host.
        axis: which of a spec's symbols, height or width, is cut.
        made: what `fetch` brings; it tells where that axis lies.

    Yields:
        Whole frames, while the last strip runs; until then the other strips' are kept.
    """
    specs = {tensor.name: tensor for tensor in component.stage(stages[0]).inputs if tensor.name in chunks[0]}
    where = _axis_of(made, axis)[0]
    whole: list[Array] = []
    for strip in strips:
        seen = ({name: _part(array, specs[name], axis, strip.seen) for name, array in chunk.items()} for chunk in chunks)
        steps = run_steps(component, stages, upload(component, stages, seen))
        for index, array in enumerate(fetch_in_turn(steps, fetch)):
            scale = array.shape[where] // (strip.seen.stop - strip.seen.start)
            if strip is strips[0]:
                whole.append(np.empty((*array.shape[:where], strips[-1].stop * scale, *array.shape[where + 1 :]), array.dtype))
            kept, own = _scaled(strip.kept, scale), _scaled(slice(strip.start, strip.stop), scale)
            whole[index][_along(where, own)] = array[_along(where, kept)]
            if strip is strips[-1]:
                yield whole[index]


def _axis_of(tensor: TensorSpec, symbol: str) -> tuple[int, int]:
    """Which axis of a tensor a symbol is, and its extent's factor."""
    return next(
        (index, symbol_of(axis)[0])
        for index, axis in enumerate(tensor.shape)
        if isinstance(axis, str) and symbol_of(axis)[1] == symbol
    )


def _part(array: Array, tensor: TensorSpec, symbol: str, positions: slice) -> Array:
    where, scale = _axis_of(tensor, symbol)
    return array[_along(where, _scaled(positions, scale))]


def _scaled(positions: slice, scale: int) -> slice:
    return slice(positions.start * scale, positions.stop * scale)


def _along(axis: int, positions: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, positions)
