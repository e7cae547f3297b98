// Latents [C, T, h, w] to a transformer's patches, and what it says of each patch back to latents: float32, moved as it is.
#pragma once

#include "rows.cuh"

struct PatchArguments {
    Tile tile;  // patches, numbers of each
    const float* x;
    float* out;
    int channels, frames, height, width;          // of the latents, counted in patches
    int patch_frames, patch_height, patch_width;  // of a patch, in numbers
};

// One number of latents, and where it lies in its patch.
struct PatchNumber {
    int channel, frame, row, column;  // of latents
    __device__ i64 in_latents(const PatchArguments& a) const {
        const i64 rows = i64(a.frames) * a.patch_frames * channel + frame;
        return (rows * a.height * a.patch_height + row) * a.width * a.patch_width + column;
    }
    __device__ i64 patch(const PatchArguments& a) const {
        return (i64(frame / a.patch_frames) * a.height + row / a.patch_height) * a.width + column / a.patch_width;
    }
    __device__ int within(const PatchArguments& a) const {
        return (frame % a.patch_frames * a.patch_height + row % a.patch_height) * a.patch_width + column % a.patch_width;
    }
};

// Patches have their channels slowest; one thread for each number of them.
__device__ void cut_patch_numbers(const PatchArguments& a) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= i64(a.tile.num_rows) * a.tile.num_columns) return;
    int patch = int(index / a.tile.num_columns), number = int(index % a.tile.num_columns);
    PatchNumber at;
    at.column = patch % a.width * a.patch_width + number % a.patch_width;
    patch /= a.width, number /= a.patch_width;
    at.row = patch % a.height * a.patch_height + number % a.patch_height;
    patch /= a.height, number /= a.patch_height;
    at.frame = patch * a.patch_frames + number % a.patch_frames;
    at.channel = number / a.patch_frames;
    a.out[index] = a.x[at.in_latents(a)];
}

// Patches have their channels fastest; one thread for each number of the latents.
__device__ void join_patch_numbers(const PatchArguments& a) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= i64(a.tile.num_rows) * a.tile.num_columns) return;
    const int columns = a.width * a.patch_width, rows = a.height * a.patch_height, frames = a.frames * a.patch_frames;
    const int line = int(index / columns), plane = line / rows;
    const PatchNumber at = {plane / frames, plane % frames, line % rows, int(index % columns)};
    a.out[index] = a.x[at.patch(a) * a.tile.num_columns + at.within(a) * a.channels + at.channel];
}
