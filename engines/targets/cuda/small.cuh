// The small work around the blocks in FP32: conversions, sums, and linear layers of a few rows (the time embedding).
#pragma once

#include "rows.cuh"

template <typename In, typename Out> struct ConvertArguments {
    Tile tile;
    Rows<In> x;
    Rows<Out> out;
};

template <Access kAccess, typename In, typename Out> __device__ void convert_rows(const ConvertArguments<In, Out>& a) {
    for (int i = 0; i < kRows * kVectors; ++i) {
        if (!a.tile.has_row(i / kVectors) || !has_column<kAccess>(a.tile, i % kVectors)) continue;
        float value[8];
        load<kAccess>(a.x.at(a.tile.row(i / kVectors), a.tile.column(i % kVectors)), value);
        store<kAccess>(a.out.at(a.tile.row(i / kVectors), a.tile.column(i % kVectors)), value);
    }
}

struct AddArguments {
    Tile tile;
    Rows<float> a, b, out;  // a stride of 0 repeats one row
};

template <Access kAccess> __device__ void add_rows(const AddArguments& arguments) {
    const Tile& tile = arguments.tile;
    for (int i = 0; i < kRows * kVectors; ++i) {
        if (!tile.has_row(i / kVectors) || !has_column<kAccess>(tile, i % kVectors)) continue;
        const int row = tile.row(i / kVectors), column = tile.column(i % kVectors);
        float a[8], b[8];
        load<kAccess>(arguments.a.at(row, column), a);
        load<kAccess>(arguments.b.at(row, column), b);
        for (int j = 0; j < 8; ++j) a[j] += b[j];
        store<kAccess>(arguments.out.at(row, column), a);
    }
}

struct GeluArguments {
    Tile tile;
    Rows<bf16> x, out;
};

// The exact GELU, x * Phi(x).
template <Access kAccess> __device__ void gelu_rows(const GeluArguments& a) {
    for (int i = 0; i < kRows * kVectors; ++i) {
        if (!a.tile.has_row(i / kVectors) || !has_column<kAccess>(a.tile, i % kVectors)) continue;
        const int row = a.tile.row(i / kVectors), column = a.tile.column(i % kVectors);
        float value[8];
        load<kAccess>(a.x.at(row, column), value);
        for (int j = 0; j < 8; ++j) value[j] *= 0.5f * erfcf(value[j] * -0.70710678f);
        store<kAccess>(a.out.at(row, column), value);
    }
}

constexpr int kGemvRows = 4;        // most rows of x
constexpr int kGemvOutputs = 4;     // output features per warp
constexpr int kGemvFloats = 8192;   // x staged at once, all rows together

template <typename Weight> struct GemvArguments {
    Tile tile;  // rows of x, and K
    int num_outputs, silu_input;
    Rows<float> x;
    Rows<Weight> weight;
    const float* bias;
    Rows<float> out;
};

// out[m, o] = sum_k act(x[m, k]) * weight[o, k] + bias[o]: a warp owns kGemvOutputs features, x is staged in shared memory.
template <Access kAccess, typename Weight> __device__ void gemv(const GemvArguments<Weight>& a) {
    __shared__ __align__(16) float staged[kGemvFloats];
    const int num_rows = a.tile.num_rows, width = kGemvFloats / num_rows / 8 * 8, lane = threadIdx.x % 32;
    const int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * kGemvOutputs;
    float sum[kGemvOutputs][kGemvRows] = {};
    for (int begin = 0; begin < a.tile.num_columns; begin += width) {
        const int count = min(width, a.tile.num_columns - begin);
        __syncthreads();
        for (int i = threadIdx.x; i < num_rows * count; i += blockDim.x) {
            const float x = *a.x.at(i / count, begin + i % count);
            staged[i] = a.silu_input ? x / (1.0f + __expf(-x)) : x;
        }
        __syncthreads();
        for (int column = lane * 8; column < count; column += 32 * 8) {
            float weight[kGemvOutputs][8];
#pragma unroll
            for (int output = 0; output < kGemvOutputs; ++output) {
                load<kAccess>(a.weight.at(min(first + output, a.num_outputs - 1), begin + column), weight[output]);
            }
#pragma unroll
            for (int row = 0; row < kGemvRows; ++row) {
                if (row == num_rows) break;
                float x[8];
                load<kFull>(staged + row * count + column, x);
#pragma unroll
                for (int i = 0; i < kGemvOutputs * 8; ++i) sum[i / 8][row] += x[i % 8] * weight[i / 8][i % 8];
            }
        }
    }
#pragma unroll
    for (int output = 0; output < kGemvOutputs; ++output)
#pragma unroll
        for (int row = 0; row < kGemvRows; ++row) {
            for (int step = 16; step > 0; step /= 2) sum[output][row] += __shfl_xor_sync(~0u, sum[output][row], step);
            if (lane == 0 && row < num_rows && first + output < a.num_outputs) {
                *a.out.at(row, first + output) = sum[output][row] + (a.bias != nullptr ? a.bias[first + output] : 0.0f);
            }
        }
}
