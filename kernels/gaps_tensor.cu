// y = x Wᵀ + b for a gap stream (see gaps.cu) and up to 32 tokens, by tensor cores; or its dense rows.
//
// The rows of a slice are made dense a stretch of columns at a time, in a ring in shared memory. Warps take one
// turn after another, so that all of them are about where the slowest row is; columns that every row has passed
// are multiplied and made zero again.
//
// stream, starts, first, order, x, y, bias, turns, glu, bias_step: as in gaps.cu. A block of this kernel has as many
// warps as keep a round within the ring; slices of a launch count from `first_slice`.
//
// Macros: GAP bits a gap; PARTS lanes share a row; TILES of 8 tokens, or 0: y is [rows, columns], where rows go
// as `order` says, or one after another; RING columns, a power of two; WARPS at most; BLOCKS that fit a multiprocessor.
// Sums are fp32, in an order that depends on the weights and the launch alone.

#define QUADS (GAP == 3 ? 6 : 5)
#define PER_WORD (GAP == 3 ? 10 : 8)
#define COUNT ((QUADS - 1) * 8)
#define ROWS (32 / PARTS)
#define BANDS (ROWS / 16)
#if PARTS == 1
typedef uint4 Rows;
#else
typedef uint2 Rows;
#endif
// Units of which a warp asks for x at once.
#define AHEAD (TILES > 2 ? 1 : PARTS == 2 || RING > 1024 ? 2 : 3)

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

// Of 8 columns: rows of two 16-bit values lie in the ring as this operand has them in registers.
#define MMA(sum, a0, a1, b)                                                                           \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 "                        \
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                                \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                             \
                 : "r"(a0), "r"(a1), "r"(b))

// The ring: [pair of columns][32 lanes' rows] words of two 16-bit values, so that a lane writes to a bank of its
// own. Operands are read as four or two rows of a lane's group at once; where a word lies depends on bits 3 and
// 4 of its column too, or the lanes of a group would meet in one bank. The word of a lane at columns 0 and 1:
__device__ __forceinline__ u32 place(u32 lane) {
    const u32 upper = lane >> 4, eight = lane >> 3 & 1, g0 = lane & 1, g1 = lane >> 1 & 1, g2 = lane >> 2 & 1;
#if PARTS == 1
    return eight | upper << 1 | g2 << 2 | g1 << 3 | g0 << 4;
#else
    return eight | g0 << 1 | g2 << 2 | upper << 3 | g1 << 4;
#endif
}

// The gap at place i of a word, times 64.
__device__ __forceinline__ u32 gap_at(u32 word, int i) {
    const u32 mask = ((1u << GAP) - 1) << (GAP * i);
    const int shift = GAP * i - 6;
    return shift >= 0 ? (word & mask) >> shift : (word & mask) << -shift;
}

__device__ __forceinline__ int least(int value) {
    int found;
    asm volatile("redux.sync.min.s32 %0, %1, 0xffffffff;" : "=r"(found) : "r"(value));
    return found;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
gaps_tensor(const uint4* __restrict__ stream, const u16* __restrict__ starts, const int* __restrict__ first,
            const int* __restrict__ order, const uint4* __restrict__ x, u16* __restrict__ y,
            const u16* __restrict__ bias, int rows, int columns, int tokens, int turns, int first_slice,
            int glu, int bias_step) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int slice = first_slice + blockIdx.x;
    size_t before = (size_t)slice * turns;
    if (first) {
        before = first[slice];
        turns = first[slice + 1] - first[slice];
    }
    const uint4* from = stream + before * QUADS * 32 + lane;
    const u16* start = starts + before * 32 + lane;
    uint4 now[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++) now[i] = load_weights(from + (warp * QUADS + i) * 32, warp < turns);
    int at = warp < turns ? start[warp * 32] : 0;
    let_next_start();
    for (int i = threadIdx.x; i < RING * 4; i += blockDim.x) shared[i] = make_uint4(0, 0, 0, 0);

#if TILES
    float sum[BANDS][TILES][4];
#pragma unroll
    for (int b = 0; b < BANDS; b++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[b][n][i] = 0;
#endif
    const u32 own = place(lane) * 4;
    const int group = lane >> 2, quad = lane & 3;
    // What this lane reads of an operand, at columns 0 and 1 of its eight.
    const u32 operand = (place(group) * 4 ^ quad * 16) + quad * 512;

    // Units of 32 columns below `done` are multiplied, those below `stop` will be; the upper lanes' parts begin
    // where the lower ones' end.
    const int last = (columns + 31) / 32;
    int done[PARTS], stop[PARTS], ends[PARTS], shared_from = 0;
    done[0] = 0;
    ends[PARTS - 1] = last;
#if PARTS == 2
    {
        const int upper = start[0];
        done[1] = least(lane >= 16 ? upper : 0xffff) / 32;
        shared_from = done[1];
        ends[0] = (31 - least(lane >= 16 ? -upper : 0)) / 32;
    }
#endif
    const int vectors = columns / 8;
#if TILES
    // What units from `unit` on need of x. Absent tokens repeat the last one, and are not stored; beyond the last
    // column weights are zeros.
    u32 seen[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) seen[n] = min(n * 8 + group, tokens - 1) * vectors;
    auto fetch = [&](uint4(&held)[AHEAD][TILES], int unit, int stop) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++, unit += warps)
            if (unit < stop) {
                const int at = min(unit * 4 + quad, vectors - 1);
#pragma unroll
                for (int n = 0; n < TILES; n++) held[i][n] = x[seen[n] + at];
            }
    };
#endif
    // Take a unit out of the ring: columns 8 · quad to 8 · quad + 7 of this lane's rows.
    auto take = [&](Rows(&v)[4], int part, int unit) {
        char* a = (char*)shared + ((operand ^ part * 32) + (unit * 32 & (RING - 1)) * 64);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = *(Rows*)(a + i * 128);
#pragma unroll
        for (int i = 0; i < 4; i++) *(Rows*)(a + i * 128) = Rows();
    };
#if TILES
    auto multiply = [&](const uint4(&b)[TILES], int part, int unit) {
        Rows v[4];
        take(v, part, unit);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const u32 columns[4] = {b[n].x, b[n].y, b[n].z, b[n].w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                MMA(sum[0][n], v[i].x, v[i].y, columns[i]);
#if PARTS == 1
                MMA(sum[1][n], v[i].z, v[i].w, columns[i]);
#endif
            }
        }
    };
#else
    // Where this lane's rows are in y, and upper lanes' shares of them begin.
    int places[ROWS / 8], begins[ROWS / 8];
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) {
        const int row = i * 8 + group;
        places[i] = order ? order[slice * ROWS + row] : blockIdx.x * ROWS + row;
        if (places[i] >= rows) places[i] = -1;
        begins[i] = PARTS == 2 ? start[16 + row - lane] : 0;
    }
    auto write = [&](int part, int unit) {
        Rows v[4];
        take(v, part, unit);
        const int vector = unit * 4 + quad;
        if (vector >= vectors) return;
        const u32* words = (u32*)v;
#pragma unroll
        for (int i = 0; i < ROWS / 8; i++) {
            if (places[i] < 0) continue;
            uint4* to = (uint4*)y + (size_t)places[i] * vectors + vector;
            const int n = sizeof(Rows) / 4;
            const u32 found[4] = {words[i], words[n + i], words[2 * n + i], words[3 * n + i]};
            if (PARTS == 1 || unit < shared_from || unit >= ends[0]) {
                *to = make_uint4(found[0], found[1], found[2], found[3]);
                continue;
            }
            // Lower and upper lanes each have some of these columns.
#pragma unroll
            for (int c = 0; c < 8; c++)
                if (part == (vector * 8 + c >= begins[i])) ((u16*)to)[c] = found[c / 2] >> (c % 2 * 16);
        }
    };
#endif
    int ahead = warps < turns ? start[warps * 32] : 0;  // where the lanes begin in the next round
    wait_for_input();

    for (int begin = 0; begin < turns; begin += warps) {
        const int next = begin + warps;
        stop[0] = ends[0];
        if (PARTS == 2) stop[PARTS - 1] = last;
        if (next < turns) {
#if PARTS == 1
            stop[0] = least(ahead) / 32;
#else
            stop[0] = min(ends[0], least(lane < 16 ? ahead : 0xffff) / 32);
            stop[1] = least(lane < 16 ? 0xffff : ahead) / 32;
#endif
        }
        ahead = next + warps < turns ? start[(next + warps) * 32] : 0;
#if TILES
        // What is first needed of x is asked for before anything is written, which takes about as long.
        uint4 held[PARTS][AHEAD][TILES];
#pragma unroll
        for (int part = 0; part < PARTS; part++) fetch(held[part], done[part] + warp, stop[part]);
#endif
        const int mine = next + warp < turns ? start[(next + warp) * 32] : 0;
        const bool more = next + warp < turns;
        const uint4* upcoming = from + (next + warp) * QUADS * 32;
        uint4 old[QUADS];
#pragma unroll
        for (int i = 0; i < QUADS; i++) old[i] = now[i];
#pragma unroll
        for (int i = 0; i < QUADS; i++) now[i] = load_weights(upcoming + i * 32, more);
        __syncthreads();  // what was multiplied is zero again
        if (begin + warp < turns) {
            const u32 gaps[4] = {old[QUADS - 1].x, old[QUADS - 1].y, old[QUADS - 1].z, old[QUADS - 1].w};
            u32 column = (u32)at << 6;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const uint4 v = old[i / 8];
                const u32 word = i / 2 % 4 == 0 ? v.x : i / 2 % 4 == 1 ? v.y : i / 2 % 4 == 2 ? v.z : v.w;
                column += gap_at(gaps[i / PER_WORD], i % PER_WORD) + (i ? 64 : 0);
                const u32 pair = column & (RING - 2) << 6;
                const u32 to = pair ^ own ^ (column >> 5 & 0x32);
                *(u16*)((char*)shared + to) = i & 1 ? word >> 16 : word;
            }
        }
        at = mine;
        __syncthreads();
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#if TILES
            for (int unit = done[part] + warp; unit < stop[part];) {
#pragma unroll
                for (int i = 0; i < AHEAD; i++, unit += warps)
                    if (unit < stop[part]) multiply(held[part][i], part, unit);
                if (unit < stop[part]) fetch(held[part], unit, stop[part]);
            }
#else
            for (int unit = done[part] + warp; unit < stop[part]; unit += warps) write(part, unit);
#endif
            done[part] = stop[part];
        }
    }

#if TILES
    // Add up what warps found, in the ring: [warp][token][row].
    __syncthreads();
    float* parts = (float*)shared;
#pragma unroll
    for (int b = 0; b < BANDS; b++)
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const int token = n * 8 + quad * 2;
            float* to = parts + (warp * tokens + token) * ROWS + b * 16 + group;
            if (token < tokens) {
                to[0] = sum[b][n][0];
                to[8] = sum[b][n][2];
            }
            if (token + 1 < tokens) {
                to[ROWS] = sum[b][n][1];
                to[ROWS + 8] = sum[b][n][3];
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * ROWS; i += blockDim.x) {
        const int place = slice * ROWS + i % ROWS, token = i / ROWS;
        const int row = order ? order[place] : place;
        auto total = [&](int further) {
            float all = bias ? widen(bias[(size_t)token * bias_step + row + further]) : 0;
            for (int w = 0; w < warps; w++) all += parts[w * tokens * ROWS + i + further];
            return all;
        };
        if (row < 0 || row >= rows || glu && i & 8) continue;
        if (glu)
            y[(size_t)token * (rows / 2) + swiglu_row(row)] = narrow(swiglu(total(0), total(8)));
        else
            y[(size_t)token * rows + row] = narrow(total(0));
    }
#endif
}
