// The fold law, once: sums over two stretches of keys become the sums over both. (FlashDecoding merges its splits so;
// here every task does, whether it takes all of its keys or shares them, and so gives the same bits either way.)

// Of each lane: o not yet divided by the sum of the weights, their maximum's logit, and their sum.
struct Fold {
  float *o, *max, *sum;
  int64_t o_stride;

  Fold at(int64_t lane) const { return {o + lane * o_stride, max + lane, sum + lane, o_stride}; }
};

// Lanes of which nothing has been seen.
inline void start_fold(const Fold& fold, int32_t lanes) {
  __builtin_memset(fold.o, 0, static_cast<size_t>(lanes * fold.o_stride) * sizeof(float));
  for (int32_t m = 0; m < lanes; ++m) {
    fold.max[m] = -kInfinity;
    fold.sum[m] = 0;
  }
}

// The maximum of two stretches, and what they weigh beside it. Nothing seen weighs nothing: exp(-infinity - pivot) is
// 0.
struct Shares {
  vf max, a, b;
};
ATTNKIT_INLINE Shares shares(vf max_a, vf max_b) {
  const vf max = max_or_second(max_a, max_b), pivot = max == set1(-kInfinity) ? vf{} : max;
  return {max, exp_weight(max_a - pivot), exp_weight(max_b - pivot)};
}

// `to` may be either of the two.
inline void merge(const Fold& to, const Fold& a, const Fold& b, int32_t lanes, int32_t channels) {
  for (int32_t first = 0; first < lanes; first += kLanes) {
    const int32_t some = lanes - first < kLanes ? lanes - first : kLanes;
    alignas(kBytes) float of_a[kLanes] = {}, of_b[kLanes] = {};  // a vector of lanes at a time
    __builtin_memcpy(of_a, a.max + first, static_cast<size_t>(some) * sizeof(float));
    __builtin_memcpy(of_b, b.max + first, static_cast<size_t>(some) * sizeof(float));
    const Shares of = shares(load(of_a), load(of_b));
    store(of_a, of.a);
    store(of_b, of.b);
    for (int32_t m = first; m < first + some; ++m) {
      if (to.o == a.o && b.max[m] == -kInfinity) continue;
      const vf wa = set1(of_a[m - first]), wb = set1(of_b[m - first]);
      to.max[m] = a.max[m] > b.max[m] ? a.max[m] : b.max[m];
      to.sum[m] = a.sum[m] * wa[0] + b.sum[m] * wb[0];
      for (int32_t c = 0; c < channels; c += kLanes)
        store(to.o + m * to.o_stride + c, fma(load(a.o + m * a.o_stride + c), wa, load(b.o + m * b.o_stride + c) * wb));
    }
  }
}

inline void copy(const Fold& to, const Fold& from, int32_t lanes, int32_t channels) {
  const auto row = static_cast<size_t>(channels) * sizeof(float);
  for (int32_t m = 0; m < lanes; ++m) __builtin_memcpy(to.o + m * to.o_stride, from.o + m * from.o_stride, row);
  __builtin_memcpy(to.max, from.max, static_cast<size_t>(lanes) * sizeof(float));
  __builtin_memcpy(to.sum, from.sum, static_cast<size_t>(lanes) * sizeof(float));
}

inline void copy_lane(const Fold& to, const Fold& from, int32_t channels) {
  for (int32_t c = 0; c < channels; c += kLanes) store(to.o + c, load(from.o + c));
  *to.max = *from.max;
  *to.sum = *from.sum;
}

// A stretch as it lies among the parts of a split task.
inline Fold fold_of(const Parts& parts, int64_t stretch, const Problem& p, int32_t lanes) {
  float* at = parts.at + stretch * part_floats(p, lanes);
  const int64_t o = lanes * padded_channels(p);
  return {at, at + o, at + o + lanes, padded_channels(p)};
}
