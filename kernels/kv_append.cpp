// Coding one new token's key and value into tiles on a CPU: see numerics/kv_tiles.py for their layout, and
// ops/packed_append.py for what is computed. In fp64 where that is, so that a token is coded as with a whole prompt.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kv_tiles.h"

namespace {

constexpr double TINY = 6.103515625e-05;  // the smallest normal number of fp16
constexpr float FP8_MAX = 448;

uint16_t half_of(double given) {
    const float x = (float)given, one = 0.5f;
    uint32_t bits, unit;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // subnormal: the last place of 0.5 is its unit
        const float sum = std::fabs(x) + one;
        std::memcpy(&bits, &sum, 4);
        std::memcpy(&unit, &one, 4);
        return sign | (bits - unit);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (bits - 0x38000000) >> 13;
}

// Of numbers up to 448.
uint8_t e4m3_of(float x) {
    const float one = 0x1p14f;
    uint32_t bits, unit;
    std::memcpy(&bits, &x, 4);
    const uint8_t sign = bits >> 24 & 0x80;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7f;
    if (bits < 0x3c800000) {  // subnormal
        const float sum = std::fabs(x) + one;
        std::memcpy(&bits, &sum, 4);
        std::memcpy(&unit, &one, 4);
        return sign | (bits - unit);
    }
    bits += 0x7ffff + (bits >> 20 & 1);
    return sign | (bits - 0x3c000000) >> 20;
}

// What codes are chosen from, and what they stand for.
struct Codebook {
    int count;
    double borders[15], values[16];

    // encode: the ones, then the others; null for fp8.
    Codebook(const float* encode, int64_t bits) : count(encode ? 1 << bits : 0) {
        for (int i = 0; i < count; i++) values[i] = encode[count + i];
        for (int i = 0; i + 1 < count; i++) borders[i] = ((double)encode[i + 1] + encode[i]) / 2;
    }

    uint8_t nearest(double x) const {
        int code = 0;
        for (int i = 0; i + 1 < count; i++) code += !(borders[i] >= x);
        return code;
    }
};

// One vector's codes, and the channels of what is kept exactly.
struct Coded {
    uint8_t codes[WIDEST];
    int64_t outliers[WIDEST];
    uint16_t missing[WIDEST];
};

// The channels of the largest numbers, what is no number first; of equals the first ones.
void largest(const double* x, int64_t width, int64_t count, int64_t* found) {
    bool taken[WIDEST] = {};
    for (int64_t i = 0; i < count; i++) {
        int64_t best = -1;
        for (int64_t c = 0; c < width; c++)
            if (!taken[c] && (best < 0 || x[c] > x[best] || (x[c] != x[c] && x[best] == x[best]))) best = c;
        taken[best] = true;
        found[i] = best;
    }
}

// A tile's record, of which one token is written.
struct Record {
    const Format& form;
    uint8_t* at;
    int64_t token;

    void half(int64_t where, uint16_t bits) const { std::memcpy(at + where, &bits, 2); }
    void parameter(int64_t index, uint16_t bits) const { half(form.parameter_at(token, index), bits); }

    void outliers(int64_t missing_at, int64_t channels_at, int64_t slots, const Coded& coded) const {
        for (int64_t i = 0; i < slots; i++) {
            half(missing_at + 2 * (token * slots + i), coded.missing[i]);
            at[channels_at + token * slots + i] = (uint8_t)coded.outliers[i];
        }
    }

    void keys(const Coded& coded) const {
        for (int64_t i = 0; i < form.width; i++) {
            bool second;
            const int64_t pair = form.pair_of(i, second);
            code(pair / 8, token % 8 * 4 + pair % 8 / 2, 2 * second + token / 8, pair % 2, coded.codes[i]);
        }
        outliers(form.key_missing_at(), form.key_channels_at(), form.key_slots, coded);
    }

    void values(const Coded& coded) const {
        for (int64_t i = 0; i < form.width; i++)
            code(form.fragments() + i / 16, i % 8 * 4 + token % 8 / 2, 2 * (token / 8) + i % 16 / 8, token % 2,
                 coded.codes[i]);
        outliers(form.value_missing_at(), form.value_channels_at(), form.value_slots, coded);
    }

   private:
    // Entry `e` of pair `pair` of a lane.
    void code(int64_t fragment, int64_t lane, int64_t pair, int64_t e, int value) const {
        const int64_t bits = form.bits;
        if (bits == FP8) {
            at[form.word_at(2 * fragment + pair / 2, lane) + pair % 2 * 2 + e] = (uint8_t)value;
        } else if (bits == 4) {
            put(fragment, lane, pair, 4 * e, 4, value);
        } else if (bits == 2) {
            put(fragment / 2, lane, pair, fragment % 2 * 4 + 2 * e, 2, value);
        } else if (fragment % 4 < 3) {
            put(fragment / 4 * 3 + fragment % 4, lane, pair, 3 * e, 3, value);
        } else {
            // Bits 3 e to 3 e + 2 of six, of which three words have two each.
            for (int64_t bit = 0; bit < 3; bit++) {
                const int64_t place = 3 * e + bit;
                put(fragment / 4 * 3 + place / 2, lane, pair, 6 + place % 2, 1, value >> bit & 1);
            }
        }
    }

    void put(int64_t word, int64_t lane, int64_t byte, int64_t shift, int64_t bits, int value) const {
        uint8_t& held = at[form.word_at(word, lane) + byte];
        held = (uint8_t)((held & ~(((1 << bits) - 1) << shift)) | value << shift);
    }
};

// Returns the scale, in fp16.
uint16_t code_fp8(const float* x, int64_t width, Coded& coded) {
    float most = 0;
    for (int64_t i = 0; i < width; i++) most = std::fabs(x[i]) > most || x[i] != x[i] ? std::fabs(x[i]) : most;
    uint16_t scale = half_of(most / FP8_MAX);
    if (half_to_float(scale) < TINY) scale = half_of(TINY);
    for (int64_t i = 0; i < width; i++)
        coded.codes[i] = e4m3_of(std::min(std::max(x[i] / half_to_float(scale), -FP8_MAX), FP8_MAX));
    return scale;
}

uint16_t code_turned(const float* x, int64_t width, const Codebook& book, Coded& coded) {
    double turned[WIDEST], power = 0, both = 0, own = 0;
    std::copy(x, x + width, turned);
    hadamard(turned, width);
    for (int64_t i = 0; i < width; i++) power += turned[i] * turned[i];
    power = std::sqrt(power / width);
    if (power < TINY) power = TINY;
    for (int64_t i = 0; i < width; i++) {
        coded.codes[i] = book.nearest(turned[i] / power);
        const double value = book.values[coded.codes[i]];
        both += turned[i] * value;
        own += value * value;
    }
    return half_of(both / own);
}

// How rounding errors of a head are passed on, see numerics/feedback.py: order [D], steps group after group.
struct Feedback {
    const int32_t* order;
    const float* steps;
};

void code_key(const float* x, const float* offset, const float* scale, int64_t width, int64_t slots,
              const Codebook& book, const Feedback* feedback, Coded& coded) {
    double unit[WIDEST];
    for (int64_t i = 0; i < width; i++) {
        unit[i] = ((double)x[i] - offset[i]) / scale[i];
        coded.codes[i] = book.nearest(unit[i]);
    }
    if (slots) {
        double error[WIDEST];
        for (int64_t i = 0; i < width; i++) error[i] = std::fabs(book.values[coded.codes[i]] - unit[i]) * scale[i];
        largest(error, width, slots, coded.outliers);
    }
    if (feedback) {
        double ordered[WIDEST];
        for (int64_t i = 0; i < width; i++) ordered[i] = unit[feedback->order[i]];
        const float* step = feedback->steps;
        for (int64_t begin = 0, end = 2; begin < width; begin = end, end = std::min(2 * end, width)) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t channel = feedback->order[i];
                coded.codes[channel] = book.nearest(ordered[i]);
                const bool exact = std::find(coded.outliers, coded.outliers + slots, channel) != coded.outliers + slots;
                ordered[i] = exact ? 0 : ordered[i] - book.values[coded.codes[channel]];
            }
            double passed[WIDEST] = {};
            for (int64_t i = begin; i < end; i++, step += width - end)
                for (int64_t j = 0; j < width - end; j++) passed[j] += ordered[i] * step[j];
            for (int64_t j = 0; j < width - end; j++) ordered[end + j] += passed[j];
        }
    }
    for (int64_t i = 0; i < slots; i++) {
        const int64_t channel = coded.outliers[i];
        coded.missing[i] = half_of(x[channel] - (book.values[coded.codes[channel]] * scale[channel] + offset[channel]));
    }
}

// Values of all heads of a token, [heads][D]: they share the scale and the offset.
void code_values(const Format& form, std::vector<double>& x, int64_t heads, const Codebook& book, Coded* coded,
                 uint16_t& scale, uint16_t& offset) {
    const int64_t width = form.width, slots = form.value_slots;
    double low = INFINITY, high = -INFINITY;
    for (int64_t h = 0; h < heads; h++) {
        double* own = x.data() + h * width;
        if (form.turned_values) hadamard(own, width);
        if (slots) {
            const auto ends = std::minmax_element(own, own + width);
            const double middle = (*ends.second + *ends.first) / 2;
            double far[WIDEST];
            for (int64_t i = 0; i < width; i++) far[i] = std::fabs(own[i] - middle);
            largest(far, width, slots, coded[h].outliers);
        }
        for (int64_t i = 0; i < width; i++) {
            const int64_t *found = coded[h].outliers, *end = found + slots;
            if (std::find(found, end, i) != end) continue;
            low = own[i] < low || own[i] != own[i] ? own[i] : low;
            high = own[i] > high || own[i] != own[i] ? own[i] : high;
        }
    }
    if (form.turned_values) {
        high = high < -low ? -low : high;
        low = -high;
    }
    offset = half_of((high + low) / 2);
    const double middle = half_to_float(offset);
    scale = half_of(std::max(high - middle, middle - low) * (1 + 0x1p-10));
    if (half_to_float(scale) < TINY) scale = half_of(TINY);
    const double by = half_to_float(scale);
    for (int64_t h = 0; h < heads; h++) {
        const double* own = x.data() + h * width;
        for (int64_t i = 0; i < width; i++) coded[h].codes[i] = book.nearest((own[i] - middle) / by);
        for (int64_t i = 0; i < slots; i++) {
            const int64_t channel = coded[h].outliers[i];
            coded[h].missing[i] = half_of(own[channel] - (book.values[coded[h].codes[channel]] * by + middle));
        }
    }
}

// A key as it was before the rotary embedding.
void turn_back(float* x, const float* table, int64_t position, int64_t half, int64_t width) {
    const float *far = table + (TILE + position / TILE) * width, *near = table + position % TILE * width;
    for (int64_t i = 0; i < half; i++) {
        const float c1 = far[2 * i], s1 = far[2 * i + 1], c2 = near[2 * i], s2 = near[2 * i + 1];
        const float cos = c1 * c2 - s1 * s2, sin = s1 * c2 + c1 * s2;
        const float one = x[i], two = x[half + i];
        x[i] = one * cos + two * sin;
        x[half + i] = two * cos - one * sin;
    }
}

}  // namespace

extern "C" {

// key, value: [batch][heads][D] of a kind; slot: where the token lies, in tile slot / 16
// modulo the capacity. books: [2][2][2^bits], null
// for fp8; offset, scale: [heads][D]; order: [heads][D] and steps: [heads][each], or null; table: of
// coding_angles(), null for keys that are not coded before the rotary embedding. key_sinks, value_sinks:
// [batch][heads][sinks][D] of the same kind.
void llmsqueeze_kv_append(const void* key, const void* value, uint8_t* tiles, int64_t slot, const int32_t* padding,
                          const float* books, const float* offset, const float* scale, const int32_t* order,
                          const float* steps, const float* table, void* key_sinks, void* value_sinks,
                          const int64_t* format, int64_t batch, int64_t heads, int64_t capacity, int64_t sinks,
                          int64_t each, int kind) {
    Format form;
    std::memcpy(&form, format, sizeof(form));
    const int64_t width = form.width, bytes = width * size_of(kind);
    std::vector<Coded> coded(heads);
    std::vector<double> values(heads * width);
    const Codebook of_keys(books, form.bits), of_values(books ? books + (2 << form.bits) : nullptr, form.bits);
    for (int64_t row = 0; row < batch; row++) {
        const int64_t position = slot - (padding ? padding[row] : 0);
        const auto record = [&](int64_t head) {
            const int64_t tile = (row * heads + head) * capacity + slot / TILE % capacity;
            return Record{form, tiles + tile * form.record(), slot % TILE};
        };
        for (int64_t h = 0; h < heads; h++) {
            const int64_t from = (row * heads + h) * width;
            float x[WIDEST];
            for (int64_t i = 0; i < width; i++) x[i] = value_at(key, from + i, kind);
            for (int64_t i = 0; i < width; i++) values[h * width + i] = value_at(value, from + i, kind);
            const Record to = record(h);
            if (!books) {
                to.parameter(0, code_fp8(x, width, coded[h]));
            } else if (form.key_scale) {
                to.parameter(0, code_turned(x, width, of_keys, coded[h]));
            } else {
                if (table) turn_back(x, table, std::max<int64_t>(position, 0), form.rotary / 2, width);
                const Feedback feedback{order + h * width, steps + h * each};
                code_key(x, offset + h * width, scale + h * width, width, form.key_slots, of_keys,
                         order ? &feedback : nullptr, coded[h]);
            }
            to.keys(coded[h]);
        }
        uint16_t by = 0, middle = 0;
        if (books && !form.key_scale) code_values(form, values, heads, of_values, coded.data(), by, middle);
        for (int64_t h = 0; h < heads; h++) {
            const Record to = record(h);
            if (!books || form.key_scale) {
                float x[WIDEST];
                std::copy_n(values.data() + h * width, width, x);
                by = books ? code_turned(x, width, of_values, coded[h]) : code_fp8(x, width, coded[h]);
            }
            to.parameter(form.key_scale, by);
            if (form.value_offset) to.parameter(form.key_scale + 1, middle);
            to.values(coded[h]);
            if (position < 0 || position >= sinks) continue;
            const int64_t from = (row * heads + h) * bytes, there = ((row * heads + h) * sinks + position) * bytes;
            std::memcpy((char*)key_sinks + there, (const char*)key + from, bytes);
            std::memcpy((char*)value_sinks + there, (const char*)value + from, bytes);
        }
    }
}
}
