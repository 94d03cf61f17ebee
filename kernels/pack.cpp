// A dense matrix as a bitmask and its non-zeros, row after row: what bitmask.cpp reads. A weight counts as zero when all
// its bits are.
//
// size: 2, 4 or 8 bytes a weight. mask: [rows][ceil(columns / 8)] bytes, bit j % 8 of byte j / 8 is column j, padding 0.

#include "cpu.h"

namespace {

template <typename Word>
uint8_t present8(const Word* from) {
    unsigned found = 0;
    for (int bit = 0; bit < 8; bit++) found |= (unsigned)(from[bit] != 0) << bit;
    return (uint8_t)found;
}

#if X86
template <>
uint8_t present8<uint16_t>(const uint16_t* from) {
    const __m128i zero = _mm_cmpeq_epi16(_mm_loadu_si128((const __m128i*)from), _mm_setzero_si128());
    return (uint8_t)~_mm_movemask_epi8(_mm_packs_epi16(zero, zero));
}
#endif

// The mask of a row; returns how many bits are set.
template <typename Word>
int32_t find(const Word* from, uint8_t* mask, int64_t columns) {
    int32_t count = 0;
    for (int64_t byte = 0; byte < columns / 8; byte++) {
        mask[byte] = present8(from + byte * 8);
        count += __builtin_popcount(mask[byte]);
    }
    if (columns % 8) {
        Word rest[8] = {};
        std::memcpy(rest, from + columns / 8 * 8, columns % 8 * sizeof(Word));
        mask[columns / 8] = present8(rest);
        count += __builtin_popcount(mask[columns / 8]);
    }
    return count;
}

template <typename Word>
void take(const Word* from, const uint8_t* mask, Word* values, int64_t columns) {
    for (int64_t column = 0; column < columns; column += 64) {
        uint64_t bits = 0;
        const int64_t left = (columns - column + 7) / 8;
        std::memcpy(&bits, mask + column / 8, left < 8 ? left : 8);
        for (; bits; bits &= bits - 1) *values++ = from[column + __builtin_ctzll(bits)];
    }
}

template <typename Word>
void find_all(const void* from, uint8_t* mask, int32_t* counts, int64_t rows, int64_t columns, int threads) {
    const int64_t bytes = (columns + 7) / 8;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        counts[row] = find((const Word*)from + row * columns, mask + row * bytes, columns);
}

template <typename Word>
void take_all(const void* from, const uint8_t* mask, const int32_t* offsets, void* values, int64_t rows, int64_t columns,
              int threads) {
    const int64_t bytes = (columns + 7) / 8;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        take((const Word*)from + row * columns, mask + row * bytes, (Word*)values + offsets[row], columns);
}

}  // namespace

extern "C" {

// counts: [rows], the non-zeros of each.
void llmsqueeze_bitmask_find(const void* from, uint8_t* mask, int32_t* counts, int64_t rows, int64_t columns, int size,
                             int threads) {
    const auto find = size == 2 ? find_all<uint16_t> : size == 4 ? find_all<uint32_t> : find_all<uint64_t>;
    find(from, mask, counts, rows, columns, threads);
}

// offsets: [rows + 1], where rows begin in values.
void llmsqueeze_bitmask_take(const void* from, const uint8_t* mask, const int32_t* offsets, void* values, int64_t rows,
                             int64_t columns, int size, int threads) {
    const auto take = size == 2 ? take_all<uint16_t> : size == 4 ? take_all<uint32_t> : take_all<uint64_t>;
    take(from, mask, offsets, values, rows, columns, threads);
}
}
