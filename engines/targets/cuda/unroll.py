"""Cuts the VAE decoder's graph after its last doubling of time, and sends the frames through what follows a few at a time.

What follows touches frames only through convolutions over time, and those find their past in the caches, which hold what the frames
before have left there: the result is the same, the activations of the largest levels are fewer.
"""

from collections.abc import Collection

import onnx
from onnx import helper

from runtime.specs import FUNCTION_DOMAIN

FRAME_RANGE = "FrameRange"
"""Node of our own: frames `start` to `stop` of its input."""

Cut = tuple[int, str]
"""The first node that runs once per part, and the one value that goes from the nodes before to those after."""


def cut_before_frames(model: onnx.ModelProto, given: Collection[str]) -> Cut | None:
    """The earliest place after the last change of the number of frames at which a single value goes on; None without such a change.

    Args:
        given: inputs of the graph that hold frames, caches not counted.
    """
    nodes = model.graph.node
    changes = [index for index, node in enumerate(nodes) if node.op_type == "InterleaveFrames"]
    if not changes:
        return None
    for index in range(changes[-1] + 1, len(nodes)):
        before = {name for node in nodes[:index] for name in node.output}.union(given)
        crossing = {name for node in nodes[index:] for name in node.input} & before
        if len(crossing) == 1:
            return index, crossing.pop()
    return None


def unroll_frames(
    model: onnx.ModelProto, cut: Cut, starts: range, num_frames: int, *, shared: Collection[str]
) -> onnx.ModelProto:
    """The model with the nodes after the cut once for each part of the frames.

    Args:
        starts: the first frame of each part.
        shared: names that every part keeps, because each makes the value anew: the caches.
    """
    index, value = cut
    unrolled = onnx.ModelProto()
    unrolled.CopyFrom(model)
    nodes, after = unrolled.graph.node, model.graph.node[index:]
    del nodes[index:]
    made = {name for node in after for name in node.output if name not in shared} | {value}
    for start in starts:
        stop = min(start + starts.step, num_frames)
        part = part_name(value, start)
        nodes.append(helper.make_node(FRAME_RANGE, [value], [part], domain=FUNCTION_DOMAIN, start=start, stop=stop))
        for node in after:
            clone = nodes.add()
            clone.CopyFrom(node)
            for names in (clone.input, clone.output):
                names[:] = [part_name(name, start) if name in made else name for name in names]
    return unrolled


def part_name(name: str, start: int) -> str:
    """Name of a value in the part that begins with frame `start`."""
    return f"{name}@{start}"
