// Fused pointwise kernels of the diffusion transformer: norms, rotary embedding, gated residuals and FP8 quantisation.
//
// The formulas are the ONNX bodies in export/functions.py; arithmetic inside is FP32, and rows are read once. Every kernel exists
// three times: plain, for 16-byte aligned arrays and rows that fill the block; _ragged, for other aligned rows; _unaligned, for all
// else. What writes FP8 needs sm_89. No float atomics: the same input gives the same bits. runtime/backends/cuda/launch.py mirrors the
// argument structs.

#include "clip.cuh"
#include "patches.cuh"
#include "rows.cuh"
#include "small.cuh"
#include "spread.cuh"
#include "text.cuh"
#include "vae.cuh"

// What is added to a row or multiplied with it. With num_clean there are two rows of each vector: the first *num_clean rows of a matrix
// take the first, all others the second.
struct Choice {
    const i64* num_clean;
    template <bool kByRow> __device__ int of(int row) const { return kByRow && row >= *num_clean ? 1 : 0; }
};

// residual + x * gate; `gate` may be null.
template <Access kAccess, bool kByRow>
__device__ void add_gated(const Tile& tile, const Rows<bf16>& residual, const Rows<bf16>& x, const Rows<float>& gate, Choice choice,
                          Values& value) {
    Packed base, addend;
    load_rows<kAccess>(tile, residual, base);
    load_rows<kAccess>(tile, x, addend);
    unpack_rows(base, value);
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
        float factor[8] = {1, 1, 1, 1, 1, 1, 1, 1};
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if ((kByRow || row == 0) && gate.data != nullptr && has_column<kAccess>(tile, vector)) {
                load<kAccess>(gate.at(choice.of<kByRow>(tile.row(row)), tile.column(vector)), factor);
            }
            float term[8];
            unpack(addend[row][vector], term);
#pragma unroll
            for (int i = 0; i < 8; ++i) value[row][vector][i] += term[i] * factor[i];
        }
    }
}

template <typename Out> struct NormArguments {
    Tile tile;
    Rows<bf16> x, residual, residual_out;
    Rows<float> gate, gain, shift;  // one row, or two
    const i64* num_clean;
    Rows<Out> out;
    float* out_scale;
    float one, eps;  // `one` is added to the gain
};

// Replace x by layer_norm(x) * (gain + one) + shift. The variance is E[x^2] - E[x]^2: its FP32 error is smaller than what the rounding
// of x to bf16 did to it as long as |mean| < 8192 standard deviations.
template <Access kAccess, bool kByRow, typename Out>
__device__ void normalize(const NormArguments<Out>& a, float* partial, Values& value) {
    float sum[2 * kRows];  // of x, then of x^2
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        sum[row] = sum[kRows + row] = 0.0f;
#pragma unroll
        for (int i = 0; i < kVectors * 8; ++i) {
            const float x = value[row][i / 8][i % 8];
            sum[row] += x;
            sum[kRows + row] += x * x;
        }
    }
    block_sum(sum, partial);
    const float share = __fdividef(1.0f, a.tile.num_columns);
    float inverse[kRows], offset[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const float mean = sum[row] * share;
        inverse[row] = rsqrtf(fmaxf(sum[kRows + row] * share - mean * mean, 0.0f) + a.eps);
        offset[row] = -mean * inverse[row];
    }
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
        float gain[8] = {}, shift[8] = {};
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if ((kByRow || row == 0) && has_column<kAccess>(a.tile, vector)) {
                const int chosen = Choice{a.num_clean}.of<kByRow>(a.tile.row(row));
                load<kAccess>(a.gain.at(chosen, a.tile.column(vector)), gain);
                load<kAccess>(a.shift.at(chosen, a.tile.column(vector)), shift);
#pragma unroll
                for (int i = 0; i < 8; ++i) gain[i] += a.one;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& x = value[row][vector][i];
                x = (x * inverse[row] + offset[row]) * gain[i] + shift[i];
            }
        }
    }
}

template <Access kAccess, bool kResidual, bool kByRow, typename Out> __device__ void norm_rows(const NormArguments<Out>& a) {
    __shared__ float partial_sum[2 * kRows * kMaxWarps];
    Values value;
    if constexpr (kResidual) {
        add_gated<kAccess, kByRow>(a.tile, a.residual, a.x, a.gate, {a.num_clean}, value);
        store_rows<kAccess>(a.tile, a.residual_out, value);
#pragma unroll
        for (int i = 0; i < kRows * kVectors; ++i) unpack(pack(value[i / kVectors][i % kVectors]), value[i / kVectors][i % kVectors]);
    } else {
        Packed packed;
        load_rows<kAccess>(a.tile, a.x, packed);
        unpack_rows(packed, value);
    }
    normalize<kAccess, kByRow>(a, partial_sum, value);
    if constexpr (sizeof(Out) == 1) {
        __shared__ u32 partial_max[kRows][kMaxWarps];
        float amax[kRows] = {};
#pragma unroll
        for (int i = 0; i < kRows * kVectors * 8; ++i) {
            const int row = i / (kVectors * 8);
            amax[row] = fmaxf(amax[row], fabsf(value[row][i / 8 % kVectors][i % 8]));
        }
        row_scales(a.tile, a.out_scale, partial_max, amax);
#pragma unroll
        for (int i = 0; i < kRows * kVectors * 8; ++i) value[i / (kVectors * 8)][i / 8 % kVectors][i % 8] *= amax[i / (kVectors * 8)];
    }
    store_rows<kAccess>(a.tile, a.out, value);
}

struct GatedResidualArguments {
    Tile tile;
    Rows<bf16> x, residual;
    Rows<float> gate;
    const i64* num_clean;
    Rows<bf16> out;
};

template <Access kAccess, bool kByRow> __device__ void gated_residual_rows(const GatedResidualArguments& a) {
    Values value;
    add_gated<kAccess, kByRow>(a.tile, a.residual, a.x, a.gate, {a.num_clean}, value);
    store_rows<kAccess>(a.tile, a.out, value);
}

template <typename Out> struct RopeArguments {
    Tile tile;
    Rows<bf16> x;
    const float *weight, *rope_cos, *rope_sin;  // tables [N, head_dim / 2], both null for no rotation
    i64 rope_stride;
    Rows<Out> out;
    int head_dim;
    u32 head_inverse;  // ceil(2^32 / head_dim): a division by multiplication
    float eps;
};

struct Angles { float cos[4], sin[4]; };

// Angles of the 4 adjacent pairs of a row from `column` on; they may run into the next head when unaligned. No tables: no rotation.
template <Access kAccess, typename Out> __device__ Angles load_angles(const RopeArguments<Out>& a, int row, int column) {
    if (a.rope_cos == nullptr) return {{1, 1, 1, 1}, {}};
    const int first = column - __umulhi(column, a.head_inverse) * a.head_dim;
    const float *cos_row = a.rope_cos + row * a.rope_stride, *sin_row = a.rope_sin + row * a.rope_stride;
    Angles angles;
    if constexpr (kAccess != kUnaligned) {
        *reinterpret_cast<float4*>(angles.cos) = *reinterpret_cast<const float4*>(cos_row + first / 2);
        *reinterpret_cast<float4*>(angles.sin) = *reinterpret_cast<const float4*>(sin_row + first / 2);
    } else {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            angles.cos[pair] = cos_row[(first + 2 * pair) % a.head_dim / 2];
            angles.sin[pair] = sin_row[(first + 2 * pair) % a.head_dim / 2];
        }
    }
    return angles;
}

// Rotate adjacent pairs, and multiply by `gain`.
__device__ void rotate(const Angles& angles, float gain, float (&value)[8]) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const float real = value[2 * pair], imaginary = value[2 * pair + 1];
        const float cos = angles.cos[pair] * gain, sin = angles.sin[pair] * gain;
        value[2 * pair] = real * cos - imaginary * sin;
        value[2 * pair + 1] = real * sin + imaginary * cos;
    }
}

// Rows stay packed until their norm is known. kFull also means that the heads repeat with the block's width: a thread needs the same
// angles for all its vectors, and loads them before the sum to hide the wait.
template <Access kAccess, typename Out> __device__ void qk_norm_rope_rows(const RopeArguments<Out>& a) {
    __shared__ float partial[kRows * kMaxWarps];
    Packed packed;
    load_rows<kAccess>(a.tile, a.x, packed);
    Angles angles[kRows];
    if constexpr (kAccess == kFull) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) angles[row] = load_angles<kAccess>(a, a.tile.row(row), a.tile.column(0));
    }
    float gain[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
        float value[8];
        unpack(packed[i / kVectors][i % kVectors], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) gain[i / kVectors] += value[j] * value[j];
    }
    block_sum(gain, partial);
    const float share = __fdividef(1.0f, a.tile.num_columns);
#pragma unroll
    for (int row = 0; row < kRows; ++row) gain[row] = rsqrtf(gain[row] * share + a.eps);
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
        if (!has_column<kAccess>(a.tile, vector)) break;
        const int column = a.tile.column(vector);
        float weight[8];
        load<kAccess>(a.weight + column, weight);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            float value[8];
            unpack(packed[row][vector], value);
#pragma unroll
            for (int i = 0; i < 8; ++i) value[i] *= weight[i];
            if constexpr (kAccess != kFull) angles[row] = load_angles<kAccess>(a, a.tile.row(row), column);
            rotate(angles[row], gain[row], value);
            if (a.tile.has_row(row)) store<kAccess>(a.out.at(a.tile.row(row), column), value);
        }
    }
}

struct QuantizeRowsArguments {
    Tile tile;
    Rows<bf16> x;
    Rows<fp8> out;
    float* out_scale;
};

template <Access kAccess> __device__ void quantize_rows_rows(const QuantizeRowsArguments& a) {
    __shared__ u32 partial[kRows][kMaxWarps];
    Packed packed;
    load_rows<kAccess>(a.tile, a.x, packed);
    float amax[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        u32 greatest = 0;
#pragma unroll
        for (int vector = 0; vector < kVectors; ++vector) greatest = __vmaxu2(greatest, magnitude(packed[row][vector]));
        amax[row] = __uint_as_float(max(greatest << 16, greatest & 0xffff0000u));
    }
    row_scales(a.tile, a.out_scale, partial, amax);
    Values value;
    unpack_rows(packed, value);
#pragma unroll
    for (int i = 0; i < kRows * kVectors * 8; ++i) value[i / (kVectors * 8)][i / 8 % kVectors][i % 8] *= amax[i / (kVectors * 8)];
    store_rows<kAccess>(a.tile, a.out, value);
}

#define ENTRY(name, threads, Arguments, access, ...)                                                                    \
    extern "C" __global__ void __launch_bounds__(threads, threads > 512 ? 2 : 1024 / threads) name(const __grid_constant__ Arguments a) {   \
        constexpr Access kAccess = access;                                                                              \
        __VA_ARGS__(a);                                                                                                 \
    }
#define KERNEL(name, threads, Arguments, ...)                          \
    ENTRY(name, threads, Arguments, kFull, __VA_ARGS__)                \
    ENTRY(name##_ragged, threads, Arguments, kRagged, __VA_ARGS__)     \
    ENTRY(name##_unaligned, threads, Arguments, kUnaligned, __VA_ARGS__)

using ToBf16 = ConvertArguments<float, bf16>;
using ToF32 = ConvertArguments<bf16, float>;

KERNEL(norm_bf16, 512, NormArguments<bf16>, norm_rows<kAccess, false, false>)
KERNEL(norm_by_row_bf16, 512, NormArguments<bf16>, norm_rows<kAccess, false, true>)
KERNEL(residual_norm_bf16, 512, NormArguments<bf16>, norm_rows<kAccess, true, false>)
KERNEL(residual_norm_by_row_bf16, 512, NormArguments<bf16>, norm_rows<kAccess, true, true>)
KERNEL(gated_residual, 512, GatedResidualArguments, gated_residual_rows<kAccess, false>)
KERNEL(gated_residual_by_row, 512, GatedResidualArguments, gated_residual_rows<kAccess, true>)
KERNEL(qk_norm_rope_bf16, 512, RopeArguments<bf16>, qk_norm_rope_rows<kAccess>)
KERNEL(column_spread, 128, ColumnSpreadArguments, column_spread_rows<kAccess>)
ENTRY(column_spread_finish, 256, ColumnFinishArguments, kFull, column_spread_columns)
KERNEL(convert_f32_bf16, 512, ToBf16, convert_rows<kAccess>)
KERNEL(convert_bf16_f32, 512, ToF32, convert_rows<kAccess>)
KERNEL(add, 512, AddArguments, add_rows<kAccess>)
KERNEL(gelu, 512, GeluArguments, gelu_rows<kAccess>)
KERNEL(gemv_f32, 256, GemvArguments<float>, gemv<kAccess>)
KERNEL(gemv_bf16, 256, GemvArguments<bf16>, gemv<kAccess>)
KERNEL(rms_norm_bf16, 512, RmsNormArguments<bf16>, rms_norm_rows<kAccess, false>)
KERNEL(rms_norm_f32, 512, RmsNormArguments<float>, rms_norm_rows<kAccess, false>)
KERNEL(residual_rms_norm_bf16, 512, RmsNormArguments<bf16>, rms_norm_rows<kAccess, true>)
KERNEL(layer_norm_bf16, 512, LayerNormArguments<bf16>, layer_norm_rows<kAccess, kRowsAlone>)
KERNEL(residual_layer_norm_bf16, 512, LayerNormArguments<bf16>, layer_norm_rows<kAccess, kSum>)
KERNEL(embed_tokens_f32, 512, LayerNormArguments<float>, layer_norm_rows<kAccess, kTokens>)
KERNEL(gated_gelu, 1024, GatedGeluArguments, gated_gelu_rows<kAccess>)
ENTRY(channel_norm_1, 256, ChannelNormArguments, kFull, channel_norm_positions<1>)
ENTRY(channel_norm_2, 256, ChannelNormArguments, kFull, channel_norm_positions<2>)
ENTRY(channel_norm_4, 256, ChannelNormArguments, kFull, channel_norm_positions<4>)
ENTRY(upsample, 256, UpsampleArguments, kFull, upsample_positions)
ENTRY(to_channels_last, 256, LayoutArguments, kFull, to_channels_last_positions)
ENTRY(to_planes, 256, LayoutArguments, kFull, to_planes_positions)
ENTRY(add_average_down, 256, ShortcutArguments, kFull, add_average_down_positions)
ENTRY(add_duplicate_up, 256, ShortcutArguments, kFull, add_duplicate_up_positions)
ENTRY(colours, 256, ColoursArguments, kFull, colours_of_pixels)
ENTRY(cut_patches, 256, PatchArguments, kFull, cut_patch_numbers)
ENTRY(join_patches, 256, PatchArguments, kFull, join_patch_numbers)
ENTRY(softmax, 256, SoftmaxArguments, kFull, softmax_queries)
ENTRY(transpose, 256, TransposeArguments, kFull, transpose_tiles)
#if __CUDA_ARCH__ >= 890
KERNEL(norm_fp8, 512, NormArguments<fp8>, norm_rows<kAccess, false, false>)
KERNEL(norm_by_row_fp8, 512, NormArguments<fp8>, norm_rows<kAccess, false, true>)
KERNEL(residual_norm_fp8, 512, NormArguments<fp8>, norm_rows<kAccess, true, false>)
KERNEL(residual_norm_by_row_fp8, 512, NormArguments<fp8>, norm_rows<kAccess, true, true>)
KERNEL(qk_norm_rope_fp8, 512, RopeArguments<fp8>, qk_norm_rope_rows<kAccess>)
KERNEL(quantize_rows, 1024, QuantizeRowsArguments, quantize_rows_rows<kAccess>)
KERNEL(quantize_centred, 512, QuantizeCentredArguments, quantize_centred_rows<kAccess>)
KERNEL(restore, 512, RestoreArguments, restore_rows<kAccess>)
KERNEL(fold_offset, 256, FoldOffsetArguments, fold_offset_outputs<kAccess>)
#endif
