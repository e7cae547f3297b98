// FP8 with one scale and one offset a column for a whole matrix, for attention: how its columns spread, and to and from such numbers.
//
// What FP8 attention averages should have no mean in any column: Hopper's tensor cores keep few bits of a sum, and sums of one sign come
// out too small. The mean is taken off before and put back behind attention, whose weights sum to 1.
#pragma once

#include "rows.cuh"

struct ColumnSpreadArguments {
    Tile tile;
    Rows<bf16> x;
    float* partial;  // [parts, 3, num_columns]: sums, least and greatest values of the rows of a part
    float* scale;    // set to 0 for column_spread_finish; may be null
    int num_parts;   // part p has rows p, p + num_parts, ...
};

// Blocks 0 to num_parts - 1 read the first 8 * blockDim.x columns, as many more the next ones, and so on.
template <Access kAccess> __device__ void column_spread_rows(const ColumnSpreadArguments& a) {
    const int part = blockIdx.x % a.num_parts, column = (blockIdx.x / a.num_parts * blockDim.x + threadIdx.x) * 8;
    if (a.scale != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *a.scale = 0.0f;
    if (column >= a.tile.num_columns) return;
    const float infinity = __uint_as_float(0x7f800000u);
    float sum[8] = {}, least[8], greatest[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) least[i] = infinity, greatest[i] = -infinity;
#pragma unroll 4
    for (int row = part; row < a.tile.num_rows; row += a.num_parts) {
        float x[8];
        load<kAccess>(a.x.at(row, column), x);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum[i] += x[i];
            least[i] = fminf(least[i], x[i]);
            greatest[i] = fmaxf(greatest[i], x[i]);
        }
    }
    float* first = a.partial + i64(part) * 3 * a.tile.num_columns + column;
    store<kFull>(first, sum);
    store<kFull>(first + a.tile.num_columns, least);
    store<kFull>(first + 2 * a.tile.num_columns, greatest);
}

struct ColumnFinishArguments {
    Tile tile;
    const float* partial;
    float* mean;       // [num_columns]; may be null
    float* scale;      // greatest distance of any value from its column's mean, over 448; may be null
    Rows<bf16> spare;  // num_spare rows, set to the mean
    int num_parts, num_spare;
};

// A block finishes 32 columns; each of its warps sums a part of the partial results.
__device__ void column_spread_columns(const ColumnFinishArguments& a) {
    __shared__ float shared[3][kMaxWarps][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32, column = blockIdx.x * 32 + lane;
    const bool inside = column < a.tile.num_columns;
    const float infinity = __uint_as_float(0x7f800000u);
    float sum = 0.0f, least = infinity, greatest = -infinity;
#pragma unroll 4
    for (int i = warp; inside && i < a.num_parts; i += num_warps) {
        const float* first = a.partial + i64(i) * 3 * a.tile.num_columns + column;
        sum += first[0];
        least = fminf(least, first[a.tile.num_columns]);
        greatest = fmaxf(greatest, first[2 * a.tile.num_columns]);
    }
    shared[0][warp][lane] = sum, shared[1][warp][lane] = least, shared[2][warp][lane] = greatest;
    __syncthreads();
    if (warp != 0) return;
    for (int i = 1; i < num_warps; ++i) {
        sum += shared[0][i][lane];
        least = fminf(least, shared[1][i][lane]), greatest = fmaxf(greatest, shared[2][i][lane]);
    }
    const float mean = sum / a.tile.num_rows;
    if (inside && a.mean != nullptr) a.mean[column] = mean;
    for (int row = 0; inside && row < a.num_spare; ++row) {
        const float rounded[8] = {mean};
        a.spare.at(row, column)->bits = u16(pack(rounded).x);
    }
    const float distance = inside ? fmaxf(greatest - mean, mean - least) : 0.0f;
    const u32 furthest = __reduce_max_sync(~0u, __float_as_uint(fmaxf(distance, kSmallestAmax) * (1.0f / kFp8Max)));
    if (a.scale != nullptr && lane == 0) atomicMax(reinterpret_cast<u32*>(a.scale), furthest);  // such floats order like their bits
}

struct QuantizeCentredArguments {
    Tile tile;
    Rows<bf16> x;
    const float *scale, *offset;
    Rows<fp8> out;
};

struct RestoreArguments {
    Tile tile;
    Rows<fp8> x;
    const float *scale, *offset;
    Rows<bf16> out;
};

struct FoldOffsetArguments {
    Tile tile;  // one row of offsets, K columns
    const float* offset;
    Rows<fp8> weight;
    const float* weight_scale;
    const bf16* bias;
    bf16* out;
    int num_outputs;
};

#if __CUDA_ARCH__ >= 890
// out = (x - offset) / scale
template <Access kAccess> __device__ void quantize_centred_rows(const QuantizeCentredArguments& a) {
    Packed packed;
    Values value;
    load_rows<kAccess>(a.tile, a.x, packed);
    unpack_rows(packed, value);
    const float inverse = __fdividef(1.0f, *a.scale);
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
        float offset[8] = {};
        if (has_column<kAccess>(a.tile, vector)) load<kAccess>(a.offset + a.tile.column(vector), offset);
#pragma unroll
        for (int i = 0; i < kRows * 8; ++i) {
            float& x = value[i / 8][vector][i % 8];
            x = (x - offset[i % 8]) * inverse;
        }
    }
    store_rows<kAccess>(a.tile, a.out, value);
}

// out = x * scale + offset
template <Access kAccess> __device__ void restore_rows(const RestoreArguments& a) {
    const float scale = *a.scale;
    for (int i = 0; i < kRows * kVectors; ++i) {
        if (!a.tile.has_row(i / kVectors) || !has_column<kAccess>(a.tile, i % kVectors)) continue;
        const int row = a.tile.row(i / kVectors), column = a.tile.column(i % kVectors);
        float value[8], offset[8];
        load<kAccess>(a.x.at(row, column), value);
        load<kAccess>(a.offset + column, offset);
#pragma unroll
        for (int j = 0; j < 8; ++j) value[j] = value[j] * scale + offset[j];
        store<kAccess>(a.out.at(row, column), value);
    }
}

// out[o] = bias[o] + weight_scale[o] * sum_k weight[o, k] * offset[k]: a warp sums one output.
template <Access kAccess> __device__ void fold_offset_outputs(const FoldOffsetArguments& a) {
    const int lane = threadIdx.x % 32, output = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (output >= a.num_outputs) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int column = lane * 8; column < a.tile.num_columns; column += 32 * 8) {
        float weight[8], offset[8];
        load<kAccess>(a.weight.at(output, column), weight);
        load<kAccess>(a.offset + column, offset);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += weight[i] * offset[i];
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) {
        const float folded[8] = {__uint_as_float(u32(a.bias[output].bits) << 16) + a.weight_scale[output] * sum};
        a.out[output].bits = u16(pack(folded).x);
    }
}
#endif
