"""The fused CUDA kernels compile for every architecture without a GPU, and Python mirrors their argument structs."""

import ctypes
import functools
import re

import pytest

from engines.targets.cuda.compile import SOURCE, compile_kernels
from runtime.backends.cuda import kernels, launch, text_kernels
from runtime.errors import BuildError

BF16_KERNELS = (
    "norm_bf16",
    "norm_by_row_bf16",
    "residual_norm_bf16",
    "residual_norm_by_row_bf16",
    "gated_residual",
    "gated_residual_by_row",
    "qk_norm_rope_bf16",
    "column_spread",
    "gelu",
    "gemv_f32",
    "gemv_bf16",
    "add",
    "rms_norm_bf16",
    "rms_norm_f32",
    "residual_rms_norm_bf16",
    "layer_norm_bf16",
    "residual_layer_norm_bf16",
    "embed_tokens_f32",
    "gated_gelu",
    "biased_attention",
)
ALIGNED_KERNELS = (
    "column_spread_finish",
    "channel_norm_1",
    "channel_norm_2",
    "channel_norm_4",
    "upsample",
    "to_channels_last",
    "to_planes",
    "add_average_down",
    "add_duplicate_up",
    "colours",
    "cut_patches",
    "join_patches",
    "softmax",
    "transpose",
)
"""They exist once: what calls them has 16-byte words only."""
FP8_KERNELS = (
    "norm_fp8",
    "norm_by_row_fp8",
    "residual_norm_fp8",
    "residual_norm_by_row_fp8",
    "qk_norm_rope_fp8",
    "quantize_rows",
    "quantize_centred",
    "restore",
    "fold_offset",
)
STRUCTURES = {
    name: value for name, value in vars(launch).items() if isinstance(value, type) and value.__name__.endswith("Arguments")
}


@functools.cache
def entry_points(arch: str) -> set[str]:
    """Names of the kernels in the cubin: an ELF file with one section `.text.<kernel>` each."""
    pytest.importorskip("cuda.core")
    cubin = compile_kernels(arch)
    assert cubin.startswith(b"\x7fELF")
    return {name.decode() for name in re.findall(rb"\.text\.([a-z0-9_]+)\0", cubin)}


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_120"])
def test_every_kernel_compiles_for_full_ragged_and_unaligned_rows(arch: str) -> None:
    for name in (*BF16_KERNELS, *FP8_KERNELS, "convert_f32_bf16", "convert_bf16_f32"):
        assert {name, f"{name}_ragged", f"{name}_unaligned"} <= entry_points(arch)


def test_sm_80_has_the_bf16_kernels_and_none_of_fp8() -> None:
    assert {*BF16_KERNELS, *ALIGNED_KERNELS} <= entry_points("sm_80")
    assert not entry_points("sm_80") & set(FP8_KERNELS)


@pytest.mark.parametrize("arch", ["sm_75", "90", "hopper", "sm_", "sm_90 --flag"])
def test_other_architectures_are_refused_with_the_possible_ones(arch: str) -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(BuildError, match="sm_80 and later"):
        compile_kernels(arch)


def test_an_architecture_unknown_to_nvrtc_is_a_build_error() -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(BuildError, match="sm_999"):
        compile_kernels("sm_999")


def cuda_source() -> str:
    """All of the CUDA text without comments."""
    files = sorted(SOURCE.parent.glob("*.cu*"))
    return "".join(re.sub(r"//.*", "", path.read_text(encoding="utf-8")) for path in files)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_argument_structs_have_the_same_fields_in_python_and_cuda(structure: type[ctypes.Structure]) -> None:
    found = re.search(rf"struct {structure.__name__} {{(.*?)}};", cuda_source(), re.DOTALL)
    assert found is not None
    kinds = {"Tile": "_Tile", "i64": "c_long", "float": "c_float", "int": "c_int", "u32": "c_uint"}
    expected = []
    for declaration in filter(None, map(str.strip, found[1].split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+(?:<\w+>)?)\s*(.*)", declaration, re.DOTALL).groups()  # type: ignore[union-attr]
        for name in names.split(","):
            pointer = "*" in name
            expected.append((name.strip(" *"), "c_ulong" if pointer else "_Rows" if "<" in kind else kinds[kind]))
    assert [(name, kind.__name__) for name, kind in structure._fields_] == expected  # type: ignore[misc]


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("kRows", launch.ROWS_PER_BLOCK),
        ("kVectors", launch.VECTORS_PER_THREAD),
        ("kGemvRows", kernels.GEMV_ROWS),
        ("kGemvOutputs", kernels.GEMV_OUTPUTS_PER_WARP),
        ("kAttentionRows", text_kernels.ATTENTION_ROWS),
        ("kHeadDim", text_kernels.MAX_HEAD_DIM),
        ("kMaxBuckets", text_kernels.MAX_BUCKETS),
    ],
)
def test_grids_are_sized_by_the_kernels_own_constants(constant: str, value: int) -> None:
    assert re.findall(rf"constexpr int {constant} = (\d+);", cuda_source()) == [str(value)]
