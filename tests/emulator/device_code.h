// CUDA C++ as a CPU runs it: what the kernels use of the language and of its intrinsics. The threads of a block are fibers of one
// thread that take turns at barriers, blocks follow each other. tests/emulator/nvrtc.py puts the kernels' source behind this text.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#define __device__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct Extent { unsigned x; };
static Extent threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename To, typename From> static To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
static float __int_as_float(int bits) { return same_bits<float>(bits); }
static unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }

static unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
static unsigned __vmaxu2(unsigned a, unsigned b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }
static float __fdividef(float a, float b) { return a / b; }
static float rsqrtf(float a) { return 1.0f / sqrtf(a); }
static float device_expf(float a) { return expf(a); }
#define __expf device_expf  // glibc has the name for itself

// Threads

constexpr int kLanes = 32, kMostThreads = 1024, kStackBytes = 64 << 10;

struct Barrier {
    int arrived, generation;
};
struct Fiber {
    std::unique_ptr<char[]> stack;
    jmp_buf state;
    bool begun, done, parity;
};
static Fiber fibers[kMostThreads];
static Barrier warp_barriers[kMostThreads / kLanes], block_barrier;
static unsigned exchanged[kMostThreads / kLanes][2][kLanes];  // by parity, so that the next exchange does not meet the last one's readers
static jmp_buf scheduler;
static int current, progress;  // whose turn it is; how many barriers were passed and threads ended
static void (*kernel)(const void*);
static const void* arguments;

static int warp() { return current / kLanes; }
static int lane() { return current % kLanes; }

static void give_turn() {
    if (_setjmp(fibers[current].state) == 0) _longjmp(scheduler, 1);
}

static void wait_at(Barrier& barrier, int expected) {
    const int generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier = {0, generation + 1};
        ++progress;
    }
    while (barrier.generation == generation) give_turn();
}
static void wait_for_warp() { wait_at(warp_barriers[warp()], kLanes); }
static void __syncwarp() { wait_for_warp(); }
static void __syncthreads() { wait_at(block_barrier, blockDim.x); }

static void run_fiber() {
    for (;;) {  // one turn of the loop for each block
        kernel(arguments);
        fibers[current].done = true;
        ++progress;
        give_turn();
    }
}

static __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.state, 1);
    fiber.begun = true;
    fiber.stack.reset(new char[kStackBytes]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
}

static void run_block(int num_threads) {
    block_barrier = {};
    for (int i = 0; i < kMostThreads / kLanes; ++i) warp_barriers[i] = {};
    for (int thread = 0; thread < num_threads; ++thread) fibers[thread].done = fibers[thread].parity = false;
    for (int idle = 0, left = num_threads; left > 0;) {
        const int before = progress;
        for (int thread = 0; thread < num_threads; ++thread) {
            if (fibers[thread].done) continue;
            current = threadIdx.x = thread;
            resume(fibers[thread]);
            left -= fibers[thread].done;
        }
        idle = progress == before ? idle + 1 : 0;
        if (idle > 1) {
            fprintf(stderr, "emulated kernel: %d of %d threads wait at a barrier that the others never reach\n", left, num_threads);
            abort();
        }
    }
}

extern "C" void run_grid(void (*chosen)(const void*), const void* given, int num_blocks, int num_threads) {
    kernel = chosen, arguments = given;
    gridDim.x = num_blocks, blockDim.x = num_threads;
    for (int block = 0; block < num_blocks; ++block) {
        blockIdx.x = block;
        run_block(num_threads);
    }
}

// What threads of a warp give each other

static const unsigned (&exchange(unsigned value))[kLanes] {
    auto& slots = exchanged[warp()][fibers[current].parity];
    fibers[current].parity = !fibers[current].parity;
    slots[lane()] = value;
    wait_for_warp();
    return slots;
}
template <typename T> static T __shfl_sync(unsigned, T value, int source) {
    return same_bits<T>(exchange(same_bits<unsigned>(value))[source]);
}
template <typename T> static T __shfl_xor_sync(unsigned mask, T value, int other) { return __shfl_sync(mask, value, lane() ^ other); }
static unsigned __reduce_max_sync(unsigned, unsigned value) {
    auto& slots = exchange(value);
    return *std::max_element(slots, slots + kLanes);
}
static void atomicMax(unsigned* address, unsigned value) { *address = max(*address, value); }

// PTX instructions, each a function of the operands that the kernels' asm statements name

static unsigned bf16_bits(float value) {
    if (std::isnan(value)) return 0x7fff;
    const unsigned bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static void ptx_bf16_pair(unsigned& pair, float high, float low) { pair = bf16_bits(high) << 16 | bf16_bits(low); }

// E4M3: sign 1, exponent 4 with bias 7, mantissa 3; numbers below 2^-6 are multiples of 2^-9, the last code is NaN.
static unsigned e4m3_bits(float value) {
    const unsigned sign = std::signbit(value) ? 0x80 : 0;
    if (std::isnan(value)) return sign | 0x7f;
    if (fabsf(value) >= 448.0f) return sign | 0x7e;
    const int exponent = max(value == 0.0f ? -6 : std::ilogb(value), -6);
    const float mantissa = nearbyintf(ldexpf(fabsf(value), 3 - exponent));  // 0..16, carried into the exponent by the addition
    return sign | ((exponent + 6) * 8 + int(mantissa));
}
static void ptx_e4m3_pair(unsigned short& pair, float high, float low) { pair = e4m3_bits(high) << 8 | e4m3_bits(low); }

static unsigned half_bits_of_e4m3(unsigned code) {
    const unsigned sign = (code & 0x80) << 8, magnitude = code & 0x7f;
    if (magnitude == 0x7f) return sign | 0x7fff;
    const float value = magnitude < 8 ? ldexpf(magnitude, -9) : ldexpf(8 + magnitude % 8, int(magnitude / 8) - 10);
    return sign | (value == 0.0f ? 0 : (__float_as_uint(value) >> 13) - (112 << 10));  // every one of them is a normal half
}
static void ptx_halves_of_e4m3(unsigned& pair, unsigned short codes) {
    pair = half_bits_of_e4m3(codes >> 8) << 16 | half_bits_of_e4m3(codes & 0xff);
}

static float half_value(unsigned bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : exponent == 0 ? ldexpf(mantissa, -24) : ldexpf(1024 + mantissa, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}
static void ptx_floats_of_halves(float& low, float& high, unsigned pair) {
    low = half_value(pair & 0xffff), high = half_value(pair >> 16);
}

// d += a b, a [16, 16] and b [16, 8] of bf16, d [16, 8]: every thread reads the whole fragments and sums its four numbers in order.
static unsigned fragments[kMostThreads / kLanes][kLanes][6];
static void ptx_mma(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
    auto& fragment = fragments[warp()];
    memcpy(fragment[lane()], own, sizeof own);
    wait_for_warp();
    float* sums[4] = {&d0, &d1, &d2, &d3};
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4, half = i / 2, column = lane() % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const unsigned a = fragment[row * 4 + k % 8 / 2][half + k / 8 * 2], b = fragment[column * 4 + k % 8 / 2][4 + k / 8];
            *sums[i] += __uint_as_float(k % 2 ? a & 0xffff0000u : a << 16) * __uint_as_float(k % 2 ? b & 0xffff0000u : b << 16);
        }
    }
    wait_for_warp();
}

// Addresses in shared memory count from here.
static char shared_origin;
static unsigned __cvta_generic_to_shared(const void* address) { return unsigned(static_cast<const char*>(address) - &shared_origin); }

// Lane 8 i + r names row r of matrix i, of 8 x 8 halves; a thread gets the pair that begins at row 2 (lane % 4), column lane / 4.
static const uint16_t* matrix_rows[kMostThreads / kLanes][kLanes];
static void ptx_ldmatrix_transposed(unsigned& b0, unsigned& b1, unsigned& b2, unsigned& b3, unsigned address) {
    auto& rows = matrix_rows[warp()];
    rows[lane()] = reinterpret_cast<const uint16_t*>(&shared_origin + int(address));
    if (reinterpret_cast<uintptr_t>(rows[lane()]) % 16) {
        fprintf(stderr, "emulated kernel: ldmatrix reads a row that is not aligned\n");
        abort();
    }
    wait_for_warp();
    unsigned* pairs[4] = {&b0, &b1, &b2, &b3};
    for (int i = 0; i < 4; ++i) {
        const int first = 8 * i + lane() % 4 * 2, column = lane() / 4;
        *pairs[i] = rows[first][column] | unsigned(rows[first + 1][column]) << 16;
    }
    wait_for_warp();
}
