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

#define WITH_AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi2")))
#if X86 && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define TILES 1
#define WITH_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt,bmi2")))
#else
#define TILES 0
#endif
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt,bmi2")))

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
    alignas(64) uint8_t raised[256][32];  // for values of 2 bytes, as the upper ones of 4
    alignas(64) uint8_t words[256][8];    // for values of 4 bytes
    Places() {
        std::memset(raised, 0xff, sizeof raised);
        for (int byte = 0; byte < 256; byte++) {
            int next = 0;
            for (int bit = 0; bit < 8; bit++) {
                const bool here = byte >> bit & 1;
                halves[byte][2 * bit] = here ? 2 * next : 0xff;
                halves[byte][2 * bit + 1] = here ? 2 * next + 1 : 0xff;
                if (here) raised[byte][4 * bit + 2] = 2 * next, raised[byte][4 * bit + 3] = 2 * next + 1;
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

// The same of bf16 in fp32. row: 32 times the byte of the mask.
WITH_AVX2 inline __m256 raise8(const uint16_t* from, size_t row) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
    const __m256i places8 = _mm256_load_si256((const __m256i*)(places.raised[0] + row));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, places8));
}

// Columns 8 i to 8 i + 7 of 32 in fp32, from the values of these 32 that `from` points to. m: four bytes of the mask.
template <int KIND>
WITH_AVX2 inline __m256 eight_avx2(const void* from, uint32_t m, int i) {
    // Few instructions are what this lives on, and that no sum waits for the one before.
    const int before = i ? _mm_popcnt_u32(_bzhi_u32(m, 8 * i)) : 0;
    const uint32_t turned = m >> (8 * i + 27) % 32 | m << (37 - 8 * i) % 32;  // one instruction, which a shift is not
    if (KIND == BF16) return raise8((const uint16_t*)from + before, turned & 0x1fe0);
    const size_t here = m >> 8 * i & 0xff;
    if (KIND == FP16) return _mm256_cvtph_ps(expand8((const uint16_t*)from + before, here));
    return expand8((const float*)from + before, here);
}

// What follows the values of these 32.
template <int KIND>
WITH_AVX2 inline const void* after_avx2(const void* from, uint32_t m) {
    return (const char*)from + (KIND == FP32 ? 4 : 2) * (int64_t)_mm_popcnt_u32(m);
}

// All 32, and what follows their values.
template <int KIND>
WITH_AVX2 inline const void* expand32_avx2(const void* from, uint32_t m, __m256 (&w)[4]) {
    for (int i = 0; i < 4; i++) w[i] = eight_avx2<KIND>(from, m, i);
    return after_avx2<KIND>(from, m);
}

// Columns 8 i to 8 i + 7 where all are there.
template <int KIND>
WITH_AVX2 inline __m256 load8_avx2(const void* from, int i) {
    const __m128i* half = (const __m128i*)from + i;
    if (KIND == FP32) return _mm256_loadu_ps((const float*)from + 8 * i);
    if (KIND == INT8) {
        const __m128i codes = _mm_loadl_epi64((const __m128i*)((const char*)from + 8 * i));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
    if (KIND == FP16) return _mm256_cvtph_ps(_mm_loadu_si128(half));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(half)), 16));
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

// expand32_avx2 in two registers. bf16: the 16 of even number, then those of odd number.
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
