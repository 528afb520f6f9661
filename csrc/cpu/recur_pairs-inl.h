// What flows back through the pairs of a chunk, w_rs for s <= r, with the decays D_rs of recur-inl.h.

// Where each channel has its decay, as Horner's rule has it: to[r] += sum over s of w_rs right_s D_rs,
inline void channels_to_rows(const float* w, int64_t stride, Rows right, const float* each, int32_t rows, int32_t width,
                             bool diagonal, bool lag, float* to) {
  for (int32_t r = 0; r < rows; ++r)
    for (int32_t d = 0; d < width; d += kLanes) {
      vf sum{};
      for (int32_t s = 0; s < r; ++s)
        sum = fma(sum, load(each + s * width + d), set1(w[r * stride + s]) * load(right.data + s * right.stride + d));
      if (!lag) sum *= load(each + r * width + d);
      if (diagonal) sum = fma(set1(w[r * stride + r]), load(right.data + r * right.stride + d), sum);
      store(to + r * width + d, load(to + r * width + d) + sum);
    }
}
// and to[s] += sum over r of w_rs left_r D_rs.
inline void channels_to_columns(const float* w, int64_t stride, Rows left, const float* each, int32_t rows,
                                int32_t width, bool diagonal, bool lag, float* to) {
  for (int32_t s = 0; s < rows; ++s)
    for (int32_t d = 0; d < width; d += kLanes) {
      vf sum{};
      for (int32_t r = rows - 1; r > s; --r) {
        if (r < rows - 1) sum *= load(each + (lag ? r : r + 1) * width + d);
        sum = fma(set1(w[r * stride + s]), load(left.data + r * left.stride + d), sum);
      }
      if (!lag && s + 1 < rows) sum *= load(each + (s + 1) * width + d);
      if (diagonal) sum = fma(set1(w[s * stride + s]), load(left.data + s * left.stride + d), sum);
      store(to + s * width + d, load(to + s * width + d) + sum);
    }
}

// w = left right^T, its lower half in blocks of 16 rows; `columns` is right^T.
inline void lower_product(Rows left, const float* columns, int32_t rows, int32_t depth, float sign, float* w,
                          int64_t stride) {
  for (int32_t r = 0; r < rows; r += 16) {
    Sum sum{w + r * stride, stride};
    sum.sign = sign;
    product<false>(left.data + r * left.stride, left.stride, columns, padded(rows), rows - r < 16 ? rows - r : 16,
                   depth, r + 16, sum);
  }
}
