// What every kernel shares; put in front of each source before it is compiled.
//
// Macros set by the launcher: HALF (1: fp16, 0: bf16 weights and activations) and PDL (1: programmatic
// dependent launch; the kernel may start while the one before it still runs, and must read nothing but
// weights before wait_for_input()).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define ALL 0xffffffffu

// The two 16-bit floats of a word, as fp32.
__device__ __forceinline__ float low(u32 word) {
#if HALF
    float x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(word));
    return x;
#else
    return __uint_as_float(word << 16);
#endif
}

__device__ __forceinline__ float high(u32 word) {
#if HALF
    float x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(word));
    return x;
#else
    return __uint_as_float(word & 0xffff0000u);
#endif
}

__device__ __forceinline__ float widen(u16 bits) { return low((u32)bits); }

__device__ __forceinline__ u16 narrow(float x) {
    u16 bits;
#if HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#endif
    return bits;
}

// Rows of a gate and of an up projection lie in turns, 8 and 8; of a pair only silu(gate) · up is stored: in place of
// row 16 i + j, where j < 8, as row 8 i + j.
__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1 + __expf(-gate)) * up; }

__device__ __forceinline__ int swiglu_row(int row) { return row / 16 * 8 + row % 8; }

// 16 bytes of weights, or zeros. They are read once: not worth a place in L1.
__device__ __forceinline__ uint4 load_weights(const uint4* from, bool wanted) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0;"
        " mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        " @p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(from), "r"((u32)wanted));
    return v;
}

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

// Wait for the kernel before: from here on its results may be read, and results may be written.
__device__ __forceinline__ void wait_for_input() {
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the kernel behind this one start, and load its weights while this one still works.
__device__ __forceinline__ void let_next_start() {
#if PDL
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
