// What surrounds the VAE's convolutions, over channels-last frames [T, H, W, C] in BF16 with C a multiple of 8: the channel norm that
// writes a convolution's window, nearest upsampling, changes of layout at the ends, and the softmax of the middle block's attention.
#pragma once

#include "rows.cuh"

constexpr int kMaxPast = 2;
constexpr int kTransposeSide = 32;
constexpr int kPixelsPerThread = 4;

struct ChannelNormArguments {
    Tile tile;  // positions of one frame, channels
    const bf16* x;
    const float* gamma;  // null: frames are copied as they are
    bf16 *past, *out;    // past_frames frames, replaced by the window's last ones; the window
    int num_frames, past_frames, from_zero, silu, lanes;
    float scale;
};

__device__ uint4 channel_norm_vector(const ChannelNormArguments& a, uint4 packed, int vector, float gain) {
    float value[8], gamma[8];
    unpack(packed, value);
    load<kFull>(a.gamma + 8 * vector, gamma);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        value[i] *= gain * gamma[i];
        if (a.silu) value[i] = __fdividef(value[i], 1.0f + __expf(-value[i]));
    }
    return pack(value);
}

template <int kCount> struct PositionVectors { uint4 vector[kCount]; };

// The vectors lane, lane + lanes, … of one position; those beyond its channels are zeros.
template <int kCount> __device__ PositionVectors<kCount> load_position(const uint4* position, int lane, int lanes, int vectors) {
    PositionVectors<kCount> value;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        value.vector[i] = make_uint4(0, 0, 0, 0);
        if (lane + i * lanes < vectors) value.vector[i] = position[lane + i * lanes];
    }
    return value;
}

template <int kCount>
__device__ void store_position(uint4* position, const PositionVectors<kCount>& value, int lane, int lanes, int vectors) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (lane + i * lanes < vectors) position[lane + i * lanes] = value.vector[i];
}

// `lanes` neighbouring threads own one position in all frames, so that `past` is read before it is replaced. What comes next is loaded
// before what is there is worked on: this kernel is bound by memory.
template <int kCount> __device__ void channel_norm_positions(const ChannelNormArguments& a) {
    const int vectors = a.tile.num_columns / 8, lanes = a.lanes, lane = threadIdx.x % lanes;
    const i64 position = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
    const bool has_position = position < a.tile.num_rows;
    const i64 frame = i64(a.tile.num_rows) * vectors, first = min(position, i64(a.tile.num_rows - 1)) * vectors;
    uint4* past = reinterpret_cast<uint4*>(a.past) + first;
    uint4* out = reinterpret_cast<uint4*>(a.out) + first;
    const uint4* x = reinterpret_cast<const uint4*>(a.x) + first;
    PositionVectors<kCount> kept[kMaxPast] = {};
#pragma unroll
    for (int index = 0; index < kMaxPast; ++index)
        if (index < a.past_frames && !a.from_zero) kept[index] = load_position<kCount>(past + index * frame, lane, lanes, vectors);
    PositionVectors<kCount> next = load_position<kCount>(x, lane, lanes, vectors);
#pragma unroll
    for (int index = 0; index < kMaxPast; ++index) {
        if (index >= a.past_frames || !has_position) break;
        store_position(out + index * frame, kept[index], lane, lanes, vectors);
        if (index >= a.num_frames) store_position(past + (index - a.num_frames) * frame, kept[index], lane, lanes, vectors);
    }
    for (int index = 0; index < a.num_frames; ++index) {
        PositionVectors<kCount> value = next;
        if (index + 1 < a.num_frames) next = load_position<kCount>(x + (index + 1) * frame, lane, lanes, vectors);
        if (a.gamma != nullptr) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                float number[8];
                unpack(value.vector[i], number);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum += number[j] * number[j];
            }
            for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            const float gain = a.scale / fmaxf(sqrtf(sum), 1e-12f);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const int vector = lane + i * lanes;
                if (vector < vectors) value.vector[i] = channel_norm_vector(a, value.vector[i], vector, gain);
            }
        }
        if (!has_position) continue;
        const int slot = a.past_frames + index - a.num_frames;  // of the next past
        store_position(out + (a.past_frames + index) * frame, value, lane, lanes, vectors);
        if (slot >= 0) store_position(past + slot * frame, value, lane, lanes, vectors);
    }
}

struct UpsampleArguments {
    Tile tile;  // positions of all frames of x, channels of x
    const bf16* x;
    bf16* out;
    int width, frame_positions, interleave, repeat;  // positions in a row and in a frame of x
};

// Every vector of 8 channels to repeat x repeat positions; with interleave, the channels' halves are even and odd frames.
__device__ void upsample_positions(const UpsampleArguments& a) {
    const int vectors = a.tile.num_columns / 8, out_vectors = a.interleave ? vectors / 2 : vectors;
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= i64(a.tile.num_rows) * vectors) return;
    const uint4 value = reinterpret_cast<const uint4*>(a.x)[index];
    const int position = int(index / vectors), vector = int(index % vectors);
    const int frame = position / a.frame_positions, within = position % a.frame_positions;
    const int out_frame = a.interleave ? 2 * frame + vector / out_vectors : frame;
    const i64 out_width = i64(a.repeat) * a.width;
    const i64 row = i64(out_frame) * (a.frame_positions / a.width) + within / a.width;  // of all frames' rows, before repetition
    uint4* out = reinterpret_cast<uint4*>(a.out) + (row * a.repeat * out_width + a.repeat * (within % a.width)) * out_vectors + vector % out_vectors;
    for (int y = 0; y < a.repeat; ++y)
        for (int x = 0; x < a.repeat; ++x) out[(y * out_width + x) * out_vectors] = value;
}

struct LayoutArguments {
    Tile tile;  // positions of all frames, channels of the channels-last side
    float* planes;  // [colours, frames, rows * side, columns * side]
    bf16* frames;
    int channels;  // colours * side^2; those beyond are zeros
    int width, frame_positions, side;  // positions in a row and in a frame
    int num_frames, first_frame;  // of the planes; which of them comes first here
};

// Where a channel of a position lies in the planes: channels count colours, then columns, then rows of a square of side^2 pixels.
__device__ i64 plane_index(const LayoutArguments& a, int position, int channel) {
    const int frame = a.first_frame + position / a.frame_positions, within = position % a.frame_positions;
    const int squares = a.side * a.side, row = within / a.width * a.side + channel % a.side;
    const int column = within % a.width * a.side + channel / a.side % a.side;
    const i64 plane = i64(channel / squares) * a.num_frames + frame;
    return (plane * (a.frame_positions / a.width) * a.side + row) * a.width * a.side + column;
}

__device__ void to_channels_last_positions(const LayoutArguments& a) {
    const int position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= a.tile.num_rows) return;
    for (int first = 0; first < a.tile.num_columns; first += 8) {
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = first + i < a.channels ? a.planes[plane_index(a, position, first + i)] : 0.0f;
        store<kFull>(a.frames + i64(position) * a.tile.num_columns + first, value);
    }
}

__device__ void to_planes_positions(const LayoutArguments& a) {
    const int position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= a.tile.num_rows) return;
    for (int first = 0; first < a.channels; first += 8) {
        float value[8];
        load<kFull>(a.frames + i64(position) * a.tile.num_columns + first, value);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (first + i < a.channels) a.planes[plane_index(a, position, first + i)] = value[i];
    }
}

struct ColoursArguments {
    Tile tile;
    const float* planes;  // [3, pixels]
    u8* colours;          // [pixels, 3]
    int num_pixels;
};

__device__ u32 colour_level(float value) { return u32(fminf(fmaxf(value * 0.5f + 0.5f, 0.0f), 1.0f) * 255.0f); }

// A thread turns four neighbouring pixels: 16 bytes of each plane into 12 bytes of colours.
__device__ void colours_of_pixels(const ColoursArguments& a) {
    const i64 first = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * kPixelsPerThread;
    if (first >= a.num_pixels) return;
    u32 level[3 * kPixelsPerThread];
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
        const float4 value = *reinterpret_cast<const float4*>(a.planes + i64(plane) * a.num_pixels + first);
        level[plane] = colour_level(value.x);
        level[3 + plane] = colour_level(value.y);
        level[6 + plane] = colour_level(value.z);
        level[9 + plane] = colour_level(value.w);
    }
    u32* out = reinterpret_cast<u32*>(a.colours + 3 * first);
#pragma unroll
    for (int i = 0; i < 3; ++i) out[i] = level[4 * i] | level[4 * i + 1] << 8 | level[4 * i + 2] << 16 | level[4 * i + 3] << 24;
}

struct ShortcutArguments {
    Tile tile;  // positions of all frames of x, channels of x
    const bf16 *x, *level_input;
    bf16* out;
    int width, frame_positions;  // of x
    int in_channels, time_factor, space_factor;
    int offset;  // frames of zeros in front of the level's input, or of its duplicates left out
};

// x plus the average of an equal share of the cubes' elements, which count channels, then frames, rows and columns of a cube.
__device__ void add_average_down_positions(const ShortcutArguments& a) {
    const int vectors = a.tile.num_columns / 8;
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= i64(a.tile.num_rows) * vectors) return;
    const int position = int(index / vectors), first = int(index % vectors) * 8, side = a.space_factor, cube = a.time_factor * side * side;
    const int frame = position / a.frame_positions, row = position % a.frame_positions / a.width, column = position % a.width;
    const int share = a.in_channels * cube / a.tile.num_columns, in_width = a.width * side;
    float value[8];
    load<kFull>(a.x + index * 8, value);
    for (int i = 0; i < 8; ++i) {
        float sum = 0.0f;
        for (int element = (first + i) * share; element < (first + i + 1) * share; ++element) {
            const int in_frame = frame * a.time_factor + element / (side * side) % a.time_factor - a.offset;
            if (in_frame < 0) continue;
            const int in_row = row * side + element / side % side, in_column = column * side + element % side;
            const i64 in_position = i64(in_frame) * a.frame_positions * side * side + i64(in_row) * in_width + in_column;
            sum += __uint_as_float(u32(a.level_input[in_position * a.in_channels + element / cube].bits) << 16);
        }
        value[i] += sum / share;
    }
    store<kFull>(a.out + index * 8, value);
}

// x plus the level's input, each channel repeated to fill the channels of x times the places of a cube.
__device__ void add_duplicate_up_positions(const ShortcutArguments& a) {
    const int vectors = a.tile.num_columns / 8;
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= i64(a.tile.num_rows) * vectors) return;
    const int position = int(index / vectors), first = int(index % vectors) * 8, side = a.space_factor, cube = a.time_factor * side * side;
    const int frame = position / a.frame_positions + a.offset, row = position % a.frame_positions / a.width, column = position % a.width;
    const int repeats = a.tile.num_columns * cube / a.in_channels;
    const i64 in_position = i64(frame / a.time_factor) * (a.frame_positions / (side * side)) + i64(row / side) * (a.width / side) + column / side;
    const int place = (frame % a.time_factor * side + row % side) * side + column % side;
    float value[8];
    load<kFull>(a.x + index * 8, value);
    for (int i = 0; i < 8; ++i) {
        const int channel = ((first + i) * cube + place) / repeats;
        value[i] += __uint_as_float(u32(a.level_input[in_position * a.in_channels + channel].bits) << 16);
    }
    store<kFull>(a.out + index * 8, value);
}

struct SoftmaxArguments {
    Tile tile;  // queries, keys rounded up to a multiple of 8
    const float* scores;
    bf16* out;
    int num_keys;
    float scale;
};

// A block per query; keys beyond the last get zero.
__device__ void softmax_queries(const SoftmaxArguments& a) {
    __shared__ float partial[2][kMaxWarps];
    const float* scores = a.scores + i64(blockIdx.x) * a.tile.num_columns;
    bf16* out = a.out + i64(blockIdx.x) * a.tile.num_columns;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    float greatest = __int_as_float(0xff800000);
    for (int key = threadIdx.x; key < a.num_keys; key += blockDim.x) greatest = fmaxf(greatest, scores[key]);
    for (int step = 16; step > 0; step /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, step));
    if (lane == 0) partial[0][warp] = greatest;
    __syncthreads();
    for (int i = 0; i < num_warps; ++i) greatest = fmaxf(greatest, partial[0][i]);
    float sum = 0.0f;
    for (int key = threadIdx.x; key < a.num_keys; key += blockDim.x) sum += __expf((scores[key] - greatest) * a.scale);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) partial[1][warp] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < num_warps; ++i) sum += partial[1][i];
    const float inverse = 1.0f / sum;
    for (int first = 8 * threadIdx.x; first < a.tile.num_columns; first += 8 * blockDim.x) {
        float value[8];
        load<kFull>(scores + first, value);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = first + i < a.num_keys ? __expf((value[i] - greatest) * a.scale) * inverse : 0.0f;
        store<kFull>(out + first, value);
    }
}

struct TransposeArguments {
    Tile tile;  // rows and columns of x
    Rows<bf16> x;
    bf16* out;  // [columns, padded]; what is beyond x's rows becomes zero
    int padded;
};

__device__ void transpose_tiles(const TransposeArguments& a) {
    __shared__ bf16 tile[kTransposeSide][kTransposeSide + 2];
    const int across = (a.tile.num_columns + kTransposeSide - 1) / kTransposeSide;
    const int row = int(blockIdx.x) / across * kTransposeSide, column = int(blockIdx.x) % across * kTransposeSide;
    const int lane = threadIdx.x % kTransposeSide;
    for (int i = threadIdx.x / kTransposeSide; i < kTransposeSide; i += blockDim.x / kTransposeSide) {
        const bool inside = row + i < a.tile.num_rows && column + lane < a.tile.num_columns;
        tile[i][lane] = inside ? *a.x.at(row + i, column + lane) : bf16{0};
    }
    __syncthreads();
    for (int i = threadIdx.x / kTransposeSide; i < kTransposeSide; i += blockDim.x / kTransposeSide) {
        if (column + i < a.tile.num_columns && row + lane < a.padded) a.out[i64(column + i) * a.padded + row + lane] = tile[lane][i];
    }
}
