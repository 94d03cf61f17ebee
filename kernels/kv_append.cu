// Code new tokens' keys and values and put them where they belong in tiles: see numerics/kv_tiles.py for their
// layout, numerics/kv_codecs.py for the codes, and ops/packed_append.py for what is computed.
//
// A block for every kv head of every sequence, blockIdx.y, and every tile that new tokens lie in, blockIdx.x: tokens of a
// tile share bytes, so they are coded one after another. key, value: [batch · kv heads][count][D]; tiles: [batch · kv heads]
// [capacity] records, tile t at t modulo the capacity; length: one number, new tokens included; padding: [batch] or
// null; limit: tiles that the length may reach. books: [2][2][2^BITS], of K
// and of V the values that are chosen from and those they stand for, fp32. Of keys by channel, [kv heads][D] each:
// offset and scale, and, or null, order: the channels in the order of their rounding; steps: [kv heads]
// [steps_of_head], how each group's errors are passed on; angles: [16 + blocks][D / 2] cos and sin. key_sinks,
// value_sinks: [batch · kv heads][sinks][D].
//
// Macros: those of kv_tiles.cu; TURN_KEYS, TURN_VALUES, by a Hadamard matrix; ROTARY, how many channels the rotary
// embedding turns.

#define THREADS 128
#define EACH (D / 32)  // channels of a lane, 32 apart
#define BOOK (BITS == 8 ? 1 : 1 << BITS)
// The largest power of two that divides D: of a Hadamard matrix.
#define TURN (D & -D)
#define FP8_MOST 448.f
#define TINY 6.103515625e-05f  // the smallest normal number of fp16
#define FAR 3.402823466e38f

__device__ __forceinline__ float most(float x) {
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL, x, apart));
    return x;
}

__device__ __forceinline__ float total(float x) {
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) x += __shfl_xor_sync(ALL, x, apart);
    return x;
}

__device__ __forceinline__ float of_half(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ u8 e4m3(float x) {
    const u32 sign = __float_as_uint(x) >> 24 & 0x80;
    const float size = fminf(fabsf(x), FP8_MOST);
    u32 code = __float2int_rn(size * 512);  // below 2^-6 all are 2^-9 apart
    if (size >= 0.015625f) {
        const u32 bits = __float_as_uint(size);
        code = (bits + 0x7ffff + (bits >> 20 & 1) >> 20) - (120 << 3);
    }
    return sign | code;
}

// A Hadamard matrix times a vector that a warp has.
__device__ __forceinline__ void turn(float (&x)[EACH]) {
#pragma unroll
    for (int apart = 1; apart < 32; apart <<= 1)
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const float other = __shfl_xor_sync(ALL, x[j], apart);
            x[j] = threadIdx.x & apart ? other - x[j] : other + x[j];
        }
#pragma unroll
    for (int apart = 1; apart < TURN / 32; apart <<= 1)
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (!(j & apart)) {
                const float one = x[j], two = x[j + apart];
                x[j] = one + two;
                x[j + apart] = one - two;
            }
    const float unit = rsqrtf((float)TURN);
#pragma unroll
    for (int j = 0; j < EACH; j++) x[j] *= unit;
}

// The nearest of a codebook; borders lie half-way.
__device__ __forceinline__ int nearest(float x, const float* book) {
    int code = 0;
#pragma unroll
    for (int i = 1; i < BOOK; i++) code += x > (book[i - 1] + book[i]) * 0.5f;
    return code;
}

// Mark the SLOTS channels where `size` is largest, the first of equals.
template <int SLOTS>
__device__ __forceinline__ u32 largest(const float (&size)[EACH], u8* channels) {
    const int lane = threadIdx.x & 31;
    u32 taken = 0;
    for (int s = 0; s < SLOTS; s++) {
        float best = -1;
        int where = 0;
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (!(taken >> j & 1) && size[j] > best) best = size[j], where = j;
        const float all = most(best);
        // The least and the greatest are as far from the middle between them: equals are common.
        const u32 first = __reduce_min_sync(ALL, best == all ? lane + 32 * where : D);
        if (lane == first % 32) taken |= 1u << first / 32;
        if (lane == 0) channels[s] = first;
    }
    return taken;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
kv_append(const u16* __restrict__ key, const u16* __restrict__ value, u8* __restrict__ tiles,
          const int* __restrict__ length, const int* __restrict__ padding, const float* __restrict__ books,
          const float* __restrict__ offset, const float* __restrict__ scale, const int* __restrict__ order,
          const float* __restrict__ steps, const float2* __restrict__ angles, u16* __restrict__ key_sinks,
          u16* __restrict__ value_sinks, int steps_of_head, int capacity, int kv_heads, int sinks,
          int limit, int count) {
    extern __shared__ float shared[];
    __shared__ float book[2][2][BOOK], low_of[64], high_of[64];
    float *x = shared, *unit = x + D, *error = unit + D, *passing = error + D;  // then this head's steps
    __shared__ u16 place[D];
    __shared__ u8 codes[2][D], kept[D], channels[2][(KEY_SLOTS > VALUE_SLOTS ? KEY_SLOTS : VALUE_SLOTS) + 1];
    __shared__ u16 parameters[PARAMETERS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int own = blockIdx.y, head = own % kv_heads, batch = own / kv_heads;
    if (BITS < 8)
        for (int i = threadIdx.x; i < 4 * BOOK; i += THREADS) ((float*)book)[i] = books[i];
    if (order) {  // constants: read while the kernel before still works
        const float4* from = (const float4*)(steps + (size_t)head * steps_of_head);
#pragma unroll 8
        for (int i = threadIdx.x; i < steps_of_head / 4; i += THREADS) ((float4*)passing)[i] = from[i];
        for (int i = threadIdx.x; i < D; i += THREADS) place[i] = order[head * D + i];
    }
    let_next_start();
    wait_for_input();
    const int end = *length, first = end - count;
    if (first < 0 || end > limit * 16) __trap();
    const int tile = first / 16 + blockIdx.x;
    u8* record = tiles + ((size_t)own * capacity + (limit > capacity ? tile % capacity : tile)) * RECORD;
    // Of a new token: what its head's vectors have in front of them.
    auto row_of = [&](int row, int slot) { return ((size_t)row * count + (slot - first)) * D; };

    // A vector of its own for every warp: of values, where all heads share a scale; else the key, then the value.
    auto load = [&](float(&v)[EACH], const u16* from, bool turned) {
#pragma unroll
        for (int j = 0; j < EACH; j++) v[j] = widen(from[lane + 32 * j]);
        if (turned) turn(v);
    };
    for (int slot = max(first, 16 * tile); slot < min(end, 16 * tile + 16); slot++) {
        const int token = slot % 16, position = slot - (padding ? padding[batch] : 0);
        const u16 *key_row = key + row_of(own, slot), *value_row = value + row_of(own, slot);
        if (position >= 0 && position < sinks)
            for (int i = threadIdx.x; i < D; i += THREADS) {
                const size_t to = ((size_t)own * sinks + position) * D + i;
                key_sinks[to] = key_row[i];
                value_sinks[to] = value_row[i];
            }
#if CHANNELS
        for (int h = warp; h < kv_heads; h += THREADS / 32) {
            float v[EACH];
            load(v, value + row_of(batch * kv_heads + h, slot), TURN_VALUES);
            float least = FAR, greatest = -FAR;
#pragma unroll
            for (int j = 0; j < EACH; j++) least = fminf(least, v[j]), greatest = fmaxf(greatest, v[j]);
            least = -most(-least), greatest = most(greatest);
#if VALUE_SLOTS
            const float middle = (least + greatest) * 0.5f;
            float size[EACH];
#pragma unroll
            for (int j = 0; j < EACH; j++) size[j] = fabsf(v[j] - middle);
            __shared__ u8 scratch[THREADS / 32][VALUE_SLOTS];
            const u32 taken = largest<VALUE_SLOTS>(size, h == head ? channels[1] : scratch[warp]);
            least = FAR, greatest = -FAR;
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (!(taken >> j & 1)) least = fminf(least, v[j]), greatest = fmaxf(greatest, v[j]);
            least = -most(-least), greatest = most(greatest);
#endif
            if (lane == 0) low_of[h] = least, high_of[h] = greatest;
            if (h == head)
#pragma unroll
                for (int j = 0; j < EACH; j++) x[lane + 32 * j] = v[j];
        }
        __syncthreads();
        {
            float low_ = FAR, high_ = -FAR;
            for (int h = 0; h < kv_heads; h++) low_ = fminf(low_, low_of[h]), high_ = fmaxf(high_, high_of[h]);
#if OFFSETS
            const u16 middle_bits = half_of((high_ + low_) * 0.5f);
            const float middle = of_half(middle_bits);
            const float widest = fmaxf(high_ - middle, middle - low_);
#else
            const float middle = 0, widest = fmaxf(high_, -low_);
#endif
            const u16 scale_bits = half_of(fmaxf(widest * (1 + 0.0009765625f), TINY));
            const float whole = of_half(scale_bits);
            if (threadIdx.x == 0) {
                parameters[0] = scale_bits;
#if OFFSETS
                parameters[1] = middle_bits;
#endif
            }
            for (int i = threadIdx.x; i < D; i += THREADS) codes[1][i] = nearest((x[i] - middle) / whole, book[1][0]);
            __syncthreads();
            u16* missing = (u16*)(record + VALUE_MISSING_AT) + token * VALUE_SLOTS;
            for (int s = threadIdx.x; s < VALUE_SLOTS; s += THREADS) {
                const int c = channels[1][s];
                missing[s] = half_of(x[c] - (book[1][1][codes[1][c]] * whole + middle));
                (record + VALUE_CHANNEL_AT)[token * VALUE_SLOTS + s] = c;
            }
        }
        __syncthreads();

        // The key as it was before the rotary embedding, in units of its channels.
        for (int i = threadIdx.x; i < D; i += THREADS) {
            float v = widen(key_row[i]);
            if (i < ROTARY) {
                const int pair = i % (ROTARY / 2);
                const float2 one = angles[(16 + max(position, 0) / 16) * (D / 2) + pair];
                const float2 two = angles[max(position, 0) % 16 * (D / 2) + pair];
                const float cos = one.x * two.x - one.y * two.y, sin = one.x * two.y + one.y * two.x;
                const float other = widen(key_row[i < ROTARY / 2 ? i + ROTARY / 2 : i - ROTARY / 2]);
                v = i < ROTARY / 2 ? v * cos + other * sin : v * cos - other * sin;
            }
            x[i] = v;
            unit[i] = (v - offset[head * D + i]) / scale[head * D + i];
            kept[i] = 1;
        }
        __syncthreads();
#if KEY_SLOTS
        if (warp == 0) {
            float size[EACH];
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int c = lane + 32 * j;
                size[j] = fabsf(book[0][1][nearest(unit[c], book[0][0])] - unit[c]) * scale[head * D + c];
            }
            const u32 taken = largest<KEY_SLOTS>(size, channels[0]);
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (taken >> j & 1) kept[lane + 32 * j] = 0;
        }
        __syncthreads();
#endif
        if (order) {
            // In order, group by group: of 2, 2, 4, 8, … channels.
            const float* step = passing;
            int size = 2;
            for (int start = 0; start < D; start += size, size = start == 2 ? 2 : start) {
                const int stop = start + size < D ? start + size : D;
                for (int i = start + threadIdx.x; i < stop; i += THREADS) {
                    const int c = place[i];
                    const int code = nearest(unit[c], book[0][0]);
                    codes[0][c] = code;
                    error[i] = kept[c] ? unit[c] - book[0][1][code] : 0;
                }
                __syncthreads();
                const int rest = D - stop;
                for (int i = threadIdx.x; i < rest; i += THREADS) {
                    float sum = 0;
#pragma unroll 8
                    for (int e = 0; e < stop - start; e++) sum = fmaf(error[start + e], step[e * rest + i], sum);
                    unit[place[stop + i]] += sum;
                }
                step += (stop - start) * rest;
                __syncthreads();
            }
        } else {
            for (int i = threadIdx.x; i < D; i += THREADS) codes[0][i] = nearest(unit[i], book[0][0]);
        }
        __syncthreads();
        {
            u16* missing = (u16*)(record + KEY_MISSING_AT) + token * KEY_SLOTS;
            for (int s = threadIdx.x; s < KEY_SLOTS; s += THREADS) {
                const int c = channels[0][s];
                missing[s] = half_of(x[c] - (book[0][1][codes[0][c]] * scale[head * D + c] + offset[head * D + c]));
                (record + KEY_CHANNEL_AT)[token * KEY_SLOTS + s] = c;
            }
        }
#else
        if (warp < 2) {
            float v[EACH];
            load(v, warp ? value_row : key_row, warp ? TURN_VALUES : TURN_KEYS);
#if BITS == 8
            float greatest = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) greatest = fmaxf(greatest, fabsf(v[j]));
            const u16 bits = half_of(fmaxf(most(greatest) / FP8_MOST, TINY));
            const float whole = of_half(bits);
#pragma unroll
            for (int j = 0; j < EACH; j++) codes[warp][lane + 32 * j] = e4m3(v[j] / whole);
#else
            float power = 0, both = 0, coded = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) power = fmaf(v[j], v[j], power);
            power = fmaxf(sqrtf(total(power) / D), TINY);
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int code = nearest(v[j] / power, book[warp][0]);
                const float stands_for = book[warp][1][code];
                codes[warp][lane + 32 * j] = code;
                both = fmaf(v[j], stands_for, both);
                coded = fmaf(stands_for, stands_for, coded);
            }
            const u16 bits = half_of(total(both) / total(coded));
#endif
            if (lane == 0) parameters[warp] = bits;
        }
#endif
        __syncthreads();

        for (int i = threadIdx.x; i < PARAMETERS; i += THREADS)
            ((u16*)(record + PARAMETERS_AT))[(token % 8 * 2 + token / 8) * PARAMETERS + i] = parameters[i];
        // The two codes of a pair of a fragment, 2 · BITS bits: those of this token new, the others as they were.
        auto pair_of = [&](int fragment, int to, int pair, u32 old) {
            const int g = to / 4, t = to % 4;
            if (fragment < FRAGMENTS) {
                if (g != token % 8 || (pair & 1) != token / 8) return old;
                u32 found = 0;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int place = 8 * fragment + 2 * t + e, second = pair >> 1;
                    const int channel = place < ROTARY / 2 ? place + second * (ROTARY / 2)
                                                           : ROTARY / 2 + place + second * ((D - ROTARY) / 2);
                    found |= (u32)codes[0][channel] << e * BITS;
                }
                return found;
            }
            if (t != token % 8 / 2 || pair >> 1 != token / 8) return old;
            const int shift = token % 2 * BITS, channel = 16 * (fragment - FRAGMENTS) + 8 * (pair & 1) + g;
            return old & ~(((1u << BITS) - 1) << shift) | (u32)codes[1][channel] << shift;
        };
        for (int i = threadIdx.x; i < WORDS * 32; i += THREADS) {
            const int run = i / (32 * RUN), to = i / RUN % 32, w = run * RUN + i % RUN;
            u32* where = (u32*)record + i;
            const u32 old = *where;
            u32 now = 0;
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const u32 byte = old >> 8 * p & 0xff;
                u32 found;
#if BITS == 8
                // Two pairs of 16 bits to a word.
                if (p & 1) continue;
                found = pair_of(w / 2, to, 2 * (w % 2) + p / 2, old >> 8 * p & 0xffff);
#elif BITS == 4
                found = pair_of(w, to, p, byte);
#elif BITS == 2
                found = pair_of(2 * w, to, p, byte & 15) | pair_of(2 * w + 1, to, p, byte >> 4) << 4;
#else
                const int part = w % 3;
                const u32 last = pair_of(w / 3 * 4 + 3, to, p, (byte >> 6) << 2 * part);
                found = pair_of(w / 3 * 4 + part, to, p, byte & 63) | (last >> 2 * part & 3) << 6;
#endif
                now |= found << 8 * p;
            }
            *where = now;
        }
        __syncthreads();
    }
}
