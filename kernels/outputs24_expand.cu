// Some rows of a matrix that is 2:4 along its outputs, dense and input-major: for products cuBLAS does.
//
// values: [stored][spans] of 16 bytes, keep: [stored][spans], index: [stored] or null: see gated.cu, FORMAT 2.
// panel: [inputs][16 * count] 16-bit words, zeros; gets the spans from `first` on.

extern "C" __global__ void __launch_bounds__(256)
outputs24_expand(const uint4* __restrict__ values, const u16* __restrict__ keep,
                 const u16* __restrict__ index, uint4* __restrict__ panel, int stored, int spans, int first,
                 int count) {
    const int work = blockIdx.x * 256 + threadIdx.x;
    const int column = work / count, span = work % count;
    if (column >= stored) return;
    const u32 input = index ? index[column] : column;
    // An input with two columns is written by the first of them, whole.
    if (index && column && index[column - 1] == input) return;
    u32 out[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int c = column; c < stored && (index ? index[c] : c) == input; c++) {
        const size_t at = (size_t)c * spans + first + span;
        const uint4 w = values[at];
        const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int group = 0; group < 4; group++) {
            const u32 bits = keep[at] >> (4 * group) & 15;
            const u32 one = words[group] & 0xffff, two = words[group] >> 16;
            const u32 second = bits & 1 ? two : one, third = bits & 8 ? one : two;
            out[2 * group] |= (bits & 1 ? one : 0) | (bits & 2 ? second << 16 : 0);
            out[2 * group + 1] |= (bits & 4 ? third : 0) | (bits & 8 ? two << 16 : 0);
        }
    }
    uint4* to = panel + ((size_t)input * count + span) * 2;
    to[0] = make_uint4(out[0], out[1], out[2], out[3]);
    to[1] = make_uint4(out[4], out[5], out[6], out[7]);
}
