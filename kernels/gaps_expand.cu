// The dense rows of slices of a gap stream (see gaps.cu), one value after another: for streams whose rows are too
// uneven for the ring of gaps_tensor.cu, which does the same several times as fast.
//
// y: [rows, columns], zeros; rows go as `order` says, or one after another. Macros: GAP, PARTS.

#define QUADS (GAP == 3 ? 6 : 5)
#define PER_WORD (GAP == 3 ? 10 : 8)
#define COUNT ((QUADS - 1) * 8)
#define ROWS (32 / PARTS)

extern "C" __global__ void __launch_bounds__(256)
gaps_expand(const uint4* __restrict__ stream, const u16* __restrict__ starts, const int* __restrict__ first,
            const int* __restrict__ order, u16* __restrict__ y, int rows, int columns, int first_slice) {
    const int lane = threadIdx.x & 31, slice = first_slice + blockIdx.x;
    const size_t before = first[slice];
    const int turns = first[slice + 1] - first[slice];
    const int row = lane % ROWS, place = order ? order[slice * ROWS + row] : blockIdx.x * ROWS + row;
    u16* to = y + (size_t)max(place, 0) * columns;
    for (int turn = threadIdx.x >> 5; turn < turns; turn += 8) {
        const uint4* from = stream + (before + turn) * QUADS * 32 + lane;
        int at = starts[(before + turn) * 32 + lane];
        u32 words[QUADS * 4];
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const uint4 v = load_weights(from + i * 32, true);
            words[4 * i] = v.x;
            words[4 * i + 1] = v.y;
            words[4 * i + 2] = v.z;
            words[4 * i + 3] = v.w;
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++, at++) {
            at += words[(QUADS - 1) * 4 + i / PER_WORD] >> (GAP * (i % PER_WORD)) & ((1 << GAP) - 1);
            const u16 value = words[i / 2] >> (16 * (i & 1));
            if (value && place < rows) to[at] = value;
        }
    }
}
