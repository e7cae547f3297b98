// The text encoder's kernels: RMS norms of a float32 residual stream, the gated GELU, and attention with a bias by position.
#pragma once

#include "rows.cuh"

template <typename Out> struct RmsNormArguments {
    Tile tile;
    Rows<float> x, residual, residual_out;
    const float* weight;
    Rows<Out> out;
    float eps;
};

// out = x / sqrt(mean(x^2) + eps) * weight; with kResidual, x + residual takes the place of x and is written to residual_out.
template <Access kAccess, bool kResidual, typename Out> __device__ void rms_norm_rows(const RmsNormArguments<Out>& a) {
    __shared__ float partial[kRows * kMaxWarps];
    Values value = {};
    float gain[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
        const int index = i / kVectors, row = a.tile.row(index), column = a.tile.column(i % kVectors);
        float(&x)[8] = value[index][i % kVectors];
        if (!has_column<kAccess>(a.tile, i % kVectors)) continue;
        load<kAccess>(a.x.at(row, column), x);
        if constexpr (kResidual) {
            float base[8];
            load<kAccess>(a.residual.at(row, column), base);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] += base[j];
            if (a.tile.has_row(index)) store<kAccess>(a.residual_out.at(row, column), x);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) gain[index] += x[j] * x[j];
    }
    block_sum(gain, partial);
    const float share = __fdividef(1.0f, a.tile.num_columns);
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
        if (!has_column<kAccess>(a.tile, vector)) break;
        float weight[8];
        load<kAccess>(a.weight + a.tile.column(vector), weight);
#pragma unroll
        for (int i = 0; i < kRows * 8; ++i) value[i / 8][vector][i % 8] *= rsqrtf(gain[i / 8] * share + a.eps) * weight[i % 8];
    }
    store_rows<kAccess>(a.tile, a.out, value);
}

struct GatedGeluArguments {
    Tile tile;
    Rows<bf16> gate, x, out;
};

// gelu_tanh(g) = g * (1 + tanh(u)) / 2 = g / (1 + exp(-2u)) with u = sqrt(2 / pi) * (g + 0.044715 g^3)
__device__ float gelu_tanh(float g) { return __fdividef(g, 1.0f + __expf(-1.5957691216057308f * (g + 0.044715f * g * g * g))); }

template <Access kAccess> __device__ void gated_gelu_rows(const GatedGeluArguments& a) {
    for (int i = 0; i < kRows * kVectors; ++i) {
        if (!a.tile.has_row(i / kVectors) || !has_column<kAccess>(a.tile, i % kVectors)) continue;
        const int row = a.tile.row(i / kVectors), column = a.tile.column(i % kVectors);
        float gate[8], x[8];
        load<kAccess>(a.gate.at(row, column), gate);
        load<kAccess>(a.x.at(row, column), x);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] *= gelu_tanh(gate[j]);
        store<kAccess>(a.out.at(row, column), x);
    }
}

constexpr int kHeadDim = 64;         // greatest size of a head: smaller ones are filled up with zeros
constexpr int kAttentionRows = 64;   // queries a block, 16 a warp; keys a step
constexpr int kMaxBuckets = 128;
constexpr int kPitch = kHeadDim + 8; // bf16 from row to row of a staged tile: 8 rows then start on 8 different groups of 4 banks
constexpr float kLog2e = 1.4426950408889634f;

struct BiasedAttentionArguments {
    Tile tile;  // tokens, and heads times head_dim
    Rows<bf16> query, key, value, out;
    const float* position_table;  // [num_buckets, num_heads]
    const i64* position_buckets;  // [tokens, tokens]
    int num_heads, head_dim, num_buckets;
};

struct StagedRows {
    __align__(16) bf16 value[kAttentionRows][kPitch];
    __device__ u32 pair(int row, int column) const { return *reinterpret_cast<const u32*>(&value[row][column]); }
};

// d += a b on a warp's tensor cores: a [16, 16] and b [16, 8] of bf16, d [16, 8]. With g = lane / 4 and t = lane % 4 a thread holds, in
// pairs, a's rows g and g + 8 at columns 2t and 2t + 8, b's rows 2t and 2t + 8 at column g, d's rows g and g + 8 at column 2t.
__device__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Rows `row` to row + 15 and columns `column` to column + 15 as the b of two products, side by side.
__device__ void load_transposed(const StagedRows& tile, int row, int column, u32 (&b)[4]) {
    const int lane = threadIdx.x % 32;
    const unsigned address = __cvta_generic_to_shared(&tile.value[row + lane % 16][column + lane / 16 * 8]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address) : "memory");
}

__device__ u32 pack_pair(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// One head's columns of rows `first` on, zeros where there are none.
template <Access kAccess>
__device__ void stage(const BiasedAttentionArguments& a, const Rows<bf16>& source, int head, int first, StagedRows& tile) {
    for (int i = threadIdx.x; i < kAttentionRows * kHeadDim / 8; i += blockDim.x) {
        const int row = i / (kHeadDim / 8), column = i % (kHeadDim / 8) * 8;
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (first + row < a.tile.num_rows && column < a.head_dim) {
            packed = load_packed<kAccess>(source.at(first + row, head * a.head_dim + column));
        }
        *reinterpret_cast<uint4*>(&tile.value[row][column]) = packed;
    }
}

// A warp's scores against the staged keys, times log2(e): q k + bias, -inf past the last key.
__device__ void score(const BiasedAttentionArguments& a, const u32 (&query)[kHeadDim / 16][4], const StagedRows& keys, const float* bias,
                      int first_query, int first_key, float (&scores)[kAttentionRows / 8][4]) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kAttentionRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; ++k) {
            multiply_add(scores[n], query[k], keys.pair(n * 8 + group, k * 16 + pair), keys.pair(n * 8 + group, k * 16 + pair + 8));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = min(first_query + group + i / 2 * 8, a.tile.num_rows - 1), key = first_key + n * 8 + pair + i % 2;
            const bool exists = key < a.tile.num_rows;
            const int bucket = exists ? int(a.position_buckets[i64(row) * a.tile.num_rows + key]) : 0;
            scores[n][i] = exists ? scores[n][i] * kLog2e + bias[bucket] : __uint_as_float(0xff800000u);
        }
    }
}

// Softmax over the keys seen so far: rescales what was summed for the two rows of this thread, and turns scores into weights.
__device__ void soften(float (&scores)[kAttentionRows / 8][4], float (&greatest)[2], float (&total)[2], float (&sum)[kHeadDim / 8][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most = greatest[half];
#pragma unroll
        for (int n = 0; n < kAttentionRows / 8; ++n) most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        for (int step = 1; step < 4; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        const float shrink = exp2f(greatest[half] - most);
        greatest[half] = most;
        total[half] *= shrink;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) sum[n][2 * half] *= shrink, sum[n][2 * half + 1] *= shrink;
#pragma unroll
        for (int i = 0; i < kAttentionRows / 4; ++i) {
            float& weight = scores[i / 2][2 * half + i % 2];
            weight = exp2f(weight - most);
            total[half] += weight;
        }
    }
}

// softmax(q k^T + bias) v for one head and kAttentionRows queries; 4 warps. FP32 but for the operands of the two products.
template <Access kAccess> __device__ void attend(const BiasedAttentionArguments& a) {
    __shared__ StagedRows queries, keys, values;
    __shared__ float bias[kMaxBuckets];
    const int head = blockIdx.x % a.num_heads, first = int(blockIdx.x) / a.num_heads * kAttentionRows;
    const int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    for (int i = threadIdx.x; i < a.num_buckets; i += blockDim.x) bias[i] = a.position_table[i * a.num_heads + head] * kLog2e;
    stage<kAccess>(a, a.query, head, first, queries);
    __syncthreads();
    u32 query[kHeadDim / 16][4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
        query[i / 4][i % 4] = queries.pair(warp_row + group + i % 2 * 8, i / 4 * 16 + i % 4 / 2 * 8 + pair);
    }
    float sum[kHeadDim / 8][4] = {}, greatest[2], total[2] = {};
    greatest[0] = greatest[1] = __uint_as_float(0xff800000u);
    for (int first_key = 0; first_key < a.tile.num_rows; first_key += kAttentionRows) {
        __syncthreads();
        stage<kAccess>(a, a.key, head, first_key, keys);
        stage<kAccess>(a, a.value, head, first_key, values);
        __syncthreads();
        float scores[kAttentionRows / 8][4];
        score(a, query, keys, bias, first + warp_row, first_key, scores);
        soften(scores, greatest, total, sum);
#pragma unroll
        for (int k = 0; k < kAttentionRows / 16; ++k) {
            const float(&low)[4] = scores[2 * k], (&high)[4] = scores[2 * k + 1];
            const u32 weight[4] = {pack_pair(low[0], low[1]), pack_pair(low[2], low[3]), pack_pair(high[0], high[1]), pack_pair(high[2], high[3])};
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; n += 2) {
                u32 value[4];
                load_transposed(values, k * 16, n * 8, value);
                multiply_add(sum[n], weight, value[0], value[1]);
                multiply_add(sum[n + 1], weight, value[2], value[3]);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        for (int step = 1; step < 4; step *= 2) total[half] += __shfl_xor_sync(~0u, total[half], step);
        const float inverse = 1.0f / total[half];
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {  // where this warp's queries were, which nobody reads any more
            u32* target = reinterpret_cast<u32*>(&queries.value[warp_row + group + half * 8][n * 8 + pair]);
            *target = pack_pair(sum[n][2 * half] * inverse, sum[n][2 * half + 1] * inverse);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kAttentionRows * kHeadDim / 8; i += blockDim.x) {
        const int row = i / (kHeadDim / 8), column = i % (kHeadDim / 8) * 8;
        if (first + row >= a.tile.num_rows || column >= a.head_dim) continue;
        store_packed<kAccess>(a.out.at(first + row, head * a.head_dim + column), *reinterpret_cast<const uint4*>(&queries.value[row][column]));
    }
}

// 128 registers a thread, where the others' entries would leave 64.
#define ATTENTION(name, access) \
    extern "C" __global__ void __launch_bounds__(128, 4) name(const __grid_constant__ BiasedAttentionArguments a) { attend<access>(a); }

ATTENTION(biased_attention, kFull)
ATTENTION(biased_attention_ragged, kRagged)
ATTENTION(biased_attention_unaligned, kUnaligned)
