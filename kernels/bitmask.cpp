// y = x Wᵀ + b on a CPU, for W as it lies in the file: one bit a weight, then the non-zeros, row after row.
//
// values: bf16, fp16 or fp32 (KIND 0, 1, 2); mask: [rows][ceil(columns / 8)] bytes, bit j % 8 of byte j / 8 is column j;
// offsets: [rows + 1], where rows begin in values. x: [tokens][columns], y: [tokens][rows], fp32 as all sums are.
//
// A row is expanded 32 columns at a time in registers, and each piece meets up to four tokens. bf16 becomes fp32 by
// its place in a word: columns of even number and of odd number, which x is divided into beforehand.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif

namespace {

enum Kind { BF16, FP16, FP32 };
enum Isa { PORTABLE, AVX2 };

constexpr int64_t GROUP = 32;    // columns that x is filled up to
constexpr int64_t MARGIN = 32;   // values that may be read behind a row's last
constexpr int TOGETHER = 4;      // tokens whose sums stay in registers
constexpr int FAR = 2048;        // bytes of values that are asked for ahead

float half_to_float(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
    uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023, word;
    if (exponent == 31) {
        word = sign | 0x7f800000 | fraction << 13;
    } else if (exponent) {
        word = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        const float tiny = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -tiny : tiny;
    }
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}

float value_at(const void* values, int64_t index, int kind) {
    if (kind == FP32) return ((const float*)values)[index];
    const uint16_t bits = ((const uint16_t*)values)[index];
    if (kind == FP16) return half_to_float(bits);
    const uint32_t word = (uint32_t)bits << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}

// One row times some tokens. x: as `arrange` leaves it; bytes: of the row's mask.
using Row = void (*)(const void* values, const uint8_t* mask, const float* x, int64_t pitch, int64_t bytes, int tokens,
                     float* sums);

template <int KIND>
void row_portable(const void* values, const uint8_t* mask, const float* x, int64_t pitch, int64_t bytes, int tokens,
                  float* sums) {
    int64_t next = 0;
    for (int t = 0; t < tokens; t++) sums[t] = 0;
    for (int64_t byte = 0; byte < bytes; byte++)
        for (int bit = 0; bit < 8; bit++) {
            // Zeros are multiplied too: what is no number shows, as in a dense product.
            const float w = mask[byte] >> bit & 1 ? value_at(values, next++, KIND) : 0;
            for (int t = 0; t < tokens; t++) sums[t] += w * x[t * pitch + byte * 8 + bit];
        }
}

#if X86

// For a byte of the mask: where each of eight places finds its value among those that follow, 0xff for none.
struct Places {
    alignas(64) uint8_t halves[256][16];  // for values of 2 bytes
    alignas(64) uint8_t words[256][8];    // for values of 4 bytes
    Places() {
        for (int byte = 0; byte < 256; byte++) {
            int next = 0;
            for (int bit = 0; bit < 8; bit++) {
                const bool here = byte >> bit & 1;
                halves[byte][2 * bit] = here ? 2 * next : 0xff;
                halves[byte][2 * bit + 1] = here ? 2 * next + 1 : 0xff;
                words[byte][bit] = here ? next : 0;
                next += here;
            }
        }
    }
};
const Places places;

#define WITH_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))

WITH_AVX2 inline float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

WITH_AVX2 inline __m128i expand8(const uint16_t* from, size_t byte) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), _mm_load_si128((const __m128i*)places.halves[byte]));
}

template <int KIND, int TOKENS>
WITH_AVX2 void row_avx2(const void* values, const uint8_t* mask, const float* x, int64_t pitch, int64_t bytes, int,
                        float* sums) {
    constexpr int CHAINS = TOKENS == 1 ? 4 : 2;
    __m256 sum[TOKENS][CHAINS];
    for (int t = 0; t < TOKENS; t++)
        for (int c = 0; c < CHAINS; c++) sum[t][c] = _mm256_setzero_ps();
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000), bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const uint16_t* half = (const uint16_t*)values;
    const float* word = (const float*)values;
    for (int64_t byte = 0; byte < bytes; byte += 4) {
        const uint8_t* m = mask + byte;
        uint8_t last[4] = {0, 0, 0, 0};
        if (byte + 4 > bytes) {  // nothing is read behind the mask
            std::memcpy(last, m, bytes - byte);
            m = last;
        }
        // Byte after byte: few instructions are what this loop lives on.
        const size_t m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3];
        const int n0 = _mm_popcnt_u32(m0), n1 = _mm_popcnt_u32(m1), n2 = _mm_popcnt_u32(m2), n3 = _mm_popcnt_u32(m3);
        _mm_prefetch((const char*)(KIND == FP32 ? (const void*)word : (const void*)half) + FAR, _MM_HINT_T0);
        __m256 w[4];
        if (KIND == FP32) {
            const float* begin[4] = {word, word + n0, word + n0 + n1, word + n0 + n1 + n2};
            const size_t here[4] = {m0, m1, m2, m3};
            for (int i = 0; i < 4; i++) {
                const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)places.words[here[i]]));
                const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)here[i]), bits), bits);
                const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(begin[i]), index);
                w[i] = _mm256_and_ps(found, _mm256_castsi256_ps(kept));
            }
            word = begin[3] + n3;
        } else {
            const __m128i a = expand8(half, m0);
            half += n0;
            const __m128i b = expand8(half, m1);
            half += n1;
            const __m128i c = expand8(half, m2);
            half += n2;
            const __m128i d = expand8(half, m3);
            half += n3;
            if (KIND == FP16) {
                w[0] = _mm256_cvtph_ps(a);
                w[1] = _mm256_cvtph_ps(b);
                w[2] = _mm256_cvtph_ps(c);
                w[3] = _mm256_cvtph_ps(d);
            } else {
                const __m256i left = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1),
                              right = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
                w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(left, 16));
                w[1] = _mm256_castsi256_ps(_mm256_slli_epi32(right, 16));
                w[2] = _mm256_castsi256_ps(_mm256_and_si256(left, odd));
                w[3] = _mm256_castsi256_ps(_mm256_and_si256(right, odd));
            }
        }
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

template <int KIND>
Row row_of(int isa, int tokens) {
    static const Row avx2[] = {row_avx2<KIND, 1>, row_avx2<KIND, 2>, row_avx2<KIND, 3>, row_avx2<KIND, 4>};
    return isa == AVX2 ? avx2[tokens - 1] : row_portable<KIND>;
}

#else

template <int KIND>
Row row_of(int, int) {
    return row_portable<KIND>;
}

#endif

Row row_for(int kind, int isa, int tokens) {
    return kind == BF16 ? row_of<BF16>(isa, tokens) : kind == FP16 ? row_of<FP16>(isa, tokens) : row_of<FP32>(isa, tokens);
}

int best_isa() {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
        __builtin_cpu_supports("f16c"))
        return AVX2;
#endif
    return PORTABLE;
}

// x filled up with zeros; of 32 columns the even ones, then the odd ones, for bf16 in registers.
std::vector<float> arrange(const float* x, int64_t tokens, int64_t columns, int64_t pitch, bool by_turns) {
    std::vector<float> found(tokens * pitch);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < columns; c++) {
            const int64_t in = c % GROUP, to = by_turns ? c - in + in % 2 * (GROUP / 2) + in / 2 : c;
            found[t * pitch + to] = x[t * columns + c];
        }
    return found;
}

}  // namespace

extern "C" {

// The best instruction set of this machine that there is code for: 0 portable, 1 AVX2 with FMA and F16C.
int llmsqueeze_isa() { return best_isa(); }

// isa: not beyond llmsqueeze_isa(). bias: [rows] fp32 or null.
void llmsqueeze_bitmask_linear(const void* values, const uint8_t* mask, const int32_t* offsets, const float* bias,
                               const float* x, float* y, int64_t rows, int64_t columns, int64_t tokens, int kind,
                               int isa, int threads) {
    const int64_t bytes = (columns + 7) / 8, pitch = (columns + GROUP - 1) / GROUP * GROUP;
    const int size = kind == FP32 ? 4 : 2;
    const std::vector<float> seen = arrange(x, tokens, columns, pitch, kind == BF16 && isa != PORTABLE);
    const int64_t all = offsets[rows];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t begin = offsets[row], end = offsets[row + 1];
        const char* from = (const char*)values + begin * size;
        std::vector<char> copy;
        if (end + MARGIN > all) {  // nothing is read behind the last value of all
            copy.resize((end - begin + MARGIN) * size);
            std::memcpy(copy.data(), from, (end - begin) * size);
            from = copy.data();
        }
        for (int64_t first = 0; first < tokens; first += TOGETHER) {
            const int some = (int)(tokens - first < TOGETHER ? tokens - first : TOGETHER);
            float sums[TOGETHER];
            row_for(kind, isa, some)(from, mask + row * bytes, seen.data() + first * pitch, pitch, bytes, some, sums);
            for (int t = 0; t < some; t++) y[(first + t) * rows + row] = sums[t] + (bias ? bias[row] : 0);
        }
    }
}

// Rows of W, dense: y is [rows][columns] fp32. offsets: of these rows, the first of which need not be 0.
void llmsqueeze_bitmask_expand(const void* values, const uint8_t* mask, const int32_t* offsets, float* y, int64_t rows,
                               int64_t columns, int kind, int threads) {
    const int64_t bytes = (columns + 7) / 8;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int64_t next = offsets[row];
        for (int64_t c = 0; c < columns; c++) {
            const bool here = mask[row * bytes + c / 8] >> (c % 8) & 1;
            y[row * columns + c] = here ? value_at(values, next, kind) : 0;
            next += here;
        }
    }
}
}
