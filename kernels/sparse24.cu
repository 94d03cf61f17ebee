// y = x Wᵀ + b for W with at most two non-zeros in four, everywhere or in most places, by tensor cores.
//
// A band is 16 rows. Without MIXED, stream: [bands][chunks][9][32 lanes] of 16 bytes; a chunk is 256 columns:
// eight operands of mma.sp.m16n8k32 in register order, and their metadata.
//
// MIXED: a band is a list of pieces, ascending by column, each [4][32 lanes] of 16 bytes: 128 columns that are
// 2:4, or 64 that are dense, as four operands of mma.m16n8k16. Columns of zeros are in no piece.
// entries: one word for each piece: its first column / 64 in bits 0 to 10, and for 2:4, with bit 31, its
//          number among those of the band from bit 11 on.
// metadata: [2:4 pieces][32 lanes] of 8 bytes. starts: [bands + 1][2]: a band's first piece, and first 2:4 one.
//
// x: [tokens, columns]; y: [tokens, rows], or with glu [tokens, rows / 2], see swiglu; bias: [rows], or
// [tokens, rows] where bias_step is `rows` and not 0, or null.
// chunks: of 256 columns; span: of them, in shared memory at a time.
//
// Macros: BANDS × SPLITS warps share a block, SPLITS of them divide the columns of a band; TILES of 8
// tokens, or 0: up to four, for which lanes of absent tokens need not read anything; BLOCKS that fit a
// multiprocessor. Sums are fp32, in an order that depends on the shape alone.

#define WARPS (BANDS * SPLITS)
#define THREADS (WARPS * 32)
#define FEW (TILES == 0)
#define SUMS (FEW ? 1 : TILES)
// With one tile every other product has a sum of its own: it need not wait for the one before.
#define CHAINS (!MIXED && SUMS == 1 ? 2 : 1)

// Words of x that a thread asks for at once.
#define BATCH (MIXED ? 4 : 8)

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

#define MMA(sum, a, b, metadata, selector)                                                            \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 "  \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, "    \
                 #selector ";"                                                                        \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                             \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),    \
                   "r"(metadata))

#define MMA_DENSE(sum, a, b0, b1)                                                                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                       \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                             \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))

// Four 8 × 8 matrices from shared memory: of row-major x, the B operand.
__device__ __forceinline__ uint4 load_operand(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}

// Without branches, so that several loads are under way before one is used.
__device__ __forceinline__ uint4 load_if(u32 address, bool wanted) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0;"
        " mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        " @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "r"(address), "r"((u32)wanted));
    return v;
}

__device__ __forceinline__ void store_if(u32 address, u32 value, bool wanted) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.shared.u32 [%0], %1;}" ::"r"(address), "r"(value),
                 "r"((u32)wanted)
                 : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
sparse24(const uint4* __restrict__ stream, const u32* __restrict__ entries, const uint2* __restrict__ metadata,
         const int* __restrict__ starts, const uint4* __restrict__ x, u16* __restrict__ y,
         const u16* __restrict__ bias, int rows, int columns, int tokens, int chunks, int span, int glu,
         int bias_step) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int split = warp % SPLITS, place = warp / SPLITS;
    const int band = blockIdx.x * BANDS + place;
    const bool present = band * 16 < rows;
#if MIXED
    const int begin = present ? starts[2 * band] : 0, count = present ? starts[2 * band + 2] - begin : 0;
    // Numbers instead of pointers: registers are short where 16 warps share a band.
    const u32 first_metadata = (present ? starts[2 * band + 1] : 0) * 32 + lane;
    // Two pieces under way for each warp. An entry is read a step before its piece: where metadata lie
    // depends on it.
    uint4 ring[2][4];
    uint2 places[2];
    u32 entry[2], upcoming = split < count ? entries[begin + split] : 0;
    auto fill = [&](int slot, int piece) {
        const bool ok = piece < count;
        entry[slot] = upcoming;
        upcoming = piece + SPLITS < count ? entries[begin + piece + SPLITS] : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) ring[slot][i] = load_weights(stream + ((begin + piece) * 128 + lane) + i * 32, ok);
        places[slot] = make_uint2(0, 0);
        if (ok && entry[slot] >> 31) places[slot] = metadata[first_metadata + (entry[slot] >> 11 & 0xfffff) * 32];
    };
    int piece = split, turn = 0;
    fill(0, piece);
    fill(1, piece + SPLITS);
#else
    const uint4* from = stream + (size_t)band * chunks * 288 + lane;

    uint4 now[9];
    int chunk = split;
#pragma unroll
    for (int i = 0; i < 9; i++)
        now[i] = load_weights(from + (size_t)chunk * 288 + i * 32, present && chunk < chunks);
#endif
    let_next_start();

    float sum[SUMS * CHAINS][4];
#pragma unroll
    for (int n = 0; n < SUMS * CHAINS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[n][i] = 0;

    // Stages of `span` chunks of x as it is, row after row; 16 bytes more a row, against bank conflicts.
    // Two stages where one does not hold all of x. Before them 16 bytes of zeros, for absent tokens.
    const int pitch = span * 32 + 1, stages = (chunks + span - 1) / span;
    const u32 base = shared_address(shared);
    if (!FEW && threadIdx.x == 0) shared[0] = make_uint4(0, 0, 0, 0);
    // Of a tile of 8 tokens a lane points at token lane % 8, at 8 columns of 32.
    const int local = lane & 7, quarter = lane >> 3;

#if FEW
    // One stage, in the order of the B operand: [unit of 32 columns][token][quad] of 16 bytes.
    auto fetch = [&](int) {
        for (int token = 0; token < tokens; token++) {
            const u32* words = (const u32*)x + (size_t)token * (columns / 2);
            const int all = chunks * 128, real = columns / 2;
            for (int begin = threadIdx.x; begin < all; begin += BATCH * THREADS) {
                u32 v[BATCH];
                // Several are asked for before one is waited for. The columns that pad the last chunk are zeros.
#pragma unroll
                for (int j = 0; j < BATCH; j++)
                    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v[j]) : "l"(words + min(begin + j * THREADS, real - 1)));
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const int i = begin + j * THREADS;
                    const u32 to = ((i >> 4) * tokens + token) * 64 + (i & 3) * 16 + (i & 12);
                    store_if(base + to, i < real ? v[j] : 0, i < all);
                }
            }
        }
    };
#else
    auto fetch = [&](int stage) {
        const int first = stage * span, vectors = (min(first + span, chunks) - first) * 32;
        const u32 to = base + 16 + (stage & 1) * tokens * pitch * 16;
        for (int i = threadIdx.x; i < vectors * tokens; i += THREADS) {
            const int token = tokens == 1 ? 0 : i / vectors, j = i - token * vectors;
            const int column = first * 256 + j * 8;
            // The columns that pad the last chunk are zeros.
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + (token * pitch + j) * 16),
                         "l"(x + (column < columns ? ((size_t)token * columns + column) / 8 : 0)),
                         "r"(column < columns ? 16 : 0)
                         : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#endif

    wait_for_input();
    fetch(0);
    for (int stage = 0; stage < stages; stage++) {
        const int first = stage * span, stop = min(first + span, chunks);
#if !FEW
        if (stage + 1 < stages) {
            fetch(stage + 1);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
#endif
        __syncthreads();
        const u32 held = base + 16 + (stage & 1) * tokens * pitch * 16;
#if MIXED
        // The operand of 32 columns for 8 tokens, from unit `unit` of this stage on.
        auto operand = [&](int n, int unit) {
#if FEW
            return load_if(base + (unit * tokens * 4 + lane) * 16, lane < tokens * 4);
#else
            const int token = n * 8 + local;
            return load_operand(token < tokens ? held + (token * pitch + unit * 4 + quarter) * 16 : base);
#endif
        };
        auto use = [&](int slot) {
            const uint4* a = ring[slot];
            const int unit = (entry[slot] & 0x7ff) * 2 - first * 8;
#pragma unroll
            for (int n = 0; n < SUMS; n++) {
                const uint4 b0 = operand(n, unit), b1 = operand(n, unit + 1);
                if (entry[slot] >> 31) {
                    const uint4 b2 = operand(n, unit + 2), b3 = operand(n, unit + 3);
                    MMA(sum[n], a[0], b0, places[slot].x, 0x0);
                    MMA(sum[n], a[1], b1, places[slot].x, 0x1);
                    MMA(sum[n], a[2], b2, places[slot].y, 0x0);
                    MMA(sum[n], a[3], b3, places[slot].y, 0x1);
                } else {
                    MMA_DENSE(sum[n], a[0], b0.x, b0.y);
                    MMA_DENSE(sum[n], a[1], b0.z, b0.w);
                    MMA_DENSE(sum[n], a[2], b1.x, b1.y);
                    MMA_DENSE(sum[n], a[3], b1.z, b1.w);
                }
            }
        };
        auto here = [&](int slot) {  // whether the columns of a slot's piece are in this stage
            return piece < count && (entry[slot] & 0x7ff) < stop * 4;
        };
        // `turn` is the slot that is next, so that slots are registers whatever the stage.
        for (;;) {
            if (turn == 0) {
                if (!here(0)) break;
                use(0);
                fill(0, piece + 2 * SPLITS);
                piece += SPLITS;
                turn = 1;
            }
            if (!here(1)) break;
            use(1);
            fill(1, piece + 2 * SPLITS);
            piece += SPLITS;
            turn = 0;
        }
#else
        for (; chunk < stop; chunk += SPLITS) {
            uint4 next[9];
            const int ahead = chunk + SPLITS;
#pragma unroll
            for (int i = 0; i < 9; i++)
                next[i] = load_weights(from + (size_t)ahead * 288 + i * 32, present && ahead < chunks);
            const u32 metadata[4] = {now[8].x, now[8].y, now[8].z, now[8].w};
#if FEW
            const u32 units = base + (chunk * 32 * tokens + lane) * 16;
#pragma unroll
            for (int half = 0; half < 8; half += 4) {
                uint4 b[4];
#pragma unroll
                for (int i = 0; i < 4; i++) b[i] = load_if(units + (half + i) * tokens * 64, lane < tokens * 4);
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    MMA(sum[0], now[half + i], b[i], metadata[(half + i) / 2], 0x0);
                    MMA(sum[1], now[half + i + 1], b[i + 1], metadata[(half + i) / 2], 0x1);
                }
            }
#else
#pragma unroll
            for (int n = 0; n < SUMS; n++) {
                const int token = n * 8 + local;
                const bool real = token < tokens;
                const u32 at = held + (token * pitch + (chunk - first) * 32 + quarter) * 16;
#pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    const uint4 b0 = load_operand(real ? at + pair * 128 : base);
                    const uint4 b1 = load_operand(real ? at + pair * 128 + 64 : base);
                    MMA(sum[n * CHAINS], now[2 * pair], b0, metadata[pair], 0x0);
                    MMA(sum[n * CHAINS + CHAINS - 1], now[2 * pair + 1], b1, metadata[pair], 0x1);
                }
            }
#endif
#pragma unroll
            for (int i = 0; i < 9; i++) now[i] = next[i];
        }
#endif
        __syncthreads();
    }

#if CHAINS == 2
#pragma unroll
    for (int i = 0; i < 4; i++) sum[0][i] += sum[1][i];
#endif
    // Add up what the splits of a band found: [split][band][token][16 rows], over x, which is done with.
    const int group = lane >> 2, quad = lane & 3;
    float* parts = (float*)shared;
    float* own = parts + (split * BANDS + place) * tokens * 16 + group;
#pragma unroll
    for (int n = 0; n < SUMS; n++) {
        const int token = n * 8 + quad * 2;
        if (token < tokens) {
            own[token * 16] = sum[n][0];
            own[token * 16 + 8] = sum[n][2];
        }
        if (token + 1 < tokens) {
            own[token * 16 + 16] = sum[n][1];
            own[token * 16 + 24] = sum[n][3];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BANDS * tokens * 16; i += THREADS) {
        const int first = (blockIdx.x * BANDS + i / (tokens * 16)) * 16 + (i & 15);
        const int token = i / 16 % tokens;
        auto total = [&](int further) {
            float sum = bias ? widen(bias[(size_t)token * bias_step + first + further]) : 0;
#pragma unroll
            for (int s = 0; s < SPLITS; s++) sum += parts[s * BANDS * tokens * 16 + i + further];
            return sum;
        };
        if (first >= rows || glu && i & 8) continue;
        if (glu)
            y[(size_t)token * (rows / 2) + swiglu_row(first)] = narrow(swiglu(total(0), total(8)));
        else
            y[(size_t)token * rows + first] = narrow(total(0));
    }
}
