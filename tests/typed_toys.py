"""Toy variants whose graphs the tests of strongly typed engines share, traced once a session."""

from dataclasses import replace
from functools import cache

import onnx

from export.graphs import stage_graph
from runtime.specs import StageSpec
from runtime.stages import network_stages
from runtime.variants import VARIANTS, ImageEncoderArch, TextEncoderArch, TransformerArch, VaeArch, Variant

TOY = replace(
    VARIANTS["wan2.1-flf2v-14b"],
    transformer=TransformerArch(
        dim=32, ffn_dim=48, num_heads=2, num_layers=1, text_dim=16, text_len=6, freq_dim=16,
        image_dim=8, image_tokens=5, image_positions=True,
    ),
    text_encoder=TextEncoderArch(dim=16, attention_dim=16, ffn_dim=24, num_heads=2, num_layers=1, vocab_size=10),
    image_encoder=ImageEncoderArch(dim=16, ffn_dim=32, num_heads=2, num_layers=2, image_size=28),
    vae=VaeArch(base_dim=8, z_dim=6, num_res_blocks=1, dim_mult=(1, 2), temporal_downsample=(True,)),
)  # fmt: skip
CLEAN_TOY = replace(TOY, transformer=replace(TOY.transformer, per_token_timesteps=True, image_dim=None))
"""Leading frames may be clean: shifts, scales and gates by row."""


def stage_of(variant: Variant, name: str) -> StageSpec:
    return next(stage for stage in network_stages(variant, name.partition(".")[0]) if stage.name == name)


@cache
def traced(variant: Variant, name: str) -> onnx.ModelProto:
    return stage_graph(variant, stage_of(variant, name))
