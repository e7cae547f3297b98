"""A VAE's numbers from the tensors of the original layout, and from diffusers' config."""

from dataclasses import replace
from typing import Any

import pytest

from export.checkpoint.settings import Settings
from export.checkpoint.vae_architectures import diffusers_vae_arch, original_vae_arch
from export.layouts import vae_tensors
from runtime.errors import ExportError
from runtime.variants import VAE_2_2, VaeArch
from tests.toys import make_vae
from tests.vaes import CONFIGS

ARCHS = {"published 2.1": VaeArch(), "published 2.2": VAE_2_2, **{name: config.vae for name, config in CONFIGS.items()}}


def config(arch: VaeArch, **changes: Any) -> Settings:
    """What diffusers writes for such a VAE."""
    channels = 3 * arch.patch_size**2
    values = {
        "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.42.1", "attn_scales": [], "base_dim": arch.base_dim,
        "decoder_base_dim": arch.decoder_base_dim, "dim_mult": list(arch.dim_mult), "dropout": 0.0, "in_channels": channels,
        "is_residual": arch.residual_levels, "latents_mean": list(arch.latents_mean), "latents_std": list(arch.latents_std),
        "num_res_blocks": arch.num_res_blocks, "out_channels": channels,
        "patch_size": arch.patch_size if arch.patch_size > 1 else None, "scale_factor_spatial": arch.spatial_stride,
        "scale_factor_temporal": arch.temporal_stride, "temperal_downsample": list(arch.temporal_downsample), "z_dim": arch.z_dim,
    }  # fmt: skip
    return Settings("vae/config.json", values | changes)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_numbers_of_an_original_vae_come_from_its_tensors(arch: VaeArch) -> None:
    table = vae_tensors(arch)
    assert original_vae_arch(table, table.__getitem__) == arch


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_numbers_of_a_diffusers_vae_come_from_its_config(arch: VaeArch) -> None:
    assert diffusers_vae_arch(config(arch)) == arch


@pytest.mark.parametrize("name", ["few levels", "few 2.2 levels"])
def test_config_that_diffusers_writes_is_read(name: str) -> None:
    values = dict(make_vae(CONFIGS[name], seed=0).config)
    written = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    assert diffusers_vae_arch(Settings("vae/config.json", written)) == CONFIGS[name].vae


def test_settings_that_are_switched_off_do_not_matter() -> None:
    assert diffusers_vae_arch(config(VAE_2_2, clip_output=False)) == VAE_2_2


def test_decoder_as_wide_as_the_encoder_is_one_architecture_in_both_layouts() -> None:
    arch = replace(VAE_2_2, decoder_base_dim=None)
    assert diffusers_vae_arch(config(arch, decoder_base_dim=arch.base_dim)) == arch
    table = vae_tensors(arch)
    assert original_vae_arch(table, table.__getitem__) == arch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_scales": [0.5]}, "attn_scales=[0.5]"),
        ({"is_residual": "yes"}, "is_residual='yes'"),
        ({"in_channels": 3}, "in_channels=3, supported: 12"),
        ({"patch_size": None}, "in_channels=12, supported: 3"),
        ({"scale_factor_spatial": 8}, "scale_factor_spatial=8, supported: 16"),
        ({"latents_std": [1.0] * 16}, "disagree"),
        ({"dim_mult": [1, 2, 4, 8]}, "no average over 1 places leads from 640 to 1280 channels"),
        ({"gate": "tanh"}, "unknown setting gate='tanh'"),
    ],
    ids=str,
)
def test_config_that_cannot_be_followed_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError) as caught:
        diffusers_vae_arch(config(VAE_2_2, **changes))
    assert words in str(caught.value)


def test_original_vae_with_other_latents_is_refused_because_its_statistics_are_unknown() -> None:
    table = vae_tensors(replace(VAE_2_2, z_dim=16))
    with pytest.raises(ExportError, match="16 latent channels, and their mean and deviation are known for 48 only"):
        original_vae_arch(table, table.__getitem__)


def test_original_vae_whose_widths_are_no_multiples_is_refused() -> None:
    table = vae_tensors(VaeArch(base_dim=8)) | {"encoder.downsamples.2.resample.1.weight": (9, 8, 3, 3)}
    with pytest.raises(ExportError, match="are not a Wan VAE"):
        original_vae_arch(table, table.__getitem__)
