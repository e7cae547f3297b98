"""Tables of tensor names and shapes, one per network, made from architecture numbers alone.

A table is what a checkpoint of that architecture contains, in the original repositories' naming; `export.checkpoint` checks files
against it. Where the published weights are not at hand, a hash of the table shows that they fit (`tests/test_layouts.py`).
"""

from export.layouts.image_encoder import (
    image_encoder_diffusers_names,
    image_encoder_stored_names,
    image_encoder_tensors,
    image_encoder_unused,
)
from export.layouts.tables import Shape, Table
from export.layouts.text_encoder import text_encoder_diffusers_names, text_encoder_tensors
from export.layouts.transformer import transformer_diffusers_names, transformer_tensors
from export.layouts.vae import vae_diffusers_names, vae_tensors

__all__ = [
    "Shape",
    "Table",
    "image_encoder_diffusers_names",
    "image_encoder_stored_names",
    "image_encoder_tensors",
    "image_encoder_unused",
    "text_encoder_diffusers_names",
    "text_encoder_tensors",
    "transformer_diffusers_names",
    "transformer_tensors",
    "vae_diffusers_names",
    "vae_tensors",
]
