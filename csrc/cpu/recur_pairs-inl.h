// What flows back through the pairs of a chunk, w_rs for s <= r, with the decays D_rs of recur-inl.h.

// Where each channel has its decay, as Horner's rule has it: to[r] += sum over s of w_rs right_s D_rs,
inline void channels_to_rows(const float* w, int64_t stride, Rows right, const float* each, int32_t rows, int32_t width,
                             bool diagonal, bool lag, float* to) {
  for (int32_t r = 0; r < rows; ++r)
    in_groups(width, [&]<int kVecs>(int32_t d) {
      vf sums[kVecs] = {};
      const auto each_vector = [&](auto what) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sums[v] = what(sums[v], d + v * kLanes);
      };
      for (int32_t s = 0; s < r; ++s) {
        const vf weight = set1(w[r * stride + s]);
        each_vector([&](vf sum, int32_t at) {
          return fma(sum, load(each + s * width + at), weight * load(right.data + s * right.stride + at));
        });
      }
      if (!lag) each_vector([&](vf sum, int32_t at) { return sum * load(each + r * width + at); });
      const vf own = set1(diagonal ? w[r * stride + r] : 0);
      if (diagonal)
        each_vector([&](vf sum, int32_t at) { return fma(own, load(right.data + r * right.stride + at), sum); });
      each_vector([&](vf sum, int32_t at) {
        store(to + r * width + at, load(to + r * width + at) + sum);
        return sum;
      });
    });
}
// and to[s] += sum over r of w_rs left_r D_rs.
inline void channels_to_columns(const float* w, int64_t stride, Rows left, const float* each, int32_t rows,
                                int32_t width, bool diagonal, bool lag, float* to) {
  for (int32_t s = 0; s < rows; ++s)
    in_groups(width, [&]<int kVecs>(int32_t d) {
      vf sums[kVecs] = {};
      const auto each_vector = [&](auto what) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sums[v] = what(sums[v], d + v * kLanes);
      };
      for (int32_t r = rows - 1; r > s; --r) {
        const vf weight = set1(w[r * stride + s]);
        const float* decay = each + (lag || r == rows - 1 ? r : r + 1) * width;  // of a sum of nothing: any
        each_vector([&](vf sum, int32_t at) {
          return fma(weight, load(left.data + r * left.stride + at), sum * load(decay + at));
        });
      }
      if (!lag && s + 1 < rows)
        each_vector([&](vf sum, int32_t at) { return sum * load(each + (s + 1) * width + at); });
      const vf own = set1(diagonal ? w[s * stride + s] : 0);
      if (diagonal)
        each_vector([&](vf sum, int32_t at) { return fma(own, load(left.data + s * left.stride + at), sum); });
      each_vector([&](vf sum, int32_t at) {
        store(to + s * width + at, load(to + s * width + at) + sum);
        return sum;
      });
    });
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
