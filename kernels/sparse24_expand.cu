// The dense rows of a 2:4 stream (see sparse24.cu): y [rows, columns] of the bands from `band` on.
// A warp expands a chunk of a band.

extern "C" __global__ void __launch_bounds__(256)
sparse24_expand(const uint4* __restrict__ stream, u16* __restrict__ y, int rows, int columns,
                int chunks, int band) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int work = blockIdx.x * 8 + (threadIdx.x >> 5), local = work / chunks, chunk = work % chunks;
    if (local * 16 >= rows) return;
    const uint4* from = stream + ((size_t)(band + local) * chunks + chunk) * 288;
#pragma unroll
    for (int unit = 0; unit < 8; unit++) {
        const uint4 v = from[unit * 32 + lane];
        const u32 values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const int half = part >> 1, row = local * 16 + g + 8 * (part & 1);
            const u32 word = ((const u32*)(from + 256 + 4 * g + 2 * (unit & 1) + half))[unit >> 1];
            const u32 places = word >> (16 * (part & 1) + 4 * t) & 15;
            const int column = chunk * 256 + unit * 32 + half * 16 + t * 4;
            // Two places are never the same.
            const unsigned long long dense =
                (unsigned long long)(values[part] & 0xffff) << (16 * (places & 3)) |
                (unsigned long long)(values[part] >> 16) << (16 * (places >> 2));
            if (row < rows && column < columns)
                *(unsigned long long*)(y + (size_t)row * columns + column) = dense;
        }
    }
}
