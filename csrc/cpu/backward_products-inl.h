// The matrix products of the backward, in registers. Micro-tiles have kAccumulators sums; their shapes order no sum.
// A, B and depths are in units, as products-inl.h has them.

// The rows of a micro-tile of so many vectors.
constexpr int tile_rows(int vecs) { return kAccumulators / vecs < kMaxKeyRows ? kAccumulators / vecs : kMaxKeyRows; }

// How many vectors of a row of `left` vectors the next micro-tile takes.
inline constexpr int kMostVecs = kQueryVecs > kOutVecs ? kQueryVecs : kOutVecs;
template <class F>
ATTNKIT_INLINE void in_columns(int32_t width, F columns) {
  for (int32_t c = 0; c < width;) {
    const int32_t left = (width - c) / kLanes;
    const auto take = [&]<int kVecs>() {
      columns.template operator()<kVecs>(c);
      c += kVecs * kLanes;
    };
    if constexpr (kMostVecs >= 4)
      if (left % 4 == 0) {
        take.template operator()<4>();
        continue;
      }
    if constexpr (kMostVecs >= 3)
      if (left >= 3) {
        take.template operator()<3>();
        continue;
      }
    left >= 2 ? take.template operator()<2>() : take.template operator()<1>();
  }
}

// sums[r][v] = sum_d A[r][d] B[d][v], v a vector; rows past the last repeat it.
template <class Dot, int kRows, int kVecs>
ATTNKIT_INLINE void rows_tile(vf (&sums)[kRows][kVecs], const float* a, int64_t a_stride, int32_t rows, const float* b,
                              int64_t b_stride, int32_t depth) {
  const float* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = a + (r < rows ? r : rows - 1) * a_stride;
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = vf{};
  for (int32_t d = 0; d < depth; ++d) {
    vf x[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) x[v] = load(b + d * b_stride + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const vf y = set1_bits(row[r] + d);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Dot::run(y, x[v], sums[r][v]);
    }
  }
}

template <class Dot, int kRows, int kVecs, class Out>
__attribute__((noinline)) void rows_times_columns(const float* a, int64_t a_stride, int32_t rows, const float* b,
                                                  int64_t b_stride, int32_t depth, int32_t column, const Out& out) {
  for (int32_t m = 0; m < rows; m += kRows) {
    vf sums[kRows][kVecs];
    rows_tile<Dot>(sums, a + m * a_stride, a_stride, rows - m, b + column, b_stride, depth);
#pragma GCC unroll 32
    for (int32_t r = 0; r < kRows; ++r) {
      if (m + r >= rows) break;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* x = out.c + (m + r) * out.stride + column + v * kLanes;
        store(x, out(sums[r][v], x, m + r));
      }
    }
  }
}

// C[m][c] = out(sum_d A[m][d] B[d][c], C[m][c], m) for `width` columns, a whole number of vectors.
template <class Dot = FloatDot, class Out>
void rows_times(const float* a, int64_t a_stride, int32_t rows, const float* b, int64_t b_stride, int32_t width,
                int32_t depth, const Out& out) {
  in_columns(width, [&]<int kVecs>(int32_t c) {
    rows_times_columns<Dot, tile_rows(kVecs), kVecs>(a, a_stride, rows, b, b_stride, depth, c, out);
  });
}

template <class Dot, int kRows, int kVecs>
ATTNKIT_INLINE void columns_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int32_t depth,
                                 float* c, int64_t c_stride) {
  vf acc[kRows][kVecs];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = vf{};
  for (int32_t m = 0; m < depth; ++m) {
    vf x[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) x[v] = load(b + m * b_stride + v * kLanes);
    const float* weight = a + m * a_stride;
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const vf w = set1_bits(weight + r);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Dot::run(w, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* x = c + r * c_stride + v * kLanes;
      store(x, load(x) + acc[r][v]);
    }
}

template <class Dot, int kVecs>
__attribute__((noinline)) void columns_times_vecs(const float* a, int64_t a_stride, int32_t columns, const float* b,
                                                  int64_t b_stride, int32_t depth, float* c, int64_t c_stride) {
  constexpr int kRows = tile_rows(kVecs);
  int32_t n = 0;
  const auto group = [&]<int kCount>() {
    columns_tile<Dot, kCount, kVecs>(a + n, a_stride, b, b_stride, depth, c + n * c_stride, c_stride);
    n += kCount;
  };
  while (columns - n >= kRows) group.template operator()<kRows>();
  while (columns - n >= 2) group.template operator()<2>();
  if (columns > n) group.template operator()<1>();
}

// C[n][c] += sum_m A[m][n] B[m][c] for `columns` columns of A and `width` columns of B, a whole number of vectors.
template <class Dot = FloatDot>
void columns_times(const float* a, int64_t a_stride, int32_t columns, const float* b, int64_t b_stride, int32_t width,
                   int32_t depth, float* c, int64_t c_stride) {
  in_columns(width, [&]<int kVecs>(int32_t at) {
    columns_times_vecs<Dot, kVecs>(a, a_stride, columns, b + at, b_stride, depth, c + at, c_stride);
  });
}
