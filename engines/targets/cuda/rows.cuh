// Rows of a matrix in registers: loads, stores, conversions and reductions that kernels.cu is made of.
//
// A block owns kRows rows, a thread 8 neighbouring columns (16 bytes of bf16) of each, kVectors times. Conversions are inline PTX, so
// that NVRTC needs no headers; FP8 conversion exists from sm_89 on.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

struct bf16 { u16 bits; };
struct fp8 { u8 bits; };  // E4M3

constexpr int kRows = 2;         // runtime/backends/cuda/launch.py sizes its grids by these two
constexpr int kVectors = 2;
constexpr int kMaxWarps = 32;
constexpr float kFp8Max = 448.0f;
constexpr float kSmallestAmax = 1e-30f;  // a row of zeros: keeps scale and 1 / scale finite

// How a kernel may touch its arrays: 16 bytes at a time and every thread with all its columns; 16 bytes; element by element.
enum Access { kFull, kRagged, kUnaligned };

template <typename T> struct Rows {
    T* data;
    i64 stride;  // elements
    __device__ T* at(int row, int column) const { return data + row * stride + column; }
};

// 8 bf16 values as they lie in memory.
template <Access kAccess> __device__ uint4 load_packed(const bf16* source) {
    if constexpr (kAccess != kUnaligned) {
        return *reinterpret_cast<const uint4*>(source);
    } else {
        u32 word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = source[2 * i].bits | u32(source[2 * i + 1].bits) << 16;
        return make_uint4(word[0], word[1], word[2], word[3]);
    }
}

__device__ void unpack(uint4 packed, float (&value)[8]) {
    const u32 word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        value[2 * i] = __uint_as_float(word[i] << 16);
        value[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
}

// The greater magnitudes of the even and of the odd values, still packed.
__device__ u32 magnitude(uint4 packed) {
    const u32 low = __vmaxu2(packed.x & 0x7fff7fffu, packed.y & 0x7fff7fffu), high = __vmaxu2(packed.z & 0x7fff7fffu, packed.w & 0x7fff7fffu);
    return __vmaxu2(low, high);
}

__device__ uint4 pack(const float (&value)[8]) {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[i]) : "f"(value[2 * i + 1]), "f"(value[2 * i]));
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

template <Access kAccess> __device__ void load(const bf16* source, float (&value)[8]) { unpack(load_packed<kAccess>(source), value); }

template <Access kAccess> __device__ void load(const float* source, float (&value)[8]) {
    if constexpr (kAccess != kUnaligned) {
        const float4 low = reinterpret_cast<const float4*>(source)[0], high = reinterpret_cast<const float4*>(source)[1];
        value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
        value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = source[i];
    }
}

template <Access kAccess> __device__ void store_packed(bf16* target, uint4 packed) {
    if constexpr (kAccess != kUnaligned) {
        *reinterpret_cast<uint4*>(target) = packed;
    } else {
        const u32 word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) target[i].bits = u16(word[i / 2] >> 16 * (i % 2));
    }
}

template <Access kAccess> __device__ void store(bf16* target, const float (&value)[8]) { store_packed<kAccess>(target, pack(value)); }

template <Access kAccess> __device__ void store(float* target, const float (&value)[8]) {
    if constexpr (kAccess != kUnaligned) {
        reinterpret_cast<float4*>(target)[0] = make_float4(value[0], value[1], value[2], value[3]);
        reinterpret_cast<float4*>(target)[1] = make_float4(value[4], value[5], value[6], value[7]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) target[i] = value[i];
    }
}

#if __CUDA_ARCH__ >= 890
template <Access kAccess> __device__ void store(fp8* target, const float (&value)[8]) {
    u16 half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(half[i]) : "f"(value[2 * i + 1]), "f"(value[2 * i]));
    }
    if constexpr (kAccess != kUnaligned) {
        *reinterpret_cast<uint2*>(target) = make_uint2(half[0] | u32(half[1]) << 16, half[2] | u32(half[3]) << 16);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) target[i].bits = u8(half[i / 2] >> 8 * (i % 2));
    }
}

template <Access kAccess> __device__ void load(const fp8* source, float (&value)[8]) {
    u8 byte[8];
    if constexpr (kAccess != kUnaligned) {
        const uint2 packed = *reinterpret_cast<const uint2*>(source);
#pragma unroll
        for (int i = 0; i < 8; ++i) byte[i] = u8((i < 4 ? packed.x : packed.y) >> 8 * (i % 4));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) byte[i] = source[i].bits;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 halves;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(u16(byte[2 * i] | byte[2 * i + 1] << 8)));
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
            : "=f"(value[2 * i]), "=f"(value[2 * i + 1]) : "r"(halves));
    }
}
#endif

// Where block_sum leaves total `index` of `count`: its bits in reverse order.
__device__ constexpr int lane_of(int index, int count) {
    int lane = 0;
    for (int low = 1, high = count / 2; high > 0; low *= 2, high /= 2) lane |= index & high ? low : 0;
    return lane;
}

// Sum each of kCount values (a power of two) over the block. Each step halves the values per lane instead of shuffling all of them:
// 13 shuffles for 4 values and not 40. `partial` holds kCount * kMaxWarps numbers that no other call of the kernel uses.
template <int kCount> __device__ void block_sum(float (&value)[kCount], float* partial) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
#pragma unroll
    for (int half = kCount / 2, bit = 1; half > 0; half /= 2, bit *= 2)
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float kept = lane & bit ? value[i + half] : value[i], sent = lane & bit ? value[i] : value[i + half];
            value[i] = kept + __shfl_xor_sync(~0u, sent, bit);
        }
#pragma unroll
    for (int step = kCount; step < 32; step *= 2) value[0] += __shfl_xor_sync(~0u, value[0], step);
    if (lane < kCount) partial[warp * kCount + lane] = value[0];
    __syncthreads();
    float total = 0.0f;
#pragma unroll 1
    for (int i = lane; i < num_warps * kCount; i += 32) total += partial[i];
#pragma unroll
    for (int step = kCount; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = __shfl_sync(~0u, total, lane_of(i, kCount));
}

// The greatest of non-negative values over the block, row by row: such floats order like their bits.
__device__ void block_max(float (&value)[kRows], u32 (*partial)[kMaxWarps]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const u32 greatest = __reduce_max_sync(~0u, __float_as_uint(value[row]));
        if (lane == 0) partial[row][warp] = greatest;
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        value[row] = __uint_as_float(__reduce_max_sync(~0u, lane < num_warps ? partial[row][lane] : 0u));
    }
}

// This thread's part of a block's rows: columns column(0) and column(1), 8 each. Rows past the last are read as the last, never written.
struct Tile {
    int num_rows, num_columns;
    __device__ int column(int vector) const { return (threadIdx.x + vector * blockDim.x) * 8; }
    __device__ int row(int index) const { return min(int(blockIdx.x) * kRows + index, num_rows - 1); }
    __device__ bool has_row(int index) const { return int(blockIdx.x) * kRows + index < num_rows; }
};

template <Access kAccess> __device__ bool has_column(const Tile& tile, int vector) {
    return kAccess == kFull || tile.column(vector) < tile.num_columns;
}

using Packed = uint4[kRows][kVectors];
using Values = float[kRows][kVectors][8];

// Columns past the last are zeros.
template <Access kAccess> __device__ void load_rows(const Tile& tile, const Rows<bf16>& source, Packed& packed) {
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int vector = 0; vector < kVectors; ++vector) {
            packed[row][vector] = make_uint4(0, 0, 0, 0);
            if (has_column<kAccess>(tile, vector)) packed[row][vector] = load_packed<kAccess>(source.at(tile.row(row), tile.column(vector)));
        }
}

__device__ void unpack_rows(const Packed& packed, Values& value) {
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) unpack(packed[i / kVectors][i % kVectors], value[i / kVectors][i % kVectors]);
}

template <Access kAccess, typename Out> __device__ void store_rows(const Tile& tile, const Rows<Out>& out, const Values& value) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        if (!tile.has_row(row)) return;
#pragma unroll
        for (int vector = 0; vector < kVectors; ++vector)
            if (has_column<kAccess>(tile, vector)) store<kAccess>(out.at(tile.row(row), tile.column(vector)), value[row][vector]);
    }
}

// From each row's greatest magnitude so far in this thread: write the row's scale, amax / 448, and return 1 / scale in its place.
__device__ void row_scales(const Tile& tile, float* out_scale, u32 (*partial)[kMaxWarps], float (&amax)[kRows]) {
    block_max(amax, partial);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        amax[row] = fmaxf(amax[row], kSmallestAmax);
        if (threadIdx.x == 0 && tile.has_row(row)) out_scale[tile.row(row)] = amax[row] * (1.0f / kFp8Max);
        amax[row] = __fdividef(kFp8Max, amax[row]);
    }
}
