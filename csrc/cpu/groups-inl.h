// Groups of tokens: affinities to centroids, and the sums of what groups leave for a token.

inline size_t affinity_bytes(const Affinities& a) {
  return static_cast<size_t>(kAffinityTokens) * static_cast<size_t>(padded(a.head_dim) + a.lanes) * sizeof(float);
}

inline void affinities(const Affinities& a, int32_t batch, int32_t head, int64_t first, int32_t count, float* to,
                       float* workspace) {
  const int32_t width = padded(a.head_dim);
  float *x = workspace, *products = x + kAffinityTokens * width;
  Rows tokens = rows_of(a.x, a.dtype, batch, head, first, count, a.head_dim, width, x);
  if (a.norm != RowNorm::none) {
    if (tokens.data != x)
      for (int32_t r = 0; r < count; ++r)
        for (int32_t d = 0; d < width; d += kLanes) store(x + r * width + d, load(tokens.data + r * tokens.stride + d));
    tokens = {x, width};
    for (int32_t r = 0; r < count; ++r) map_row(a.norm, FeatureMap::identity, x + r * width, a.head_dim, width);
  }
  const float* centroids = a.centroids + static_cast<int64_t>(head) * a.head_dim * a.lanes;
  rows_times(tokens.data, tokens.stride, count, centroids, a.lanes, a.lanes, a.head_dim, Put{products, a.lanes});
  for (int32_t n = 0; n < count; n += kLanes)
    for (int32_t c = 0; c < a.lanes; c += kLanes) {
      vf square[kLanes];
#pragma GCC unroll 16
      for (int32_t r = 0; r < kLanes; ++r)
        square[r] = n + r < count ? load(products + static_cast<int64_t>(n + r) * a.lanes + c) : vf{};
      transpose_square(square);
#pragma GCC unroll 16
      for (int32_t r = 0; r < kLanes; ++r)
        if (c + r < a.count) store(to + (c + r) * a.stride + first + n, square[r]);
    }
}

// Integers in the order of floats: NaN comes first, and both zeros are one.
ATTNKIT_INLINE vi in_order(vf x) {
  const vi bits = as_int(x + vf{});
  return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : set1_int(INT32_MIN);
}

inline void best(const float* numbers, int64_t n, int64_t w, float* keys, int32_t* places) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store_int(keys + i, in_order(load(numbers + i)));
  if (whole < n) {
    vf x = set1(__builtin_nanf(""));
    __builtin_memcpy(&x, numbers + whole, static_cast<size_t>(n - whole) * sizeof(float));
    store_int(keys + whole, in_order(x));
  }
  // The w-th largest, bit by bit from the top; if w of them are at least as large as something, that will do.
  int64_t ties = 0;
  uint32_t least = 0;
  const auto as_key = [](uint32_t bits) { return static_cast<int32_t>(bits ^ 0x80000000u); };
  const auto at_least = [&](int32_t key) {
    vi count{};
    const vi limit = set1_int(key);
    for (int64_t i = 0; i < n; i += kLanes) count -= load_int(keys + i) >= limit;
    int64_t sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += count[l];
    return sum;
  };
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t tried = least | uint32_t{1} << bit;
    const int64_t count = at_least(as_key(tried));
    if (count >= w) least = tried;
    if (count == w) {
      ties = w;  // more than there can be
      break;
    }
  }
  const vi limit = set1_int(as_key(least));
  if (ties == 0) ties = w - (least == UINT32_MAX ? 0 : at_least(as_key(least + 1)));
  for (int64_t i = 0, found = 0; found < w; i += kLanes) {
    const vi key = load_int(keys + i);
    const uint32_t equal = lane_bits(key == limit);
    for (uint32_t left = lane_bits(key >= limit); left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if ((equal >> lane & 1) != 0 && ties-- <= 0) continue;
      places[found++] = static_cast<int32_t>(i + lane);
    }
  }
}

inline void sum_rows(const RowSums& s, const TokenRows& of, int32_t batch, int32_t head, int64_t row_of_head,
                     int64_t first, int64_t end) {
  alignas(kBytes) float sum[4096];
  const auto row = [&](int32_t r) { return row_of<const float*>(s.from, batch, head, r); };
  for (int64_t t = first; t < end; ++t) {
    const int32_t *rows = of.rows + of.first[t], count = of.first[t + 1] - of.first[t];
    for (int32_t d = 0; d < s.channels; d += kLanes) {
      vf x = count > 0 ? vector_at(row(rows[0]), 1, s.channels, d) : vf{};
      for (int32_t i = 1; i < count; ++i) x += vector_at(row(rows[i]), 1, s.channels, d);
      store(sum + d, x);
    }
    const float factor = s.mean && count > 1 ? 1 / static_cast<float>(count) : 1;
    with_elements(s.dtype, [&](auto* type) {
      narrow_row(row_of<decltype(type)>(s.to, batch, head, t), s.to.stride[3], sum, s.channels, factor);
    });
    if (s.lse != nullptr && count > 1)
      for (int32_t i = 0; i < count; ++i) s.lse[row_of_head + rows[i]] += __builtin_logf(static_cast<float>(count));
  }
}

constexpr GroupKernel kGroupKernel{affinity_bytes, affinities, best, sum_rows};
