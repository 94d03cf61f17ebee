// y = W · (x where |x| > threshold) + b: only the columns of W that meet an input are read.
//
// weight: [columns][stride] of 16 bytes, Wᵀ: column k of W lies in one piece.
// threshold: [columns] fp32; x: [tokens, columns]; y: [tokens, rows]; bias: [rows] or null.
//
// CLUSTER blocks divide the columns of a tile of TILE rows; each lists its active inputs in shared memory
// and streams their columns. NaN and infinity are always active: they show, as in the reference.
//
// Macros: WARPS, TILE (a multiple of 8, at most 256), CLUSTER (1 before sm_90), DEPTH loads in flight,
// ITEMS pairs of inputs that a thread examines, BLOCKS that fit a multiprocessor.

#define THREADS (WARPS * 32)
#define LANES (TILE / 8)            // lanes that share a column
#define GROUPS (THREADS / LANES)    // columns that a block reads at a time

// Launched without programmatic dependence: which weights are wanted is not known before x is.

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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gated(const uint4* __restrict__ weight, const u16* __restrict__ x, const float* __restrict__ threshold,
      u16* __restrict__ y, const u16* __restrict__ bias, int rows, int columns, int stride) {
    extern __shared__ uint2 list[];   // offset of a column and the input that meets it, then `parts`
    __shared__ int counts[WARPS];
#if CLUSTER > 1
    __shared__ float mine[CLUSTER][TILE / CLUSTER];
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int rank = blockIdx.x % CLUSTER, tile = blockIdx.x / CLUSTER, token = blockIdx.y;
    const int share = (columns + 2 * CLUSTER - 1) / (2 * CLUSTER) * 2;
    const int first = rank * share, pairs = max(0, min(share, columns - first)) / 2;
    cluster_arrive();
    let_next_start();
    wait_for_input();

    // List the active inputs, in ascending order.
    const u32* words = (const u32*)(x + (size_t)token * columns + first);
    const float2* limits = (const float2*)(threshold + first);
    u32 word[ITEMS], even[ITEMS], odd[ITEMS];
    int count = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int pair = (warp * ITEMS + i) * 32 + lane;
        word[i] = 0;
        bool one = false, two = false;
        if (pair < pairs) {
            word[i] = words[pair];
            const float2 limit = limits[pair];
            one = active(low(word[i]), limit.x);
            two = active(high(word[i]), limit.y);
        }
        even[i] = __ballot_sync(ALL, one);
        odd[i] = __ballot_sync(ALL, two);
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
        const u32 column = first + 2 * ((warp * ITEMS + i) * 32 + lane);
        int to = place + __popc(even[i] & before) + __popc(odd[i] & before);
        if (even[i] >> lane & 1)
            list[to++] = make_uint2(column * stride, __float_as_uint(low(word[i])));
        if (odd[i] >> lane & 1)
            list[to] = make_uint2((column + 1) * stride, __float_as_uint(high(word[i])));
        place += __popc(even[i]) + __popc(odd[i]);
    }
    __syncthreads();

    // A ring of DEPTH loads for each thread.
    const int group = threadIdx.x / LANES, part = threadIdx.x % LANES;
    const bool inside = tile * LANES + part < stride;
    const uint4* from = weight + tile * LANES + part;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    uint4 ring[DEPTH];
    float input[DEPTH];
#define FILL(slot, index)                                                  \
    {                                                                      \
        const int j = index;                                               \
        const bool ok = j < all && inside;                                 \
        const uint2 entry = list[ok ? j : 0];                              \
        ring[slot] = load_weights(from + (ok ? entry.x : 0), ok);          \
        input[slot] = ok ? __uint_as_float(entry.y) : 0;                   \
    }
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++) FILL(slot, group + slot * GROUPS);
    for (int base = group; base < all; base += GROUPS * DEPTH) {
#pragma unroll
        for (int slot = 0; slot < DEPTH; slot++) {
            // An exit at every step keeps the compiler from using all slots before it refills any.
            if (base + slot * GROUPS >= all) goto done;
            const uint4 w = ring[slot];
            const float v = input[slot];
            sum[0] = fmaf(low(w.x), v, sum[0]);
            sum[1] = fmaf(high(w.x), v, sum[1]);
            sum[2] = fmaf(low(w.y), v, sum[2]);
            sum[3] = fmaf(high(w.y), v, sum[3]);
            sum[4] = fmaf(low(w.z), v, sum[4]);
            sum[5] = fmaf(high(w.z), v, sum[5]);
            sum[6] = fmaf(low(w.w), v, sum[6]);
            sum[7] = fmaf(high(w.w), v, sum[7]);
            FILL(slot, base + (slot + DEPTH) * GROUPS);
        }
    }
done:
    __syncwarp();
    // Lanes of a warp that read other columns of the same outputs, then warps, then blocks.
#pragma unroll
    for (int offset = 16; offset >= LANES; offset >>= 1)
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += __shfl_xor_sync(ALL, sum[i], offset);
    float* parts = (float*)(list + share);
    if (lane < LANES)
#pragma unroll
        for (int i = 0; i < 8; i++) parts[warp * TILE + part * 8 + i] = sum[i];
    __syncthreads();
    cluster_wait();  // every block of the cluster has begun
    for (int i = threadIdx.x; i < TILE; i += THREADS) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += parts[w * TILE + i];
#if CLUSTER > 1
        // Outputs are divided among the blocks; each gets what the others found for its own.
        const u32 to = shared_address(&mine[rank][i % (TILE / CLUSTER)]);
        u32 remote;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(to), "r"(i / (TILE / CLUSTER)));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(total) : "memory");
    }
    cluster_arrive();
    cluster_wait();
    for (int i = threadIdx.x; i < TILE / CLUSTER; i += THREADS) {
        float total = 0;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) total += mine[r][i];
        const int row = tile * TILE + rank * (TILE / CLUSTER) + i;
#else
        const int row = tile * TILE + i;
#endif
        if (row < rows) {
            if (bias) total += widen(bias[row]);
            y[(size_t)token * rows + row] = narrow(total);
        }
    }
}
