// The tile registers of AMX on memory and loops: eight of 16 rows of 64 bytes for each thread. Included where
// csrc/cpu/simd_amx-inl.h has them.

struct EmulatedTile {
  union {
    float sums[16][16];
    uint16_t halves[16][32];
    int32_t integers[16][16];
    int8_t bytes[16][64];
  };
};
inline thread_local EmulatedTile g_tiles[8];

template <int kTile>
ATTNKIT_EMULATED void tile_load(const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(g_tiles[kTile].sums[r], static_cast<const char*>(p) + r * stride, 64);
}
template <int kTile>
ATTNKIT_EMULATED void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(p) + r * stride, g_tiles[kTile].sums[r], 64);
}
template <int kTile>
ATTNKIT_EMULATED void tile_zero() {
  g_tiles[kTile] = {};
}
// Even and odd elements are summed apart, and then joined to what is there.
template <int kSum, int kLeft, int kRight>
inline __attribute__((noinline)) void tile_multiply() {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < 16; ++k) {
        const uint16_t *a = g_tiles[kLeft].halves[m] + 2 * k, *b = g_tiles[kRight].halves[k] + 2 * n;
        even = __builtin_fmaf(widened(a[0]), widened(b[0]), even);
        odd = __builtin_fmaf(widened(a[1]), widened(b[1]), odd);
      }
      g_tiles[kSum].sums[m][n] += even + odd;
    }
}
template <int kSum, int kLeft, int kRight>
inline __attribute__((noinline)) void tile_multiply_bytes() {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n)
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 4; ++i)
          g_tiles[kSum].integers[m][n] += g_tiles[kLeft].bytes[m][4 * k + i] * g_tiles[kRight].bytes[k][4 * n + i];
}
ATTNKIT_EMULATED void tile_begin(const void*) {}
ATTNKIT_EMULATED void tile_end() {}
