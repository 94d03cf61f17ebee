// The layout of a tile of coded keys and values, see numerics/kv_tiles.py; put in front of the kernels that read and
// write tiles.
//
// Macros: D; BITS of a code, 8 for e4m3; CHANNELS, keys are by channel and have no scale of their own; OFFSETS, of
// values; KEY_SLOTS, VALUE_SLOTS, outliers of a token.

#define FRAGMENTS (D / 16)
#define WORDS (FRAGMENTS * BITS / 2)
#define RUN (WORDS % 4 == 0 ? 4 : WORDS % 2 == 0 ? 2 : 1)
#define PARAMETERS (CHANNELS ? 1 + OFFSETS : 2)
#define PARAMETERS_AT (128 * WORDS)
#define KEY_MISSING_AT (PARAMETERS_AT + 32 * PARAMETERS)
#define KEY_CHANNEL_AT (KEY_MISSING_AT + 32 * KEY_SLOTS)
#define VALUE_MISSING_AT (KEY_CHANNEL_AT + 16 * KEY_SLOTS)
#define VALUE_CHANNEL_AT (VALUE_MISSING_AT + 32 * VALUE_SLOTS)
#define RECORD (VALUE_CHANNEL_AT + 16 * VALUE_SLOTS)

__device__ __forceinline__ u16 half_of(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
