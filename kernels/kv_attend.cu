// One new token's attention over a cache of coded keys and values, in tiles of 16 tokens: see
// numerics/kv_tiles.py for their layout, numerics/kv_constants.py for what else is read, and
// ops/packed_attention.py for what is computed.
//
// q: [batch, heads, D]; tiles: [batch · kv heads][capacity] records; length: one number, padding: [batch] or
// null. y: [batch, heads, D]. partial: [batch · kv heads][splits][PARTIAL] fp32, what a block found: sums
// [GROUP][D], then largest scores and weights [GROUP][2]; counters: [batch · kv heads], zero before and after. limit:
// tiles that the length may reach. Beyond the capacity it is where there is a window: a tile then lies at its number
// modulo the capacity, which is a tile more than a window can touch, for the kernel before may write the newest.
//
// Blocks divide the tiles of a kv head, and each warp streams its own through a ring in shared memory. Products
// are 16 tokens by 8 heads at a time: keys, 16 tokens × 16 channels, times queries, and values, 16 channels × 16
// tokens, times the softmax's numerators. Words of codes become fragments by a table of pairs that is there once
// for every lane, so that no two lanes meet in a bank.
//
// Keys by channel: a lane has the same tokens of every tile, so their rotation, scale and offset are constants;
// the query is turned back by a tile's angle. Values' scales go into the numerators; what offsets add is the same
// for all channels, one number. Outliers of keys are added to scores, in fp32; those of values are a product more.
//
// Macros: those of kv_tiles.cu; GROUP, heads to a kv head, at most 8; TURN_KEYS, TURN_VALUES, by a Hadamard matrix;
// ROTARY, how many channels the rotary embedding turns; WARPS of a block; STAGES of a ring; COPIES of the table,
// 32 or, where shared memory is small, 8; HELD, constants of channels in registers; SLIDING, there is a window; SKIP,
// tiles whose scores all lie further below the largest of their warp than `skip`, in powers of two, do not count;
// PAIRED, columns of the second half of a product, where they would be those of the first again, have the next
// fragment's outliers of values. Giving them what fp16 leaves of the queries instead took 5 % longer, and the error
// at 128K tokens from 3.3e-3 to 3.1e-3.

#define KEY_WORDS (BITS == 3 ? (FRAGMENTS + 3) / 4 * 3 : FRAGMENTS * BITS / 4)
#define KEY_RUNS ((KEY_WORDS + RUN - 1) / RUN)
#define STEP (CHANNELS ? 2 * D : 0)  // bytes of a tile's angles, behind its record
#define STAGE (RECORD + STEP)

// Shared memory, in bytes. What warps found takes the place of the table and the rings.
#define TABLE (BITS == 8 ? 0 : 2048 * COPIES)
#define RINGS (WARPS * STAGES * STAGE)
#define FOUND (4 * WARPS * GROUP * (D + 4))
#define FRONT (TABLE + RINGS > FOUND ? TABLE + RINGS : FOUND)
#define CONSTANTS_AT FRONT
#define CONSTANTS (CHANNELS && !HELD ? 96 * D : 0)
#define ANGLES_AT (CONSTANTS_AT + CONSTANTS)  // [D / 2][16] cos and sin
#define COLUMNS (GROUP > 4 || GROUP == 3 ? 8 : GROUP == 4 ? 4 : 2)  // of a product that are not those before again
#define PAIRS_AT (ANGLES_AT + (KEY_SLOTS ? 64 * D : 0))  // [D / 2][COLUMNS], of queries
#define FACTORS_AT (PAIRS_AT + (KEY_SLOTS ? 4 * COLUMNS * D : 0))  // of outliers of keys
#define QUERY_AT (FACTORS_AT + (KEY_SLOTS ? 4 * D : 0))
#define PITCH (D + 8)  // of a query, so that heads lie in other banks
#define SINKS_AT (QUERY_AT + 4 * GROUP * PITCH)
#define BARRIERS_AT (SINKS_AT + 4 * GROUP * (D + 4))
#define SHARED (BARRIERS_AT + 8 * WARPS * STAGES)

#define THREADS (WARPS * 32)
#define QUADS (GROUP * D / 4)  // of four channels, of a group of heads
#define TEAMS (THREADS / QUADS > 1 ? THREADS / QUADS : 1)  // of threads, that share the blocks to add up
#define PARTIAL (GROUP * (D + 4))

// Tiles of a warp that are requested before anything else: the copy engine takes one after the other, and a warp
// waits to hand it the next.
#define EARLY 2

#define HOPPER (__CUDA_ARCH__ >= 900)
#define NONE (-1e30f)  // no score is as low
#define LIMIT (SLIDING ? limit : capacity)
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

// All bits of a half where they are equal: small integers, which are fp16 numbers too.
__device__ __forceinline__ u32 equal2(u32 a, u32 b) {
    u32 d;
    asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
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
    const char* records;  // the first; of a window, where that of number 0 modulo the capacity lies
    const char* steps;  // angles of the first
    int count, lane, place, capacity;  // place: of the next, of a window

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

    // Take the tiles from `first` on, WARPS apart, of a kv head's.
    __device__ __forceinline__ void begin(const char* tiles, const char* all_steps, int head, int first, int capacity_) {
        steps = all_steps + (size_t)first * STEP;
#if SLIDING
        records = tiles + (size_t)head * capacity_ * RECORD;
        capacity = capacity_, place = (u32)first % (u32)capacity_;
#else
        records = tiles + ((size_t)head * capacity_ + first) * RECORD;
#endif
    }

    // Request a tile, after the one before.
    __device__ __forceinline__ void request(int tile, int stage) {
#if SLIDING
        const char* record = records + (size_t)place * RECORD;
        // A warp that has a second tile has no more warps than there are places.
        if (tile < count && (place += WARPS) >= capacity) place -= capacity;
#else
        const char* record = records + (size_t)tile * WARPS * RECORD;
#endif
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

#if HOPPER
    // Begin again, with other tiles, when so many of the first were requested: every stage has had its turn then.
    __device__ __forceinline__ void begin_again(int requested) {
        for (int s = 0; s < STAGES; s++) {
            if (lane == 0 && s >= requested)
                asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barriers + 8 * s) : "memory");
            take(s, 0);
        }
    }
#endif

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

// Outliers of a tile's values, one of every token: a matrix that has each in the row that is its channel modulo 16,
// times numerators of those tokens alone whose channels belong to a fragment.
struct Outliers {
    u32 rows[4], fragments[2];

    // value_inverse: of tokens g and g + 8, by which numerators are too large for what is no multiple of scales.
    __device__ __forceinline__ void load(const char* record, const float* value_inverse, int i, int g) {
        u32 entries[2], channels[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int slot = (g + 8 * r) * VALUE_SLOTS + i;
            const float entry = half_low(((const u16*)(record + VALUE_MISSING_AT))[slot]) * value_inverse[r];
            const u32 channel = ((const u8*)(record + VALUE_CHANNEL_AT))[slot];
            // From the lanes of a token to those of its column: pairs of tokens 2 t and 2 t + 1.
            entries[r] = transposed(__byte_perm(half_of(fminf(fmaxf(entry, -65504.f), 65504.f)), 0, 0x1010));
            channels[r] = transposed(channel | channel << 16);
            fragments[r] = channels[r] >> 4 & 0x000f000f;
            if (PAIRED) fragments[r] ^= (g >> 2) * 0x10001;  // of an even one, the next in columns from 4 on
            channels[r] &= 0x000f000f;
        }
#pragma unroll
        for (int r = 0; r < 4; r++) rows[r] = entries[r / 2] & equal2(channels[r / 2], (g + 8 * (r % 2)) * 0x10001);
    }

    __device__ __forceinline__ void add(float* sum, u32 p0, u32 p1, int f) const {
        multiply(sum, rows, p0 & equal2(fragments[0], f * 0x10001), p1 & equal2(fragments[1], f * 0x10001));
    }
};

// What outliers of a token's keys add to its scores with heads 2 t and 2 t + 1.
__device__ __forceinline__ float2 outliers_scores(const char* shared, const char* record, int token, int t) {
    float2 score = {0, 0};
#pragma unroll
    for (int i = 0; i < KEY_SLOTS; i++) {
        const int slot = token * KEY_SLOTS + i, channel = ((const u8*)(record + KEY_CHANNEL_AT))[slot];
        const float missing = half_low(((const u16*)(record + KEY_MISSING_AT))[slot]) *
                              *(const float*)(shared + FACTORS_AT + channel * 4);
        const bool inside = ROTARY == D || channel < ROTARY;
        const int from = inside ? channel : channel - ROTARY, half = inside ? ROTARY / 2 : (D - ROTARY) / 2;
        const bool second = from >= half;
        const int pair = from - (second ? half : 0) + (inside ? 0 : ROTARY / 2);
        // The angles of the tile, and of the token in it.
        const uint2 two = *(const uint2*)(record + RECORD + (pair >> 4) * 64 + (pair >> 1 & 3) * 16 + (pair & 8));
        const u32 far = __byte_perm(two.x, two.y, pair & 1 ? 0x7632 : 0x5410);
        const float2 near = *(const float2*)(shared + ANGLES_AT + (pair * 16 + token) * 8);
        const float4 q = *(const float4*)(shared + PAIRS_AT + (pair * COLUMNS + 2 * t % COLUMNS) * 8);
        const float cos = (half_low(far) * near.x - half_high(far) * near.y) * missing;
        const float sin = (half_high(far) * near.x + half_low(far) * near.y) * missing;
        const float one = second ? -sin : cos, other = second ? cos : sin;
        score.x += one * q.x + other * q.y;
        score.y += one * q.z + other * q.w;
    }
    return score;
}

// The same of a lane's tokens g and g + 8.
__device__ __forceinline__ void add_outliers(float* score, const char* shared, const char* record, int g, int t) {
    float2 one, two;
    if (COLUMNS <= 4) {  // lanes t and t + 2 have the same heads: a token each
        const float2 mine = outliers_scores(shared, record, g + 8 * (t >> 1), t);
        const float2 other = {__shfl_xor_sync(ALL, mine.x, 2), __shfl_xor_sync(ALL, mine.y, 2)};
        one = t < 2 ? mine : other;
        two = t < 2 ? other : mine;
    } else {
        one = outliers_scores(shared, record, g, t);
        two = outliers_scores(shared, record, g + 8, t);
    }
    score[0] += one.x, score[1] += one.y, score[2] += two.x, score[3] += two.y;
}

// Of four channels: numerators, and the denominator, as multiples of 2^most.
struct Sum {
    float4 sum = {0, 0, 0, 0};
    float weight = 0, most = NONE;

    // Make the largest of these the reference, if it is larger.
    template <int COUNT>
    __device__ __forceinline__ void renew(const float (&found)[COUNT]) {
        float now = most;
#pragma unroll
        for (int i = 0; i < COUNT; i++) now = fmaxf(now, found[i]);
        const float faded = power_of_two(most - now);
        most = now;
        sum.x *= faded, sum.y *= faded, sum.z *= faded, sum.w *= faded;
        weight *= faded;
    }

    __device__ __forceinline__ void add(float4 other, float other_weight, float part) {
        sum.x = fmaf(other.x, part, sum.x), sum.y = fmaf(other.y, part, sum.y);
        sum.z = fmaf(other.z, part, sum.z), sum.w = fmaf(other.w, part, sum.w);
        weight = fmaf(other_weight, part, weight);
    }
};

// What a block is to do: positions of the tokens it sees, and its tiles.
struct Share {
    int length, start, oldest, first, begin, end;

    __device__ __forceinline__ Share(int length_, int start_, int split, int splits, int capacity, int sinks,
                                     int window) {
        length = length_;
        start = start_;
        oldest = window ? max(start, length - window) : start;
        first = max(oldest, start + sinks);  // of those that are in tiles
        const int first_tile = first >> 4;
        const u32 count = max(((length + 15) >> 4) - first_tile, 0);
        begin = first_tile + (u32)split * count / (u32)splits;
        end = first_tile + (u32)(split + 1) * count / (u32)splits;
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
kv_attend(const u16* q, const char* tiles, const int* length, const int* padding,
          const u32* __restrict__ books, const uint4* __restrict__ channels, const float* __restrict__ inverse,
          const float2* __restrict__ angles, const char* __restrict__ steps, const u16* key_sinks,
          const u16* value_sinks, u16* __restrict__ y, float* __restrict__ partial, int* counters, float scale,
          int capacity, int kv_heads, int sinks, int window, int limit, float skip) {
    extern __shared__ __align__(1024) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int head = blockIdx.y, batch = head / kv_heads, kv_head = head % kv_heads;
    const int split = blockIdx.x, splits = gridDim.x;
    {
        u32 given;
        asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(given));
        if (given < SHARED) __trap();
    }
    let_next_start();

    // Loads go out together; what waits for them comes behind.
    int now_length = *(const volatile int*)length, now_start = padding ? ((const volatile int*)padding)[batch] : 0;
#if BITS < 8
    constexpr int HALF_ROW = 4 * COPIES, PIECES = HALF_ROW / 8;  // of 16 bytes to a row
    constexpr int ROWS = THREADS / PIECES, EACH = 256 / ROWS;
    const int piece = threadIdx.x % PIECES, from = threadIdx.x / PIECES * EACH;
    uint4 pairs[EACH / 4];
#pragma unroll
    for (int i = 0; i < EACH / 4; i++)
        pairs[i] = __ldg((const uint4*)(books + (piece >= PIECES / 2) * 256 + from) + i);
#endif
    Ring ring;
    ring.lane = lane;
    ring.stages = shared + TABLE + warp * STAGES * STAGE;
    ring.barriers = shared_address(shared + BARRIERS_AT) + 8 * STAGES * warp;
    ring.open();
#if PDL
    // Before the wait the kernel before may still write the length and the tile of the newest token. The other
    // tiles are requested by what the length is now, and others if this block's turn out to be others.
    now_length = min(max(__shfl_sync(ALL, now_length, 0), 1), 16 * LIMIT);
    now_start = min(max(__shfl_sync(ALL, now_start, 0), 0), 16 * LIMIT);
#endif
    const Share early(now_length, now_start, split, splits, capacity, sinks, window);
    const int early_end = min(early.end, PDL ? (now_length - 1) >> 4 : LIMIT);
    const int early_count = max(early_end - early.begin - warp + WARPS - 1, 0) / WARPS;
    ring.count = early_count;
    ring.begin(tiles, steps, head, early.begin + warp, capacity);
    ring.request(0, 0);

    Decoder decoder;
#if BITS < 8
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint4 four = pairs[i / 4];
        const u32 pair = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
        *(uint4*)(shared + (from + i) * 2 * HALF_ROW + piece * 16) = make_uint4(pair, pair, pair, pair);
    }
    decoder.table = shared;
    decoder.lane = (lane & (COPIES - 1)) * 4;
#endif
#pragma unroll
    for (int s = 1; s < EARLY; s++) ring.request(s, s);
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
#if KEY_SLOTS
    for (int i = threadIdx.x; i < 8 * D; i += THREADS)
        ((float2*)(shared + ANGLES_AT))[i % (D / 2) * 16 + i / (D / 2)] = __ldg(angles + i);
    // Like codes, outliers are divided by the scale and multiplied by the constant of it: a1 or b2 of token 0.
    for (int i = threadIdx.x; i < D; i += THREADS) {
        const int pair = i % (D / 2), second = i >= D / 2, channel = second ? second_of(pair) : first_of(pair);
        const u16* of_fragment = (const u16*)(channels + ((size_t)kv_head * FRAGMENTS + (pair >> 3)) * 96);
        const u16 own = __ldg(of_fragment + second * 256 + (pair >> 1 & 3) * 8 + (pair & 1));
        const float factor = half_low(own) * __ldg(inverse + kv_head * D + channel);
        ((float*)(shared + FACTORS_AT))[channel] = fminf(fmaxf(factor, -65504.f), 65504.f);
    }
#endif
#endif

    int stage = 0, phase = 0;
#if PDL
    wait_for_input();
    now_length = *(const volatile int*)length;
    now_start = padding ? ((const volatile int*)padding)[batch] : 0;
#endif
    // The queries: a head for every warp.
    constexpr int HEADS = (GROUP + WARPS - 1) / WARPS;  // of a warp
    float x[HEADS][D / 32];
#pragma unroll
    for (int n = 0; n < HEADS; n++) {
        const u16* own = q + (size_t)(head * GROUP + min(warp + n * WARPS, GROUP - 1)) * D + lane;
#pragma unroll
        for (int r = 0; r < D / 32; r++) x[n][r] = widen(own[32 * r]) * scale;
    }
#if PDL
    const Share share_(now_length, now_start, split, splits, capacity, sinks, window);
    ring.count = max(share_.end - share_.begin - warp + WARPS - 1, 0) / WARPS;
    if (share_.begin != early.begin || share_.end != early.end) {
        ring.begin_again(min(early_count, EARLY));
        ring.begin(tiles, steps, head, share_.begin + warp, capacity);
        phase = 1;
#pragma unroll
        for (int s = 0; s < EARLY; s++) ring.request(s, s);
    } else {
#pragma unroll
        for (int s = 0; s < EARLY; s++)
            if (s >= early_count) ring.request(s, s);
    }
#else
    const Share& share_ = early;
#endif

    float* query = (float*)(shared + QUERY_AT);
    float* found_first = (float*)(shared + SINKS_AT);  // [GROUP][D + 4]
#pragma unroll
    for (int n = 0; n < HEADS; n++) {
        const int h = warp + n * WARPS;
        if (h >= GROUP) break;
        if (split == 0 && sinks) {
            // What stands at the first positions.
            float sum[D / 32], most = NONE, total = 0;
#pragma unroll
            for (int r = 0; r < D / 32; r++) sum[r] = 0;
            const int end = min(sinks, share_.length - share_.start);
            for (int i = share_.oldest - share_.start; i < end; i += 4) {
                float keys[4][D / 32], values[4][D / 32];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const size_t at = ((size_t)head * sinks + min(i + j, end - 1)) * D + lane;
#pragma unroll
                    for (int r = 0; r < D / 32; r++) {
                        keys[j][r] = widen(key_sinks[at + 32 * r]);
                        values[j][r] = widen(value_sinks[at + 32 * r]);
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float score = 0;
#pragma unroll
                    for (int r = 0; r < D / 32; r++) score = fmaf(x[n][r], keys[j][r], score);
#pragma unroll
                    for (int apart = 16; apart; apart >>= 1) score += __shfl_xor_sync(ALL, score, apart);
                    if (i + j >= end) score = -INFINITY_;
                    const float now = fmaxf(most, score);
                    const float faded = power_of_two(most - now), part = power_of_two(score - now);
                    most = now;
                    total = fmaf(total, faded, part);
#pragma unroll
                    for (int r = 0; r < D / 32; r++) sum[r] = fmaf(sum[r], faded, part * values[j][r]);
                }
            }
            if (TURN_VALUES) turn(sum, lane);
#pragma unroll
            for (int r = 0; r < D / 32; r++) found_first[h * (D + 4) + lane + 32 * r] = sum[r];
            if (lane == 0) {
                found_first[h * (D + 4) + D] = most;
                found_first[h * (D + 4) + D + 1] = total;
            }
        }
        if (TURN_KEYS) turn(x[n], lane);
        float* own = query + h * PITCH;
#pragma unroll
        for (int r = 0; r < D / 32; r++) own[lane + 32 * r] = x[n][r];
#if CHANNELS
        // Turned by the padding, since a key's position is its slot less that. Tiles turn it back from there, so that
        // however many blocks there are, every tile meets the same one.
        __syncwarp();
        for (int pair = lane; pair < D / 2; pair += 32) {
            float one = own[first_of(pair)], two = own[second_of(pair)];
            if (share_.start) {
                const float2 far = __ldg(angles + (size_t)(16 + (share_.start >> 4)) * (D / 2) + pair);
                const float2 near = __ldg(angles + (size_t)(share_.start & 15) * (D / 2) + pair);
                const float turned = far.x * one - far.y * two;
                two = far.y * one + far.x * two;
                one = near.x * turned - near.y * two;
                two = near.y * turned + near.x * two;
            }
            own[first_of(pair)] = one;
            own[second_of(pair)] = two;
#if KEY_SLOTS
            float2* to = (float2*)(shared + PAIRS_AT) + pair * COLUMNS;
            for (int column = h; column < COLUMNS; column += GROUP) to[column] = make_float2(one, two);
#endif
        }
#endif
    }
    __syncthreads();
    u32 queries[FRAGMENTS][2];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        const float* own = query + g % GROUP * PITCH;
        const int pair = 8 * f + 2 * t;
        const float2 one = *(const float2*)(own + first_of(pair)), two = *(const float2*)(own + second_of(pair));
        queries[f][0] = halves(one.x, one.y);
        queries[f][1] = halves(two.x, two.y);
    }

#pragma unroll
    for (int s = EARLY; s < STAGES; s++) ring.request(s, s);

    float sum[FRAGMENTS][4], reference[2] = {NONE, NONE}, own_weight[2] = {0, 0}, own_offset[2] = {0, 0};
#if SKIP
    float highest[2] = {NONE, NONE};  // score of heads 2 t and 2 t + 1
#endif
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) sum[f][0] = sum[f][1] = sum[f][2] = sum[f][3] = 0;
#if PAIRED
    float pairs_sum[FRAGMENTS / 2][4];  // of outliers of values
#pragma unroll
    for (int f = 0; f < FRAGMENTS / 2; f++)
        pairs_sum[f][0] = pairs_sum[f][1] = pairs_sum[f][2] = pairs_sum[f][3] = 0;
#endif

    for (int i = 0; i < ring.count; i++) {
        const char* record = ring.take(stage, phase);
        u32 words[WORDS];
        load_words(words, record, lane, 0, KEY_RUNS);
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
        // A numerator is the value's scale times 2^score, so that fp16 holds it, whatever the scale.
        float inverse_value[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            value_scale[r] = fmaxf(value_scale[r], SMALLEST);
            inverse_value[r] = reciprocal(value_scale[r]);
        }
        Outliers outliers[VALUE_SLOTS + !VALUE_SLOTS];
#pragma unroll
        for (int j = 0; j < VALUE_SLOTS; j++) outliers[j].load(record, inverse_value, j, g);
#if KEY_SLOTS
        float outliers_score[4] = {0, 0, 0, 0};
        add_outliers(outliers_score, shared, record, g, t);
#endif
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        uint4 angle;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            u32 a[4], b0 = queries[f][0], b1 = queries[f][1];
            decoder.fragment(a, words, f, 0);
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
        load_words(words, record, lane, KEY_RUNS, WORDS / RUN);
        __syncwarp();
        ring.request(i + STAGES, stage);
        if (++stage == STAGES) stage = 0, phase ^= 1;

        // Scores of token g with heads 2 t and 2 t + 1, then of token g + 8.
        float score[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            score[j] = (even[j] + odd[j]) * key_scale[j / 2];
#if KEY_SLOTS
            score[j] += outliers_score[j];
#endif
        }
        const int token = (share_.begin + warp + i * WARPS) * 16;
        if (token < share_.first || token + 16 > share_.length) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int slot = token + g + 8 * (j / 2);
                if (slot < share_.first || slot >= share_.length) score[j] = -INFINITY_;
            }
        }
#if SKIP
        {
            // A score that is no number is not below.
            const float one = highest[0] - skip, two = highest[1] - skip;
            if (!__any_sync(ALL, !(score[0] <= one && score[1] <= two && score[2] <= one && score[3] <= two))) continue;
            if (__any_sync(ALL, fmaxf(score[0], score[2]) > highest[0] || fmaxf(score[1], score[3]) > highest[1])) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    highest[j] = fmaxf(highest[j], fmaxf(score[j], score[2 + j]));
#pragma unroll
                    for (int apart = 4; apart < 32; apart <<= 1)
                        highest[j] = fmaxf(highest[j], __shfl_xor_sync(ALL, highest[j], apart));
                }
            }
        }
#endif
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float power = log_of_two(value_scale[r]);
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
#if PAIRED
#pragma unroll
                for (int f = 0; f < FRAGMENTS / 2; f++) pairs_sum[f][j] *= faded, pairs_sum[f][2 + j] *= faded;
#endif
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
#pragma unroll
            for (int j = 0; j < VALUE_SLOTS; j++) {
#if PAIRED
                if (f % 2 == 0) outliers[j].add(pairs_sum[f / 2], p0, p1, f);
#else
                outliers[j].add(sum[f], p0, p1, f);
#endif
            }
        }
    }
#if PAIRED
#pragma unroll
    for (int f = 0; f < FRAGMENTS / 2; f++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum[2 * f][j] += pairs_sum[f][j];
            sum[2 * f + 1][j] += __shfl_xor_sync(ALL, pairs_sum[f][j], 2);  // columns 4 further
        }
#endif

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
    float(*found)[GROUP][D] = (float(*)[GROUP][D])shared;                        // of every warp
    float4(*about)[GROUP] = (float4(*)[GROUP])(shared + 4 * WARPS * GROUP * D);  // reference, weight, offset
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int h = 2 * t + j;
        if (h >= GROUP) continue;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            found[warp][h][16 * f + g] = sum[f][j];
            found[warp][h][16 * f + g + 8] = sum[f][2 + j];
        }
        if (g == 0) about[warp][h] = make_float4(reference[j], own_weight[j], own_offset[j], 0);
    }
    __syncthreads();
    const bool has_first = split == 0 && sinks;
    float* mine = partial + ((size_t)head * splits + split) * PARTIAL;
    float* whole = query;  // [GROUP][PITCH], the weight behind
    u16* own_y = y + (size_t)head * GROUP * D;
    // What is left when all is added up: of four channels from i on.
    auto finish = [&](int i, Sum all) {
        const int h = i / (D / 4), d = i % (D / 4) * 4;
        if (TURN_VALUES) {
            *(float4*)(whole + h * PITCH + d) = all.sum;
            if (d == 0) whole[h * PITCH + D] = all.weight;
        } else {
            const float one = 1 / all.weight;
            *(uint2*)(own_y + h * D + d) =
                make_uint2(narrow(all.sum.x * one) | (u32)narrow(all.sum.y * one) << 16,
                           narrow(all.sum.z * one) | (u32)narrow(all.sum.w * one) << 16);
        }
    };
    for (int i = threadIdx.x; i < QUADS; i += THREADS) {
        const int h = i / (D / 4), d = i % (D / 4) * 4;
        Sum all;
        float most[WARPS + 1];
#pragma unroll
        for (int w = 0; w < WARPS; w++) most[w] = about[w][h].x;
        most[WARPS] = has_first ? found_first[h * (D + 4) + D] : NONE;
        all.renew(most);
        float added = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float part = power_of_two(most[w] - all.most);
            all.add(*(const float4*)&found[w][h][d], about[w][h].y, part);
            added = fmaf(about[w][h].z, part, added);
        }
        all.sum.x = fmaf(all.sum.x, UNIT, added), all.sum.y = fmaf(all.sum.y, UNIT, added);
        all.sum.z = fmaf(all.sum.z, UNIT, added), all.sum.w = fmaf(all.sum.w, UNIT, added);
        if (has_first)
            all.add(*(const float4*)(found_first + h * (D + 4) + d), found_first[h * (D + 4) + D + 1],
                    power_of_two(most[WARPS] - all.most));
        if (splits == 1) {
            finish(i, all);
        } else {
            __stcg((float4*)(mine + h * D + d), all.sum);
            if (d == 0) __stcg((float2*)(mine + GROUP * D) + h, make_float2(all.most, all.weight));
        }
    }
    if (splits > 1) {
        // The last block to come adds up what all of a kv head's found, whatever their order.
        int* last = (int*)(query + D + 1);
        __syncthreads();
        if (threadIdx.x == 0) {
            int before;
            asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                         : "=r"(before)
                         : "l"(counters + head)
                         : "memory");
            *last = before == splits - 1;
            if (before == splits - 1) counters[head] = 0;
        }
        __syncthreads();
        if (!*last) return;
        const float* blocks = partial + (size_t)head * splits * PARTIAL;
        float4* team_sums = (float4*)shared;  // [THREADS]
        float2* team_about = (float2*)(shared + 16 * THREADS);
        const int team = TEAMS > 1 ? threadIdx.x / QUADS : 0;
        for (int i = TEAMS > 1 ? threadIdx.x % QUADS : threadIdx.x; i < QUADS && team < TEAMS; i += THREADS) {
            Sum all;
            // All of a batch of loads wait for memory together.
            constexpr int BATCH = 8;
            for (int first = team; first < splits; first += BATCH * TEAMS) {
                float4 sums[BATCH];
                float most[BATCH], weight[BATCH];
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const bool there = first + j * TEAMS < splits;
                    const float* block = blocks + (size_t)(there ? first + j * TEAMS : first) * PARTIAL;
                    const float2 v = __ldcg((const float2*)(block + GROUP * D) + i / (D / 4));
                    most[j] = there ? v.x : NONE, weight[j] = there ? v.y : 0;
                    sums[j] = __ldcg((const float4*)block + i);
                }
                all.renew(most);
#pragma unroll
                for (int j = 0; j < BATCH; j++)
                    if (first + j * TEAMS < splits) all.add(sums[j], weight[j], power_of_two(most[j] - all.most));
            }
            if (TEAMS > 1) {
                team_sums[threadIdx.x] = all.sum;
                team_about[threadIdx.x] = make_float2(all.most, all.weight);
            } else
                finish(i, all);
        }
        if (TEAMS > 1) {
            __syncthreads();
            const int i = threadIdx.x;
            if (i < QUADS) {
                Sum all;
                float most[TEAMS];
#pragma unroll
                for (int j = 0; j < TEAMS; j++) most[j] = team_about[i + j * QUADS].x;
                all.renew(most);
#pragma unroll
                for (int j = 0; j < TEAMS; j++)
                    all.add(team_sums[i + j * QUADS], team_about[i + j * QUADS].y, power_of_two(most[j] - all.most));
                finish(i, all);
            }
        }
    }
#if TURN_VALUES
    __syncthreads();
    for (int h = warp; h < GROUP; h += WARPS) {
        float own[D / 32];
#pragma unroll
        for (int r = 0; r < D / 32; r++) own[r] = whole[h * PITCH + lane + 32 * r];
        turn(own, lane);
        const float one = 1 / whole[h * PITCH + D];
#pragma unroll
        for (int r = 0; r < D / 32; r++) own_y[h * D + lane + 32 * r] = narrow(own[r] * one);
    }
#endif
}
