// The tile registers of AMX: eight matrices of 16 rows of 64 bytes. A row holds 16 floats, of sums, or 32 bfloat16: of
// the left factor, 32 elements of one row; of the right one, of 16 columns two rows each, as pairs.

inline constexpr int kTileRows = 16, kTileBytes = 64, kTileDepth = 32;  // the depth of a product, in bfloat16

#ifdef ATTNKIT_EMULATE
#include "../emulate/amx.h"
#else
// The compiler's own take the number of a register from the text of the program.
template <int kTile>
ATTNKIT_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
ATTNKIT_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
ATTNKIT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kSum, int kLeft, int kRight>
ATTNKIT_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}
template <int kSum, int kLeft, int kRight>
ATTNKIT_INLINE void tile_multiply_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}
ATTNKIT_INLINE void tile_begin(const void* shapes) { asm volatile("ldtilecfg (%0)" : : "r"(shapes) : "memory"); }
ATTNKIT_INLINE void tile_end() { asm volatile("tilerelease"); }
#endif

// While one lives, this thread has the registers.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.bytes[i] = kTileBytes;
      shapes.rows[i] = kTileRows;
    }
    tile_begin(&shapes);
  }
  ~TileRegisters() { tile_end(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Where a factor's tiles lie: two side by side, rows `stride` bytes apart, and `step` bytes to the next in depth.
struct TileFactor {
  const void *first, *second;
  int64_t stride, step;
};

// A matrix of tiles: rows of one `stride` bytes apart, `step` bytes from a tile to the next in depth, `next` to the
// next beside it.
struct TileMatrix {
  const void* at;
  int64_t stride, step, next;

  // The tile whose first row or column is `first`, a multiple of a tile's, and the one beside it.
  ATTNKIT_INLINE TileFactor tile(int32_t first) const {
    const char* one = static_cast<const char*>(at) + first / kTileRows * next;
    return {one, one + next, stride, step};
  }
};

// What tiles hold: pairs of bfloat16, whose sums are floats; or four signed bytes, whose sums are integers.
struct TilePairs {
  template <int kSum, int kLeft, int kRight>
  static ATTNKIT_INLINE void multiply() {
    tile_multiply<kSum, kLeft, kRight>();
  }
};
struct TileBytes {
  template <int kSum, int kLeft, int kRight>
  static ATTNKIT_INLINE void multiply() {
    tile_multiply_bytes<kSum, kLeft, kRight>();
  }
};

// Products one after the other: C = A B, or (`add`) C += A B, of kRows x kColumns tiles of sums, `steps` deep; rows of
// C are `ld` floats apart. What one has summed is stored while the next begins: a store right after the products would
// wait for them, and those of the next for it.
template <class Elements = TilePairs>
class TileProducts {
 public:
  TileProducts() = default;
  ~TileProducts() { put_all(); }
  TileProducts(const TileProducts&) = delete;
  TileProducts& operator=(const TileProducts&) = delete;

  template <int kRows, int kColumns>
  ATTNKIT_INLINE void multiply(const TileFactor& a, const TileFactor& b, int32_t steps, bool add, float* c,
                               int64_t ld) {
    static_assert(kRows <= 2 && kColumns <= 2);
    constexpr bool kDown = kRows == 2, kRight = kColumns == 2;
    const char *a0 = static_cast<const char*>(a.first), *a1 = static_cast<const char*>(a.second);
    const char *b0 = static_cast<const char*>(b.first), *b1 = static_cast<const char*>(b.second);
    if constexpr (!kRight) put<1>();
    if constexpr (!kDown) put<2>();
    if constexpr (!kRight || !kDown) put<3>();
    const auto step = [&](auto begin) __attribute__((always_inline)) {
      tile_load<4>(a0, a.stride);
      tile_load<6>(b0, b.stride);
      if constexpr (kRight) tile_load<7>(b1, b.stride);
      if constexpr (kDown) tile_load<5>(a1, a.stride);
      begin.template operator()<0>();
      Elements::template multiply<0, 4, 6>();
      if constexpr (kRight) {
        begin.template operator()<1>();
        Elements::template multiply<1, 4, 7>();
      }
      if constexpr (kDown) {
        begin.template operator()<2>();
        Elements::template multiply<2, 5, 6>();
      }
      if constexpr (kDown && kRight) {
        begin.template operator()<3>();
        Elements::template multiply<3, 5, 7>();
      }
      a0 += a.step, a1 += a.step, b0 += b.step, b1 += b.step;
    };
    step([&]<int kSum>() __attribute__((always_inline)) {
      put<kSum>();
      float* sums = c + kSum % 2 * kTileRows + kSum / 2 * kTileRows * ld;
      add ? tile_load<kSum>(sums, 4 * ld) : tile_zero<kSum>();
      left_[kSum] = sums;
    });
    ld_ = ld;
    for (int32_t i = 1; i < steps; ++i) step([]<int>() __attribute__((always_inline)) {});
  }

  // The same for one or two tiles of rows and of columns, whole or not.
  ATTNKIT_INLINE void multiply(const TileFactor& a, int32_t rows, const TileFactor& b, int32_t columns, int32_t steps,
                               bool add, float* c, int64_t ld) {
    const auto with_rows = [&]<int kRows>() __attribute__((always_inline)) {
      columns > kTileRows ? multiply<kRows, 2>(a, b, steps, add, c, ld) : multiply<kRows, 1>(a, b, steps, add, c, ld);
    };
    rows > kTileRows ? with_rows.template operator()<2>() : with_rows.template operator()<1>();
  }

  ATTNKIT_INLINE void put_all() {
    put<0>();
    put<1>();
    put<2>();
    put<3>();
  }

 private:
  template <int kSum>
  ATTNKIT_INLINE void put() {
    if (left_[kSum] != nullptr) tile_store<kSum>(left_[kSum], 4 * ld_);
    left_[kSum] = nullptr;
  }

  float* left_[4] = {};  // where sums that are not yet stored go
  int64_t ld_ = 0;
};

// C = A B, or (`add`) C += A B, whole tiles of `rows` rows and `columns` columns.
__attribute__((noinline)) void tile_products(const TileMatrix& a, int32_t rows, const TileMatrix& b, int32_t columns,
                                             int32_t steps, bool add, float* c, int64_t ld) {
  TileProducts products;
  for (int32_t n = 0; n < columns; n += 2 * kTileRows)
    for (int32_t m = 0; m < rows; m += 2 * kTileRows)
      products.multiply(a.tile(m), rows - m, b.tile(n), columns - n, steps, add, c + m * ld + n, ld);
}

// ---- factors that lie the other way round ----

typedef int16_t shorts __attribute__((vector_size(64), may_alias));

// 128 bits from each of four places.
ATTNKIT_INLINE shorts load_quarters(const Bf16* a, const Bf16* b, const Bf16* c, const Bf16* d) {
  const auto quarter = [](const Bf16* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  __m512i x = _mm512_castsi128_si512(quarter(a));
  x = _mm512_inserti32x4(x, quarter(b), 1);
  x = _mm512_inserti32x4(x, quarter(c), 2);
  return (shorts)_mm512_inserti32x4(x, quarter(d), 3);
}
ATTNKIT_INLINE vf load_quarters(const float* p, int64_t apart) {
  const auto quarter = [&](int i) { return reinterpret_cast<const Bf16*>(p + i * apart); };
  return (vf)load_quarters(quarter(0), quarter(1), quarter(2), quarter(3));
}

// Of 32 rows eight channels: the rows of each side by side, kTileDepth elements from one channel to the next. `most` is
// raised to the largest magnitude, as an integer.
template <bool kMost>
ATTNKIT_INLINE void transpose_eight(const Bf16* const* rows, int32_t channel, Bf16* to, shorts& most) {
  shorts x[8], y[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    x[r] = load_quarters(rows[r] + channel, rows[8 + r] + channel, rows[16 + r] + channel, rows[24 + r] + channel);
    if constexpr (kMost) {
      const shorts size = x[r] & 0x7fff;
      most = size > most ? size : most;
    }
  }
  // Within each quarter: pairs of rows, then fours, then all eight.
  const auto one = [](shorts a, shorts b, bool high) __attribute__((always_inline)) {
    return high ? (shorts)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b)
                : (shorts)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
  };
  const auto two = [](shorts a, shorts b, bool high) __attribute__((always_inline)) {
    return high ? (shorts)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b)
                : (shorts)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b);
  };
  const auto four = [](shorts a, shorts b, bool high) __attribute__((always_inline)) {
    return high ? (shorts)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b)
                : (shorts)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // y[i]: channels 0-3 of rows 2 i, 2 i + 1; y[4 + i]: channels 4-7
    y[i] = one(x[2 * i], x[2 * i + 1], false);
    y[4 + i] = one(x[2 * i], x[2 * i + 1], true);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)  // of two channels each, the rows 0-3 and 4-7
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      x[4 * half + i] = two(y[4 * half + 2 * i], y[4 * half + 2 * i + 1], false);
      x[4 * half + 2 + i] = two(y[4 * half + 2 * i], y[4 * half + 2 * i + 1], true);
    }
#pragma GCC unroll 4
  for (int pair = 0; pair < 4; ++pair)
#pragma GCC unroll 2
    for (int high = 0; high < 2; ++high)
      store_int(reinterpret_cast<float*>(to + (2 * pair + high) * kTileDepth),
                (vi)four(x[2 * pair], x[2 * pair + 1], high != 0));
}

inline constexpr int16_t kExponent = 0x7f80;  // of a bfloat16: all of it, of what is not finite

ATTNKIT_INLINE bool is_not_finite(Bf16 x) { return (x.bits & kExponent) == kExponent; }

inline void clear_not_finite(Bf16* x, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    if (is_not_finite(x[i])) x[i] = Bf16{0};
}

// Calls f(row, channel, value) for what is no number, or infinite, of rows first .. first + count - 1.
template <class F>
void each_not_finite(const Lines& rows, int32_t first, int32_t count, int64_t stride, int32_t width, F f) {
  for (int32_t n = first; n < first + count; ++n)
    for (int32_t d = 0; d < width; ++d) {
      const Bf16 value = reinterpret_cast<const Bf16*>(rows.at(n))[d * stride];
      if (is_not_finite(value)) f(n, d, widen_one(value));
    }
}

// Rows of channels, up to 32 of them, as a left factor [channel][row]: zeros beyond the last of either. Returns whether
// all are finite, where it is asked to look.
template <bool kLook>
__attribute__((noinline)) bool transpose_chunk(const Bf16* const* rows, int32_t count, int64_t stride, int32_t width,
                                               int32_t padded, Bf16* to) {
  shorts most{};
  int32_t d = 0;
  if (stride == 1 && count == kTileDepth)
    for (; d + 8 <= width; d += 8, to += 8 * kTileDepth) transpose_eight<kLook>(rows, d, to, most);
  if (stride == 1 && count < kTileDepth) {
    Bf16 eight[kTileDepth][8] = {};
    const Bf16* all[kTileDepth];
    for (int32_t r = 0; r < kTileDepth; ++r) all[r] = eight[r];
    for (; d + 8 <= width; d += 8, to += 8 * kTileDepth) {
      for (int32_t r = 0; r < count; ++r) __builtin_memcpy(eight[r], rows[r] + d, sizeof eight[r]);
      transpose_eight<kLook>(all, 0, to, most);
    }
  }
  bool finite = true;
  if constexpr (kLook)
    for (int i = 0; i < 32; ++i) finite &= most[i] < kExponent;
  for (; d < padded; ++d, to += kTileDepth)
    for (int32_t r = 0; r < kTileDepth; ++r) {
      to[r] = d < width && r < count ? rows[r][d * stride] : Bf16{0};
      if constexpr (kLook) finite &= !is_not_finite(to[r]);
    }
  return finite;
}
