// The dense rows of slices of a gap stream (see gaps.cu), in the order in which slices hold them.
//
// y: [slices of this launch · rows of one, columns]. A block makes WIDTH columns of a slice in shared memory
// and writes them out in one piece. Macros: GAP, PARTS, WIDTH.

#define QUADS (GAP == 3 ? 6 : 5)
#define PER_WORD (GAP == 3 ? 10 : 8)
#define COUNT ((QUADS - 1) * 8)
#define ROWS (32 / PARTS)
#define WARPS 8

extern "C" __global__ void __launch_bounds__(WARPS * 32)
gaps_expand(const uint4* __restrict__ stream, const u16* __restrict__ starts,
            const int* __restrict__ first, uint4* __restrict__ y, int columns, int warps, int begin) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x & 31, slice = begin + blockIdx.x;
    const int low_end = blockIdx.y * WIDTH, high_end = low_end + WIDTH;
    const int blocks = first[slice + 1] - first[slice];
    for (int i = threadIdx.x; i < ROWS * WIDTH / 8; i += WARPS * 32)
        shared[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    u16* row = (u16*)shared + lane % ROWS * WIDTH - low_end;
    const size_t before = (size_t)first[slice] * warps;
    const int turns = (first[slice + 1] - first[slice]) * warps;
    const u16* start = starts + before * 32 + lane;
    for (int turn = threadIdx.x >> 5; turn < turns; turn += WARPS) {
        int at = start[turn * 32];
        // Where the next block of a lane begins; what comes behind the last one's is not known here.
        const int stop = turn + 1 < turns ? start[(turn + 1) * 32] : columns;
        if (!__any_sync(ALL, at < high_end && stop > low_end)) continue;
        const uint4* from = stream + (before + turn) * QUADS * 32 + lane;
        u32 words[QUADS * 4];
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const uint4 v = from[i * 32];
            words[4 * i] = v.x;
            words[4 * i + 1] = v.y;
            words[4 * i + 2] = v.z;
            words[4 * i + 3] = v.w;
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            at += words[(QUADS - 1) * 4 + i / PER_WORD] >> (GAP * (i % PER_WORD)) & ((1 << GAP) - 1);
            const u16 value = words[i / 2] >> (16 * (i & 1)) & 0xffff;
            if (at >= low_end && at < high_end && value) row[at] = value;
            at++;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * WIDTH / 8; i += WARPS * 32) {
        const int column = low_end + i % (WIDTH / 8) * 8;
        if (column < columns)
            y[(((size_t)blockIdx.x * ROWS + i / (WIDTH / 8)) * columns + column) / 8] = shared[i];
    }
}
