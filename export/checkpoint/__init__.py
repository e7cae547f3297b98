"""Checkpoints as they are distributed → one set of names, shapes and numbers.

After `open_checkpoint` nothing about layouts and files is left to know: tensors have original names, numbers are in the variant.
"""

from export.checkpoint.contents import Layout, check_kind, layout_of
from export.checkpoint.folders import CheckpointFolder
from export.checkpoint.opening import Checkpoint, open_checkpoint
from export.checkpoint.sources import TensorSource, check_component

__all__ = [
    "Checkpoint",
    "CheckpointFolder",
    "Layout",
    "TensorSource",
    "check_component",
    "check_kind",
    "layout_of",
    "open_checkpoint",
]
