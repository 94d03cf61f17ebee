// The dense rows of a 2:4 stream (see sparse24.cu): y [rows, columns] of the bands from `band` on.
// A warp expands a chunk of a band; with MIXED a block its pieces, onto zeros. columns: divisible by 8.

// Two values and where they stand in a group of four; the places are never the same.
__device__ __forceinline__ unsigned long long group_of(u32 values, u32 places) {
    return (unsigned long long)(values & 0xffff) << (16 * (places & 3)) |
           (unsigned long long)(values >> 16) << (16 * (places >> 2));
}

#if MIXED
#define THREADS 256
#else
#define THREADS 64
#endif
#define PITCH 34  // of a row in shared memory, in 16 bytes: it begins 8 banks behind the one before

extern "C" __global__ void __launch_bounds__(THREADS)
sparse24_expand(const uint4* __restrict__ stream, const u32* __restrict__ entries,
                const u32* __restrict__ metadata, const int* __restrict__ starts, u16* __restrict__ y,
                int rows, int columns, int chunks, int band) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#if MIXED
    const int local = blockIdx.x, begin = starts[2 * (band + local)];
    const int count = starts[2 * (band + local) + 2] - begin;
    for (int piece = threadIdx.x >> 5; piece < count; piece += 8) {
        const u32 entry = entries[begin + piece];
        const uint4* from = stream + (size_t)(begin + piece) * 128 + lane;
        const u32* words = metadata + (size_t)(starts[2 * (band + local) + 1] + (entry >> 11 & 0xfffff)) * 64;
#pragma unroll
        for (int unit = 0; unit < 4; unit++) {
            const uint4 v = from[unit * 32];
            const u32 values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int part = 0; part < 4; part++) {
                const int half = part >> 1, row = local * 16 + g + 8 * (part & 1);
                const int first = (entry & 0x7ff) * 64;
                u16* to = y + (size_t)row * columns;
                if (row >= rows) continue;
                if (entry >> 31) {
                    const u32 word = words[(4 * g + 2 * (unit & 1) + half) * 2 + (unit >> 1)];
                    const int column = first + unit * 32 + half * 16 + t * 4;
                    const u32 places = word >> (16 * (part & 1) + 4 * t) & 15;
                    if (column < columns) *(unsigned long long*)(to + column) = group_of(values[part], places);
                } else {
                    const int column = first + unit * 16 + half * 8 + t * 2;
                    if (column < columns) *(u32*)(to + column) = values[part];
                }
            }
        }
    }
#else
    // Whole rows of a chunk leave a warp together, 512 bytes each, by way of shared memory.
    extern __shared__ uint4 staged[];
    uint4* mine = staged + (threadIdx.x >> 5) * 16 * PITCH;
    const int work = blockIdx.x * 2 + (threadIdx.x >> 5), local = work / chunks, chunk = work % chunks;
    if (local * 16 >= rows) return;
    const uint4* from = stream + ((size_t)(band + local) * chunks + chunk) * 288;
    uint4 values[8];
    u32 places[8][2];
#pragma unroll
    for (int unit = 0; unit < 8; unit++) values[unit] = load_weights(from + unit * 32 + lane, true);
#pragma unroll
    for (int unit = 0; unit < 8; unit++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            places[unit][half] = ((const u32*)(from + 256 + 4 * g + 2 * (unit & 1) + half))[unit >> 1];
    wait_for_input();  // y may still be read
#pragma unroll
    for (int unit = 0; unit < 8; unit++) {
        const u32 word[4] = {values[unit].x, values[unit].y, values[unit].z, values[unit].w};
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const int half = part >> 1, row = g + 8 * (part & 1);
            unsigned long long* to = (unsigned long long*)(mine + row * PITCH) + unit * 8 + half * 4 + t;
            *to = group_of(word[part], places[unit][half] >> (16 * (part & 1) + 4 * t) & 15);
        }
    }
    __syncwarp();
    const int column = chunk * 256 + lane * 8;
    if (column >= columns) return;
    u16* to = y + (size_t)local * 16 * columns + column;
    const int last = min(16, rows - local * 16);
#pragma unroll
    for (int row = 0; row < 16; row++)
        if (row < last) *(uint4*)(to + (size_t)row * columns) = mine[row * PITCH + lane];
#endif
}
