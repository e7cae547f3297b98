"""Checkpoints as they are distributed → one set of names, shapes and numbers.

After `open_checkpoint` nothing about layouts and files is left to know: tensors have original names, numbers are in the variant.
"""

from export.checkpoint.opening import Checkpoint, Layout, open_checkpoint
from export.checkpoint.sources import TensorSource, check_component

__all__ = ["Checkpoint", "Layout", "TensorSource", "check_component", "open_checkpoint"]
