// The image encoder's kernel: layer norms of a float32 residual stream.
#pragma once

#include "rows.cuh"

// What is normed: x; residual + x, which is also written to residual_out; or tokens, the row `first` and then x's rows, + residual.
enum Normed { kRowsAlone, kSum, kTokens };

template <typename Out> struct LayerNormArguments {
    Tile tile;
    Rows<float> x, residual, residual_out;
    const float *first, *weight, *bias;
    Rows<Out> out;
    float eps;
};

// out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. The variance is taken about the mean: a loud channel of the stream may put
// the mean far from zero.
template <Access kAccess, Normed kNormed, typename Out> __device__ void layer_norm_rows(const LayerNormArguments<Out>& a) {
    __shared__ float partial_mean[kRows * kMaxWarps], partial_variance[kRows * kMaxWarps];
    Values value = {};
    float mean[kRows] = {}, gain[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
        const int index = i / kVectors, row = a.tile.row(index), column = a.tile.column(i % kVectors);
        float(&x)[8] = value[index][i % kVectors];
        if (!has_column<kAccess>(a.tile, i % kVectors)) continue;
        if (kNormed != kTokens || row > 0) {
            load<kAccess>(a.x.at(kNormed == kTokens ? row - 1 : row, column), x);
        } else {
            load<kAccess>(a.first + column, x);
        }
        if constexpr (kNormed != kRowsAlone) {
            float base[8];
            load<kAccess>(a.residual.at(row, column), base);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] += base[j];
            if (kNormed == kSum && a.tile.has_row(index)) store<kAccess>(a.residual_out.at(row, column), x);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) mean[index] += x[j];
    }
    block_sum(mean, partial_mean);
    const float share = __fdividef(1.0f, a.tile.num_columns);
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
        if (!has_column<kAccess>(a.tile, i % kVectors)) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float& x = value[i / kVectors][i % kVectors][j];
            x -= mean[i / kVectors] * share;
            gain[i / kVectors] += x * x;
        }
    }
    block_sum(gain, partial_variance);
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
        if (!has_column<kAccess>(a.tile, vector)) break;
        float weight[8], bias[8];
        load<kAccess>(a.weight + a.tile.column(vector), weight);
        load<kAccess>(a.bias + a.tile.column(vector), bias);
#pragma unroll
        for (int i = 0; i < kRows * 8; ++i) {
            float& x = value[i / 8][vector][i % 8];
            x = x * rsqrtf(gain[i / 8] * share + a.eps) * weight[i % 8] + bias[i % 8];
        }
    }
    store_rows<kAccess>(a.tile, a.out, value);
}
