// What the kernels for a CPU share: kinds of weights, instruction sets, the expansion of packed values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "masks are read as words of little byte order, which is how they lie in a file"
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#ifndef __clang__  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#else
#define X86 0
#endif

#define WITH_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#if X86 && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define TILES 1
#define WITH_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt")))
#else
#define TILES 0
#endif
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt")))

enum Kind { BF16, FP16, FP32, INT8 };
enum Isa { PORTABLE, AVX2, AVX512, AMX };  // AMX: AVX-512, and tiles of bf16

constexpr int64_t MARGIN = 32;  // values that may be read behind the last of a row

inline int size_of(int kind) { return kind == FP32 ? 4 : kind == INT8 ? 1 : 2; }

inline float half_to_float(uint16_t bits) {
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

inline float value_at(const void* values, int64_t index, int kind) {
    if (kind == FP32) return ((const float*)values)[index];
    if (kind == INT8) return ((const int8_t*)values)[index];
    const uint16_t bits = ((const uint16_t*)values)[index];
    if (kind == FP16) return half_to_float(bits);
    const uint32_t word = (uint32_t)bits << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}

#if X86

WITH_AVX2 inline float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

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
inline const Places places;

// Eight columns from the values that `from` points to; m: their byte of the mask.
WITH_AVX2 inline __m128i expand8(const uint16_t* from, size_t m) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), _mm_load_si128((const __m128i*)places.halves[m]));
}

WITH_AVX2 inline __m256 expand8(const float* from, size_t m) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)places.words[m]));
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)m), bits), bits);
    return _mm256_and_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), index), _mm256_castsi256_ps(kept));
}

// 32 columns in fp32, from the values that `from` points to; returns what follows them. m: four bytes of the mask.
// bf16: the 16 of even number, then those of odd number; else in their order.
template <int KIND>
WITH_AVX2 inline const void* expand32_avx2(const void* from, const uint8_t* m, __m256 (&w)[4]) {
    // Byte after byte: few instructions are what this lives on.
    const size_t m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3];
    const int n0 = _mm_popcnt_u32(m0), n1 = _mm_popcnt_u32(m1), n2 = _mm_popcnt_u32(m2), n3 = _mm_popcnt_u32(m3);
    if (KIND == FP32) {
        const float* word = (const float*)from;
        w[0] = expand8(word, m0);
        word += n0;
        w[1] = expand8(word, m1);
        word += n1;
        w[2] = expand8(word, m2);
        word += n2;
        w[3] = expand8(word, m3);
        return word + n3;
    }
    const uint16_t* half = (const uint16_t*)from;
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
        return half;
    }
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    const __m256i left = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1),
                  right = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(left, 16));
    w[1] = _mm256_castsi256_ps(_mm256_slli_epi32(right, 16));
    w[2] = _mm256_castsi256_ps(_mm256_and_si256(left, odd));
    w[3] = _mm256_castsi256_ps(_mm256_and_si256(right, odd));
    return half;
}

// 32 columns that are all there, as expand32_avx2 gives them.
template <int KIND>
WITH_AVX2 inline const void* load32_avx2(const void* from, __m256 (&w)[4]) {
    if (KIND == FP32) {
        const float* word = (const float*)from;
        w[0] = _mm256_loadu_ps(word);
        w[1] = _mm256_loadu_ps(word + 8);
        w[2] = _mm256_loadu_ps(word + 16);
        w[3] = _mm256_loadu_ps(word + 24);
        return word + 32;
    }
    const __m128i* half = (const __m128i*)from;
    if (KIND == INT8) {
        for (int i = 0; i < 4; i++)
            w[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)from + 8 * i))));
        return half + 2;
    }
    if (KIND == FP16) {
        w[0] = _mm256_cvtph_ps(_mm_loadu_si128(half));
        w[1] = _mm256_cvtph_ps(_mm_loadu_si128(half + 1));
        w[2] = _mm256_cvtph_ps(_mm_loadu_si128(half + 2));
        w[3] = _mm256_cvtph_ps(_mm_loadu_si128(half + 3));
        return half + 4;
    }
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    const __m256i left = _mm256_loadu_si256((const __m256i*)half), right = _mm256_loadu_si256((const __m256i*)half + 1);
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(left, 16));
    w[1] = _mm256_castsi256_ps(_mm256_slli_epi32(right, 16));
    w[2] = _mm256_castsi256_ps(_mm256_and_si256(left, odd));
    w[3] = _mm256_castsi256_ps(_mm256_and_si256(right, odd));
    return half + 4;
}

template <int KIND>
WITH_AVX512 inline const void* load32_avx512(const void* from, __m512 (&w)[2]) {
    if (KIND == FP32) {
        w[0] = _mm512_loadu_ps(from);
        w[1] = _mm512_loadu_ps((const float*)from + 16);
        return (const float*)from + 32;
    }
    if (KIND == INT8) {
        w[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
        w[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from + 1)));
        return (const char*)from + 32;
    }
    const uint16_t* half = (const uint16_t*)from;
    const __m512i found = _mm512_loadu_si512(half);
    if (KIND == FP16) {
        w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(found));
        w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(found, 1));
    } else {
        w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(found, 16));
        w[1] = _mm512_castsi512_ps(_mm512_and_si512(found, _mm512_set1_epi32((int)0xffff0000)));
    }
    return half + 32;
}

// expand32_avx2 in two registers.
template <int KIND>
WITH_AVX512 inline const void* expand32_avx512(const void* from, uint32_t m, __m512 (&w)[2]) {
    if (KIND == FP32) {
        const float* word = (const float*)from;
        const __mmask16 low = (__mmask16)m, high = (__mmask16)(m >> 16);
        const float* second = word + _mm_popcnt_u32(low);
        w[0] = _mm512_maskz_expand_ps(low, _mm512_loadu_ps(word));
        w[1] = _mm512_maskz_expand_ps(high, _mm512_loadu_ps(second));
        return second + _mm_popcnt_u32(high);
    }
    const uint16_t* half = (const uint16_t*)from;
    const __m512i found = _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(half));
    const void* next = half + _mm_popcnt_u32(m);
    if (KIND == FP16) {
        w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(found));
        w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(found, 1));
        return next;
    }
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(found, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(found, _mm512_set1_epi32((int)0xffff0000)));
    return next;
}

#endif
