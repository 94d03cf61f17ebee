// One new token's attention over a cache of coded keys and values on a CPU, in tiles of 16 tokens: see
// numerics/kv_tiles.py for their layout, numerics/kv_constants.py for what else is read, and
// ops/packed_attention.py for what is computed.
//
// SPLIT tiles of a kv head are a piece of work, whatever the number of threads: first the scores of all its tokens,
// then the softmax's numerators, then their sum of values. Pieces are merged in their order, so that results do not
// depend on threads.
//
// A tile's codes are brought into the order of tokens (keys) or channels (values), bytes as they are; a byte shuffle
// looks up both halves of the codebook's fp16; and what they stand for lies in fp32 for all heads of a group to
// meet. Keys by channel are scaled and turned by their place in the tile, the query back by the tile's angle. Values'
// scales go into the numerators; what offsets add is the same for all channels, one number.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "kv_tiles.h"

namespace {

constexpr int64_t SPLIT = 16;          // tiles
constexpr int64_t SPAN = SPLIT * TILE;  // tokens
constexpr int64_t MOST = 4;            // heads that meet a tile together
constexpr int64_t BLOCK = 32;          // channels that are summed up by themselves: one long sum would lose more
constexpr float LOG2_E = 1.4426950408889634f;

#if defined(__GNUC__)
#define EVERYWHERE inline __attribute__((always_inline))  // compiled for the instructions of what calls it
#else
#define EVERYWHERE inline
#endif

// What a tile's fragments are decoded by.
struct Book {
    alignas(16) uint8_t low[16], high[16];  // of fp16
    float values[16];
};

// Of the keys of a kv head: what they are decoded and turned by. Without constants they have a scale for every token.
struct Turning {
    const float* constants;  // [D / 2][4]: scale and offset of a pair's first channel, and of its second
    const float* angles;     // [D / 2][2][16]: cos, then sin, of the tokens of a tile
};

// Bytes of words, [word][half][lane % 4][byte % 2][lane / 4], half: byte / 2.
EVERYWHERE int64_t byte_at(int64_t word, int64_t byte, int64_t t, int64_t g) {
    return ((word * 2 + byte / 2) * 4 + t) * 16 + byte % 2 * 8 + g;
}

// 2^x of x up to 0, within 2e-7 of it; NaN of NaN. Coefficients of a polynomial for what is left of x, the largest
// power first: of the interpolation at Chebyshev's points between -1/2 and 1/2.
constexpr float POWERS[] = {1.5461444854736328e-4f, 1.3400427997112274e-3f, 9.618056938052177e-3f, 5.550327152013779e-2f,
                            2.4022650718688965e-1f, 6.931471824645996e-1f,  1.f};
constexpr float LEAST = -126;

float power_of_two(float x) {
    const float at = x > LEAST ? x : LEAST;
    const int32_t whole = (int32_t)(at - 0.5f);  // towards 0: the nearest
    const float left = at - (float)whole;
    float y = 0;
    for (const float power : POWERS) y = y * left + power;
    const uint32_t bits = (uint32_t)(whole + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return x < LEAST ? 0.f : y * scale + (x - at);
}

// q [heads][D], pairs' first channels, then their second ones, turned back by angles [D / 2][2].
EVERYWHERE void turn_back(const float* q, const float* angles, int64_t heads, int64_t width, float* turned) {
    const int64_t half = width / 2;
    float cos[WIDEST / 2], sin[WIDEST / 2];
    for (int64_t i = 0; i < half; i++) cos[i] = angles[2 * i], sin[i] = angles[2 * i + 1];
    for (int64_t h = 0; h < heads; h++) {
        const float *one = q + h * width, *two = one + half;
        float *to = turned + h * width, *other = to + half;
        for (int64_t i = 0; i < half; i++) {
            to[i] = cos[i] * one[i] + sin[i] * two[i];
            other[i] = cos[i] * two[i] - sin[i] * one[i];
        }
    }
}

// Numbers of a tile's tokens, each times its own.
inline void multiply(const float* __restrict x, const float* __restrict by, float* __restrict y) {
    for (int64_t j = 0; j < TILE; j++) y[j] = x[j] * by[j];
}

inline void add_products(const float* __restrict x, const float* __restrict by, float* __restrict sum) {
    for (int64_t j = 0; j < TILE; j++) sum[j] += x[j] * by[j];
}

// The code of a lane's pair: entry `e` of pair `i` of a fragment.
template <int BITS>
int code_of(const uint8_t* bytes, int64_t fragment, int64_t t, int64_t g, int64_t i, int64_t e) {
    if (BITS == FP8) return bytes[byte_at(2 * fragment + i / 2, i % 2 * 2 + e, t, g)];
    const auto word = [&](int64_t index) { return (int)bytes[byte_at(index, i, t, g)]; };
    int pair;
    if (BITS == 4) {
        pair = word(fragment);
    } else if (BITS == 2) {
        pair = word(fragment / 2) >> fragment % 2 * 4;
    } else {
        const int64_t first = fragment / 4 * 3, index = fragment % 4;
        pair = index < 3 ? word(first + index)
                         : word(first) >> 6 | word(first + 1) >> 6 << 2 | word(first + 2) >> 6 << 4;
    }
    return pair >> e * BITS & ((1 << BITS) - 1);
}

// e4m3 by its bits in fp16 is 2^8 too small.
constexpr float UNIT = 256.f;

template <int BITS>
float value_of(int code, const Book& book) {
    return BITS == FP8 ? half_to_float((uint16_t)((code & 0x80) << 8 | (code & 0x7f) << 7)) : book.values[code];
}

// Words begin to end of a record.
void spread_portable(const Format& form, const uint8_t* record, int64_t begin, int64_t end, uint8_t* bytes) {
    for (int64_t word = begin; word < end; word++)
        for (int64_t lane = 0; lane < 32; lane++)
            for (int64_t byte = 0; byte < 4; byte++)
                bytes[byte_at(word, byte, lane % 4, lane / 4)] = record[form.word_at(word, lane) + byte];
}

// Keys of a tile: [D][16], pairs' first channels, then their second ones.
template <int BITS>
void keys_portable(const uint8_t* bytes, int64_t width, const Book& book, const Turning& turning, float* keys) {
    for (int64_t pair = 0; pair < width / 2; pair++)
        for (int64_t token = 0; token < TILE; token++) {
            float both[2];
            for (int64_t p = 0; p < 2; p++)
                both[p] = value_of<BITS>(
                    code_of<BITS>(bytes, pair / 8, pair % 8 / 2, token % 8, 2 * p + token / 8, pair % 2), book);
            if (turning.constants) {
                const float* c = turning.constants + 4 * pair;
                const float cos = turning.angles[pair * 32 + token], sin = turning.angles[pair * 32 + 16 + token];
                const float x = both[0] * c[0] + c[1], y = both[1] * c[2] + c[3];
                both[0] = cos * x - sin * y;
                both[1] = sin * x + cos * y;
            }
            keys[pair * TILE + token] = both[0];
            keys[(width / 2 + pair) * TILE + token] = both[1];
        }
}

// Values of a tile: [16][D].
template <int BITS>
void values_portable(const uint8_t* bytes, int64_t width, const Book& book, float* values) {
    for (int64_t token = 0; token < TILE; token++)
        for (int64_t channel = 0; channel < width; channel++)
            values[token * width + channel] = value_of<BITS>(
                code_of<BITS>(bytes, width / 16 + channel / 16, token % 8 / 2, channel % 8,
                              2 * (token / 8) + channel % 16 / 8, token % 2),
                book);
}

// scores [heads][SPAN]: of queries [heads][D] with the 16 tokens of a tile.
void scores_portable(const float* keys, const float* q, int64_t heads, int64_t width, float* scores) {
    for (int64_t h = 0; h < heads; h++) {
        float sum[TILE] = {};
        for (int64_t from = 0; from < width; from += BLOCK) {
            float part[TILE] = {};
            for (int64_t d = from; d < from + BLOCK; d++)
                for (int64_t j = 0; j < TILE; j++) part[j] += q[h * width + d] * keys[d * TILE + j];
            for (int64_t j = 0; j < TILE; j++) sum[j] += part[j];
        }
        std::memcpy(scores + h * SPAN, sum, sizeof(sum));
    }
}

// y [heads][D] += parts [heads][16] times values.
void add_portable(const float* values, const float* parts, int64_t heads, int64_t width, float* y) {
    for (int64_t h = 0; h < heads; h++)
        for (int64_t from = 0; from < width; from += BLOCK) {
            float sum[BLOCK] = {};
            for (int64_t j = 0; j < TILE; j++)
                for (int64_t d = 0; d < BLOCK; d++) sum[d] += parts[h * TILE + j] * values[j * width + from + d];
            for (int64_t d = 0; d < BLOCK; d++) y[h * width + from + d] += sum[d];
        }
}

// Of scores of some tokens, numerators in their place. about: the largest score, and their sum.
void numerators_portable(float* scores, int64_t count, float* about) {
    const float most = *std::max_element(scores, scores + count), reference = most == -INFINITY ? 0 : most;
    float parts[TILE] = {};
    for (int64_t i = 0; i < count; i++) parts[i % TILE] += scores[i] = power_of_two(scores[i] - reference);
    about[0] = most, about[1] = 0;
    for (const float part : parts) about[1] += part;
}

void halves_portable(const uint8_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i++) to[i] = half_at(from + 2 * i);
}

void turn_back_portable(const float* q, const float* angles, int64_t heads, int64_t width, float* turned) {
    turn_back(q, angles, heads, width, turned);
}

#if X86

// Of 16 columns of eight rows of bytes, in each half of a register: column after column, two in each register.
WITH_AVX2 inline void transpose(__m256i (&r)[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[i] = _mm256_unpacklo_epi8(r[i], r[i + 4]);
        a[i + 4] = _mm256_unpackhi_epi8(r[i], r[i + 4]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + j] = _mm256_unpacklo_epi8(a[i + j], a[i + j + 2]);
            b[i + j + 2] = _mm256_unpackhi_epi8(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 8; i += 2) {
        r[i] = _mm256_unpacklo_epi8(b[i], b[i + 1]);
        r[i + 1] = _mm256_unpackhi_epi8(b[i], b[i + 1]);
    }
}

template <int RUN>
WITH_AVX2 void spread_run(const uint8_t* record, int64_t begin, int64_t end, uint8_t* bytes) {
    for (int64_t word = begin / RUN * RUN; word < end; word += RUN) {
        const uint8_t* from = record + word * 128;
        for (int64_t u = 0; u < RUN / 2 + (RUN == 1); u++) {
            __m256i r[8];
            for (int g = 0; g < 8; g++) {
                const uint8_t* row = from + g * 16 * RUN + u * 32;
                r[g] = RUN == 1 ? _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)row))
                                : _mm256_loadu_si256((const __m256i*)row);
            }
            transpose(r);
            for (int o = 0; o < 8; o++) {
                // Where the four bytes of a word begin in 16: words of a lane, or lanes.
                const int64_t w = RUN == 4 ? o / 2 : RUN == 2 ? o / 2 % 2 : 0;
                const int64_t t = RUN == 4 ? 2 * u : RUN == 2 ? o / 4 : o / 2;
                uint8_t* to = bytes + byte_at(word + w, o % 2 * 2, t, 0);
                if (RUN == 4) {
                    _mm256_storeu_si256((__m256i*)to, r[o]);
                } else {
                    _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(r[o]));
                    if (RUN == 2) _mm_storeu_si128((__m128i*)(to + 32), _mm256_extracti128_si256(r[o], 1));
                }
            }
        }
    }
}

WITH_AVX2 void spread_avx2(const Format& form, const uint8_t* record, int64_t begin, int64_t end, uint8_t* bytes) {
    const int64_t run = form.run();
    (run == 4 ? spread_run<4> : run == 2 ? spread_run<2> : spread_run<1>)(record, begin, end, bytes);
}

// The pairs of a fragment of lanes t = 2 u and 2 u + 1, of half `side` of each: bytes of two codes.
template <int BITS>
WITH_AVX2 inline __m256i pairs(const uint8_t* bytes, int64_t fragment, int64_t side, int64_t u) {
    const int64_t first = BITS == 4 ? fragment : BITS == 2 ? fragment / 2 : fragment / 4 * 3, index = fragment % 4;
    const uint8_t* from = bytes + byte_at(first, 2 * side, 2 * u, 0);
    constexpr int64_t WORD = 128;
    if (BITS == 3 && index == 1) from += WORD;
    if (BITS == 3 && index == 2) from += 2 * WORD;
    const __m256i word = _mm256_loadu_si256((const __m256i*)from);
    if (BITS == 2 && fragment % 2) return _mm256_srli_epi16(word, 4);
    if (BITS != 3 || index < 3) return word;
    const __m256i next = _mm256_loadu_si256((const __m256i*)(from + WORD)),
                  last = _mm256_loadu_si256((const __m256i*)(from + 2 * WORD));
    const __m256i a = _mm256_and_si256(_mm256_srli_epi16(word, 6), _mm256_set1_epi8(0x03)),
                  b = _mm256_and_si256(_mm256_srli_epi16(next, 4), _mm256_set1_epi8(0x0c)),
                  c = _mm256_and_si256(_mm256_srli_epi16(last, 2), _mm256_set1_epi8(0x30));
    return _mm256_or_si256(_mm256_or_si256(a, b), c);
}

// What the codes of lanes 2 u and 2 u + 1 stand for, eight of each: those of byte 2 · side and of the next one.
struct Eights {
    __m256 of[2][2];  // lane, byte
};

template <int BITS>
WITH_AVX2 inline Eights decode(const uint8_t* bytes, int64_t fragment, int64_t side, int64_t u, int e, __m256i low,
                               __m256i high) {
    __m256i found[2];
    if constexpr (BITS == FP8) {
        const __m256i zero = _mm256_setzero_si256();
        for (int h = 0; h < 2; h++) {
            const __m256i codes =
                _mm256_loadu_si256((const __m256i*)(bytes + byte_at(2 * fragment + side, 2 * h, 2 * u, 0)));
            const __m256i wide = e ? _mm256_unpackhi_epi8(zero, codes) : _mm256_unpacklo_epi8(zero, codes);
            const __m256i size = _mm256_srli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f00)), 1);
            found[h] = _mm256_or_si256(size, _mm256_and_si256(wide, _mm256_set1_epi16((short)0x8000)));
        }
    } else {
        __m256i codes = pairs<BITS>(bytes, fragment, side, u);
        if (e) codes = _mm256_srli_epi16(codes, BITS);
        codes = _mm256_and_si256(codes, _mm256_set1_epi8((1 << BITS) - 1));
        const __m256i a = _mm256_shuffle_epi8(low, codes), b = _mm256_shuffle_epi8(high, codes);
        found[0] = _mm256_unpacklo_epi8(a, b);
        found[1] = _mm256_unpackhi_epi8(a, b);
    }
    Eights y;
    for (int h = 0; h < 2; h++) {
        y.of[0][h] = _mm256_cvtph_ps(_mm256_castsi256_si128(found[h]));
        y.of[1][h] = _mm256_cvtph_ps(_mm256_extracti128_si256(found[h], 1));
    }
    return y;
}

template <int BITS>
WITH_AVX2 void keys_avx2(const uint8_t* bytes, int64_t width, const Book& book, const Turning& turning, float* keys) {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)book.low)),
                  high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)book.high));
    float* second = keys + width / 2 * TILE;
    for (int64_t f = 0; f < width / 16; f++)
        for (int64_t u = 0; u < 2; u++)
            for (int e = 0; e < 2; e++) {
                const Eights x = decode<BITS>(bytes, f, 0, u, e, low, high),
                             y = decode<BITS>(bytes, f, 1, u, e, low, high);
                for (int lane = 0; lane < 2; lane++) {
                    const int64_t pair = 8 * f + 4 * u + 2 * lane + e;
                    if (turning.constants) {
                        const float* c = turning.constants + 4 * pair;
                        const __m256 s1 = _mm256_broadcast_ss(c), z1 = _mm256_broadcast_ss(c + 1),
                                     s2 = _mm256_broadcast_ss(c + 2), z2 = _mm256_broadcast_ss(c + 3);
                        for (int h = 0; h < 2; h++) {
                            const float* angle = turning.angles + pair * 32 + 8 * h;
                            const __m256 cos = _mm256_loadu_ps(angle), sin = _mm256_loadu_ps(angle + 16);
                            const __m256 one = _mm256_fmadd_ps(x.of[lane][h], s1, z1),
                                         two = _mm256_fmadd_ps(y.of[lane][h], s2, z2);
                            _mm256_storeu_ps(keys + pair * TILE + 8 * h,
                                             _mm256_fmsub_ps(cos, one, _mm256_mul_ps(sin, two)));
                            _mm256_storeu_ps(second + pair * TILE + 8 * h,
                                             _mm256_fmadd_ps(sin, one, _mm256_mul_ps(cos, two)));
                        }
                    } else {
                        for (int h = 0; h < 2; h++) {
                            _mm256_storeu_ps(keys + pair * TILE + 8 * h, x.of[lane][h]);
                            _mm256_storeu_ps(second + pair * TILE + 8 * h, y.of[lane][h]);
                        }
                    }
                }
            }
}

template <int BITS>
WITH_AVX2 void values_avx2(const uint8_t* bytes, int64_t width, const Book& book, float* values) {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)book.low)),
                  high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)book.high));
    for (int64_t f = 0; f < width / 16; f++)
        for (int64_t u = 0; u < 2; u++)
            for (int k = 0; k < 2; k++)
                for (int e = 0; e < 2; e++) {
                    const Eights x = decode<BITS>(bytes, width / 16 + f, k, u, e, low, high);
                    for (int lane = 0; lane < 2; lane++) {
                        float* to = values + (8 * k + 4 * u + 2 * lane + e) * width + 16 * f;
                        _mm256_storeu_ps(to, x.of[lane][0]);
                        _mm256_storeu_ps(to + 8, x.of[lane][1]);
                    }
                }
}

// Heads of a number that is known when this is compiled: their sums stay in registers, several where heads are few,
// so that one addition does not wait for another.
template <int HEADS>
WITH_AVX2 void scores_some(const float* keys, const float* q, int64_t width, float* scores) {
    constexpr int CHAINS = HEADS == 1 ? 4 : HEADS == 2 ? 2 : 1;
    __m256 sum[HEADS][2];
    for (int h = 0; h < HEADS; h++) sum[h][0] = sum[h][1] = _mm256_setzero_ps();
    for (int64_t from = 0; from < width; from += BLOCK) {
        __m256 part[CHAINS][HEADS][2];
        for (int c = 0; c < CHAINS; c++)
            for (int h = 0; h < HEADS; h++) part[c][h][0] = part[c][h][1] = _mm256_setzero_ps();
        for (int64_t d = from; d < from + BLOCK; d += CHAINS)
            for (int c = 0; c < CHAINS; c++) {
                const __m256 one = _mm256_loadu_ps(keys + (d + c) * TILE),
                             two = _mm256_loadu_ps(keys + (d + c) * TILE + 8);
                for (int h = 0; h < HEADS; h++) {
                    const __m256 given = _mm256_broadcast_ss(q + h * width + d + c);
                    part[c][h][0] = _mm256_fmadd_ps(given, one, part[c][h][0]);
                    part[c][h][1] = _mm256_fmadd_ps(given, two, part[c][h][1]);
                }
            }
        for (int c = 0; c < CHAINS; c++)
            for (int h = 0; h < HEADS; h++) {
                sum[h][0] = _mm256_add_ps(sum[h][0], part[c][h][0]);
                sum[h][1] = _mm256_add_ps(sum[h][1], part[c][h][1]);
            }
    }
    for (int h = 0; h < HEADS; h++) {
        _mm256_storeu_ps(scores + h * SPAN, sum[h][0]);
        _mm256_storeu_ps(scores + h * SPAN + 8, sum[h][1]);
    }
}

WITH_AVX2 void scores_avx2(const float* keys, const float* q, int64_t heads, int64_t width, float* scores) {
    for (; heads >= MOST; heads -= MOST, q += MOST * width, scores += MOST * SPAN)
        scores_some<MOST>(keys, q, width, scores);
    if (heads == 3) scores_some<3>(keys, q, width, scores);
    if (heads == 2) scores_some<2>(keys, q, width, scores);
    if (heads == 1) scores_some<1>(keys, q, width, scores);
}

template <int HEADS>
WITH_AVX2 void add_some(const float* values, const float* parts, int64_t width, float* y) {
    constexpr int EIGHTS = HEADS > 2 ? 2 : 4;  // channels at a time, by eight
    for (int64_t d = 0; d < width; d += 8 * EIGHTS) {
        __m256 sum[HEADS][EIGHTS];
        for (int h = 0; h < HEADS; h++)
            for (int i = 0; i < EIGHTS; i++) sum[h][i] = _mm256_setzero_ps();
        for (int64_t j = 0; j < TILE; j++) {
            __m256 value[EIGHTS];
            for (int i = 0; i < EIGHTS; i++) value[i] = _mm256_loadu_ps(values + j * width + d + 8 * i);
            for (int h = 0; h < HEADS; h++) {
                const __m256 part = _mm256_broadcast_ss(parts + h * TILE + j);
                for (int i = 0; i < EIGHTS; i++) sum[h][i] = _mm256_fmadd_ps(part, value[i], sum[h][i]);
            }
        }
        for (int h = 0; h < HEADS; h++)
            for (int i = 0; i < EIGHTS; i++) {
                float* to = y + h * width + d + 8 * i;
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum[h][i]));
            }
    }
}

WITH_AVX2 void add_avx2(const float* values, const float* parts, int64_t heads, int64_t width, float* y) {
    for (; heads >= MOST; heads -= MOST, parts += MOST * TILE, y += MOST * width)
        add_some<MOST>(values, parts, width, y);
    if (heads == 3) add_some<3>(values, parts, width, y);
    if (heads == 2) add_some<2>(values, parts, width, y);
    if (heads == 1) add_some<1>(values, parts, width, y);
}

WITH_AVX2 inline __m256 power_of_two(__m256 x) {
    const __m256 least = _mm256_set1_ps(LEAST), at = _mm256_max_ps(x, least);  // least of NaN
    const __m256 whole = _mm256_round_ps(at, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 left = _mm256_sub_ps(at, whole);
    __m256 y = _mm256_set1_ps(POWERS[0]);
    for (int i = 1; i < 7; i++) y = _mm256_fmadd_ps(y, left, _mm256_set1_ps(POWERS[i]));
    const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)));
    y = _mm256_add_ps(y, _mm256_sub_ps(x, at));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, least, _CMP_LT_OQ), y);
}

WITH_AVX2 void numerators_avx2(float* scores, int64_t count, float* about) {
    alignas(32) float found[TILE];
    __m256 most[2], sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int k = 0; k < 2; k++) {
        most[k] = _mm256_loadu_ps(scores + 8 * k);
        for (int64_t i = TILE; i < count; i += TILE) most[k] = _mm256_max_ps(_mm256_loadu_ps(scores + i + 8 * k), most[k]);
        _mm256_store_ps(found + 8 * k, most[k]);
    }
    about[0] = *std::max_element(found, found + TILE), about[1] = 0;
    const __m256 reference = _mm256_set1_ps(about[0] == -INFINITY ? 0 : about[0]);
    for (int64_t i = 0; i < count; i += TILE)
        for (int k = 0; k < 2; k++) {
            const __m256 y = power_of_two(_mm256_sub_ps(_mm256_loadu_ps(scores + i + 8 * k), reference));
            _mm256_storeu_ps(scores + i + 8 * k, y);
            sum[k] = _mm256_add_ps(sum[k], y);
        }
    for (int k = 0; k < 2; k++) _mm256_store_ps(found + 8 * k, sum[k]);
    for (const float part : found) about[1] += part;
}

// count: divisible by 16.
WITH_AVX2 void halves_avx2(const uint8_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 2 * i))));
}

WITH_AVX2 void turn_back_avx2(const float* q, const float* angles, int64_t heads, int64_t width, float* turned) {
    turn_back(q, angles, heads, width, turned);
}

#endif

// The code for a width of codes and instructions. AVX-512 takes what AVX2 takes.
struct Code {
    void (*spread)(const Format&, const uint8_t*, int64_t, int64_t, uint8_t*);
    void (*keys)(const uint8_t*, int64_t, const Book&, const Turning&, float*);
    void (*values)(const uint8_t*, int64_t, const Book&, float*);
    void (*scores)(const float*, const float*, int64_t, int64_t, float*);
    void (*add)(const float*, const float*, int64_t, int64_t, float*);
    void (*numerators)(float*, int64_t, float*);
    void (*halves)(const uint8_t*, int64_t, float*);
    void (*turn_back)(const float*, const float*, int64_t, int64_t, float*);
};

template <int BITS>
Code code_of_bits(int isa) {
#if X86
    if (isa != PORTABLE)
        return {spread_avx2, keys_avx2<BITS>, values_avx2<BITS>, scores_avx2,
                add_avx2,    numerators_avx2, halves_avx2,       turn_back_avx2};
#else
    (void)isa;
#endif
    return {spread_portable, keys_portable<BITS>, values_portable<BITS>, scores_portable,
            add_portable,    numerators_portable, halves_portable,       turn_back_portable};
}

Code code_for(int64_t bits, int isa) {
    return bits == 4 ? code_of_bits<4>(isa) : bits == 3 ? code_of_bits<3>(isa)
         : bits == 2 ? code_of_bits<2>(isa) : code_of_bits<FP8>(isa);
}

// All that a call is given, and what it prepares for the pieces of work.
struct Call {
    Format form;
    Code code;
    const float* q;  // [batch · kv heads][GROUP][D]
    const uint8_t* tiles;
    const int32_t* padding;
    const float *inverse, *table;
    const void *key_sinks, *value_sinks;
    int64_t length, capacity, kv_heads, group, sinks, window;
    int sinks_kind;
    float scale, skip;  // skip: in powers of two, 0 for none

    Book books[2];
    std::vector<float> queries, constants, factors, angles;
    std::unique_ptr<float[]> partial;  // [batch · kv heads][splits][GROUP][D + 2]: sums, largest score, weight
    int64_t splits;

    int64_t width() const { return form.width; }
    float* part(int64_t row, int64_t split) {
        return partial.get() + (row * splits + split) * group * (width() + 2);
    }

    // What a row sees: its first token, the oldest slot, the first slot that tiles are read for.
    int64_t start(int64_t row) const {
        const int64_t given = padding ? padding[row / kv_heads] : 0;
        return std::min(std::max<int64_t>(given, 0), length);
    }
    int64_t oldest(int64_t row) const { return window ? std::max(start(row), length - window) : start(row); }
    int64_t first(int64_t row) const { return std::max(oldest(row), start(row) + sinks); }

    void read_books(const uint8_t* given) {
        for (int side = 0; side < 2; side++)
            for (int code = 0; code < 16; code++) {
                const uint8_t* from = given + (side * 256 + code % (1 << form.bits)) * 4;
                books[side].low[code] = from[0], books[side].high[code] = from[1];
                books[side].values[code] = half_at(from);
            }
    }

    void read_angles() {
        const int64_t half = width() / 2;
        angles.resize(half * 2 * TILE);
        for (int64_t token = 0; token < TILE; token++)
            for (int64_t i = 0; i < half; i++)
                for (int64_t part = 0; part < 2; part++)
                    angles[(i * 2 + part) * TILE + token] = table[(token * half + i) * 2 + part];
    }

    // Scale and offset of channels: what token 0 of a tile, which nothing turns, is made by.
    void read_channels(const uint8_t* given) {
        const int64_t half = width() / 2;
        constants.resize(kv_heads * half * 4);
        factors.resize(kv_heads * WIDEST);
        for (int64_t head = 0; head < kv_heads; head++)
            for (int64_t i = 0; i < half; i++) {
                float* to = constants.data() + (head * half + i) * 4;
                constexpr int64_t PLACES[4] = {0, 2, 4, 5};  // a1, a0, b2, b0
                for (int64_t c = 0; c < 4; c++) {
                    const int64_t third = (head * form.fragments() + i / 8) * 3 + PLACES[c] / 4;
                    to[c] = half_at(given + 2 * ((third * 32 + i % 8 / 2) * 8 + PLACES[c] % 4 * 2 + i % 2));
                }
                if (!inverse) continue;
                // Like codes, outliers are divided by the scale and multiplied by the constant of it.
                const int64_t one = form.first_of(i), two = form.second_of(i);
                factors[head * WIDEST + one] = to[0] * inverse[head * width() + one];
                factors[head * WIDEST + two] = to[2] * inverse[head * width() + two];
            }
    }

    // A row's queries in the order of keys: scaled, turned as keys are, and by the padding, since a key's position is
    // its slot less that.
    void prepare(int64_t row) {
        const int64_t half = width() / 2, from = start(row);
        if (from >= length) return;  // it sees nothing, and its angles may be behind the table
        for (int64_t h = 0; h < group; h++) {
            float own[WIDEST];
            const float* given = q + (row * group + h) * width();
            for (int64_t i = 0; i < width(); i++) own[i] = given[i] * (scale * LOG2_E);
            if (form.turned_keys) hadamard(own, width());
            float* to = queries.data() + (row * group + h) * width();
            for (int64_t i = 0; i < half; i++) {
                float one = own[form.first_of(i)], two = own[form.second_of(i)];
                if (table && from) {
                    const float* near = table + (from % TILE * half + i) * 2;
                    const float* far = table + ((TILE + from / TILE) * half + i) * 2;
                    for (const float* by : {far, near}) {
                        const float turned = by[0] * one - by[1] * two;
                        two = by[1] * one + by[0] * two;
                        one = turned;
                    }
                }
                to[i] = one;
                to[half + i] = two;
            }
        }
    }

    // What outliers of a tile's keys add.
    void add_key_outliers(const uint8_t* record, int64_t head, float* keys) const {
        const int64_t half = width() / 2;
        const float* own = factors.data() + head * WIDEST;
        float missing[MOST_SLOTS * TILE];
        code.halves(record + form.key_missing_at(), form.key_slots * TILE, missing);
        for (int64_t i = 0; i < form.key_slots * TILE; i++) {
            const int64_t channel = record[form.key_channels_at() + i], j = i / form.key_slots;
            if (missing[i] == 0 || channel >= width()) continue;
            bool second;
            const int64_t pair = form.pair_of(channel, second);
            const float by = missing[i] * own[channel];
            const float cos = by * angles[pair * 2 * TILE + j], sin = by * angles[(pair * 2 + 1) * TILE + j];
            keys[pair * TILE + j] += second ? -sin : cos;
            keys[(half + pair) * TILE + j] += second ? cos : sin;
        }
    }

    // One piece of work. room: of `scratch` floats.
    void work(int64_t row, int64_t split, float* room) {
        const int64_t head = row % kv_heads, seen = first(row), first_tile = seen / TILE + split * SPLIT;
        const int64_t count = std::min(SPLIT, (length + TILE - 1) / TILE - first_tile);
        if (count <= 0 || seen >= length) return;
        float *tile = room, *scores = tile + WIDEST * TILE, *turned = scores + group * SPAN,
              *parts = turned + group * width(), *offsets = parts + group * TILE, *found = part(row, split);
        alignas(64) uint8_t bytes[128 * WIDEST / 16 * FP8 / 2];
        const auto record_of = [&](int64_t n) {  // a tile's place: its number modulo the capacity, where there is a window
            return tiles + (row * capacity + (first_tile + n) % capacity) * form.record();
        };
        const float* own = queries.data() + row * group * width();
        const int64_t fragments = form.fragments(), words = form.words();
        const int64_t key_words = form.bits == 3 ? (fragments + 3) / 4 * 3 : words / 2;
        const int64_t value_words = form.bits == 3 ? fragments / 4 * 3 : words / 2;
        const Turning turning{table ? constants.data() + head * width() * 2 : nullptr, angles.data()};
        for (int64_t n = 0; n < count; n++) {
            const uint8_t* record = record_of(n);
            code.spread(form, record, 0, key_words, bytes);
            code.keys(bytes, width(), books[0], turning, tile);
            if (form.key_slots) add_key_outliers(record, head, tile);
            if (table) code.turn_back(own, table + (TILE + first_tile + n) * width(), group, width(), turned);
            code.scores(tile, table ? turned : own, group, width(), scores + n * TILE);
            if (form.key_scale) {
                float by[TILE], own_scores[TILE];
                parameters(record, 0, by);
                for (float& each : by) each *= unit();
                for (int64_t h = 0; h < group; h++) {
                    float* to = scores + h * SPAN + n * TILE;
                    std::memcpy(own_scores, to, sizeof(own_scores));
                    multiply(own_scores, by, to);
                }
            }
            const int64_t slot = (first_tile + n) * TILE;
            for (int64_t j = 0; j < TILE; j++)
                if (slot + j < seen || slot + j >= length)
                    for (int64_t h = 0; h < group; h++) scores[h * SPAN + n * TILE + j] = -INFINITY;
        }
        const uint32_t left_out = skip > 0 ? leave_out(scores, count) : 0;
        for (int64_t h = 0; h < group; h++) {
            code.numerators(scores + h * SPAN, count * TILE, found + group * width() + 2 * h);
        }
        std::memset(found, 0, group * width() * sizeof(float));
        std::fill_n(offsets, group * TILE, 0.f);
        for (int64_t n = 0; n < count; n++) {
            if (left_out >> n & 1) continue;
            const uint8_t* record = record_of(n);
            code.spread(form, record, value_words, words, bytes);
            code.values(bytes, width(), books[1], tile);
            float by[TILE], more[TILE] = {}, missing[MOST_SLOTS * TILE];
            code.halves(record + form.value_missing_at(), form.value_slots * TILE, missing);
            parameters(record, form.key_scale, by);
            if (form.value_offset) parameters(record, form.key_scale + 1, more);
            for (int64_t j = 0; j < TILE; j++) {
                const int64_t slot = (first_tile + n) * TILE + j;
                if (slot < seen || slot >= length) {  // what is not seen may be no number
                    by[j] = more[j] = 0;
                    continue;
                }
                by[j] *= unit();
                for (int64_t i = j * form.value_slots; i < (j + 1) * form.value_slots; i++) {
                    const int64_t channel = record[form.value_channels_at() + i];
                    if (channel < width()) tile[j * width() + channel] += missing[i] / by[j];
                }
            }
            for (int64_t h = 0; h < group; h++) {
                const float* own_parts = scores + h * SPAN + n * TILE;
                multiply(own_parts, by, parts + h * TILE);
                if (form.value_offset) add_products(own_parts, more, offsets + h * TILE);
            }
            code.add(tile, parts, group, width(), found);
        }
        if (form.value_offset)
            for (int64_t h = 0; h < group; h++) {
                float offset = 0;
                for (int64_t j = 0; j < TILE; j++) offset += offsets[h * TILE + j];
                for (int64_t d = 0; d < width(); d++) found[h * width() + d] += offset;
            }
    }

    // Make scores of tiles that lie too far below the largest of their heads -inf. Returns a bit for each.
    uint32_t leave_out(float* scores, int64_t count) const {
        uint32_t low = (1u << count) - 1;
        for (int64_t h = 0; h < group; h++) {
            const float* own = scores + h * SPAN;
            const float least = *std::max_element(own, own + count * TILE) - skip;
            for (int64_t i = 0; i < count * TILE; i++)
                if (!(own[i] <= least)) low &= ~(1u << i / TILE);  // what is no number is not below
        }
        for (int64_t h = 0; low && h < group; h++)
            for (int64_t n = 0; n < count; n++)
                if (low >> n & 1) std::fill_n(scores + h * SPAN + n * TILE, TILE, -INFINITY);
        return low;
    }

    float unit() const { return form.bits == FP8 ? UNIT : 1; }

    int64_t scratch() const { return WIDEST * TILE + group * (SPAN + width() + 2 * TILE); }

    // Of a tile's tokens.
    void parameters(const uint8_t* record, int64_t index, float* found) const {
        float all[3 * TILE];
        const int64_t each = form.parameters();
        code.halves(record + form.parameters_at(), each * TILE, all);
        for (int64_t j = 0; j < TILE; j++) found[j] = all[(j % 8 * 2 + j / 8) * each + index];
    }

    // All of a row's pieces together, and the sinks.
    void merge(int64_t row, float* y) {
        const int64_t seen = first(row), from = start(row), pieces =
            seen < length ? ((length + TILE - 1) / TILE - seen / TILE + SPLIT - 1) / SPLIT : 0;
        std::vector<float> first_scores(sinks);
        for (int64_t h = 0; h < group; h++) {
            const auto about = [&](int64_t split) { return part(row, split) + group * width() + 2 * h; };
            const float* own = q + (row * group + h) * width();
            float most = -INFINITY;
            for (int64_t split = 0; split < pieces; split++) most = std::max(most, about(split)[0]);
            const int64_t begin = oldest(row) - from, end = std::min(sinks, length - from);
            for (int64_t i = begin; i < end; i++) {
                float score = 0;
                for (int64_t d = 0; d < width(); d++)
                    score += own[d] * value_at(key_sinks, (row * sinks + i) * width() + d, sinks_kind);
                first_scores[i] = score * (scale * LOG2_E);
                most = std::max(most, first_scores[i]);
            }
            float sum[WIDEST] = {}, total = 0;
            for (int64_t split = 0; split < pieces; split++) {
                const float faded = power_of_two(about(split)[0] - most), *found = part(row, split) + h * width();
                total += about(split)[1] * faded;
                for (int64_t d = 0; d < width(); d++) sum[d] += found[d] * faded;
            }
            if (form.turned_values) hadamard(sum, width());
            for (int64_t i = begin; i < end; i++) {
                const float weight = power_of_two(first_scores[i] - most);
                total += weight;
                for (int64_t d = 0; d < width(); d++)
                    sum[d] += weight * value_at(value_sinks, (row * sinks + i) * width() + d, sinks_kind);
            }
            for (int64_t d = 0; d < width(); d++) y[(row * group + h) * width() + d] = sum[d] / total;
        }
    }
};

}  // namespace

extern "C" {

// q, y: [batch][kv heads · group][D] fp32; tiles: [batch · kv heads][capacity] records; length: at most 16 · capacity,
// but with a window, of which tiles may hold what it sees alone. skip: nats, 0 for none. padding: [batch] or null; books: [2][256][2] fp16, null for fp8. channels, inverse, table: null for keys with a
// scale of their own, inverse also where they have no outliers; table: of 16 rows and one for every tile at least. key_sinks,
// value_sinks: [batch · kv heads][sinks][D] of sinks_kind, or null. format: the fields of Format.
void llmsqueeze_kv_attend(const float* q, const uint8_t* tiles, int64_t length, const int32_t* padding,
                          const uint8_t* books, const uint8_t* channels, const float* inverse, const float* table,
                          const void* key_sinks, const void* value_sinks, float* y, const int64_t* format,
                          int64_t batch, int64_t kv_heads, int64_t group, int64_t capacity, int64_t sinks,
                          int64_t window, float scale, float skip, int sinks_kind, int isa, int threads) {
    Call call{};
    std::memcpy(&call.form, format, sizeof(Format));
    call.code = code_for(call.form.bits, isa);
    call.q = q, call.tiles = tiles, call.padding = padding;
    call.inverse = inverse, call.table = channels ? table : nullptr;
    call.key_sinks = key_sinks, call.value_sinks = value_sinks;
    call.length = length, call.capacity = capacity, call.kv_heads = kv_heads, call.group = group;
    call.sinks = sinks, call.window = window, call.sinks_kind = sinks_kind, call.scale = scale;
    call.skip = skip * LOG2_E;
    if (books) call.read_books(books);
    if (channels) {
        call.read_angles();
        call.read_channels(channels);
    }
    const int64_t rows = batch * kv_heads, width = call.width();
    int64_t most = 0;
    for (int64_t row = 0; row < rows; row += kv_heads)
        most = std::max(most, (length + TILE - 1) / TILE - call.first(row) / TILE);
    call.splits = (most + SPLIT - 1) / SPLIT;
    call.queries.resize(rows * group * width);
    call.partial.reset(new float[rows * call.splits * group * (width + 2)]);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(call.scratch());
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) call.prepare(row);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < rows * call.splits; i++) call.work(i / call.splits, i % call.splits, room.data());
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) call.merge(row, y);
    }
}
}
