// y = x Wᵀ + b on a CPU, for W as it lies in the file: one bit a weight, then the non-zeros, row after row.
//
// values: bf16, fp16, fp32 or, where all are there, int8 (KIND 0 to 3);
// mask: [rows][ceil(columns / 8)] bytes, bit j % 8 of byte j / 8 is column j;
// offsets: [rows + 1], where rows begin in values. x: [tokens][columns], y: [tokens][rows], fp32 as all sums are.
//
// Rows are expanded 32 columns at a time in registers, and each piece meets a few tokens. Several rows go side by side,
// so that x is read once for all of them. They lie apart: each is followed, in memory and in time, by its neighbour, so
// that a thread reads a few long streams, which the prefetcher of the core keeps up with. bf16 becomes fp32 by its place
// in a word: with AVX-512 columns of even number and of odd number, which x is divided into beforehand.

#include <cmath>
#include <new>
#include <vector>

#include "cpu.h"
#if TILES && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t GROUP = 64;   // columns that x is filled up to
constexpr int64_t PIECE = 32;   // columns that are expanded together
constexpr int MOST = 8;         // tokens whose sums stay in registers, at most
constexpr int SIDE = 4;         // rows side by side, at most
// Bytes that are asked for ahead of what is read, of values and of masks: by AVX2; by AVX-512 from memory (FAR) and from the
// second cache; by tiles.
constexpr int64_t NEAR_AVX2 = 2048, FAR = 2048, FAR_MASK = 1024, NEAR = 512, NEAR_TILES = 512, NEAR_MASK = 64;

// Where a row begins. mask: null where all weights are there.
struct Strip {
    const void* values;
    const uint8_t* mask;
};

// Some rows times some tokens: sums is [rows][tokens]. x: as `arrange` leaves it; bytes: of a row's mask. Where weights
// are not MASKED, all are there, the mask is not read, and bytes are divisible by 8.
using Rows = void (*)(const Strip* strips, const float* x, int64_t pitch, int64_t bytes, int tokens, float* sums);

template <int KIND, bool MASKED>
void row_portable(const Strip* strip, const float* x, int64_t pitch, int64_t bytes, int tokens, float* sums) {
    const void* values = strip->values;
    const uint8_t* mask = strip->mask;
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

// The last bytes of a row's mask where they are no eight: nothing is read behind them. Copied before anything else, since
// a call in a loop would have all sums wait in memory.
uint64_t last_of(const uint8_t* mask, int64_t bytes) {
    uint64_t last = 0;
    std::memcpy(&last, mask + bytes / 8 * 8, bytes % 8);
    return last;
}

// 64 columns of some rows, times some tokens.
template <int KIND, bool MASKED, int ROWS, int TOKENS, int CHAINS>
WITH_AVX2 inline __attribute__((always_inline)) void columns_avx2(const void* (&values)[ROWS], const uint64_t (&masks)[ROWS],
                                                                  const float* x, int64_t pitch,
                                                                  __m256 (&sum)[ROWS][TOKENS][CHAINS]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        uint32_t m[ROWS];
        for (int r = 0; r < ROWS; r++) m[r] = (uint32_t)(masks[r] >> 32 * half);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m256 w[ROWS];
            for (int r = 0; r < ROWS; r++)
                w[r] = MASKED ? eight_avx2<KIND>(values[r], m[r], i) : load8_avx2<KIND>(values[r], i);
            for (int t = 0; t < TOKENS; t++) {
                const __m256 seen = _mm256_loadu_ps(x + t * pitch + 32 * half + 8 * i);
                for (int r = 0; r < ROWS; r++)
                    sum[r][t][i % CHAINS] = _mm256_fmadd_ps(w[r], seen, sum[r][t][i % CHAINS]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            values[r] = MASKED ? after_avx2<KIND>(values[r], m[r])
                               : (const char*)values[r] + 32 * (KIND == FP32 ? 4 : KIND == INT8 ? 1 : 2);
    }
}

template <int KIND, bool MASKED, int ROWS, int TOKENS>
WITH_AVX2 void rows_avx2(const Strip* strips, const float* x, int64_t pitch, int64_t bytes, int, float* sums) {
    constexpr int CHAINS = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;  // alike for all numbers of rows
    __m256 sum[ROWS][TOKENS][CHAINS];
    const void* values[ROWS];
    const uint8_t* mask[ROWS];
    uint64_t here[ROWS], last[ROWS];
    for (int r = 0; r < ROWS; r++) {
        values[r] = strips[r].values;
        mask[r] = strips[r].mask;
        last[r] = MASKED ? last_of(mask[r], bytes) : 0;
        for (int t = 0; t < TOKENS; t++)
            for (int c = 0; c < CHAINS; c++) sum[r][t][c] = _mm256_setzero_ps();
    }
    const int64_t whole = bytes / 8 * 8;
    for (int64_t byte = 0; byte < whole; byte += 8) {
        for (int r = 0; r < ROWS; r++) {
            for (int line = 0; line < 2; line++) _mm_prefetch((const char*)values[r] + NEAR_AVX2 + 64 * line, _MM_HINT_T0);
            if (MASKED) std::memcpy(&here[r], mask[r] + byte, 8);
        }
        columns_avx2<KIND, MASKED>(values, here, x + byte * 8, pitch, sum);
    }
    if (whole < bytes) columns_avx2<KIND, MASKED>(values, last, x + whole * 8, pitch, sum);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) {
            for (int c = 1; c < CHAINS; c++) sum[r][t][0] = _mm256_add_ps(sum[r][t][0], sum[r][t][c]);
            sums[r * TOKENS + t] = total(sum[r][t][0]);
        }
}

// 64 columns of some rows, times some tokens.
template <int KIND, bool MASKED, int ROWS, int TOKENS, int CHAINS>
WITH_AVX512 inline __attribute__((always_inline)) void columns_avx512(const void* (&values)[ROWS], const uint64_t (&masks)[ROWS],
                                                                      const float* x, int64_t pitch,
                                                                      __m512 (&sum)[ROWS][TOKENS][CHAINS]) {
    for (int half = 0; half < 2; half++) {
        __m512 w[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            values[r] = MASKED ? expand32_avx512<KIND>(values[r], (uint32_t)(masks[r] >> 32 * half), w[r])
                               : load32_avx512<KIND>(values[r], w[r]);
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < 2; i++) {
                const __m512 seen = _mm512_loadu_ps(x + t * pitch + 32 * half + 16 * i);
                for (int r = 0; r < ROWS; r++)
                    sum[r][t][i % CHAINS] = _mm512_fmadd_ps(w[r][i], seen, sum[r][t][i % CHAINS]);
            }
    }
}

template <int KIND, bool MASKED, int ROWS, int TOKENS>
WITH_AVX512 void rows_avx512(const Strip* strips, const float* x, int64_t pitch, int64_t bytes, int, float* sums) {
    constexpr int CHAINS = TOKENS <= 2 ? 2 : 1;  // alike for all numbers of rows
    __m512 sum[ROWS][TOKENS][CHAINS];
    const void* values[ROWS];
    const uint8_t* mask[ROWS];
    uint64_t here[ROWS], last[ROWS];
    for (int r = 0; r < ROWS; r++) {
        values[r] = strips[r].values;
        mask[r] = strips[r].mask;
        last[r] = MASKED ? last_of(mask[r], bytes) : 0;
        for (int t = 0; t < TOKENS; t++)
            for (int c = 0; c < CHAINS; c++) sum[r][t][c] = _mm512_setzero_ps();
    }
    const int64_t whole = bytes / 8 * 8;
    for (int64_t byte = 0; byte < whole; byte += 8) {
        for (int r = 0; r < ROWS; r++) {
            for (int line = 0; line < 2; line++) {
                _mm_prefetch((const char*)values[r] + FAR + 64 * line, _MM_HINT_T1);
                _mm_prefetch((const char*)values[r] + NEAR + 64 * line, _MM_HINT_T0);
            }
            if (!MASKED) continue;
            if (byte % 64 == 0) _mm_prefetch((const char*)mask[r] + byte + FAR_MASK, _MM_HINT_T1);
            std::memcpy(&here[r], mask[r] + byte, 8);
        }
        columns_avx512<KIND, MASKED>(values, here, x + byte * 8, pitch, sum);
    }
    if (whole < bytes) columns_avx512<KIND, MASKED>(values, last, x + whole * 8, pitch, sum);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) {
            for (int c = 1; c < CHAINS; c++) sum[r][t][0] = _mm512_add_ps(sum[r][t][0], sum[r][t][c]);
            sums[r * TOKENS + t] = _mm512_reduce_add_ps(sum[r][t][0]);
        }
}

template <int KIND, bool MASKED>
Rows rows_of(int isa, int rows, int tokens) {
    static const Rows avx2[][4] = {{rows_avx2<KIND, MASKED, 1, 1>, rows_avx2<KIND, MASKED, 1, 2>,
                                    rows_avx2<KIND, MASKED, 1, 3>, rows_avx2<KIND, MASKED, 1, 4>},
                                   {rows_avx2<KIND, MASKED, 2, 1>, rows_avx2<KIND, MASKED, 2, 2>,
                                    rows_avx2<KIND, MASKED, 2, 3>, rows_avx2<KIND, MASKED, 2, 4>}};
    static const Rows avx512[][8] = {
        {rows_avx512<KIND, MASKED, 1, 1>, rows_avx512<KIND, MASKED, 1, 2>, rows_avx512<KIND, MASKED, 1, 3>,
         rows_avx512<KIND, MASKED, 1, 4>, rows_avx512<KIND, MASKED, 1, 5>, rows_avx512<KIND, MASKED, 1, 6>,
         rows_avx512<KIND, MASKED, 1, 7>, rows_avx512<KIND, MASKED, 1, 8>},
        {nullptr, nullptr, nullptr, nullptr, rows_avx512<KIND, MASKED, 2, 5>, rows_avx512<KIND, MASKED, 2, 6>,
         rows_avx512<KIND, MASKED, 2, 7>, rows_avx512<KIND, MASKED, 2, 8>},
        {},
        {rows_avx512<KIND, MASKED, 4, 1>, rows_avx512<KIND, MASKED, 4, 2>, rows_avx512<KIND, MASKED, 4, 3>,
         rows_avx512<KIND, MASKED, 4, 4>}};
    return isa >= AVX512 ? avx512[rows - 1][tokens - 1]
           : isa == AVX2 ? avx2[rows - 1][tokens - 1]
                         : row_portable<KIND, MASKED>;
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
        const uint16_t* half = (const uint16_t*)from;
        from = half + _mm_popcnt_u32(m);
        if (!WIDE)
            _mm_storeu_si128((__m128i*)((uint16_t*)y + c), expand8(half, m));
        else
            _mm256_storeu_ps((float*)y + c, KIND == BF16 ? raise8(half, 32 * m) : _mm256_cvtph_ps(expand8(half, m)));
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
    return isa >= AVX512 ? expand_avx512<KIND, WIDE> : isa == AVX2 ? expand_avx2<KIND, WIDE> : expand_portable<KIND, WIDE>;
}

#else

template <int KIND, bool MASKED>
Rows rows_of(int, int, int) {
    return row_portable<KIND, MASKED>;
}

template <int KIND, bool WIDE>
Expand expand_of(int) {
    return expand_portable<KIND, WIDE>;
}

#endif

// How many rows go side by side: what registers hold.
int beside(int isa, int tokens) { return isa < AVX2 ? 1 : isa < AVX512 || tokens > 4 ? 2 : 4; }

template <bool MASKED>
Rows rows_for(int kind, int isa, int rows, int tokens) {
    if (!MASKED && kind == INT8) return rows_of<INT8, false>(isa, rows, tokens);
    return kind == BF16   ? rows_of<BF16, MASKED>(isa, rows, tokens)
           : kind == FP16 ? rows_of<FP16, MASKED>(isa, rows, tokens)
                          : rows_of<FP32, MASKED>(isa, rows, tokens);
}

Expand expand_for(int kind, int isa, bool wide) {
    if (kind == BF16) return wide ? expand_of<BF16, true>(isa) : expand_of<BF16, false>(isa);
    if (kind == FP16) return wide ? expand_of<FP16, true>(isa) : expand_of<FP16, false>(isa);
    return expand_of<FP32, true>(isa);
}

// Whether there is AMX, and the system lets this process use it.
bool has_tiles() {
#if TILES && defined(__linux__)
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr int ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    static const bool allowed = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
    return allowed;
#else
    return false;
#endif
}

int best_isa() {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")) {
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2")))
            return AVX2;
        return has_tiles() ? AMX : AVX512;
    }
#endif
    return PORTABLE;
}

// Of so many rows what a thread takes at a time: some cores are slower, or have other work.
int64_t rows_at_a_time(int64_t rows, int threads) {
    const int64_t part = rows / (16 * (int64_t)threads);
    return part < 2 ? 2 : part;
}

// Numbers that begin where a line of the cache does, so that what is read of them lies in one.
struct Aligned {
    explicit Aligned(int64_t count)
        : data((float*)::operator new(count * sizeof(float), std::align_val_t(64))) {}
    ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    float* data;
};

// x filled up with zeros; by turns of 32 columns the even ones, then the odd ones, for bf16 and AVX-512.
void arrange(const float* x, float* found, int64_t tokens, int64_t columns, int64_t pitch, bool by_turns) {
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = x + t * columns;
        float* to = found + t * pitch;
        const int64_t whole = by_turns ? columns / PIECE * PIECE : 0;
        for (int64_t c = 0; c < whole; c += PIECE)
            for (int64_t i = 0; i < PIECE / 2; i++) {
                to[c + i] = from[c + 2 * i];
                to[c + PIECE / 2 + i] = from[c + 2 * i + 1];
            }
        std::memset(to + whole, 0, (pitch - whole) * sizeof(float));
        for (int64_t c = whole; c < columns; c++) {
            const int64_t in = c - whole;
            to[by_turns ? whole + in % 2 * (PIECE / 2) + in / 2 : c] = from[c];
        }
    }
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

// Some rows of one W, `gap` from each other. before: outputs of the W before it.
struct Band {
    const Weight* weight;
    int64_t before, row, gap;
    int rows;
};

// Where sums go, and what is added to them: see llmsqueeze_linears.
struct Output {
    const float *bias, *residual;
    float* y;
    int64_t outputs;
    int glu;

    // sums: [rows][pitch], of tokens from `first` on; ups: of the second W.
    void put(const Band& band, int64_t first, int tokens, int pitch, const float* sums, const float* ups) const {
        for (int r = 0; r < band.rows; r++)
            for (int t = 0; t < tokens; t++) {
                const int64_t output = band.before + band.row + r * band.gap, to = (first + t) * outputs + output;
                const float sum = sums[r * pitch + t];
                y[to] = glu ? sum / (1 + std::exp(-sum)) * ups[r * pitch + t]
                            : sum + (bias ? bias[output] : 0) + (residual ? residual[to] : 0);
            }
    }
};

// Calls `each` with bands that together hold all rows of some W once; a band has `side` rows or fewer. A thread's rows lie
// one after another: a part of them for each place in a band, and those that are left over.
template <typename Each>
void in_bands(const Weight* weights, int64_t count, int64_t side, int threads, const Each& each) {
    int64_t outputs = 0, turns = 0;
    for (int64_t w = 0; w < count; w++) outputs += weights[w].rows;
    const int64_t most = (rows_at_a_time(outputs, threads) + side - 1) / side * side;
    for (int64_t w = 0; w < count; w++) turns += (weights[w].rows + most - 1) / most;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t turn = 0; turn < turns; turn++) {
        int64_t in = turn, before = 0;
        const Weight* weight = weights;
        for (int64_t some; in >= (some = (weight->rows + most - 1) / most); weight++) in -= some, before += weight->rows;
        const int64_t first = in * most, rows = weight->rows - first < most ? weight->rows - first : most;
        const int64_t gap = rows / side, left = rows - gap * side;
        for (int64_t i = 0; i < gap; i++) each(Band{weight, before, first + i, gap, (int)side});
        if (left) each(Band{weight, before, first + gap * side, 1, (int)left});
    }
}

// The beginnings of a band's rows of W. Nothing is read behind the last value: those near it are copied.
void set_up(const Weight& weight, const Band& band, int64_t columns, int64_t size, Strip* strips,
            std::vector<char>* copies) {
    const int64_t bytes = (columns + 7) / 8;
    for (int r = 0; r < band.rows; r++) {
        const int64_t at = band.row + r * band.gap;
        if (!weight.mask) {
            strips[r] = {(const char*)weight.values + at * columns * size, nullptr};
            continue;
        }
        const int64_t begin = weight.offsets[at], end = weight.offsets[at + 1];
        const char* from = (const char*)weight.values + begin * size;
        if (end + MARGIN > weight.offsets[weight.rows]) {
            copies[r].resize((end - begin + MARGIN) * size);
            std::memcpy(copies[r].data(), from, (end - begin) * size);
            from = copies[r].data();
        }
        strips[r] = {from, weight.mask + at * bytes};
    }
}

// A band's rows of W times x. x: some tokens, [tokens][columns]; seen: the same as `arrange` leaves them;
// sums: [rows][tokens], room for SIDE times MOST.
void rows_times(const Weight& weight, const Band& band, int kind, int isa, const float* x, const float* seen,
                int64_t columns, int64_t pitch, int tokens, float* sums) {
    const int64_t bytes = (columns + 7) / 8, whole = columns / GROUP * GROUP;
    Strip strips[SIDE];
    std::vector<char> copies[SIDE];
    set_up(weight, band, columns, size_of(kind), strips, copies);
    const int64_t seen_bytes = weight.mask ? bytes : whole / 8;
    for (int r = 0, step = beside(isa, tokens); r < band.rows; r += step) {
        if (band.rows - r < step) step = 1;
        const Rows times = (weight.mask ? rows_for<true> : rows_for<false>)(kind, isa, step, tokens);
        times(strips + r, seen, pitch, seen_bytes, tokens, sums + r * tokens);
    }
    for (int r = 0; r < band.rows; r++)
        for (int t = 0; t < tokens; t++) {
            float& sum = sums[r * tokens + t];
            if (!weight.mask)
                for (int64_t c = whole; c < columns; c++) sum += value_at(strips[r].values, c, kind) * x[t * columns + c];
            if (weight.scale) sum *= weight.scale[band.row + r * band.gap];
        }
}

// Tokens of a tile, and the least that are worth one; rows that are multiplied together; pieces that are expanded before.
constexpr int64_t ACROSS = 16, LEAST = 5, DOWN = 32, AHEAD = 4;

#if TILES

// x as tiles of AMX read it: [16 tokens at a time][piece][part][column / 2][token][column % 2], zeros for tokens and columns
// that are not there. The parts add up to x; returns how many there are, 1 or 3.
int tile(const float* x, std::vector<uint16_t>& found, int64_t tokens, int64_t columns, int threads) {
    const int64_t pieces = (columns + PIECE - 1) / PIECE, groups = (tokens + ACROSS - 1) / ACROSS;
    uint32_t low = 0;
    for (int64_t i = 0; i < tokens * columns; i++) {
        uint32_t word;
        std::memcpy(&word, x + i, 4);
        low |= word & 0xffff;
    }
    const int parts = low ? 3 : 1;
    found.resize(groups * pieces * parts * PIECE * ACROSS);
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < groups * pieces; at++) {
        const int64_t piece = at % pieces * PIECE, first = at / pieces * ACROSS;
        uint16_t* to = found.data() + at * parts * PIECE * ACROSS;
        if (parts == 1 && first + ACROSS <= tokens && piece + PIECE <= columns) {
            for (int64_t t = 0; t < ACROSS; t++)
                for (int64_t c = 0; c < PIECE; c += 2) {
                    uint32_t two[2];
                    std::memcpy(two, x + (first + t) * columns + piece + c, 8);
                    two[1] |= two[0] >> 16;
                    std::memcpy(to + c * ACROSS + t * 2, two + 1, 4);
                }
            continue;
        }
        for (int64_t t = 0; t < ACROSS; t++)
            for (int64_t c = 0; c < PIECE; c++) {
                const bool here = first + t < tokens && piece + c < columns;
                float rest = here ? x[(first + t) * columns + piece + c] : 0;
                for (int part = 0; part < parts; part++) {
                    uint32_t word;
                    std::memcpy(&word, &rest, 4);
                    if (rest != rest) word |= 0x400000;
                    to[part * PIECE * ACROSS + c / 2 * 2 * ACROSS + t * 2 + c % 2] = (uint16_t)(word >> 16);
                    word &= 0xffff0000;  // cut off, so that the rest is exact
                    float taken;
                    std::memcpy(&taken, &word, 4);
                    rest = (word & 0x7f800000) == 0x7f800000 ? 0 : rest - taken;
                }
            }
    }
    return parts;
}

struct alignas(64) Layout {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16};
};

// DOWN rows, or fewer, times up to 16 tokens; seen: those, as `tile` leaves them. sums: [DOWN][ACROSS].
template <bool MASKED>
WITH_AMX void tiles_times(const Strip* strips, int rows, const uint16_t* seen, int parts, int64_t columns, float* sums) {
    const int64_t pieces = (columns + PIECE - 1) / PIECE, bytes = (columns + 7) / 8;
    // By turns: what is expanded now is multiplied beside what is expanded next, once it has left for the cache.
    alignas(64) uint16_t dense[2][AHEAD][DOWN][PIECE];
    if (rows < DOWN) std::memset(dense, 0, sizeof dense);
    const uint16_t* values[DOWN];
    for (int r = 0; r < rows; r++) values[r] = (const uint16_t*)strips[r].values;
    static const Layout layout;
    _tile_loadconfig(&layout);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(5);
    _tile_zero(6);
    for (int64_t begin = 0; begin < pieces + AHEAD; begin += AHEAD) {
        const int now = begin / AHEAD % 2;
        const int some = (int)(begin >= pieces ? 0 : pieces - begin < AHEAD ? pieces - begin : AHEAD);
        for (int r = 0; r < DOWN; r++) {
            if (some && r < rows) {
                const uint16_t* from = values[r];
                uint32_t masks[AHEAD] = {};
                if (MASKED) {
                    const uint8_t* m = strips[r].mask + begin * 4;
                    if (begin * 4 + (int64_t)sizeof masks <= bytes)
                        std::memcpy(masks, m, sizeof masks);
                    else
                        std::memcpy(masks, m, bytes - begin * 4);
                }
                for (int line = 0; line < (MASKED ? 2 : 4); line++)
                    _mm_prefetch((const char*)from + NEAR_TILES + 64 * line, _MM_HINT_T1);
                if (MASKED && begin * 4 % 64 == 0)
                    _mm_prefetch((const char*)strips[r].mask + begin * 4 + NEAR_MASK, _MM_HINT_T1);
                for (int i = 0; i < some; i++) {
                    const __m512i w = _mm512_loadu_si512(from);
                    _mm512_store_si512(dense[now][i][r], MASKED ? _mm512_maskz_expand_epi16(masks[i], w) : w);
                    from += MASKED ? _mm_popcnt_u32(masks[i]) : PIECE;
                }
                values[r] = from;
            }
            const int64_t piece = begin - AHEAD + r / (DOWN / AHEAD);
            if (r % (DOWN / AHEAD) != DOWN / AHEAD - 1 || piece < 0 || piece >= pieces) continue;
            _tile_loadd(2, dense[1 - now][piece % AHEAD][0], 64);
            _tile_loadd(3, dense[1 - now][piece % AHEAD][16], 64);
            for (int part = 0; part < parts; part++) {
                _tile_loadd(4, seen + (piece * parts + part) * PIECE * ACROSS, 64);
                if (part == 0) {
                    _tile_dpbf16ps(0, 2, 4);
                    _tile_dpbf16ps(1, 3, 4);
                } else {  // sums of their own, so that the large ones are rounded less often
                    _tile_dpbf16ps(5, 2, 4);
                    _tile_dpbf16ps(6, 3, 4);
                }
            }
        }
    }
    _tile_stored(0, sums, 4 * ACROSS);
    _tile_stored(1, sums + 16 * ACROSS, 4 * ACROSS);
    if (parts > 1) {
        alignas(64) float rest[DOWN * ACROSS];
        _tile_stored(5, rest, 4 * ACROSS);
        _tile_stored(6, rest + 16 * ACROSS, 4 * ACROSS);
        for (int i = 0; i < DOWN * ACROSS; i++) sums[i] += rest[i];
    }
    _tile_release();
}

// As llmsqueeze_linears, x normed.
void linears_by_tiles(const Weight* weights, int64_t count, const Output& output, const float* x, int64_t columns,
                      int64_t tokens, int threads) {
    std::vector<uint16_t> seen;
    const int parts = tile(x, seen, tokens, columns, threads);
    const int64_t span = (columns + PIECE - 1) / PIECE * parts * PIECE * ACROSS;
    in_bands(weights, count, DOWN, threads, [&](const Band& band) {
        alignas(64) float sums[2][DOWN * ACROSS];
        for (int64_t first = 0; first < tokens; first += ACROSS) {
            for (int w = 0; w <= output.glu; w++) {
                const Weight& weight = output.glu ? weights[w] : *band.weight;
                Strip strips[DOWN];
                std::vector<char> copies[DOWN];
                set_up(weight, band, columns, 2, strips, copies);
                const uint16_t* tiles = seen.data() + first / ACROSS * span;
                (weight.mask ? tiles_times<true> : tiles_times<false>)(strips, band.rows, tiles, parts, columns, sums[w]);
            }
            const int some = (int)(tokens - first < ACROSS ? tokens - first : ACROSS);
            output.put(band, first, some, ACROSS, sums[0], sums[1]);
        }
    });
}

// Whether all are of a kind that tiles multiply: without a mask rows must end with a piece.
bool by_tiles(const Weight* weights, int64_t count, int64_t columns, int64_t tokens, int kind, int isa) {
    if (isa != AMX || kind != BF16 || tokens < LEAST) return false;
    for (int64_t w = 0; w < count; w++)
        if (weights[w].scale || (!weights[w].mask && columns % PIECE) || !weights[w].mask != !weights[0].mask) return false;
    return true;
}

#endif

}  // namespace

extern "C" {

// The best instruction set of this machine that there is code for: 0 portable, 1 AVX2 with BMI2, FMA and F16C, 2 AVX-512
// with VBMI2, 3 that and AMX.
int llmsqueeze_isa() { return best_isa(); }

// y = x Wᵀ + bias + residual for several W of one input, as if they were one: their outputs one after another; with glu,
// of two W, silu of what the first puts out times what the second does. norm: [columns], x is first divided by its root
// mean square and multiplied by it; or null. bias: [outputs], residual: [tokens][outputs], fp32 or null, no bias or
// residual with glu. All W of one kind; isa: not beyond llmsqueeze_isa().
void llmsqueeze_linears(const Weight* weights, int64_t count, const float* norm, float epsilon, const float* bias,
                        const float* residual, const float* x, float* y, int64_t columns, int64_t tokens, int kind,
                        int glu, int isa, int threads) {
    const int64_t pitch = (columns + GROUP - 1) / GROUP * GROUP;
    const int together = isa >= AVX512 ? MOST : MOST / 2;
    const std::vector<float> normed = norm ? normalise(x, norm, epsilon, columns, tokens) : std::vector<float>();
    if (norm) x = normed.data();
    Output output{bias, residual, y, 0, glu};
    if (glu) count = 1;  // the second goes with the first
    for (int64_t w = 0; w < count; w++) output.outputs += weights[w].rows;
#if TILES
    if (by_tiles(weights, count, columns, tokens, kind, isa))
        return linears_by_tiles(weights, count, output, x, columns, tokens, threads);
#endif
    const Aligned seen(tokens * pitch);
    arrange(x, seen.data, tokens, columns, pitch, kind == BF16 && isa >= AVX512);
    in_bands(weights, count, beside(isa, 1), threads, [&](const Band& band) {
        float sums[2][SIDE * MOST];
        for (int64_t first = 0; first < tokens; first += together) {
            const int some = (int)(tokens - first < together ? tokens - first : together);
            for (int w = 0; w <= glu; w++)
                rows_times(glu ? weights[w] : *band.weight, band, kind, isa, x + first * columns, seen.data + first * pitch,
                           columns, pitch, some, sums[w]);
            output.put(band, first, some, some, sums[0], sums[1]);
        }
    });
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
