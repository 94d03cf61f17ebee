// What a single new token needs between products on a CPU: its rotation, and attention over the cache as it lies.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu.h"

namespace {

constexpr int64_t FEW = 1 << 16;  // multiplications that are not worth a second thread

// The sum of products of a vector in fp32 with one of KIND, and adding one of KIND times a number to one in fp32.
template <int KIND>
float dot_portable(const float* a, const void* b, int64_t count) {
    float parts[8] = {};
    for (int64_t i = 0; i < count; i++) parts[i % 8] += a[i] * value_at(b, i, KIND);
    float sum = 0;
    for (const float part : parts) sum += part;
    return sum;
}

template <int KIND>
void add_portable(float* to, const void* from, float factor, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += factor * value_at(from, i, KIND);
}

#if X86

template <int KIND>
WITH_AVX2 inline __m256 load8(const void* from, int64_t i) {
    if (KIND == FP32) return _mm256_loadu_ps((const float*)from + i);
    const __m128i half = _mm_loadu_si128((const __m128i*)((const uint16_t*)from + i));
    if (KIND == FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <int KIND>
WITH_AVX2 float dot_avx2(const float* a, const void* b, int64_t count) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int k = 0; k < 2; k++)
            sum[k] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * k), load8<KIND>(b, i + 8 * k), sum[k]);
    float rest = 0;
    for (; i < count; i++) rest += a[i] * value_at(b, i, KIND);
    return rest + total(_mm256_add_ps(sum[0], sum[1]));
}

template <int KIND>
WITH_AVX2 void add_avx2(float* to, const void* from, float factor, int64_t count) {
    const __m256 given = _mm256_set1_ps(factor);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_fmadd_ps(load8<KIND>(from, i), given, _mm256_loadu_ps(to + i)));
    for (; i < count; i++) to[i] += factor * value_at(from, i, KIND);
}

#endif

// One head of one sequence. seen: of every token, or null; what is hidden is not read. y: [width].
template <int KIND>
void attend_one(const float* q, const char* k, int64_t k_step, const char* v, int64_t v_step, const uint8_t* seen,
                int64_t length, int64_t width, float scale, bool fast, float* y) {
    auto dot = dot_portable<KIND>;
    auto add = add_portable<KIND>;
#if X86
    if (fast) dot = dot_avx2<KIND>, add = add_avx2<KIND>;
#else
    (void)fast;
#endif
    std::vector<float> scores(length);
    float most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < length; i++) {
        if (seen && !seen[i]) continue;
        scores[i] = scale * dot(q, k + i * k_step, width);
        most = std::max(most, scores[i]);
    }
    for (int64_t c = 0; c < width; c++) y[c] = 0;
    for (int64_t i = 0; i < length; i++) {
        if (seen && !seen[i]) continue;
        const float share = std::exp(scores[i] - most);
        sum += share;
        add(y, v + i * v_step, share, width);
    }
    // Where nothing is seen, nothing comes out.
    for (int64_t c = 0; c < width && sum != 0; c++) y[c] /= sum;
}

}  // namespace

extern "C" {

// q: [batch][heads][width] fp32; k, v: [batch][kv_heads][length][width] of a kind, each width in one piece, strides in
// elements: of a sequence, a head and a token; heads share kv heads in runs. seen: [batch][length], with a stride, or
// null. y: [batch][heads][width] fp32.
void llmsqueeze_attend(const float* q, const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                       const uint8_t* seen, int64_t seen_stride, float* y, int64_t batch, int64_t heads,
                       int64_t kv_heads, int64_t length, int64_t width, float scale, int kind, int isa, int threads) {
    const int64_t size = size_of(kind);
    const auto one = kind == BF16 ? attend_one<BF16> : kind == FP16 ? attend_one<FP16> : attend_one<FP32>;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (batch * heads * length * width > FEW)
    for (int64_t i = 0; i < batch * heads; i++) {
        const int64_t sequence = i / heads, shared = i % heads / (heads / kv_heads);
        one(q + i * width, (const char*)k + (sequence * k_strides[0] + shared * k_strides[1]) * size, k_strides[2] * size,
            (const char*)v + (sequence * v_strides[0] + shared * v_strides[1]) * size, v_strides[2] * size,
            seen ? seen + sequence * seen_stride : nullptr, length, width, scale, isa != PORTABLE, y + i * width);
    }
}

// y = x · cos + half-turned x · sin, as rotary embeddings turn queries and keys. x: [tokens][heads][width] with a stride
// of tokens; cos, sin: [turns][width], of token t row t % turns; y: [tokens][heads][width]. All fp32.
void llmsqueeze_rotate(const float* x, int64_t stride, const float* cos, const float* sin, int64_t turns, float* y,
                       int64_t tokens, int64_t heads, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t % turns * width, *s = sin + t % turns * width;
        for (int64_t h = 0; h < heads; h++) {
            const float* from = x + t * stride + h * width;
            float* to = y + (t * heads + h) * width;
            for (int64_t i = 0; i < half; i++) {
                to[i] = from[i] * c[i] - from[half + i] * s[i];
                to[half + i] = from[half + i] * c[half + i] + from[i] * s[half + i];
            }
        }
    }
}
}
