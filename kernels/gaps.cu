// y = x Wᵀ + b for W with zeros anywhere: a lane follows a row, from one non-zero to the next.
//
// stream: [slices][turns][QUADS][32 lanes] of 16 bytes: the non-zeros of a row's part, 8 to a quad,
//         then one quad of gaps, how many columns lie between a non-zero and the one before.
// starts: [slices][turns][32 lanes] u16, the column at which a lane's block begins.
// first:  [slices + 1], turns before each slice, or null where all have `turns`. A warp takes so many that follow
//         one another as divide them by the warps; the last warps may have fewer.
// order:  [slices · rows of one], which row a place in a slice is (-1: none), or null for the identity.
// x: [tokens, columns]; y: [tokens, rows], or with glu [tokens, rows / 2], see swiglu: then 16 rows each are in
// order; bias: [rows], or [tokens, rows] where bias_step is `rows` and not 0, or null.
//
// Macros: GAP bits a gap; PARTS lanes share a row; TOKENS 1, 2 or 4, of which `tokens` are real; WARPS
// at most, of one block or of several on a multiprocessor. Sums are fp32, in an order that depends on the shape alone.
//
// One token on an H100: 2.8 to 3.0 TB/s of the 3.05 that mere reading reaches. By Nsight Compute warps wait for loads
// three quarters of the time; a quarter of the issue slots and two fifths of shared memory's cycles are taken, by
// gathers of 2.8 wavefronts each. What is missing is the start of blocks, and how they divide: of 14336 rows
// multiprocessors get three blocks or four. Did not help: to have weights in L2 ahead of time (13 to 25 % slower, x
// comes behind them), x as fp32 (4 %), more blocks or fewer than numerics.gaps.choose_shape() asks for.

#define QUADS (GAP == 3 ? 6 : 5)
#define PER_WORD (GAP == 3 ? 10 : 8)
#define COUNT ((QUADS - 1) * 8)
#define ROWS (32 / PARTS)
// Bytes of a column of x in shared memory.
#define COLUMN (TOKENS * 2)

__device__ __forceinline__ u32 gap_bytes(u32 word, int i) {
    const u32 mask = ((1u << GAP) - 1) << (GAP * i);
    // A shift by the difference of both, in one instruction.
    const int shift = GAP * i - (TOKENS == 1 ? 1 : TOKENS == 2 ? 2 : 3);
    return shift >= 0 ? (word & mask) >> shift : (word & mask) << -shift;
}

// Without the 1 the compiler saves registers, and puts off loads until their values are needed.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
gaps(const uint4* __restrict__ stream, const u16* __restrict__ starts, const int* __restrict__ first,
     const int* __restrict__ order, const u16* __restrict__ x, u16* __restrict__ y,
     const u16* __restrict__ bias, int rows, int columns, int padded, int tokens, int turns,
     int glu, int bias_step) {
    extern __shared__ uint4 shared[];
    __shared__ float parts[WARPS][ROWS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int warps = blockDim.x >> 5, slice = blockIdx.x;
    size_t before = (size_t)slice * turns;
    if (first) {
        before = first[slice];
        turns = first[slice + 1] - first[slice];
    }
    const int piece = (u32)(turns + warps - 1) / (u32)warps;
    const int blocks = min(piece, turns - warp * piece);
    before += warp * piece;
    const uint4* from = stream + before * QUADS * 32 + lane;
    uint4 now[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++) now[i] = load_weights(from + i * 32, blocks > 0);
    u32 at = shared_address(shared);
    if (blocks > 0) at += COLUMN * (u32)starts[before * 32 + lane];
    let_next_start();
    wait_for_input();

    // Without a way through registers: a block cannot do much before it has x.
#if TOKENS == 1
    for (int i = threadIdx.x; i < padded / 8; i += blockDim.x) {
        const bool real = i < columns / 8;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared + i)),
                     "l"((const uint4*)x + (real ? i : 0)), "r"(real ? 16 : 0)
                     : "memory");
    }
    asm volatile("cp.async.commit_group;\n cp.async.wait_group 0;" ::: "memory");
#else
    for (int i = threadIdx.x; i < padded / 8; i += blockDim.x) {
        u32 in[TOKENS][4], out[4][2][TOKENS / 2];  // pairs of columns, a column, pairs of tokens
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (i < columns / 8 && t < tokens) v = ((const uint4*)x)[(size_t)t * (columns / 8) + i];
            in[t][0] = v.x, in[t][1] = v.y, in[t][2] = v.z, in[t][3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int p = 0; p < TOKENS / 2; p++) {
                out[j][0][p] = __byte_perm(in[2 * p][j], in[2 * p + 1][j], 0x5410);
                out[j][1][p] = __byte_perm(in[2 * p][j], in[2 * p + 1][j], 0x7632);
            }
        const u32* words = &out[0][0][0];
#pragma unroll
        for (int k = 0; k < TOKENS; k++)
            shared[i * TOKENS + k] = make_uint4(words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]);
    }
#endif
    __syncthreads();

    // Four chains at one token: the next product need not wait for the last sum.
    constexpr int CHAINS = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
    float sum[CHAINS][TOKENS];
#pragma unroll
    for (int c = 0; c < CHAINS; c++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sum[c][t] = 0;

    for (int block = 0; block < blocks; block++) {
        const u32 gap[4] = {now[QUADS - 1].x, now[QUADS - 1].y, now[QUADS - 1].z, now[QUADS - 1].w};
        u32 value[COUNT / 2];
#pragma unroll
        for (int i = 0; i < QUADS - 1; i++) {
            value[4 * i] = now[i].x;
            value[4 * i + 1] = now[i].y;
            value[4 * i + 2] = now[i].z;
            value[4 * i + 3] = now[i].w;
        }
        from += QUADS * 32;
#pragma unroll
        for (int i = 0; i < QUADS; i++) now[i] = load_weights(from + i * 32, block + 1 < blocks);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            at += gap_bytes(gap[i / PER_WORD], i % PER_WORD);
            const float w = i & 1 ? high(value[i / 2]) : low(value[i / 2]);
            float* to = sum[i % CHAINS];
            // Columns that follow one another without a gap are COLUMN bytes apart: the constant offset.
#if TOKENS == 1
            u16 v;
            asm("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at + i * COLUMN));
            to[0] = fmaf(w, widen(v), to[0]);
#elif TOKENS == 2
            u32 v;
            asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at + i * COLUMN));
            to[0] = fmaf(w, low(v), to[0]);
            to[1] = fmaf(w, high(v), to[1]);
#else
            u32 v[2];
            asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(at + i * COLUMN));
#pragma unroll
            for (int t = 0; t < 2; t++) {
                to[2 * t] = fmaf(w, low(v[t]), to[2 * t]);
                to[2 * t + 1] = fmaf(w, high(v[t]), to[2 * t + 1]);
            }
#endif
        }
        at += COUNT * COLUMN;
    }

#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float total = sum[0][t];
#pragma unroll
        for (int c = 1; c < CHAINS; c++) total += sum[c][t];
#pragma unroll
        for (int offset = 16; offset >= ROWS; offset >>= 1)
            total += __shfl_xor_sync(ALL, total, offset);
        if (t >= tokens) break;
        if (t) __syncthreads();
        if (lane < ROWS) parts[warp][lane] = total;
        __syncthreads();
        if (threadIdx.x < ROWS) {
            const int place = slice * ROWS + threadIdx.x;
            const int row = order ? order[place] : place;
            auto all = [&](int further) {
                float sum = bias ? widen(bias[(size_t)t * bias_step + row + further]) : 0;
#pragma unroll (TOKENS == 1 ? WARPS : 8)
                for (int w = 0; w < WARPS; w++)
                    if (w < warps) sum += parts[w][threadIdx.x + further];
                return sum;
            };
            if (row >= 0 && row < rows) {
                if (!glu)
                    y[(size_t)t * rows + row] = narrow(all(0));
                else if (!(threadIdx.x & 8))
                    y[(size_t)t * (rows / 2) + swiglu_row(row)] = narrow(swiglu(all(0), all(8)));
            }
        }
    }
}
