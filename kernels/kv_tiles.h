// The layout of a tile of coded keys and values, see numerics/kv_tiles.py, for the CPU's kernels that read and write
// tiles.
#pragma once

#include "cpu.h"

constexpr int64_t TILE = 16;  // tokens
constexpr int64_t WIDEST = 256, MOST_SLOTS = 4;
constexpr int64_t FP8 = 8;  // bits of a code that is e4m3

// TileFormat, as operators take it.
struct Format {
    int64_t width, bits, key_scale, value_offset, key_slots, value_slots, turned_keys, turned_values, rotary;

    int64_t fragments() const { return width / 16; }
    int64_t words() const { return fragments() * bits / 2; }
    int64_t run() const { return words() % 4 == 0 ? 4 : words() % 2 == 0 ? 2 : 1; }
    int64_t parameters() const { return key_scale + 1 + value_offset; }
    int64_t parameters_at() const { return 128 * words(); }
    int64_t key_missing_at() const { return parameters_at() + 2 * TILE * parameters(); }
    int64_t key_channels_at() const { return key_missing_at() + 2 * TILE * key_slots; }
    int64_t value_missing_at() const { return key_channels_at() + TILE * key_slots; }
    int64_t value_channels_at() const { return value_missing_at() + 2 * TILE * value_slots; }
    int64_t record() const { return value_channels_at() + TILE * value_slots; }

    int64_t word_at(int64_t word, int64_t lane) const {
        return ((word / run() * 32 + lane) * run() + word % run()) * 4;
    }
    int64_t parameter_at(int64_t token, int64_t index) const {
        return parameters_at() + 2 * ((token % 8 * 2 + token / 8) * parameters() + index);
    }

    // The two channels of a pair of the rotary embedding; of one further, one further.
    int64_t first_of(int64_t pair) const { return pair < rotary / 2 ? pair : pair + rotary / 2; }
    int64_t second_of(int64_t pair) const { return pair < rotary / 2 ? pair + rotary / 2 : pair + width / 2; }
    // The inverse: of a channel its pair, by `second` whether it is the second one.
    int64_t pair_of(int64_t channel, bool& second) const {
        const bool inside = channel < rotary;
        const int64_t from = inside ? channel : channel - rotary, half = (inside ? rotary : width - rotary) / 2;
        second = from >= half;
        return from - (second ? half : 0) + (inside ? 0 : rotary / 2);
    }
};

inline float half_at(const uint8_t* from) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return half_to_float(bits);
}

// Times an orthonormal Hadamard matrix, in blocks of the largest power of two; see numerics/hadamard.py.
template <typename T>
void hadamard(T* x, int64_t width) {
    const int64_t block = width & -width;
    double norm = 1;
    for (int64_t apart = 1; apart < block; apart *= 2) {
        norm *= 0.70710678118654752440;
        for (int64_t i = 0; i < width; i += 2 * apart)
            for (int64_t j = i; j < i + apart; j++) {
                const T one = x[j], two = x[j + apart];
                x[j] = one + two;
                x[j + apart] = one - two;
            }
    }
    for (int64_t i = 0; i < width; i++) x[i] = (T)(x[i] * norm);
}
