// The matrix products of a recurrence, in registers: chunks of tokens times states, and chunks times chunks, of which
// half exists. They are short, so rows that are left over have tiles of their own and repeat nothing.

// Where a product goes: C = in * alpha + sign * product, a row at a time. Without alpha, C = sign * product.
struct Sum {
  float* c;
  int64_t stride;
  const float* alpha = nullptr;  // of row r: alpha[r * step]
  int32_t step = 0;
  float sign = 1;
  const float* in = nullptr;  // rows as far apart as those of C; null: C itself
};
inline constexpr float kOne = 1;
inline Sum added_to(float* c, int64_t stride, float sign = 1) { return {c, stride, &kOne, 0, sign}; }

// Over which terms row r sums: all, those up to r, those before r, or those from r on. The last three know that the
// left factor is 0 elsewhere, and sum over a few of its zeros.
enum class Terms { all, up_to, from };

// A B, over `depth` terms; and with `more`, that is added.
struct Operands {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int32_t depth;
  Terms terms = Terms::all;
  const Operands* more = nullptr;
};

// Rows r .. of A, or (kAcross) columns r .. of A, times columns of B.
template <bool kAcross, int kRows, int kVecs>
ATTNKIT_INLINE void product_tile(const Operands& all, int32_t r, int32_t column, const Sum& out) {
  vf acc[kRows][kVecs];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[i][v] = vf{};
  for (const Operands* f = &all; f != nullptr; f = f->more) {
    const float *a = f->a, *b = f->b;
    const int64_t a_stride = f->a_stride, b_stride = f->b_stride;
    const int32_t first = f->terms == Terms::from ? r : 0;
    const int32_t end = f->terms == Terms::up_to && r + kRows < f->depth ? r + kRows : f->depth;
    const float* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = kAcross ? a + r + i : a + (r + i) * a_stride;
    const float* across = a + r + first * a_stride;
    for (int32_t d = first; d < end; ++d, across += a_stride) {
      vf x[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) x[v] = load(b + d * b_stride + column + v * kLanes);
#pragma GCC unroll 32
      for (int i = 0; i < kRows; ++i) {
        const vf y = set1(kAcross ? across[i] : row[i][d]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[i][v] = fma(y, x[v], acc[i][v]);
      }
    }
  }
  const Sum to = out;  // in registers: for all that is known, what is stored could lie where `out` does
  const vf sign = set1(to.sign);
  const int64_t first = r * to.stride + column;
  float* c = to.c + first;
  const float* in = (to.in == nullptr ? to.c : to.in) + first;
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i, c += to.stride, in += to.stride) {
    const vf alpha = set1(to.alpha == nullptr ? 0.0f : to.alpha[(r + i) * to.step]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const vf sum = acc[i][v] * sign;
      store(c + v * kLanes, to.alpha == nullptr ? sum : fma(load(in + v * kLanes), alpha, sum));
    }
  }
}

template <bool kAcross, int kVecs>
__attribute__((noinline)) void product_columns(const Operands& of, int32_t rows, int32_t column, bool exact,
                                               const Sum& out) {
  constexpr int kRows = kVecs > 1 && kAccumulators / kVecs > 8 ? 8
                        : kAccumulators / kVecs > 16           ? 16
                                                               : kAccumulators / kVecs;
  int32_t r = 0;
  const auto group = [&]<int kCount>() {
    product_tile<kAcross, kCount, kVecs>(of, r, column, out);
    r += kCount;
  };
  if (!exact) {
    while (rows - r >= kRows) group.template operator()<kRows>();
    while (rows - r >= 4) group.template operator()<4>();
    if (rows - r >= 2) group.template operator()<2>();
  }
  while (rows > r) group.template operator()<1>();
}

// How a product with a half of its left factor is to go about it. `exact`: no term that does not exist may be touched,
// for there are infinities or NaN about.
struct Half {
  Terms terms = Terms::all;
  bool exact = false;
};

// out(A B): A[r][d] at a + r * a_stride + d, or (kAcross, A is the transpose) at a + d * a_stride + r. `width`: of B,
// whole vectors.
template <bool kAcross>
void product(const Operands& of, int32_t rows, int32_t width, const Sum& out, bool exact = false) {
  constexpr int kMost = kOutVecs;  // 4 or 2
  int32_t column = 0;
  const auto columns = [&]<int kVecs>() {
    product_columns<kAcross, kVecs>(of, rows, column, exact, out);
    column += kVecs * kLanes;
  };
  while (column + kMost * kLanes <= width) columns.template operator()<kMost>();
  if constexpr (kMost > 2) {
    if (column + 3 * kLanes <= width) columns.template operator()<3>();
    if (column + 2 * kLanes <= width) columns.template operator()<2>();
  }
  if (column < width) columns.template operator()<1>();
}

template <bool kAcross>
void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int32_t rows, int32_t depth,
             int32_t width, const Sum& out, Half half = {}) {
  product<kAcross>({a, a_stride, b, b_stride, depth, half.terms}, rows, width, out, half.exact);
}

// to[d][r] = from[r][d] for `rows` rows of `width` floats, a whole number of vectors; zeros up to `padded` columns.
inline void transpose(const float* from, int64_t stride, int32_t rows, int32_t width, float* to, int32_t padded) {
  for (int32_t r = 0; r < padded; r += kLanes)
    for (int32_t d = 0; d < width; d += kLanes) {
      vf square[kLanes];
      const float* x = from + r * stride + d;
      if (r + kLanes <= rows) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(x + i * stride);
      } else {
        for (int i = 0; i < kLanes; ++i) square[i] = r + i < rows ? load(x + i * stride) : vf{};
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * padded + r, square[i]);
    }
}
