// y = x Wᵀ + b on a CPU, for W as it lies in the file: one bit a weight, then the non-zeros, row after row.
//
// values: bf16, fp16, fp32 or, where all are there, int8 (KIND 0 to 3);
// mask: [rows][ceil(columns / 8)] bytes, bit j % 8 of byte j / 8 is column j;
// offsets: [rows + 1], where rows begin in values. x: [tokens][columns], y: [tokens][rows], fp32 as all sums are.
//
// Rows are expanded 32 columns at a time in registers, and each piece meets a few tokens. Several rows go side by side,
// so that x comes from the second cache once for all of them. bf16 becomes fp32 by its place in a word: columns of even
// number and of odd number, which x is divided into beforehand.

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
// Bytes that are asked for ahead: of the values of a row by itself, of some side by side, of many by tiles; of their masks.
constexpr int64_t NEAR = 2048, NEAR_SIDE = 512, NEAR_TILES = 1024, NEAR_MASK = 128;

// A row. size: bytes of its values; far: from them to those of the row that comes in its place, asked for meanwhile where
// several go side by side; far_mask: of masks.
struct Strip {
    const void* values;
    const uint8_t* mask;
    int64_t size, far, far_mask;
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

// The last bytes of a row's mask where they are no four: nothing is read behind them. Copied before anything else, since
// a call in a loop would have all sums wait in memory.
uint32_t last_of(const uint8_t* mask, int64_t bytes) {
    uint32_t last = 0;
    std::memcpy(&last, mask + bytes / 4 * 4, bytes % 4);
    return last;
}

template <int KIND, bool MASKED, int TOKENS>
WITH_AVX2 void row_avx2(const Strip* strip, const float* x, int64_t pitch, int64_t bytes, int, float* sums) {
    constexpr int CHAINS = TOKENS == 1 ? 4 : 2;
    __m256 sum[TOKENS][CHAINS];
    for (int t = 0; t < TOKENS; t++)
        for (int c = 0; c < CHAINS; c++) sum[t][c] = _mm256_setzero_ps();
    const void* values = strip->values;
    const uint32_t last = MASKED ? last_of(strip->mask, bytes) : 0;
    for (int64_t byte = 0; byte < bytes; byte += 4) {
        const uint8_t* m = !MASKED || byte + 4 <= bytes ? strip->mask + byte : (const uint8_t*)&last;
        _mm_prefetch((const char*)values + NEAR, _MM_HINT_T0);
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

template <int KIND, bool MASKED, int ROWS, int TOKENS>
WITH_AVX512 void rows_avx512(const Strip* strips, const float* x, int64_t pitch, int64_t bytes, int, float* sums) {
    constexpr int CHAINS = TOKENS <= 2 ? 2 : 1;  // alike for all numbers of rows
    __m512 sum[ROWS][TOKENS][CHAINS];
    const void* values[ROWS];
    uint32_t last[ROWS];
    for (int r = 0; r < ROWS; r++) {
        values[r] = strips[r].values;
        last[r] = MASKED ? last_of(strips[r].mask, bytes) : 0;
        for (int t = 0; t < TOKENS; t++)
            for (int c = 0; c < CHAINS; c++) sum[r][t][c] = _mm512_setzero_ps();
    }
    for (int64_t byte = 0; byte < bytes; byte += 4) {
        __m512 w[ROWS][2];
        for (int r = 0; r < ROWS; r++) {
            uint32_t m = last[r];
            if (MASKED && byte + 4 <= bytes) std::memcpy(&m, strips[r].mask + byte, 4);
            // From memory those that come next, from the second cache what is near.
            _mm_prefetch((const char*)values[r] + strips[r].far, _MM_HINT_T1);
            if (KIND == FP32) _mm_prefetch((const char*)values[r] + strips[r].far + 64, _MM_HINT_T1);
            _mm_prefetch((const char*)values[r] + NEAR_SIDE, _MM_HINT_T0);
            if (MASKED && byte % 64 == 0) {
                _mm_prefetch((const char*)strips[r].mask + byte + strips[r].far_mask, _MM_HINT_T1);
                _mm_prefetch((const char*)strips[r].mask + byte + 64, _MM_HINT_T0);
            }
            values[r] = MASKED ? expand32_avx512<KIND>(values[r], m, w[r]) : load32_avx512<KIND>(values[r], w[r]);
        }
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < 2; i++) {
                const __m512 seen = _mm512_loadu_ps(x + t * pitch + byte * 8 + 16 * i);
                for (int r = 0; r < ROWS; r++)
                    sum[r][t][i % CHAINS] = _mm512_fmadd_ps(w[r][i], seen, sum[r][t][i % CHAINS]);
            }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) {
            for (int c = 1; c < CHAINS; c++) sum[r][t][0] = _mm512_add_ps(sum[r][t][0], sum[r][t][c]);
            sums[r * TOKENS + t] = _mm512_reduce_add_ps(sum[r][t][0]);
        }
}

template <int KIND, bool MASKED>
Rows rows_of(int isa, int rows, int tokens) {
    static const Rows avx2[] = {row_avx2<KIND, MASKED, 1>, row_avx2<KIND, MASKED, 2>, row_avx2<KIND, MASKED, 3>,
                                row_avx2<KIND, MASKED, 4>};
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
           : isa == AVX2 ? avx2[tokens - 1]
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

// How many rows go side by side: what registers hold. With AVX2 two took longer than one, on an EPYC.
int beside(int isa, int tokens) { return isa < AVX512 ? 1 : tokens <= 4 ? 4 : 2; }

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
        __builtin_cpu_supports("f16c")) {
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2")))
            return AVX2;
        return has_tiles() ? AMX : AVX512;
    }
#endif
    return PORTABLE;
}

// Of so many rows, or groups of them, what a thread takes at a time.
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

// x filled up with zeros; of 32 columns the even ones, then the odd ones, for bf16 in registers.
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

// Some rows of W side by side. Nothing is read behind the last value: those near it are copied.
void set_up(const Weight& weight, int64_t row, int rows, int64_t columns, int64_t size, Strip* strips,
            std::vector<char>* copies) {
    const int64_t bytes = (columns + 7) / 8;
    for (int r = 0; r < rows; r++) {
        const int64_t at = row + r, next = at + rows < weight.rows ? at + rows : at;
        if (!weight.mask) {
            strips[r] = {(const char*)weight.values + at * columns * size, nullptr, columns * size,
                         (next - at) * columns * size, 0};
            continue;
        }
        const int64_t begin = weight.offsets[at], end = weight.offsets[at + 1];
        const char* from = (const char*)weight.values + begin * size;
        if (end + MARGIN > weight.offsets[weight.rows]) {
            copies[r].resize((end - begin + MARGIN) * size);
            std::memcpy(copies[r].data(), from, (end - begin) * size);
            from = copies[r].data();
        }
        strips[r] = {from, weight.mask + at * bytes, (end - begin) * size, (weight.offsets[next] - begin) * size,
                     (next - at) * bytes};
    }
}

// Rows of W times x. x: some tokens, [tokens][columns]; seen: the same as `arrange` leaves them; sums: [rows][tokens], room
// for SIDE times MOST.
void rows_times(const Weight& weight, int64_t row, int rows, int kind, int isa, const float* x, const float* seen,
                int64_t columns, int64_t pitch, int tokens, float* sums) {
    const int64_t bytes = (columns + 7) / 8, whole = columns / GROUP * GROUP;
    Strip strips[SIDE];
    std::vector<char> copies[SIDE];
    set_up(weight, row, rows, columns, size_of(kind), strips, copies);
    const int64_t seen_bytes = weight.mask ? bytes : whole / 8;
    if (rows == beside(isa, tokens))
        (weight.mask ? rows_for<true> : rows_for<false>)(kind, isa, rows, tokens)(strips, seen, pitch, seen_bytes, tokens, sums);
    else
        for (int r = 0; r < rows; r++)
            (weight.mask ? rows_for<true> : rows_for<false>)(kind, isa, 1, tokens)(strips + r, seen, pitch, seen_bytes, tokens,
                                                                                  sums + r * tokens);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            float& sum = sums[r * tokens + t];
            if (!weight.mask)
                for (int64_t c = whole; c < columns; c++) sum += value_at(strips[r].values, c, kind) * x[t * columns + c];
            if (weight.scale) sum *= weight.scale[row + r];
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
    const uint16_t *values[DOWN], *end[DOWN];
    for (int r = 0; r < rows; r++) {
        values[r] = (const uint16_t*)strips[r].values;
        end[r] = values[r] + strips[r].size / 2;
    }
    static const Layout layout;
    _tile_loadconfig(&layout);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(5);
    _tile_zero(6);
    for (int64_t begin = 0; begin < pieces + AHEAD; begin += AHEAD) {
        const int now = begin / AHEAD % 2;
        const int some = (int)(begin >= pieces ? 0 : pieces - begin < AHEAD ? pieces - begin : AHEAD);
        // Of every row's mask what comes soon, in it or in that of the row in its place.
        int64_t soon = begin * 4 + NEAR_MASK;
        if (soon >= bytes) soon += strips->far_mask - bytes;
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
                const char* ask = (const char*)from + NEAR_TILES;
                if (ask >= (const char*)end[r]) ask += strips[r].far - strips[r].size;
                for (int line = 0; line < (MASKED ? 2 : 4); line++) _mm_prefetch(ask + 64 * line, _MM_HINT_T1);
                if (MASKED && begin * 4 % 64 == 0) _mm_prefetch((const char*)strips[r].mask + soon, _MM_HINT_T1);
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
void linears_by_tiles(const Weight* weights, int64_t count, const float* bias, const float* residual, const float* x, float* y,
                      int64_t columns, int64_t tokens, int glu, int threads) {
    std::vector<uint16_t> seen;
    const int parts = tile(x, seen, tokens, columns, threads);
    const int64_t span = (columns + PIECE - 1) / PIECE * parts * PIECE * ACROSS;
    int64_t outputs = 0, turns = 0;
    for (int64_t w = 0; w < (glu ? 1 : count); w++) {
        outputs += weights[w].rows;
        turns += (weights[w].rows + DOWN - 1) / DOWN;
    }
    // Several at a time, since each asks for what the next one needs first.
#pragma omp parallel for num_threads(threads) schedule(dynamic, rows_at_a_time(turns, threads))
    for (int64_t turn = 0; turn < turns; turn++) {
        int64_t in = turn, before = 0;
        const Weight* weight = weights;
        for (int64_t some; in >= (some = (weight->rows + DOWN - 1) / DOWN); weight++) in -= some, before += weight->rows;
        const int64_t row = in * DOWN;
        const int rows = (int)(weight->rows - row < DOWN ? weight->rows - row : DOWN);
        alignas(64) float sums[2][DOWN * ACROSS];
        for (int64_t first = 0; first < tokens; first += ACROSS) {
            for (int w = 0; w <= glu; w++) {
                Strip strips[DOWN];
                std::vector<char> copies[DOWN];
                set_up(glu ? weights[w] : *weight, row, rows, columns, 2, strips, copies);
                const uint16_t* tiles = seen.data() + first / ACROSS * span;
                (weight->mask ? tiles_times<true> : tiles_times<false>)(strips, rows, tiles, parts, columns, sums[w]);
            }
            const int64_t some = tokens - first < ACROSS ? tokens - first : ACROSS;
            for (int r = 0; r < rows; r++)
                for (int64_t t = 0; t < some; t++) {
                    const int64_t output = before + row + r, to = (first + t) * outputs + output;
                    const float sum = sums[0][r * ACROSS + t];
                    y[to] = glu ? sum / (1 + std::exp(-sum)) * sums[1][r * ACROSS + t]
                                : sum + (bias ? bias[output] : 0) + (residual ? residual[to] : 0);
                }
        }
    }
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

// The best instruction set of this machine that there is code for: 0 portable, 1 AVX2 with FMA and F16C, 2 AVX-512
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
#if TILES
    if (by_tiles(weights, count, columns, tokens, kind, isa))
        return linears_by_tiles(weights, count, bias, residual, x, y, columns, tokens, glu, threads);
#endif
    const Aligned seen(tokens * pitch);
    arrange(x, seen.data, tokens, columns, pitch, kind == BF16 && isa != PORTABLE);
    int64_t outputs = 0, turns = 0;
    for (int64_t w = 0; w < (glu ? 1 : count); w++) {
        outputs += weights[w].rows;
        turns += (weights[w].rows + SIDE - 1) / SIDE;
    }
    // In turns: some cores are slower, or have other work.
#pragma omp parallel for num_threads(threads) schedule(dynamic, rows_at_a_time(turns, threads))
    for (int64_t turn = 0; turn < turns; turn++) {
        int64_t in = turn, before = 0;
        const Weight* weight = weights;
        for (int64_t some; in >= (some = (weight->rows + SIDE - 1) / SIDE); weight++) in -= some, before += weight->rows;
        const int64_t end = (in + 1) * SIDE < weight->rows ? (in + 1) * SIDE : weight->rows;
        for (int64_t first = 0; first < tokens; first += together) {
            const int some = (int)(tokens - first < together ? tokens - first : together);
            const int step = beside(isa, some);
            const float* plain = x + first * columns;
            const float* turned = seen.data + first * pitch;
            for (int64_t row = in * SIDE; row < end; row += step) {
                const int rows = (int)(end - row < step ? end - row : step);
                float sums[SIDE * MOST], ups[SIDE * MOST];
                rows_times(*weight, row, rows, kind, isa, plain, turned, columns, pitch, some, sums);
                if (glu) rows_times(weights[1], row, rows, kind, isa, plain, turned, columns, pitch, some, ups);
                for (int r = 0; r < rows; r++)
                    for (int t = 0; t < some; t++) {
                        const int64_t output = before + row + r, to = (first + t) * outputs + output;
                        const float sum = sums[r * some + t];
                        y[to] = glu ? sum / (1 + std::exp(-sum)) * ups[r * some + t]
                                    : sum + (bias ? bias[output] : 0) + (residual ? residual[to] : 0);
                    }
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
