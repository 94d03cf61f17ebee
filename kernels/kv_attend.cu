// One new token's attention over a cache of coded keys and values, in tiles of 16 tokens: see
// numerics/kv_tiles.py for their layout, numerics/kv_constants.py for what else is read, and
// ops/packed_attention.py for what is computed.
//
// q: [batch, heads, D]; tiles: [batch · kv heads][capacity] records; length: one number, padding: [batch] or
// null. y: [batch, heads, D]. partial: [batch · kv heads][splits][GROUP][D + 2] fp32, what a block found: its
// sum, its largest score and its weight; counters: [batch · kv heads], zero before and after.
//
// Blocks divide the tiles of a kv head, and each warp streams its own through a ring in shared memory. Products
// are 16 tokens by 8 heads at a time: keys, 16 tokens × 16 channels, times queries, and values, 16 channels × 16
// tokens, times the softmax's numerators. Words of codes become fragments by a table of pairs that is there once
// for every lane, so that no two lanes meet in a bank.
//
// Keys by channel: a lane has the same tokens of every tile, so their rotation, scale and offset are constants;
// the query is turned back by a tile's angle. Values' scales go into the numerators; what offsets add is the same
// for all channels, one number.
//
// Macros: D; GROUP, heads to a kv head, at most 8; BITS of a code, 8 for e4m3; CHANNELS, keys are by channel;
// OFFSETS, of values; KEY_SLOTS, VALUE_SLOTS, outliers of a token; TURN_KEYS, TURN_VALUES, by a Hadamard matrix;
// ROTARY, how many channels the rotary embedding turns; WARPS of a block; STAGES of a ring; COPIES of the table,
// 32 or, where shared memory is small, 8; HELD, constants of channels in registers.

#define FRAGMENTS (D / 16)
#define WORDS (FRAGMENTS * BITS / 2)
#define RUN (WORDS % 4 == 0 ? 4 : WORDS % 2 == 0 ? 2 : 1)
#define KEY_WORDS (BITS == 3 ? (FRAGMENTS + 3) / 4 * 3 : FRAGMENTS * BITS / 4)
#define KEY_RUNS ((KEY_WORDS + RUN - 1) / RUN)
#define PARAMETERS (CHANNELS ? 1 + OFFSETS : 2)
#define PARAMETERS_AT (128 * WORDS)
#define KEY_MISSING_AT (PARAMETERS_AT + 32 * PARAMETERS)
#define KEY_CHANNEL_AT (KEY_MISSING_AT + 32 * KEY_SLOTS)
#define VALUE_MISSING_AT (KEY_CHANNEL_AT + 16 * KEY_SLOTS)
#define VALUE_CHANNEL_AT (VALUE_MISSING_AT + 32 * VALUE_SLOTS)
#define RECORD (VALUE_CHANNEL_AT + 16 * VALUE_SLOTS)
#define STEP (CHANNELS ? 2 * D : 0)  // bytes of a tile's angles, behind its record
#define STAGE (RECORD + STEP)

// Shared memory, in bytes. What warps found takes the place of the table and the rings.
#define TABLE (BITS == 8 ? 0 : 2048 * COPIES)
#define RINGS (WARPS * STAGES * STAGE)
#define FOUND (4 * WARPS * GROUP * (D + 4))
#define FRONT (TABLE + RINGS > FOUND ? TABLE + RINGS : FOUND)
#define SPARSE_AT FRONT
#define SPARSE (KEY_SLOTS || VALUE_SLOTS ? WARPS * 32 * D : 0)
#define CONSTANTS_AT (SPARSE_AT + SPARSE)
#define CONSTANTS (CHANNELS && !HELD ? 96 * D : 0)
#define INVERSE_AT (CONSTANTS_AT + CONSTANTS)
#define QUERY_AT (INVERSE_AT + (KEY_SLOTS ? 4 * D : 0))
#define PITCH (D + 8)  // of a query, so that heads lie in other banks
#define SINKS_AT (QUERY_AT + 4 * GROUP * PITCH)
#define BARRIERS_AT (SINKS_AT + 4 * GROUP * (D + 2))
#define SHARED (BARRIERS_AT + 8 * WARPS * STAGES)

#define HOPPER (__CUDA_ARCH__ >= 900)
#define NONE (-1e30f)  // no score is as low
#define INFINITY_ __int_as_float(0x7f800000)
// e4m3 by shifting its bits into an fp16 is 2^8 too small.
#if BITS == 8 && __CUDA_ARCH__ < 890
#define UNIT 256.f
#else
#define UNIT 1.f
#endif
#define SMALLEST 0x1p-24f  // of fp16: scales may be 0
// Numerators are fp16: 2^4 where the reference is new, and it is renewed beyond 2^14.
#define HEADROOM 4.f
#define MOST 14.f

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log_of_two(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float half_low(u32 word) {
    float x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(word));
    return x;
}

__device__ __forceinline__ float half_high(u32 word) {
    float x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(word));
    return x;
}

__device__ __forceinline__ u32 halves(float low_, float high_) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high_), "f"(low_));
    return word;
}

__device__ __forceinline__ u16 half_of(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 add2(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 neg2(u32 a) {
    u32 d;
    asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

__device__ __forceinline__ void multiply(float* sum, const u32* a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 × 8 matrix of fp16, a pair in every lane.
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// What a Hadamard matrix makes of a vector whose entries lane, lane + 32, … a lane has; see numerics/hadamard.py.
__device__ __forceinline__ void turn(float (&x)[D / 32], int lane) {
#pragma unroll
    for (int apart = 1; apart < 32; apart <<= 1)
#pragma unroll
        for (int r = 0; r < D / 32; r++) {
            const float other = __shfl_xor_sync(ALL, x[r], apart);
            x[r] = lane & apart ? other - x[r] : x[r] + other;
        }
    float norm = 0.17677669529663687f;  // of blocks of 32
#if (D & (D - 1)) == 0
#pragma unroll
    for (int apart = 1; apart < D / 32; apart <<= 1) {
        norm *= 0.7071067811865476f;
#pragma unroll
        for (int r = 0; r < D / 32; r++)
            if (!(r & apart)) {
                const float one = x[r], two = x[r + apart];
                x[r] = one + two;
                x[r + apart] = one - two;
            }
    }
#endif
#pragma unroll
    for (int r = 0; r < D / 32; r++) x[r] *= norm;
}

// The two channels of a pair of the rotary embedding; of one further, one further.
__device__ __forceinline__ int first_of(int pair) { return pair < ROTARY / 2 ? pair : pair + ROTARY / 2; }

__device__ __forceinline__ int second_of(int pair) { return pair < ROTARY / 2 ? pair + ROTARY / 2 : pair + D / 2; }

// Where an entry lies in fragments of fp16, in bytes: 16 of every lane for a fragment.
__device__ __forceinline__ int key_place(int token, int channel) {
    const int inside = channel < ROTARY, half = inside ? ROTARY / 2 : (D - ROTARY) / 2;
    const int from = inside ? channel : channel - ROTARY, second = from >= half;
    const int pair = from - (second ? half : 0) + (inside ? 0 : ROTARY / 2);
    return (pair >> 3) * 512 + (token & 7) * 64 + (pair >> 1 & 3) * 16 + second * 8 + (token >> 3) * 4 + (pair & 1) * 2;
}

__device__ __forceinline__ int value_place(int token, int channel) {
    return (channel >> 4) * 512 + (channel & 7) * 64 + (token >> 1 & 3) * 16 + (token >> 3) * 8 +
           (channel >> 3 & 1) * 4 + (token & 1) * 2;
}

// Codes to fragments. words: all of a lane's.
struct Decoder {
    const char* table;  // with COPIES of 32, at this lane's copy
    u32 lane;           // the low byte of addresses, or the copy's

    __device__ __forceinline__ u32 pair(u32 word, int byte, int side) const {
#if COPIES == 32
        // A row is 256 bytes: 32 copies of K's pair, then of V's.
        return *(const u32*)(table + __byte_perm(word, lane, 0x5504 | byte << 4) + side * 128);
#else
        const u32 row = byte ? word >> (8 * byte - 6) : word << 6;
        return *(const u32*)(table + ((row & 0x3fc0) | lane) + side * 32);
#endif
    }

    __device__ __forceinline__ void fragment(u32* a, const u32* words, int index, int side) const {
#if BITS == 8
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 word = words[2 * index + i];
#if __CUDA_ARCH__ >= 890
            asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}"
                : "=r"(a[2 * i]), "=r"(a[2 * i + 1])
                : "r"(word));
#else
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 spread = __byte_perm(word, 0, j ? 0x3424 : 0x1404);
                a[2 * i + j] = (spread & 0x80008000u) | (spread >> 1 & 0x3f803f80u);
            }
#endif
        }
#else
        u32 word;
#if BITS == 4
        word = words[index];
#elif BITS == 2
        word = words[index / 2] >> (index & 1) * 4;
#else
        const u32* three = words + index / 4 * 3;
        if (index % 4 < 3)
            word = three[index % 4];
        else
            word = (three[0] >> 6 & 0x03030303u) | (three[1] >> 4 & 0x0c0c0c0cu) | (three[2] >> 2 & 0x30303030u);
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = pair(word, i, side);
#endif
    }
};

// The words of runs `begin` to `end`, of a record in shared memory.
__device__ __forceinline__ void load_words(u32* words, const char* record, int lane, int begin, int end) {
#pragma unroll
    for (int i = begin; i < end; i++) {
        const char* from = record + (i * 32 + lane) * RUN * 4;
        if (RUN == 4) {
            const uint4 v = *(const uint4*)from;
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        } else if (RUN == 2) {
            const uint2 v = *(const uint2*)from;
            words[2 * i] = v.x, words[2 * i + 1] = v.y;
        } else {
            words[i] = *(const u32*)from;
        }
    }
}

// A warp's own ring: its tiles, WARPS apart, on their way to shared memory.
struct Ring {
    char* stages;
    u32 barriers;
    const char* records;  // the first
    const char* steps;
    int count, lane;

    __device__ __forceinline__ void open() {
#if HOPPER
        if (lane == 0) {
            for (int s = 0; s < STAGES; s++)
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * s) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        __syncwarp();
#endif
    }

    // Request a tile.
    __device__ __forceinline__ void request(int tile, int stage) {
        const char* record = records + (size_t)tile * WARPS * RECORD;
        const char* step = steps + (size_t)tile * WARPS * STEP;
        const u32 to = shared_address(stages + stage * STAGE);
#if HOPPER
        if (lane == 0 && tile < count) {
            const u32 barrier = barriers + 8 * stage;
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(STAGE)
                         : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                             "r"(to), "l"(record), "n"(RECORD), "r"(barrier)
                         : "memory");
            if (STEP)
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                        to + RECORD),
                    "l"(step), "n"(STEP ? STEP : 16), "r"(barrier)
                    : "memory");
        }
#else
        if (tile < count)
#pragma unroll
            for (int i = 0; i < (STAGE / 16 + 31) / 32; i++) {
                const int at = (i * 32 + lane) * 16;
                const char* from = at < RECORD ? record + at : step + (at - RECORD);
                if (at < STAGE)
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from) : "memory");
            }
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    // Wait until the oldest requested one has come.
    __device__ __forceinline__ const char* take(int stage, int phase) {
#if HOPPER
        asm volatile(
            "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again;}" ::"r"(
                barriers + 8 * stage),
            "r"(phase)
            : "memory");
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        __syncwarp();
#endif
        return stages + stage * STAGE;
    }
};

// Outliers of a tile, into fragments of fp16 that are zero elsewhere; in units of the codes' values.
template <int SLOTS, bool KEYS>
struct Outliers {
    static constexpr int COUNT = (16 * SLOTS + 31) / 32;
    int places[COUNT];

    __device__ __forceinline__ void put(char* sparse, const char* record, const float* inverse, int lane) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int slot = lane + 32 * i, token = slot / SLOTS;
            if (16 * SLOTS % 32 && slot >= 16 * SLOTS) continue;
            const float missing = half_low(((const u16*)(record + (KEYS ? KEY_MISSING_AT : VALUE_MISSING_AT)))[slot]);
            const int channel = ((const u8*)(record + (KEYS ? KEY_CHANNEL_AT : VALUE_CHANNEL_AT)))[slot];
            float unit;
            if (KEYS) {
                unit = inverse[channel];
                places[i] = key_place(token, channel);
            } else {
                const u16* own = (const u16*)(record + PARAMETERS_AT) + ((token & 7) * 2 + (token >> 3)) * PARAMETERS;
                unit = reciprocal(fmaxf(half_low(own[CHANNELS ? 0 : 1]), SMALLEST));
                places[i] = value_place(token, channel);
            }
            *(u16*)(sparse + places[i]) = half_of(fminf(fmaxf(missing * unit, -65504.f), 65504.f));
        }
        __syncwarp();
    }

    __device__ __forceinline__ void take_back(char* sparse, int lane) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (!(16 * SLOTS % 32) || lane + 32 * i < 16 * SLOTS) *(u16*)(sparse + places[i]) = 0;
        __syncwarp();
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
kv_attend(const u16* q, const char* tiles, const int* length_, const int* padding,
          const u32* __restrict__ books, const uint4* __restrict__ channels, const float* __restrict__ inverse_,
          const float2* __restrict__ angles, const char* __restrict__ steps, const u16* key_sinks,
          const u16* value_sinks, u16* __restrict__ y, float* __restrict__ partial, int* counters, float scale,
          int capacity, int kv_heads, int sinks, int window) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ float shares[GROUP][WARPS + 1], largest[GROUP], weight[GROUP], offset[GROUP];
    __shared__ bool last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int head = blockIdx.y, batch = head / kv_heads, kv_head = head % kv_heads;
    const int split = blockIdx.x, splits = gridDim.x;
    {
        u32 given;
        asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(given));
        if (given < SHARED) __trap();
    }
    let_next_start();

    // What does not depend on the kernel before: the table, constants, barriers.
    Decoder decoder;
#if BITS < 8
    {
        constexpr int HALF_ROW = 4 * COPIES, PIECES = HALF_ROW / 8;  // of 16 bytes to a row
        constexpr int ROWS = WARPS * 32 / PIECES, EACH = 256 / ROWS;
        const int piece = threadIdx.x % PIECES, side = piece >= PIECES / 2, from = threadIdx.x / PIECES * EACH;
        u32 pairs[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) pairs[i] = __ldg(books + side * 256 + from + i);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            *(uint4*)(shared + (from + i) * 2 * HALF_ROW + piece * 16) =
                make_uint4(pairs[i], pairs[i], pairs[i], pairs[i]);
    }
    decoder.table = shared;
    decoder.lane = (lane & (COPIES - 1)) * 4;
#endif
#if CHANNELS
    const uint4* own_channels = channels + (size_t)kv_head * FRAGMENTS * 96 + lane;
#if HELD
    u32 constants[FRAGMENTS][12];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const uint4 v = __ldg(own_channels + (f * 3 + i) * 32);
            constants[f][4 * i] = v.x, constants[f][4 * i + 1] = v.y;
            constants[f][4 * i + 2] = v.z, constants[f][4 * i + 3] = v.w;
        }
#else
    for (int i = warp; i < FRAGMENTS * 3; i += WARPS)
        ((uint4*)(shared + CONSTANTS_AT))[i * 32 + lane] = __ldg(own_channels + i * 32);
#endif
#endif
#if KEY_SLOTS
    float* inverse = (float*)(shared + INVERSE_AT);
    for (int i = threadIdx.x; i < D; i += WARPS * 32) inverse[i] = __ldg(inverse_ + kv_head * D + i);
#else
    const float* inverse = nullptr;
#endif
#if KEY_SLOTS || VALUE_SLOTS
    char* sparse = shared + SPARSE_AT + warp * 32 * D;
    for (int i = lane; i < 2 * D; i += 32) ((uint4*)sparse)[i] = make_uint4(0, 0, 0, 0);
#endif
    Ring ring;
    ring.lane = lane;
    ring.stages = shared + TABLE + warp * STAGES * STAGE;
    ring.barriers = shared_address(shared + BARRIERS_AT) + 8 * STAGES * warp;
    ring.open();

    wait_for_input();
    const int length = *(const volatile int*)length_;
    const int start = padding ? padding[batch] : 0;
    const int oldest = window ? max(start, length - window) : start;
    const int first = max(oldest, start + sinks);  // of those that are in tiles
    const int first_tile = first >> 4, count = max(((length + 15) >> 4) - first_tile, 0);
    const int begin = first_tile + (int)((long long)split * count / splits);
    const int end = first_tile + (int)((long long)(split + 1) * count / splits);
    ring.count = max(end - begin - warp + WARPS - 1, 0) / WARPS;
    ring.records = tiles + ((size_t)head * capacity + begin + warp) * RECORD;
    ring.steps = steps + (size_t)warp * STEP;
#pragma unroll
    for (int s = 0; s < STAGES; s++) ring.request(s, s);

    // The queries, and what stands at the first positions: a head for every warp.
    float* query = (float*)(shared + QUERY_AT);
    float* found_first = (float*)(shared + SINKS_AT);  // [GROUP][D + 2]
    for (int h = warp; h < GROUP; h += WARPS) {
        const u16* from = q + (size_t)(head * GROUP + h) * D;
        float x[D / 32];
#pragma unroll
        for (int r = 0; r < D / 32; r++) x[r] = widen(from[lane + 32 * r]) * scale;
        if (split == 0 && sinks) {
            float sum[D / 32], most = NONE, total = 0;
#pragma unroll
            for (int r = 0; r < D / 32; r++) sum[r] = 0;
            for (int i = max(oldest - start, 0); i < sinks && start + i < length; i++) {
                const u16* key = key_sinks + ((size_t)head * sinks + i) * D + lane;
                const u16* value = value_sinks + ((size_t)head * sinks + i) * D + lane;
                float score = 0, values[D / 32];
#pragma unroll
                for (int r = 0; r < D / 32; r++) {
                    score = fmaf(x[r], widen(key[32 * r]), score);
                    values[r] = widen(value[32 * r]);
                }
#pragma unroll
                for (int apart = 16; apart; apart >>= 1) score += __shfl_xor_sync(ALL, score, apart);
                const float now = fmaxf(most, score);
                const float faded = power_of_two(most - now), share = power_of_two(score - now);
                most = now;
                total = fmaf(total, faded, share);
#pragma unroll
                for (int r = 0; r < D / 32; r++) sum[r] = fmaf(sum[r], faded, share * values[r]);
            }
            if (TURN_VALUES) turn(sum, lane);
#pragma unroll
            for (int r = 0; r < D / 32; r++) found_first[h * (D + 2) + lane + 32 * r] = sum[r];
            if (lane == 0) {
                found_first[h * (D + 2) + D] = most;
                found_first[h * (D + 2) + D + 1] = total;
            }
        }
        if (TURN_KEYS) turn(x, lane);
#pragma unroll
        for (int r = 0; r < D / 32; r++) query[h * PITCH + lane + 32 * r] = x[r];
    }
    __syncthreads();
#if CHANNELS
    // Turned by the padding, since a key's position is its slot less that, and back to this block's first tile.
    for (int i = threadIdx.x; i < GROUP * D / 2; i += WARPS * 32) {
        const int pair = i % (D / 2);
        float* own = query + i / (D / 2) * PITCH;
        float one = own[first_of(pair)], two = own[second_of(pair)];
        const float2 back = __ldg(angles + (size_t)(16 + min(begin, capacity - 1)) * (D / 2) + pair);
        float turned = back.x * one + back.y * two;
        two = back.x * two - back.y * one;
        one = turned;
        if (start) {
            const float2 far = __ldg(angles + (size_t)(16 + (start >> 4)) * (D / 2) + pair);
            const float2 near = __ldg(angles + (size_t)(start & 15) * (D / 2) + pair);
            turned = far.x * one - far.y * two;
            two = far.y * one + far.x * two;
            one = near.x * turned - near.y * two;
            two = near.y * turned + near.x * two;
        }
        own[first_of(pair)] = one;
        own[second_of(pair)] = two;
    }
    __syncthreads();
#endif
    u32 queries[FRAGMENTS][2];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        const float* own = query + g % GROUP * PITCH;
        const int pair = 8 * f + 2 * t;
        const float2 one = *(const float2*)(own + first_of(pair)), two = *(const float2*)(own + second_of(pair));
        queries[f][0] = halves(one.x, one.y);
        queries[f][1] = halves(two.x, two.y);
    }

    float sum[FRAGMENTS][4], reference[2] = {NONE, NONE}, own_weight[2] = {0, 0}, own_offset[2] = {0, 0};
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) sum[f][0] = sum[f][1] = sum[f][2] = sum[f][3] = 0;

    int stage = 0, phase = 0;
    for (int i = 0; i < ring.count; i++) {
        const char* record = ring.take(stage, phase);
        u32 words[WORDS];
        load_words(words, record, lane, 0, KEY_RUNS);
#if KEY_SLOTS
        Outliers<KEY_SLOTS, true> key_outliers;
        key_outliers.put(sparse, record, inverse, lane);
#endif
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        uint4 angle;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            u32 a[4], b0 = queries[f][0], b1 = queries[f][1];
            decoder.fragment(a, words, f, 0);
#if KEY_SLOTS
            const uint4 outliers = *(const uint4*)(sparse + f * 512 + lane * 16);
            a[0] = add2(a[0], outliers.x), a[1] = add2(a[1], outliers.y);
            a[2] = add2(a[2], outliers.z), a[3] = add2(a[3], outliers.w);
#endif
#if CHANNELS
            if (f % 2 == 0) angle = *(const uint4*)(record + RECORD + f / 2 * 64 + t * 16);
            const u32 cos = f % 2 ? angle.z : angle.x, sin = f % 2 ? angle.w : angle.y;
            const u32 turned = fma2(cos, b0, mul2(sin, b1));
            b1 = fma2(cos, b1, neg2(mul2(sin, b0)));
            b0 = turned;
#if HELD
            const u32* c = constants[f];
#else
            u32 c[12];
#pragma unroll
            for (int j = 0; j < 3; j++) {
                const uint4 v = ((const uint4*)(shared + CONSTANTS_AT))[(f * 3 + j) * 32 + lane];
                c[4 * j] = v.x, c[4 * j + 1] = v.y, c[4 * j + 2] = v.z, c[4 * j + 3] = v.w;
            }
#endif
#pragma unroll
            for (int r = 0; r < 2; r++) {  // tokens g and g + 8
                const u32 x = a[r], z = a[2 + r];
                a[r] = fma2(c[6 * r], x, fma2(c[6 * r + 1], z, c[6 * r + 2]));
                a[2 + r] = fma2(c[6 * r + 3], x, fma2(c[6 * r + 4], z, c[6 * r + 5]));
            }
#endif
            multiply(f % 2 ? odd : even, a, b0, b1);
        }
#if KEY_SLOTS
        key_outliers.take_back(sparse, lane);
#endif
#if VALUE_SLOTS
        Outliers<VALUE_SLOTS, false> value_outliers;
        value_outliers.put(sparse, record, inverse, lane);
#endif
        load_words(words, record, lane, KEY_RUNS, WORDS / RUN);
        float key_scale[2] = {1, 1}, value_scale[2], value_offset[2] = {0, 0};
        if (PARAMETERS == 2) {
            const uint2 v = *(const uint2*)(record + PARAMETERS_AT + g * 8);
            if (CHANNELS) {
                value_scale[0] = half_low(v.x), value_scale[1] = half_low(v.y);
                value_offset[0] = half_high(v.x), value_offset[1] = half_high(v.y);
            } else {
                key_scale[0] = half_low(v.x) * UNIT, key_scale[1] = half_low(v.y) * UNIT;
                value_scale[0] = half_high(v.x), value_scale[1] = half_high(v.y);
            }
        } else {
            const u32 v = *(const u32*)(record + PARAMETERS_AT + g * 4);
            value_scale[0] = half_low(v), value_scale[1] = half_high(v);
        }
        __syncwarp();
        ring.request(i + STAGES, stage);
        if (++stage == STAGES) stage = 0, phase ^= 1;

        // Scores of token g with heads 2 t and 2 t + 1, then of token g + 8.
        float score[4];
#pragma unroll
        for (int j = 0; j < 4; j++) score[j] = (even[j] + odd[j]) * key_scale[j / 2];
        const int token = (begin + warp + i * WARPS) * 16;
        if (token < first || token + 16 > length) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int slot = token + g + 8 * (j / 2);
                if (slot < first || slot >= length) score[j] = -INFINITY_;
            }
        }
        // A numerator is the value's scale times 2^score, so that fp16 holds it, whatever the scale.
        float inverse_value[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float own = fmaxf(value_scale[r], SMALLEST);
            inverse_value[r] = reciprocal(own);
            const float power = log_of_two(own);
            score[2 * r] += power;
            score[2 * r + 1] += power;
        }
        const float most[2] = {fmaxf(score[0], score[2]), fmaxf(score[1], score[3])};
        if (__any_sync(ALL, most[0] > reference[0] + MOST || most[1] > reference[1] + MOST)) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float now = most[j];
#pragma unroll
                for (int apart = 4; apart < 32; apart <<= 1) now = fmaxf(now, __shfl_xor_sync(ALL, now, apart));
                now = fmaxf(now - HEADROOM, reference[j]);
                const float faded = power_of_two(reference[j] - now);
                reference[j] = now;
                own_weight[j] *= faded;
                own_offset[j] *= faded;
#pragma unroll
                for (int f = 0; f < FRAGMENTS; f++) sum[f][j] *= faded, sum[f][2 + j] *= faded;
            }
        }
        float share[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            share[j] = power_of_two(score[j] - reference[j % 2]);
            const float part = share[j] * inverse_value[j / 2];
            own_weight[j % 2] += part;
            if (OFFSETS) own_offset[j % 2] = fmaf(part, value_offset[j / 2], own_offset[j % 2]);
        }
        const u32 p0 = transposed(halves(share[0], share[1])), p1 = transposed(halves(share[2], share[3]));
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            u32 a[4];
            decoder.fragment(a, words, FRAGMENTS + f, 1);
            multiply(sum[f], a, p0, p1);
#if VALUE_SLOTS
            const uint4 outliers = *(const uint4*)(sparse + f * 512 + lane * 16);
            const u32 b[4] = {outliers.x, outliers.y, outliers.z, outliers.w};
            multiply(sum[f], b, p0, p1);
#endif
        }
#if VALUE_SLOTS
        value_outliers.take_back(sparse, lane);
#endif
    }

    // Over the lanes of a warp, then over warps.
#pragma unroll
    for (int apart = 4; apart < 32; apart <<= 1)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            own_weight[j] += __shfl_xor_sync(ALL, own_weight[j], apart);
            own_offset[j] += __shfl_xor_sync(ALL, own_offset[j], apart);
        }
#if !HOPPER
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
    __syncthreads();
    float(*found)[GROUP][D] = (float(*)[GROUP][D])shared;                                  // of every warp
    float(*about)[GROUP][4] = (float(*)[GROUP][4])(shared + 4 * WARPS * GROUP * D);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int h = 2 * t + j;
        if (h >= GROUP) continue;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            found[warp][h][16 * f + g] = sum[f][j];
            found[warp][h][16 * f + g + 8] = sum[f][2 + j];
        }
        if (g == 0) about[warp][h][0] = reference[j], about[warp][h][1] = own_weight[j], about[warp][h][2] = own_offset[j];
    }
    __syncthreads();
    const bool has_first = split == 0 && sinks;
    for (int h = warp; h < GROUP; h += WARPS) {
        float most = NONE, total = 0, added = 0;
        if (lane < WARPS) most = about[lane][h][0], total = about[lane][h][1], added = about[lane][h][2];
        if (lane == WARPS && has_first) most = found_first[h * (D + 2) + D], total = found_first[h * (D + 2) + D + 1];
        float now = most;
#pragma unroll
        for (int apart = 16; apart; apart >>= 1) now = fmaxf(now, __shfl_xor_sync(ALL, now, apart));
        const float share = power_of_two(most - now);
        if (lane <= WARPS) shares[h][lane] = share;
        total *= share;
        added *= share;
#pragma unroll
        for (int apart = 16; apart; apart >>= 1) {
            total += __shfl_xor_sync(ALL, total, apart);
            added += __shfl_xor_sync(ALL, added, apart);
        }
        if (lane == 0) largest[h] = now, weight[h] = total, offset[h] = added;
    }
    __syncthreads();
    float* mine = partial + ((size_t)head * splits + split) * GROUP * (D + 2);
    float* whole = query;  // [GROUP][PITCH]
    for (int i = threadIdx.x; i < GROUP * D; i += WARPS * 32) {
        const int h = i / D, d = i % D;
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total = fmaf(found[w][h][d], shares[h][w], total);
        total = fmaf(total, UNIT, offset[h]);
        if (has_first) total = fmaf(found_first[h * (D + 2) + d], shares[h][WARPS], total);
        if (splits == 1)
            whole[h * PITCH + d] = total;
        else
            mine[h * (D + 2) + d] = total;
    }
    if (splits > 1) {
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
        float* all_shares = (float*)shared;  // [GROUP][splits]
        for (int i = threadIdx.x; i < GROUP * splits; i += WARPS * 32)
            all_shares[i] = __ldcg(all + ((i % splits) * GROUP + i / splits) * (D + 2) + D);
        __syncthreads();
        for (int h = warp; h < GROUP; h += WARPS) {
            float* own_shares = all_shares + h * splits;
            float most = NONE, total = 0;
            for (int s = lane; s < splits; s += 32) most = fmaxf(most, own_shares[s]);
#pragma unroll
            for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL, most, apart));
            for (int s = lane; s < splits; s += 32) {
                const float share = power_of_two(own_shares[s] - most);
                own_shares[s] = share;
                total = fmaf(__ldcg(all + (s * GROUP + h) * (D + 2) + D + 1), share, total);
            }
#pragma unroll
            for (int apart = 16; apart; apart >>= 1) total += __shfl_xor_sync(ALL, total, apart);
            if (lane == 0) weight[h] = total;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < GROUP * D; i += WARPS * 32) {
            const int h = i / D, d = i % D;
            float total = 0;
#pragma unroll 8
            for (int s = 0; s < splits; s++)
                total = fmaf(__ldcg(all + (s * GROUP + h) * (D + 2) + d), all_shares[h * splits + s], total);
            whole[h * PITCH + d] = total;
        }
    }
    __syncthreads();
    for (int h = warp; h < GROUP; h += WARPS) {
        float x[D / 32];
#pragma unroll
        for (int r = 0; r < D / 32; r++) x[r] = whole[h * PITCH + lane + 32 * r];
        if (TURN_VALUES) turn(x, lane);
        const float inverse_weight = 1 / weight[h];
#pragma unroll
        for (int r = 0; r < D / 32; r++)
            y[(size_t)(head * GROUP + h) * D + lane + 32 * r] = narrow(x[r] * inverse_weight);
    }
}
