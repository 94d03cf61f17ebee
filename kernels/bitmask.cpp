// y = x Wᵀ + b on a CPU, for W as it lies in the file: one bit a weight, then the non-zeros, row after row.
//
// values: bf16, fp16, fp32 or, where all are there, int8 (KIND 0 to 3);
// mask: [rows][ceil(columns / 8)] bytes, bit j % 8 of byte j / 8 is column j;
// offsets: [rows + 1], where rows begin in values. x: [tokens][columns], y: [tokens][rows], fp32 as all sums are.
//
// A row is expanded 32 columns at a time in registers, and each piece meets a few tokens. bf16 becomes fp32 by
// its place in a word: columns of even number and of odd number, which x is divided into beforehand.

#include <cmath>
#include <vector>

#include "cpu.h"

namespace {

constexpr int64_t GROUP = 64;  // columns that x is filled up to
constexpr int64_t PIECE = 32;  // columns that are expanded together
constexpr int MOST = 8;        // tokens whose sums stay in registers, at most
constexpr int64_t FAR = 2048;  // bytes of values that are asked for ahead

// One row times some tokens. x: as `arrange` leaves it; bytes: of the row's mask. Where weights are not MASKED, all are
// there, the mask is not read, and bytes are divisible by 8.
using Row = void (*)(const void* values, const uint8_t* mask, const float* x, int64_t pitch, int64_t bytes, int tokens,
                     float* sums);

template <int KIND, bool MASKED>
void row_portable(const void* values, const uint8_t* mask, const float* x, int64_t pitch, int64_t bytes, int tokens,
                  float* sums) {
    int64_t next = 0;
    float parts[MOST][8] = {};  // one long sum would lose more in rounding
    for (int64_t byte = 0; byte < bytes; byte++)
        for (int bit = 0; bit < 8; bit++) {
            // Zeros are multiplied too: what is no number shows, as in a dense product.
            const float w = !MASKED || mask[byte] >> bit & 1 ? value_at(values, next++, KIND) : 0;
            for (int t = 0; t < tokens; t++) parts[t][bit] += w * x[t * pitch + byte * 8 + bit];
        }
    for (int t = 0; t < tokens; t++) {
        sums[t] = 0;
        for (const float part : parts[t]) sums[t] += part;
    }
}

// Some columns of a row, divisible by 32, made dense: in fp32, or as they are. Returns what follows their values.
using Expand = const void* (*)(const void* from, const uint8_t* mask, void* y, int64_t columns);

template <int KIND, bool WIDE>
const void* expand_portable(const void* from, const uint8_t* mask, void* y, int64_t columns) {
    constexpr int SIZE = KIND == FP32 ? 4 : 2;
    for (int64_t c = 0; c < columns; c++) {
        const bool here = mask[c / 8] >> (c % 8) & 1;
        if (WIDE) {
            ((float*)y)[c] = here ? value_at(from, 0, KIND) : 0;
        } else {
            std::memset((char*)y + c * SIZE, 0, SIZE);
            if (here) std::memcpy((char*)y + c * SIZE, from, SIZE);
        }
        from = (const char*)from + here * SIZE;
    }
    return from;
}

#if X86

template <int KIND, bool MASKED, int TOKENS>
WITH_AVX2 void row_avx2(const void* values, const uint8_t* mask, const float* x, int64_t pitch, int64_t bytes, int,
                        float* sums) {
    constexpr int CHAINS = TOKENS == 1 ? 4 : 2;
    __m256 sum[TOKENS][CHAINS];
    for (int t = 0; t < TOKENS; t++)
        for (int c = 0; c < CHAINS; c++) sum[t][c] = _mm256_setzero_ps();
    for (int64_t byte = 0; byte < bytes; byte += 4) {
        const uint8_t* m = mask + byte;
        uint8_t last[4] = {0, 0, 0, 0};
        if (MASKED && byte + 4 > bytes) {  // nothing is read behind the mask
            std::memcpy(last, m, bytes - byte);
            m = last;
        }
        _mm_prefetch((const char*)values + FAR, _MM_HINT_T0);
        __m256 w[4];
        values = MASKED ? expand32_avx2<KIND>(values, m, w) : load32_avx2<KIND>(values, w);
        const float* from = x + byte * 8;
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < 4; i++)
                sum[t][i % CHAINS] = _mm256_fmadd_ps(w[i], _mm256_loadu_ps(from + t * pitch + 8 * i), sum[t][i % CHAINS]);
    }
    for (int t = 0; t < TOKENS; t++) {
        for (int c = 1; c < CHAINS; c++) sum[t][0] = _mm256_add_ps(sum[t][0], sum[t][c]);
        sums[t] = total(sum[t][0]);
    }
}

template <int KIND, bool MASKED, int TOKENS>
WITH_AVX512 void row_avx512(const void* values, const uint8_t* mask, const float* x, int64_t pitch, int64_t bytes, int,
                            float* sums) {
    constexpr int CHAINS = TOKENS <= 4 ? 4 : 2;
    __m512 sum[TOKENS][CHAINS];
    for (int t = 0; t < TOKENS; t++)
        for (int c = 0; c < CHAINS; c++) sum[t][c] = _mm512_setzero_ps();
    for (int64_t byte = 0; byte < bytes; byte += 8) {
        uint64_t m = 0;
        if (MASKED && byte + 8 <= bytes)
            std::memcpy(&m, mask + byte, 8);
        else if (MASKED)
            std::memcpy(&m, mask + byte, bytes - byte);
        _mm_prefetch((const char*)values + FAR, _MM_HINT_T0);
        if (KIND == FP32) _mm_prefetch((const char*)values + FAR + 64, _MM_HINT_T0);
        const float* from = x + byte * 8;
        for (int half = 0; half < 2; half++) {
            __m512 w[2];
            values = MASKED ? expand32_avx512<KIND>(values, (uint32_t)(m >> 32 * half), w)
                            : load32_avx512<KIND>(values, w);
            for (int t = 0; t < TOKENS; t++)
                for (int i = 0; i < 2; i++) {
                    __m512& into = sum[t][(2 * half + i) % CHAINS];
                    into = _mm512_fmadd_ps(w[i], _mm512_loadu_ps(from + t * pitch + 32 * half + 16 * i), into);
                }
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        for (int c = 1; c < CHAINS; c++) sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][c]);
        sums[t] = _mm512_reduce_add_ps(sum[t][0]);
    }
}

template <int KIND, bool MASKED>
Row row_of(int isa, int tokens) {
    static const Row avx2[] = {row_avx2<KIND, MASKED, 1>, row_avx2<KIND, MASKED, 2>, row_avx2<KIND, MASKED, 3>,
                               row_avx2<KIND, MASKED, 4>};
    static const Row avx512[] = {row_avx512<KIND, MASKED, 1>, row_avx512<KIND, MASKED, 2>, row_avx512<KIND, MASKED, 3>,
                                 row_avx512<KIND, MASKED, 4>, row_avx512<KIND, MASKED, 5>, row_avx512<KIND, MASKED, 6>,
                                 row_avx512<KIND, MASKED, 7>, row_avx512<KIND, MASKED, 8>};
    return isa == AVX512 ? avx512[tokens - 1] : isa == AVX2 ? avx2[tokens - 1] : row_portable<KIND, MASKED>;
}

template <int KIND, bool WIDE>
WITH_AVX2 const void* expand_avx2(const void* from, const uint8_t* mask, void* y, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 8) {
        const size_t m = mask[c / 8];
        if (KIND == FP32) {
            _mm256_storeu_ps((float*)y + c, expand8((const float*)from, m));
            from = (const float*)from + _mm_popcnt_u32(m);
            continue;
        }
        const __m128i found = expand8((const uint16_t*)from, m);
        from = (const uint16_t*)from + _mm_popcnt_u32(m);
        if (!WIDE)
            _mm_storeu_si128((__m128i*)((uint16_t*)y + c), found);
        else if (KIND == FP16)
            _mm256_storeu_ps((float*)y + c, _mm256_cvtph_ps(found));
        else
            _mm256_storeu_si256((__m256i*)((float*)y + c), _mm256_slli_epi32(_mm256_cvtepu16_epi32(found), 16));
    }
    return from;
}

template <int KIND, bool WIDE>
WITH_AVX512 const void* expand_avx512(const void* from, const uint8_t* mask, void* y, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 32) {
        uint32_t m;
        std::memcpy(&m, mask + c / 8, 4);
        if (KIND == BF16 || !WIDE) {
            const __m512i found = _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(from));
            from = (const uint16_t*)from + _mm_popcnt_u32(m);
            if (!WIDE) {
                _mm512_storeu_si512((uint16_t*)y + c, found);
                continue;
            }
            const __m256i low = _mm512_castsi512_si256(found), high = _mm512_extracti64x4_epi64(found, 1);
            _mm512_storeu_si512((float*)y + c, _mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
            _mm512_storeu_si512((float*)y + c + 16, _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            continue;
        }
        __m512 w[2];
        from = expand32_avx512<KIND>(from, m, w);
        _mm512_storeu_ps((float*)y + c, w[0]);
        _mm512_storeu_ps((float*)y + c + 16, w[1]);
    }
    return from;
}

template <int KIND, bool WIDE>
Expand expand_of(int isa) {
    return isa == AVX512 ? expand_avx512<KIND, WIDE> : isa == AVX2 ? expand_avx2<KIND, WIDE> : expand_portable<KIND, WIDE>;
}

#else

template <int KIND, bool MASKED>
Row row_of(int, int) {
    return row_portable<KIND, MASKED>;
}

template <int KIND, bool WIDE>
Expand expand_of(int) {
    return expand_portable<KIND, WIDE>;
}

#endif

template <bool MASKED>
Row row_for(int kind, int isa, int tokens) {
    if (!MASKED && kind == INT8) return row_of<INT8, false>(isa, tokens);
    return kind == BF16   ? row_of<BF16, MASKED>(isa, tokens)
           : kind == FP16 ? row_of<FP16, MASKED>(isa, tokens)
                          : row_of<FP32, MASKED>(isa, tokens);
}

Expand expand_for(int kind, int isa, bool wide) {
    if (kind == BF16) return wide ? expand_of<BF16, true>(isa) : expand_of<BF16, false>(isa);
    if (kind == FP16) return wide ? expand_of<FP16, true>(isa) : expand_of<FP16, false>(isa);
    return expand_of<FP32, true>(isa);
}

int best_isa() {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
        __builtin_cpu_supports("f16c"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2")
                   ? AVX512
                   : AVX2;
#endif
    return PORTABLE;
}

int64_t rows_at_a_time(int64_t rows, int threads) {
    const int64_t part = rows / (16 * (int64_t)threads);
    return part < 8 ? 8 : part;
}

// x filled up with zeros; of 32 columns the even ones, then the odd ones, for bf16 in registers.
std::vector<float> arrange(const float* x, int64_t tokens, int64_t columns, int64_t pitch, bool by_turns) {
    std::vector<float> found(tokens * pitch);
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = x + t * columns;
        float* to = found.data() + t * pitch;
        const int64_t whole = by_turns ? columns / PIECE * PIECE : 0;
        for (int64_t c = 0; c < whole; c += PIECE)
            for (int64_t i = 0; i < PIECE / 2; i++) {
                to[c + i] = from[c + 2 * i];
                to[c + PIECE / 2 + i] = from[c + 2 * i + 1];
            }
        for (int64_t c = whole; c < columns; c++) {
            const int64_t in = c - whole;
            to[by_turns ? whole + in % 2 * (PIECE / 2) + in / 2 : c] = from[c];
        }
    }
    return found;
}

// x / rms(x) · norm for each token.
std::vector<float> normalise(const float* x, const float* norm, float epsilon, int64_t columns, int64_t tokens) {
    std::vector<float> found(tokens * columns);
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = x + t * columns;
        float parts[16] = {};
        for (int64_t c = 0; c < columns; c++) parts[c % 16] += from[c] * from[c];
        float sum = 0;
        for (const float part : parts) sum += part;
        const float factor = 1 / std::sqrt(sum / (float)columns + epsilon);
        for (int64_t c = 0; c < columns; c++) found[t * columns + c] = from[c] * factor * norm[c];
    }
    return found;
}

// One W: without a mask all weights are there, [rows][columns]. scale: what a row's are multiplied by, or null.
struct Weight {
    const void* values;
    const uint8_t* mask;
    const int32_t* offsets;
    const float* scale;
    int64_t rows;
};

// x: some tokens, [tokens][columns]; seen: the same as `arrange` leaves them. Nothing is read behind the last value.
void row_times(const Weight& weight, int64_t row, int kind, int isa, const float* x, const float* seen, int64_t columns,
               int64_t pitch, int tokens, float* sums) {
    const int64_t size = size_of(kind);
    if (weight.mask) {
        const int64_t bytes = (columns + 7) / 8, begin = weight.offsets[row], end = weight.offsets[row + 1];
        const char* from = (const char*)weight.values + begin * size;
        std::vector<char> copy;
        if (end + MARGIN > weight.offsets[weight.rows]) {
            copy.resize((end - begin + MARGIN) * size);
            std::memcpy(copy.data(), from, (end - begin) * size);
            from = copy.data();
        }
        row_for<true>(kind, isa, tokens)(from, weight.mask + row * bytes, seen, pitch, bytes, tokens, sums);
    } else {
        const int64_t whole = columns / GROUP * GROUP;
        const char* from = (const char*)weight.values + row * columns * size;
        row_for<false>(kind, isa, tokens)(from, nullptr, seen, pitch, whole / 8, tokens, sums);
        for (int t = 0; t < tokens; t++)
            for (int64_t c = whole; c < columns; c++) sums[t] += value_at(from, c, kind) * x[t * columns + c];
    }
    if (weight.scale)
        for (int t = 0; t < tokens; t++) sums[t] *= weight.scale[row];
}

}  // namespace

extern "C" {

// The best instruction set of this machine that there is code for: 0 portable, 1 AVX2 with FMA and F16C, 2 AVX-512
// with VBMI2.
int llmsqueeze_isa() { return best_isa(); }

// y = x Wᵀ + bias + residual for several W of one input, as if they were one: their outputs one after another; with glu,
// of two W, silu of what the first puts out times what the second does. norm: [columns], x is first divided by its root
// mean square and multiplied by it; or null. bias: [outputs], residual: [tokens][outputs], fp32 or null, no bias or
// residual with glu. All W of one kind; isa: not beyond llmsqueeze_isa().
void llmsqueeze_linears(const Weight* weights, int64_t count, const float* norm, float epsilon, const float* bias,
                        const float* residual, const float* x, float* y, int64_t columns, int64_t tokens, int kind,
                        int glu, int isa, int threads) {
    const int64_t pitch = (columns + GROUP - 1) / GROUP * GROUP;
    const int together = isa == AVX512 ? MOST : MOST / 2;
    const std::vector<float> normed = norm ? normalise(x, norm, epsilon, columns, tokens) : std::vector<float>();
    if (norm) x = normed.data();
    const std::vector<float> seen = arrange(x, tokens, columns, pitch, kind == BF16 && isa != PORTABLE);
    int64_t rows = 0;
    for (int64_t w = 0; w < (glu ? 1 : count); w++) rows += weights[w].rows;
    const int64_t turn = rows_at_a_time(rows, threads);
    // In turns: some cores are slower, or have other work.
#pragma omp parallel for num_threads(threads) schedule(dynamic, turn)
    for (int64_t row = 0; row < rows; row++) {
        int64_t in = row;
        const Weight* weight = weights;
        while (in >= weight->rows) in -= weight++->rows;
        for (int64_t first = 0; first < tokens; first += together) {
            const int some = (int)(tokens - first < together ? tokens - first : together);
            const float* plain = x + first * columns;
            const float* turned = seen.data() + first * pitch;
            float sums[MOST], ups[MOST];
            row_times(*weight, in, kind, isa, plain, turned, columns, pitch, some, sums);
            if (glu) row_times(weights[1], in, kind, isa, plain, turned, columns, pitch, some, ups);
            for (int t = 0; t < some; t++) {
                float& to = y[(first + t) * rows + row];
                if (glu)
                    to = sums[t] / (1 + std::exp(-sums[t])) * ups[t];
                else
                    to = sums[t] + (bias ? bias[row] : 0) + (residual ? residual[(first + t) * rows + row] : 0);
            }
        }
    }
}

// Rows of W, dense: y is [rows][columns], in fp32 or, if it is not wide, in the kind of the values. offsets: of these
// rows, the first of which need not be 0; all: how many values there are.
void llmsqueeze_bitmask_expand(const void* values, const uint8_t* mask, const int32_t* offsets, void* y, int64_t rows,
                               int64_t columns, int64_t all, int kind, int wide, int isa, int threads) {
    const int64_t bytes = (columns + 7) / 8, size = size_of(kind), to = wide ? 4 : size;
    const Expand expand = expand_for(kind, isa, wide != 0);
#pragma omp parallel for num_threads(threads) schedule(dynamic, rows_at_a_time(rows, threads))
    for (int64_t row = 0; row < rows; row++) {
        const int64_t begin = offsets[row], end = offsets[row + 1];
        const uint8_t* m = mask + row * bytes;
        char* into = (char*)y + row * columns * to;
        // What would be read behind the last value of all, or written behind the row, goes one by one.
        int64_t done = end + MARGIN > all ? 0 : columns / PIECE * PIECE, next = begin;
        const void* from = (const char*)values + begin * size;
        from = expand(from, m, into, done);
        next = ((const char*)from - (const char*)values) / size;
        for (int64_t c = done; c < columns; c++) {
            const bool here = m[c / 8] >> (c % 8) & 1;
            if (wide) {
                ((float*)into)[c] = here ? value_at(values, next, kind) : 0;
            } else if (here) {
                std::memcpy(into + c * size, (const char*)values + next * size, size);
            } else {
                std::memset(into + c * size, 0, size);
            }
            next += here;
        }
    }
}
}
