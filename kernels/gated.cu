// y = W · (x where |x| > threshold) + b: only the columns of W that meet an input are read.
//
// weight: [columns][stride] of 16 bytes, Wᵀ: column k of W lies in one piece. FORMAT says what 16 bytes are:
//   0  8 weights, bf16 or fp16
//   1  16 weights, int8; scale: [rows] fp32
//   2  16 weights, 2:4 along the outputs: the two non-zeros of four groups of four; meta: [columns][stride]
//      u16, the keep mask of the 16. index: [columns] u16, the input that meets a column, or null: the input
//      of the same number. An input may meet two columns (then all 16 weights can be non-zero) or none.
// common: the threshold of all inputs, fp32, or null: all count. limits: [inputs], thresholds in the dtype of
// x, instead: every block reads them. x: [tokens, inputs]; y: [tokens, rows], or with glu [tokens, rows / 2], see
// swiglu; bias: [rows], or [tokens, rows] where bias_step is `rows` and not 0, or null.
//
// CLUSTER blocks divide the columns of a tile of TILE rows; each lists its active inputs in shared memory
// and streams their columns. NaN and infinity are always active: they show, as in the reference.
//
// Macros: FORMAT, WARPS, TILE (32 to 256), CLUSTER (1 before sm_90), DEPTH loads in flight (even), ITEMS pairs
// of inputs that a thread examines, BLOCKS that fit a multiprocessor.

#define THREADS (WARPS * 32)
#define OUTPUTS (FORMAT ? 16 : 8)   // of a lane
#define LANES (TILE / OUTPUTS)      // lanes that share a column
#define GROUPS (THREADS / LANES)    // columns that a block reads at a time

// Which weights are wanted is not known before x is, so programmatic dependent launch hides no more than a start:
// on an H100 4096 x 4096 weights that are 2:4 along outputs gain 4 %, others nothing, or lose.

__device__ __forceinline__ bool active(float x, float threshold) {
    return !(fabsf(x) <= fminf(threshold, 3.402823466e38f));
}

__device__ __forceinline__ void cluster_arrive() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Overwrites v if wanted. Nothing is zeroed: a slot that was not filled is not used.
__device__ __forceinline__ void refill(uint4& v, const char* from, bool wanted) {
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0;"
        " @p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(from), "r"((u32)wanted));
}

__device__ __forceinline__ void refill(u32& v, const char* from, bool wanted) {
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %2, 0;"
        " @p ld.global.nc.L1::no_allocate.L2::256B.u16 %0, [%1];}"
        : "+r"(v)
        : "l"(from), "r"((u32)wanted));
}

// Two weights of four, where bits 0 to 3 of `keep` say, times x. Predicated, without a branch.
__device__ __forceinline__ void add_group(float* sum, u32 pair, u32 keep, float x) {
    const float one = low(pair), two = high(pair);
    asm("{.reg .pred a, b, c, d; .reg .b32 t; .reg .f32 s, r;"
        " and.b32 t, %7, 1; setp.ne.b32 a, t, 0; and.b32 t, %7, 2; setp.ne.b32 b, t, 0;"
        " and.b32 t, %7, 4; setp.ne.b32 c, t, 0; and.b32 t, %7, 8; setp.ne.b32 d, t, 0;"
        " selp.f32 s, %5, %4, a; selp.f32 r, %4, %5, d;"
        " @a fma.rn.f32 %0, %4, %6, %0; @b fma.rn.f32 %1, s, %6, %1;"
        " @c fma.rn.f32 %2, r, %6, %2; @d fma.rn.f32 %3, %5, %6, %3;}"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "f"(one), "f"(two), "f"(x), "r"(keep));
}

// What 16 bytes of a column add to the outputs of a lane.
__device__ __forceinline__ void add(float* sum, const uint4& w, u32 keep, float x) {
    const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if FORMAT == 0
        sum[2 * i] = fmaf(low(words[i]), x, sum[2 * i]);
        sum[2 * i + 1] = fmaf(high(words[i]), x, sum[2 * i + 1]);
#elif FORMAT == 1
        // A byte as the low bits of 2^23: exact, and no conversion.
        const u32 biased = words[i] ^ 0x80808080u;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float code = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7540 + j)) - 8388736.f;
            sum[4 * i + j] = fmaf(code, x, sum[4 * i + j]);
        }
#else
        add_group(sum + 4 * i, words[i], keep >> (4 * i), x);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gated(const uint4* __restrict__ weight, const u16* __restrict__ x, const float* __restrict__ common,
      const u16* __restrict__ limits, u16* __restrict__ y, const u16* __restrict__ bias,
      const float* __restrict__ scale, const u16* __restrict__ meta, const u16* __restrict__ index, int rows,
      int columns, int inputs, int stride, int glu, int bias_step) {
    extern __shared__ u32 list[];  // a column's number in the share, and the input it meets; then `parts`
    __shared__ int counts[WARPS];
#if CLUSTER > 1
    __shared__ float mine[CLUSTER][TILE / CLUSTER];
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int rank = blockIdx.x % CLUSTER, tile = blockIdx.x / CLUSTER, token = blockIdx.y;
    const int share = (columns + 2 * CLUSTER - 1) / (2 * CLUSTER) * 2;
    const int first = rank * share, own = max(0, min(share, columns - first));
#if CLUSTER > 1
    // Says only that this block has begun: nothing to be seen by others, hence no fence.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    let_next_start();
    wait_for_input();

    // List the active inputs, in ascending order.
    x += (size_t)token * inputs;
    const float all_alike = common ? *common : -1;
    // All loads first, without a branch between them: they then wait for memory together.
    u32 word[ITEMS], limit[ITEMS], even[ITEMS], odd[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int pair = (warp * ITEMS + i) * 32 + lane;
        const u32* from = (const u32*)((FORMAT == 2 && index ? index : x) + first);
        word[i] = 2 * pair < own ? from[pair] : 0;
        limit[i] = limits && 2 * pair < own ? ((const u32*)(limits + first))[pair] : 0;
    }
    if (FORMAT == 2 && index) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const u32 one = word[i] & 0xffff, two = word[i] >> 16;
            word[i] = x[one] | (u32)x[two] << 16;
            limit[i] = limits ? limits[one] | (u32)limits[two] << 16 : 0;
        }
    }
    int count = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = 2 * ((warp * ITEMS + i) * 32 + lane);
        const bool one = active(low(word[i]), limits ? low(limit[i]) : all_alike);
        const bool two = active(high(word[i]), limits ? high(limit[i]) : all_alike);
        even[i] = __ballot_sync(ALL, at < own && one);
        odd[i] = __ballot_sync(ALL, at + 1 < own && two);
        count += __popc(even[i]) + __popc(odd[i]);
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int place = 0, all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) place += counts[w];
        all += counts[w];
    }
    const u32 before = (1u << lane) - 1;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const u32 column = 2 * ((warp * ITEMS + i) * 32 + lane);
        int to = place + __popc(even[i] & before) + __popc(odd[i] & before);
        if (even[i] >> lane & 1) list[to++] = column | word[i] << 16;
        if (odd[i] >> lane & 1) list[to] = column + 1 | word[i] & 0xffff0000u;
        place += __popc(even[i]) + __popc(odd[i]);
    }
    if (threadIdx.x == 0 && all & 1) list[all] = 0;  // they are taken in pairs
    __syncthreads();

    // A ring of DEPTH loads for each thread, filled by pairs of list entries.
    const int group = threadIdx.x / LANES, part = threadIdx.x % LANES;
    const uint2* entries = (const uint2*)list;
    const int stop = tile * LANES + part < stride ? (all + 1) / 2 : 0;
    const size_t start = (size_t)first * stride + tile * LANES + part;
    const char* from = (const char*)(weight + start);
    const char* from_meta = (const char*)(meta + start);
    float sum[OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) sum[i] = 0;
    uint4 ring[DEPTH];
    u32 keep[DEPTH], entry[DEPTH];
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++) ring[slot] = make_uint4(0, 0, 0, 0), keep[slot] = entry[slot] = 0;
#define FILL(slot, number)                                                                         \
    {                                                                                              \
        const bool ok = number < stop;                                                             \
        if (ok) {                                                                                  \
            const uint2 two = entries[number];                                                     \
            entry[slot] = two.x, entry[slot + 1] = two.y;                                          \
        }                                                                                          \
        _Pragma("unroll") for (int i = slot; i < slot + 2; i++) {                                  \
            const size_t column = entry[i] & 0xffff;                                               \
            refill(ring[i], from + column * (u32)(16 * stride), ok);                               \
            if (FORMAT == 2) refill(keep[i], from_meta + column * (u32)(2 * stride), ok);          \
        }                                                                                          \
    }
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot += 2) FILL(slot, group + slot / 2 * GROUPS);
    for (int base = group; base < stop; base += GROUPS * DEPTH / 2) {
#pragma unroll
        for (int slot = 0; slot < DEPTH; slot += 2) {
            // An exit at every step keeps the compiler from using all slots before it refills any.
            if (base + slot / 2 * GROUPS >= stop) goto done;
            add(sum, ring[slot], keep[slot], high(entry[slot]));
            add(sum, ring[slot + 1], keep[slot + 1], high(entry[slot + 1]));
            FILL(slot, base + (slot + DEPTH) / 2 * GROUPS);
        }
    }
done:
    __syncwarp();
    constexpr int own_rows = TILE / CLUSTER;
    const int output = threadIdx.x;  // of the tile; there are no more than threads
    const int row = tile * TILE + rank * own_rows + output;
    const bool mine_to_store = output < own_rows && row < rows;
    const float factor = FORMAT == 1 && mine_to_store ? scale[row] : 1;
    const float offset = bias && mine_to_store ? widen(bias[(size_t)token * bias_step + row]) : 0;
    // Lanes of a warp that read other columns of the same outputs, each ending with a share of them; then
    // warps, then blocks.
    int begin = 0;
    constexpr int held = TILE / 32 < OUTPUTS ? TILE / 32 : OUTPUTS;
#pragma unroll
    for (int apart = 16, half = OUTPUTS / 2; apart >= LANES; apart >>= 1, half >>= 1) {
        const bool upper = lane & apart;
        if (upper) begin += half;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float give = upper ? sum[i] : sum[i + half], keep = upper ? sum[i + half] : sum[i];
            sum[i] = keep + __shfl_xor_sync(ALL, give, apart);
        }
    }
    float* parts = (float*)(list + share);
#pragma unroll
    for (int i = 0; i < held; i++) parts[warp * TILE + part * OUTPUTS + begin + i] = sum[i];
    __syncthreads();
    cluster_wait();  // every block of the cluster has begun
    float total = 0;
    if (output < TILE)
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += parts[w * TILE + output];
#if CLUSTER > 1
    // Outputs are divided among the blocks; each gets what the others found for its own.
    if (output < TILE) {
        const u32 to = shared_address(&mine[rank][output % own_rows]);
        u32 remote;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(to), "r"(output / own_rows));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(total) : "memory");
    }
    cluster_arrive();
    cluster_wait();
    total = 0;
    if (output < own_rows)
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) total += mine[r][output];
#endif
    total = fmaf(total, factor, offset);
    if (glu) {  // TILE / CLUSTER is 16 or more: the other row of a pair is in the same warp
        const float up = __shfl_down_sync(ALL, total, 8);
        if (mine_to_store && !(output & 8)) y[(size_t)token * (rows / 2) + swiglu_row(row)] = narrow(swiglu(total, up));
    } else if (mine_to_store) {
        y[(size_t)token * rows + row] = narrow(total);
    }
}
