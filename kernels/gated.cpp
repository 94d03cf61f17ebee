// y = W x on a CPU that reads only the inputs which exceed their thresholds: W lies input after input.
//
// The inputs that count are listed first. Every thread takes a span of outputs, keeps its sums in the first cache, and
// adds a few inputs to them at a time. bf16 becomes fp32 by its place in a word: within a piece of outputs the sums of
// those of even number come first, then those of odd number, and are put in order at the end.

#include <cmath>
#include <vector>

#include "cpu.h"

namespace {

constexpr int TOKENS = 2;           // at most
constexpr int64_t SPAN = 4096;      // outputs whose sums a thread keeps, at most
constexpr int64_t PIECE = 32;       // outputs that are computed together
constexpr int MOST = 4;             // inputs that are added together, at most

// The inputs that count, and what they are: 0 where only the other token's counts.
struct Kept {
    std::vector<int32_t> inputs;
    std::vector<float> x[TOKENS];
};

Kept keep(const float* x, const float* threshold, int64_t thresholds, int64_t columns, int64_t tokens) {
    Kept kept;
    kept.inputs.reserve(columns);
    for (int64_t t = 0; t < tokens; t++) kept.x[t].reserve(columns);
    for (int64_t c = 0; c < columns; c++) {
        const float limit = threshold[thresholds == 1 ? 0 : c];
        float value[TOKENS];
        bool counts = false;
        for (int64_t t = 0; t < tokens; t++) {
            const float given = x[t * columns + c];
            // What is no number shows, also where it is dropped.
            value[t] = std::fabs(given) > limit ? given : given * 0;
            counts |= !(value[t] == 0);
        }
        if (!counts) continue;
        kept.inputs.push_back((int32_t)c);
        for (int64_t t = 0; t < tokens; t++) kept.x[t].push_back(value[t]);
    }
    return kept;
}

// Adds COUNT inputs to the sums of a span. from: where their weights begin; x: [token][count] what they are;
// sums: [token][SPAN]; outputs: divisible by PIECE. ahead: weights that come next, or null.
using Add = void (*)(const void* const* from, const void* const* ahead, const float (*x)[MOST], float* sums,
                     int64_t outputs);

template <int KIND, int COUNT>
void add_portable(const void* const* from, const void* const*, const float (*x)[MOST], float* sums, int64_t outputs,
                  int tokens) {
    for (int64_t o = 0; o < outputs; o++)
        for (int i = 0; i < COUNT; i++) {
            const float w = value_at(from[i], o, KIND);
            for (int t = 0; t < tokens; t++) sums[t * SPAN + o] += w * x[t][i];
        }
}

template <int KIND, int COUNT, int T>
void add_plain(const void* const* from, const void* const* ahead, const float (*x)[MOST], float* sums,
               int64_t outputs) {
    add_portable<KIND, COUNT>(from, ahead, x, sums, outputs, T);
}

#if X86

template <int KIND>
WITH_AVX2 inline void load16(const char* from, __m256& a, __m256& b) {
    if (KIND == BF16) {
        const __m256i v = _mm256_loadu_si256((const __m256i*)from);
        a = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
        b = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000)));
    } else if (KIND == FP16) {
        a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
        b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from + 1));
    } else if (KIND == FP32) {
        a = _mm256_loadu_ps((const float*)from);
        b = _mm256_loadu_ps((const float*)from + 8);
    } else {
        a = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
        b = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8))));
    }
}

template <int KIND, int COUNT, int T>
WITH_AVX2 void add_avx2(const void* const* from, const void* const* ahead, const float (*x)[MOST], float* sums,
                        int64_t outputs) {
    constexpr int64_t SIZE = KIND == FP32 ? 4 : KIND == INT8 ? 1 : 2;
    for (int64_t o = 0; o < outputs; o += 16) {
        __m256 a[T], b[T];
        for (int t = 0; t < T; t++) {
            a[t] = _mm256_loadu_ps(sums + t * SPAN + o);
            b[t] = _mm256_loadu_ps(sums + t * SPAN + o + 8);
        }
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) {
            if (ahead) _mm_prefetch((const char*)ahead[i] + o * SIZE, _MM_HINT_T0);
            __m256 left, right;
            load16<KIND>((const char*)from[i] + o * SIZE, left, right);
            for (int t = 0; t < T; t++) {
                const __m256 given = _mm256_broadcast_ss(&x[t][i]);
                a[t] = _mm256_fmadd_ps(left, given, a[t]);
                b[t] = _mm256_fmadd_ps(right, given, b[t]);
            }
        }
        for (int t = 0; t < T; t++) {
            _mm256_storeu_ps(sums + t * SPAN + o, a[t]);
            _mm256_storeu_ps(sums + t * SPAN + o + 8, b[t]);
        }
    }
}

template <int KIND>
WITH_AVX512 inline void load32(const char* from, __m512& a, __m512& b) {
    if (KIND == BF16) {
        const __m512i v = _mm512_loadu_si512(from);
        a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
        b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
    } else if (KIND == FP16) {
        a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
        b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from + 1));
    } else if (KIND == FP32) {
        a = _mm512_loadu_ps(from);
        b = _mm512_loadu_ps((const float*)from + 16);
    } else {
        a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
        b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from + 1)));
    }
}

template <int KIND, int COUNT, int T>
WITH_AVX512 void add_avx512(const void* const* from, const void* const* ahead, const float (*x)[MOST], float* sums,
                            int64_t outputs) {
    constexpr int64_t SIZE = KIND == FP32 ? 4 : KIND == INT8 ? 1 : 2;
    for (int64_t o = 0; o < outputs; o += 32) {
        __m512 a[T], b[T];
        for (int t = 0; t < T; t++) {
            a[t] = _mm512_loadu_ps(sums + t * SPAN + o);
            b[t] = _mm512_loadu_ps(sums + t * SPAN + o + 16);
        }
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) {
            if (ahead) _mm_prefetch((const char*)ahead[i] + o * SIZE, _MM_HINT_T0);
            __m512 left, right;
            load32<KIND>((const char*)from[i] + o * SIZE, left, right);
            for (int t = 0; t < T; t++) {
                const __m512 given = _mm512_set1_ps(x[t][i]);
                a[t] = _mm512_fmadd_ps(left, given, a[t]);
                b[t] = _mm512_fmadd_ps(right, given, b[t]);
            }
        }
        for (int t = 0; t < T; t++) {
            _mm512_storeu_ps(sums + t * SPAN + o, a[t]);
            _mm512_storeu_ps(sums + t * SPAN + o + 16, b[t]);
        }
    }
}

#endif

// The same for inputs of which a mask says where their weights are not zero. from: what each has of those; mask: of
// this span; both move on.
using AddMasked = void (*)(const void* const* from, const uint8_t* const* mask, const int64_t* ahead,
                           const float (*x)[MOST], float* sums, int64_t outputs);

template <int KIND, int COUNT, int T>
void masked_portable(const void* const* from, const uint8_t* const* mask, const int64_t*, const float (*x)[MOST],
                     float* sums, int64_t outputs) {
    int64_t next[COUNT] = {};
    for (int64_t o = 0; o < outputs; o++)
        for (int i = 0; i < COUNT; i++) {
            const float w = mask[i][o / 8] >> (o % 8) & 1 ? value_at(from[i], next[i]++, KIND) : 0;
            for (int t = 0; t < T; t++) sums[t * SPAN + o] += w * x[t][i];
        }
}

#if X86

template <int KIND, int T>
WITH_AVX2 inline const void* masked32(const void* from, const uint8_t* mask, const float (*x)[MOST], int i,
                                      int64_t ahead, __m256 (&sum)[T][4]) {
    _mm_prefetch((const char*)from + ahead, _MM_HINT_T0);
    uint32_t m;
    std::memcpy(&m, mask, 4);
    __m256 w[4];
    from = expand32_avx2<KIND>(from, m, w);
    for (int t = 0; t < T; t++) {
        const __m256 given = _mm256_broadcast_ss(&x[t][i]);
        sum[t][0] = _mm256_fmadd_ps(w[0], given, sum[t][0]);
        sum[t][1] = _mm256_fmadd_ps(w[1], given, sum[t][1]);
        sum[t][2] = _mm256_fmadd_ps(w[2], given, sum[t][2]);
        sum[t][3] = _mm256_fmadd_ps(w[3], given, sum[t][3]);
    }
    return from;
}

// Pointers by name, not in an array: they have to stay in registers.
template <int KIND, int COUNT, int T>
WITH_AVX2 void masked_avx2(const void* const* from, const uint8_t* const* mask, const int64_t* ahead,
                           const float (*x)[MOST], float* sums, int64_t outputs) {
    const void *from0 = from[0], *from1 = nullptr, *from2 = nullptr, *from3 = nullptr;
    const uint8_t *mask0 = mask[0], *mask1 = nullptr, *mask2 = nullptr, *mask3 = nullptr;
    if (COUNT == MOST) {
        from1 = from[1], from2 = from[2], from3 = from[3];
        mask1 = mask[1], mask2 = mask[2], mask3 = mask[3];
    }
    for (int64_t o = 0; o < outputs; o += 32) {
        __m256 sum[T][4];
        for (int t = 0; t < T; t++)
            for (int k = 0; k < 4; k++) sum[t][k] = _mm256_loadu_ps(sums + t * SPAN + o + 8 * k);
        from0 = masked32<KIND, T>(from0, mask0 + o / 8, x, 0, ahead[0], sum);
        if (COUNT == MOST) {
            from1 = masked32<KIND, T>(from1, mask1 + o / 8, x, 1, ahead[1], sum);
            from2 = masked32<KIND, T>(from2, mask2 + o / 8, x, 2, ahead[2], sum);
            from3 = masked32<KIND, T>(from3, mask3 + o / 8, x, 3, ahead[3], sum);
        }
        for (int t = 0; t < T; t++)
            for (int k = 0; k < 4; k++) _mm256_storeu_ps(sums + t * SPAN + o + 8 * k, sum[t][k]);
    }
}

template <int KIND, int T>
WITH_AVX512 inline const void* masked32(const void* from, const uint8_t* mask, const float (*x)[MOST], int i,
                                        int64_t ahead, __m512 (&sum)[T][2]) {
    _mm_prefetch((const char*)from + ahead, _MM_HINT_T0);
    uint32_t m;
    std::memcpy(&m, mask, 4);
    __m512 w[2];
    from = expand32_avx512<KIND>(from, m, w);
    for (int t = 0; t < T; t++) {
        const __m512 given = _mm512_set1_ps(x[t][i]);
        sum[t][0] = _mm512_fmadd_ps(w[0], given, sum[t][0]);
        sum[t][1] = _mm512_fmadd_ps(w[1], given, sum[t][1]);
    }
    return from;
}

template <int KIND, int COUNT, int T>
WITH_AVX512 void masked_avx512(const void* const* from, const uint8_t* const* mask, const int64_t* ahead,
                               const float (*x)[MOST], float* sums, int64_t outputs) {
    const void *from0 = from[0], *from1 = nullptr, *from2 = nullptr, *from3 = nullptr;
    const uint8_t *mask0 = mask[0], *mask1 = nullptr, *mask2 = nullptr, *mask3 = nullptr;
    if (COUNT == MOST) {
        from1 = from[1], from2 = from[2], from3 = from[3];
        mask1 = mask[1], mask2 = mask[2], mask3 = mask[3];
    }
    for (int64_t o = 0; o < outputs; o += 32) {
        __m512 sum[T][2];
        for (int t = 0; t < T; t++)
            for (int k = 0; k < 2; k++) sum[t][k] = _mm512_loadu_ps(sums + t * SPAN + o + 16 * k);
        from0 = masked32<KIND, T>(from0, mask0 + o / 8, x, 0, ahead[0], sum);
        if (COUNT == MOST) {
            from1 = masked32<KIND, T>(from1, mask1 + o / 8, x, 1, ahead[1], sum);
            from2 = masked32<KIND, T>(from2, mask2 + o / 8, x, 2, ahead[2], sum);
            from3 = masked32<KIND, T>(from3, mask3 + o / 8, x, 3, ahead[3], sum);
        }
        for (int t = 0; t < T; t++)
            for (int k = 0; k < 2; k++) _mm512_storeu_ps(sums + t * SPAN + o + 16 * k, sum[t][k]);
    }
}

#endif

template <int KIND, int COUNT, int T>
AddMasked masked_of(int isa) {
#if X86
    if (isa >= AVX512) return masked_avx512<KIND, COUNT, T>;
    if (isa == AVX2) return masked_avx2<KIND, COUNT, T>;
#else
    (void)isa;
#endif
    return masked_portable<KIND, COUNT, T>;
}

template <int KIND>
AddMasked masked_kind(int isa, bool many, int64_t tokens) {
    if (tokens == 1) return many ? masked_of<KIND, MOST, 1>(isa) : masked_of<KIND, 1, 1>(isa);
    return many ? masked_of<KIND, MOST, 2>(isa) : masked_of<KIND, 1, 2>(isa);
}

AddMasked masked_for(int kind, int isa, bool many, int64_t tokens) {
    return kind == BF16   ? masked_kind<BF16>(isa, many, tokens)
           : kind == FP16 ? masked_kind<FP16>(isa, many, tokens)
                          : masked_kind<FP32>(isa, many, tokens);
}

template <int KIND, int COUNT, int T>
Add add_of(int isa) {
#if X86
    if (isa >= AVX512) return add_avx512<KIND, COUNT, T>;
    if (isa == AVX2) return add_avx2<KIND, COUNT, T>;
#else
    (void)isa;
#endif
    return add_plain<KIND, COUNT, T>;
}

template <int KIND>
Add add_kind(int isa, bool many, int64_t tokens) {
    if (tokens == 1) return many ? add_of<KIND, MOST, 1>(isa) : add_of<KIND, 1, 1>(isa);
    return many ? add_of<KIND, MOST, 2>(isa) : add_of<KIND, 1, 2>(isa);
}

Add add_for(int kind, int isa, bool many, int64_t tokens) {
    switch (kind) {
        case BF16: return add_kind<BF16>(isa, many, tokens);
        case FP16: return add_kind<FP16>(isa, many, tokens);
        case FP32: return add_kind<FP32>(isa, many, tokens);
        default: return add_kind<INT8>(isa, many, tokens);
    }
}

// Where in a piece of so many outputs the sum of one is.
inline int64_t place(int64_t output, int64_t piece, bool by_turns) {
    if (!by_turns) return output;
    const int64_t in = output % piece;
    return output - in + in % 2 * (piece / 2) + in / 2;
}

}  // namespace

extern "C" {

// weight: of input c at weight + c · stride, in elements; kind: BF16, FP16, FP32 or INT8. threshold: [columns] or, for
// thresholds 1, of all. scale, bias: [rows] fp32 or null; what is kept · scale + bias is y. x: [tokens][columns],
// y: [tokens][rows] fp32; tokens: 1 or 2.
void llmsqueeze_gated_linear(const void* weight, int64_t stride, const float* threshold, int64_t thresholds,
                             const float* scale, const float* bias, const float* x, float* y, int64_t rows,
                             int64_t columns, int64_t tokens, int kind, int isa, int threads) {
    const Kept kept = keep(x, threshold, thresholds, columns, tokens);
    const int64_t count = (int64_t)kept.inputs.size(), size = size_of(kind);
    const int64_t each = (rows + threads - 1) / threads;
    const int64_t span = each >= SPAN ? SPAN : (each + PIECE - 1) / PIECE * PIECE;
    const int64_t spans = (rows + span - 1) / span, piece = isa >= AVX512 ? 32 : 16;
    const bool by_turns = kind == BF16 && isa != PORTABLE;
    const Add many = add_for(kind, isa, true, tokens), one = add_for(kind, isa, false, tokens);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t s = 0; s < spans; s++) {
        const int64_t begin = s * span, end = begin + span < rows ? begin + span : rows;
        const int64_t whole = (end - begin) / PIECE * PIECE;
        alignas(64) float sums[TOKENS * SPAN];
        for (int64_t t = 0; t < tokens; t++) std::memset(sums + t * SPAN, 0, span * sizeof(float));
        const auto at = [&](int64_t i) {
            return (const void*)((const char*)weight + (kept.inputs[i] * stride + begin) * size);
        };
        int64_t i = 0;
        for (int64_t group = MOST; i < count; i += group) {
            if (count - i < MOST) group = 1;
            const void *from[MOST], *ahead[MOST];
            float given[TOKENS][MOST];
            for (int64_t k = 0; k < group; k++) {
                from[k] = at(i + k);
                ahead[k] = i + group + k < count ? at(i + group + k) : from[k];
                for (int64_t t = 0; t < tokens; t++) given[t][k] = kept.x[t][i + k];
            }
            (group == MOST ? many : one)(from, ahead, given, sums, whole);
            // What no piece is filled by: nothing is read behind the last weight.
            for (int64_t o = whole; o < end - begin; o++)
                for (int64_t k = 0; k < group; k++) {
                    const float w = value_at(from[k], o, kind);
                    for (int64_t t = 0; t < tokens; t++) sums[t * SPAN + o] += w * given[t][k];
                }
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t o = 0; o < end - begin; o++) {
                const float sum = sums[t * SPAN + (o < whole ? place(o, piece, by_turns) : o)];
                const int64_t row = begin + o;
                y[t * rows + row] = (scale ? sum * scale[row] : sum) + (bias ? bias[row] : 0);
            }
    }
}

// W cut into panels of so many outputs, input after input in each: mask [panels · columns][panel / 8] bytes, what it
// says is there in values, offsets [panels · columns + 1]. panel: divisible by 32, at most 4096. The rest as above.
void llmsqueeze_gated_bitmask_linear(const void* values, const uint8_t* mask, const int32_t* offsets, int64_t panel,
                                     const float* threshold, int64_t thresholds, const float* bias, const float* x,
                                     float* y, int64_t rows, int64_t columns, int64_t tokens, int kind, int isa,
                                     int threads) {
    const Kept kept = keep(x, threshold, thresholds, columns, tokens);
    const int64_t count = (int64_t)kept.inputs.size(), size = size_of(kind);
    const int64_t panels = (rows + panel - 1) / panel, all = offsets[panels * columns];
    const bool by_turns = kind == BF16 && isa >= AVX512;
    const AddMasked many = masked_for(kind, isa, true, tokens), one = masked_for(kind, isa, false, tokens);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t p = 0; p < panels; p++) {
        alignas(64) float sums[TOKENS * SPAN];
        for (int64_t t = 0; t < tokens; t++) std::memset(sums + t * SPAN, 0, panel * sizeof(float));
        std::vector<char> copy[MOST];
        int64_t i = 0;
        for (int64_t group = MOST; i < count; i += group) {
            if (count - i < MOST) group = 1;
            const void* from[MOST];
            const uint8_t* here[MOST];
            int64_t ahead[MOST];
            float given[TOKENS][MOST];
            for (int64_t k = 0; k < group; k++) {
                const int64_t at = p * columns + kept.inputs[i + k], begin = offsets[at], end = offsets[at + 1];
                here[k] = mask + at * (panel / 8);
                from[k] = (const char*)values + begin * size;
                ahead[k] = 0;
                if (i + group + k < count) {
                    const int64_t next = p * columns + kept.inputs[i + group + k];
                    ahead[k] = (offsets[next] - begin) * size;
                    for (int64_t byte = 0; byte < panel / 8; byte += 64)
                        __builtin_prefetch(mask + next * (panel / 8) + byte);
                }
                if (end + MARGIN > all) {  // nothing is read behind the last value of all
                    copy[k].assign((end - begin + MARGIN) * size, 0);
                    std::memcpy(copy[k].data(), from[k], (end - begin) * size);
                    from[k] = copy[k].data();
                }
                for (int64_t t = 0; t < tokens; t++) given[t][k] = kept.x[t][i + k];
            }
            (group == MOST ? many : one)(from, here, ahead, given, sums, panel);
        }
        const int64_t begin = p * panel, end = begin + panel < rows ? begin + panel : rows;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t row = begin; row < end; row++)
                y[t * rows + row] = sums[t * SPAN + place(row - begin, 32, by_turns)] + (bias ? bias[row] : 0);
    }
}
}
