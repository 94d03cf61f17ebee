// One new token's attention over its cache: softmax(scale · q Kᵀ, where the mask allows it) V.
//
// q: [batch, heads, D]; k, v: [batch, kv heads, length, D], D in one piece, the rest by strides of 8 elements.
// mask: a byte for every cached token, rows by a stride, or null. y: [batch, heads, D].
// partial: [batch · kv heads][splits][GROUP][D + 2] fp32, what a block found: its sum, its largest score and
// its weight. counters: [batch · kv heads], zero before and after: blocks that are done.
//
// The heads that share a kv head are computed together. Blocks divide the cache by chunks of 64 tokens, and
// the last one to finish adds up, in their order. Chunks that the mask hides are not read.
//
// Macros: D, divisible by 8, at most 256; GROUP heads to a kv head, at most 8; BLOCKS that fit a
// multiprocessor.

#define WARPS 8
#define CHUNK 64
#define PART (D <= 64 ? 8 : D <= 128 ? 16 : 32)   // lanes that share a token, 8 elements each
#define TOKENS (32 / PART)                        // of a warp at a time
#define INFINITY_ __int_as_float(0x7f800000)
#define LOADS (CHUNK / (WARPS * TOKENS))

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void unpack(float* to, const uint4& v) {
    to[0] = low(v.x), to[1] = high(v.x), to[2] = low(v.y), to[3] = high(v.y);
    to[4] = low(v.z), to[5] = high(v.z), to[6] = low(v.w), to[7] = high(v.w);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
attend(const u16* __restrict__ q, const uint4* __restrict__ k, const uint4* __restrict__ v,
       const u8* __restrict__ mask, u16* __restrict__ y, float* __restrict__ partial, int* counters,
       float scale, int length, int kv_heads, int k_batch, int k_head, int k_token, int v_batch, int v_head,
       int v_token, int mask_batch) {
    extern __shared__ float shared[];  // scores and what warps found
    float(*scores)[CHUNK] = (float(*)[CHUNK])shared;
    float(*found)[GROUP][D] = (float(*)[GROUP][D])(shared + GROUP * CHUNK);
    __shared__ float largest[GROUP], weight[GROUP], fading[GROUP];
    __shared__ bool last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % PART, own = lane / PART;
    const int head = blockIdx.y, batch = head / kv_heads, kv_head = head % kv_heads;
    const int split = blockIdx.x, splits = gridDim.x;
    const bool inside = part * 8 < D;
    let_next_start();
    wait_for_input();

    float query[GROUP][8], sum[GROUP][8];
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        uint4 word = make_uint4(0, 0, 0, 0);
        if (inside) word = ((const uint4*)(q + (size_t)(head * GROUP + h) * D))[part];
        unpack(query[h], word);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[h][i] = 0;
    }
    if (threadIdx.x < GROUP) largest[threadIdx.x] = -INFINITY_, weight[threadIdx.x] = 0;
    const uint4* key_of = k + (size_t)batch * k_batch + (size_t)kv_head * k_head + part;
    const uint4* value_of = v + (size_t)batch * v_batch + (size_t)kv_head * v_head + part;
    if (mask) mask += (size_t)batch * mask_batch;

    for (int chunk = split; chunk * CHUNK < length; chunk += splits) {
        bool wanted[LOADS], any = false;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int token = chunk * CHUNK + (i * WARPS + warp) * TOKENS + own;
            wanted[i] = token < length && (!mask || mask[token]);
            any |= wanted[i];
        }
        if (!__syncthreads_or(any)) continue;
        uint4 keys[LOADS], values[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const size_t token = chunk * CHUNK + (i * WARPS + warp) * TOKENS + own;
            keys[i] = load_weights(key_of + token * k_token, wanted[i] && inside);
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const size_t token = chunk * CHUNK + (i * WARPS + warp) * TOKENS + own;
            values[i] = load_weights(value_of + token * v_token, wanted[i] && inside);
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            float key[8], score[GROUP];
            unpack(key, keys[i]);
#pragma unroll
            for (int h = 0; h < GROUP; h++) {
                score[h] = 0;
#pragma unroll
                for (int j = 0; j < 8; j++) score[h] = fmaf(query[h][j], key[j], score[h]);
#pragma unroll
                for (int apart = PART / 2; apart; apart >>= 1) score[h] += __shfl_xor_sync(ALL, score[h], apart);
            }
            if (part == 0)
#pragma unroll
                for (int h = 0; h < GROUP; h++)
                    scores[h][(i * WARPS + warp) * TOKENS + own] = wanted[i] ? score[h] * scale : -INFINITY_;
        }
        __syncthreads();
        if (warp < GROUP) {  // a head for every warp
            const float one = scores[warp][lane], two = scores[warp][lane + 32];
            float most = fmaxf(one, two);
#pragma unroll
            for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL, most, apart));
            most = fmaxf(most, largest[warp]);
            const float a = power_of_two(one - most), b = power_of_two(two - most);
            scores[warp][lane] = a;
            scores[warp][lane + 32] = b;
            float total = a + b;
#pragma unroll
            for (int apart = 16; apart; apart >>= 1) total += __shfl_xor_sync(ALL, total, apart);
            if (lane == 0) {
                const float faded = power_of_two(largest[warp] - most);
                fading[warp] = faded;
                weight[warp] = fmaf(weight[warp], faded, total);
                largest[warp] = most;
            }
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            const float faded = fading[h];
#pragma unroll
            for (int j = 0; j < 8; j++) sum[h][j] *= faded;
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            float value[8];
            unpack(value, values[i]);
#pragma unroll
            for (int h = 0; h < GROUP; h++) {
                const float share = scores[h][(i * WARPS + warp) * TOKENS + own];
#pragma unroll
                for (int j = 0; j < 8; j++) sum[h][j] = fmaf(share, value[j], sum[h][j]);
            }
        }
    }

    // Over the tokens of a warp, then over warps.
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
#pragma unroll
        for (int apart = PART; apart < 32; apart <<= 1)
#pragma unroll
            for (int j = 0; j < 8; j++) sum[h][j] += __shfl_xor_sync(ALL, sum[h][j], apart);
        if (own == 0 && inside)
#pragma unroll
            for (int j = 0; j < 8; j++) found[warp][h][part * 8 + j] = sum[h][j];
    }
    __syncthreads();
    float* mine = partial + ((size_t)head * splits + split) * GROUP * (D + 2);
    for (int i = threadIdx.x; i < GROUP * D; i += WARPS * 32) {
        const int h = i / D, d = i % D;
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += found[w][h][d];
        if (splits == 1)
            y[(size_t)(head * GROUP + h) * D + d] = narrow(total / weight[h]);
        else
            mine[h * (D + 2) + d] = total;
    }
    if (splits == 1) return;
    if (threadIdx.x < GROUP) {
        mine[threadIdx.x * (D + 2) + D] = largest[threadIdx.x];
        mine[threadIdx.x * (D + 2) + D + 1] = weight[threadIdx.x];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counters + head, 1) == splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) counters[head] = 0;
    // Every block's share of each head first: its loads then wait for memory together.
    const float* all = partial + (size_t)head * splits * GROUP * (D + 2);
    float* shares = shared;  // [GROUP][splits]
    for (int i = threadIdx.x; i < GROUP * splits; i += WARPS * 32)
        shares[i] = __ldcg(all + ((i % splits) * GROUP + i / splits) * (D + 2) + D);
    __syncthreads();
    if (warp < GROUP) {
        float* own_shares = shares + warp * splits;
        float most = -INFINITY_, whole = 0;
        for (int s = lane; s < splits; s += 32) most = fmaxf(most, own_shares[s]);
#pragma unroll
        for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL, most, apart));
        for (int s = lane; s < splits; s += 32) {
            const float share = power_of_two(own_shares[s] - most);
            own_shares[s] = share;
            whole = fmaf(__ldcg(all + (s * GROUP + warp) * (D + 2) + D + 1), share, whole);
        }
#pragma unroll
        for (int apart = 16; apart; apart >>= 1) whole += __shfl_xor_sync(ALL, whole, apart);
        if (lane == 0) weight[warp] = whole;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * D; i += WARPS * 32) {
        const int h = i / D, d = i % D;
        float total = 0;
#pragma unroll 8
        for (int s = 0; s < splits; s++)
            total = fmaf(__ldcg(all + (s * GROUP + h) * (D + 2) + d), shares[h * splits + s], total);
        y[(size_t)(head * GROUP + h) * D + d] = narrow(total / weight[h]);
    }
}
