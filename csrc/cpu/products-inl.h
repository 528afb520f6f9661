// The two matrix products of a tile: scores from queries and keys, outputs from weights and values.
//
// Both take 4-byte units: a float, or (kernel_bf16-inl.h) a pair of bfloat16 that are multiplied and summed together.
// What is done with a unit is a `Dot`:
//   run(a, b, sum)               sum + a * b, lane by lane
//   kKeys                        how many keys' weights and values are in a unit
// and for scores, of keys and lanes counted from those of at(key, lane):
//   start(key)                   what the sum of a key's scores begins with
//   finish(sum, key, v, first)   a key's scores of vector v of queries; `first`: of the first stretch of units
//
// An instruction set says, before it includes this, how its registers are used: scores are computed for
// kAccumulators / kQueryVecs keys by kQueryVecs vectors of queries (where two vectors of queries are left for
// kTwoVecKeys keys, where one is for kMaxKeyRows), outputs for kOutRows queries by kOutVecs vectors of channels,
// float32 weights for kSoftmaxKeys keys. None of these orders a sum: they change no bit.

static_assert(kAccumulators / kQueryVecs <= kMaxKeyRows && kTwoVecKeys <= kMaxKeyRows);
static_assert(kMaxTileQ % kLanes == 0 && kMaxTileKv % kLanes == 0);

struct FloatDot {  // of queries that are scaled
  static constexpr int kKeys = 1;
  ATTNKIT_INLINE FloatDot at(int32_t, int32_t) const { return {}; }
  ATTNKIT_INLINE vf start(int32_t) const { return vf{}; }
  ATTNKIT_INLINE vf finish(vf sum, int32_t, int, bool) const { return sum; }
  static ATTNKIT_INLINE vf run(vf a, vf b, vf sum) { return fma(a, b, sum); }
};

// Keys first .. end - 1 of a tile.
struct Span {
  int32_t first, end;
};

// Those that some of the queries lane .. lane + lanes - 1 see: `live` has a span for each vector of queries; null if
// they see all.
ATTNKIT_INLINE Span seen(const Span* live, int32_t lane, int32_t lanes, int32_t count) {
  if (live == nullptr) return {0, count};
  Span all{count, 0};
  for (int32_t v = lane / kLanes; v * kLanes < lane + lanes; ++v) {
    forget(v);  // they are few: not to be vectorised
    if (live[v].first < all.first) all.first = live[v].first;
    if (live[v].end > all.end) all.end = live[v].end;
  }
  return all.first < all.end ? all : Span{0, 0};
}

// Keys as units: rows `stride` bytes apart.
struct KeyRows {
  const char* data;
  int64_t stride;
};

// Scores less what is taken away from them: a row of `ld` for each key.
template <class Dot>
struct LessDot : Dot {
  const float* less;
  int64_t ld;
  ATTNKIT_INLINE LessDot at(int32_t key, int32_t lane) const {
    return {Dot::at(key, lane), less + key * ld + lane, ld};
  }
  // It is needed when the product is done, and would be waited for.
  ATTNKIT_INLINE vf start(int32_t key) const {
#pragma GCC unroll 4
    for (int v = 0; v < kQueryVecs; ++v) __builtin_prefetch(less + key * ld + v * kLanes);
    return Dot::start(key);
  }
  ATTNKIT_INLINE vf finish(vf sum, int32_t key, int v, bool first) const {
    sum = Dot::finish(sum, key, v, first);
    return first ? sum - load(less + key * ld + v * kLanes) : sum;
  }
};

// Scores of kRows keys, over `depth` units; added to what `s` holds, or (`first`) put there. `largest`, if not null, is
// raised to them: one value per query.
template <class Dot, int kRows, int kVecs>
ATTNKIT_INLINE void qk_tile(const float* qt, int32_t bm, const KeyRows& k, int32_t rows, int32_t depth, const Dot& dot,
                            bool first, float* s, float* largest) {
  const auto in_tile = [&](int r) { return r < rows ? r : rows - 1; };  // tails repeat the last key
  const char *key[kRows], *at = k.data;
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    key[r] = at;
    at += r + 1 < rows ? k.stride : 0;
    forget(at);
  }
  vf acc[kRows][kVecs];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    const vf begin = first ? dot.start(in_tile(r)) : vf{};
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = begin;
  }
  for (int32_t d = 0; d < depth; ++d) {
    vf q[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) q[v] = load(qt + static_cast<int64_t>(d) * bm + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const vf x = set1_bits(key[r] + 4 * static_cast<int64_t>(d));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Dot::run(x, q[v], acc[r][v]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = dot.finish(acc[r][v], in_tile(r), v, first);
  if (!first) {
    const float* x = s;
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r, x += bm) {
      forget(x);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] += load(x + v * kLanes);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r, s += bm) {
    forget(s);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(s + v * kLanes, acc[r][v]);
  }
  if (largest == nullptr) return;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    vf most = load(largest + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) most = max_or_second(acc[r][v], most);
    store(largest + v * kLanes, most);
  }
}

// Not inlined: inside `run` the compiler would keep the keys' addresses in memory.
template <class Dot, int kRows, int kVecs>
__attribute__((noinline)) void qk_columns(const float* qt, int32_t bm, const KeyRows& k, int32_t count, int32_t depth,
                                          const Dot& dot, bool first, float* s, float* largest) {
  for (int32_t n = 0; n < count; n += kRows)
    qk_tile<Dot, kRows, kVecs>(qt, bm, {k.data + n * k.stride, k.stride}, count - n, depth, dot.at(n, 0), first,
                               s + static_cast<int64_t>(n) * bm, largest);
}

// Units are summed in stretches of so many: several short sums lose fewer bits than one long one.
inline constexpr int32_t kChannels = 128;

// S = K Q^T for `count` keys, as far as `live` needs it. Rows up to the next multiple of the micro-tile are written
// with copies of the last key. `largest`, if not null, is raised to the largest score of each query.
template <class Dot>
void qk_units(const float* qt, int32_t bm, KeyRows k, int32_t count, const Span* live, int32_t units, const Dot& dot,
              float* s, float* largest) {
  const auto columns = [&]<int kRows, int kVecs>(int32_t lane) {
    const Span keys = seen(live, lane, kVecs * kLanes, count);
    const char* data = k.data + keys.first * k.stride;
    for (int32_t d = 0; d < units; d += kChannels, data += 4 * kChannels) {
      const int32_t depth = units - d < kChannels ? units - d : kChannels;
      const bool last = d + depth == units;
      qk_columns<Dot, kRows, kVecs>(qt + static_cast<int64_t>(d) * bm + lane, bm, {data, k.stride},
                                    keys.end - keys.first, depth, dot.at(keys.first, lane), d == 0,
                                    s + lane + static_cast<int64_t>(keys.first) * bm,
                                    last && largest != nullptr ? largest + lane : nullptr);
    }
  };
  int32_t lane = 0;
  // Four vectors are two and two: of three and one, the one would load as much for a third of the work.
  for (; lane + kQueryVecs * kLanes <= bm && bm - lane != 4 * kLanes; lane += kQueryVecs * kLanes)
    columns.template operator()<kAccumulators / kQueryVecs, kQueryVecs>(lane);
  for (; lane + 2 * kLanes <= bm; lane += 2 * kLanes) columns.template operator()<kTwoVecKeys, 2>(lane);
  for (; lane < bm; lane += kLanes) columns.template operator()<kMaxKeyRows, 1>(lane);
}

// O[rows of one group] = O * alpha + P^T V over `count` keys, kVecs vectors of value channels wide. A tile's keys are
// summed by themselves first: two short sums lose fewer bits than one long one. `each` is told every key.
struct Nothing {
  ATTNKIT_INLINE void operator()(int32_t) const {}
};
template <class Dot, int kRows, int kVecs, class T, class Each = Nothing>
ATTNKIT_INLINE void pv_tile(const float* p, int32_t bm, const T* v, int64_t v_stride, int32_t count, const float* alpha,
                            float* o, int32_t o_stride, Each each = {}) {
  vf acc[kRows][kVecs];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) acc[r][c] = vf{};
  for (int32_t n = 0; n < count; ++n) {
    each(n);
    vf value[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) value[c] = widen(v + n * v_stride + c * kLanes);
    const float* weight = p + static_cast<int64_t>(n) * bm;
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const vf w = set1_bits(weight + r);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) acc[r][c] = Dot::run(w, value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    const vf a = set1(alpha[r]);
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      float* x = o + static_cast<int64_t>(r) * o_stride + c * kLanes;
      store(x, fma(load(x), a, acc[r][c]));
    }
  }
}

// Groups of kRows queries from m on, as many as there are. Not inlined, as above.
template <class Dot, int kRows, int kVecs>
__attribute__((noinline)) int32_t pv_groups(const float* p, int32_t bm, const float* v, int64_t v_stride, int32_t count,
                                            const Span* live, const float* alpha, float* o, int32_t o_stride, int32_t m,
                                            int32_t queries) {
  for (; queries - m >= kRows; m += kRows) {
    const Span keys = seen(live, m, kRows, count);
    const int32_t first = keys.first / Dot::kKeys, end = (keys.end + Dot::kKeys - 1) / Dot::kKeys;
    pv_tile<Dot, kRows, kVecs>(p + m + static_cast<int64_t>(first) * bm, bm, v + first * v_stride, v_stride,
                               end - first, alpha + m, o + static_cast<int64_t>(m) * o_stride, o_stride);
  }
  return m;
}

// `v`: rows of Dot::kKeys keys.
template <class Dot>
void pv(const float* p, int32_t bm, const float* v, int64_t v_stride, int32_t count, const Span* live,
        const float* alpha, float* o, int32_t o_stride, int32_t queries) {
  int32_t c = 0;
  const auto columns = [&]<int kVecs>() {
    int32_t m = 0;
    const auto groups = [&]<int kRows>() {
      if (queries - m >= kRows)
        m = pv_groups<Dot, kRows, kVecs>(p, bm, v + c, v_stride, count, live, alpha, o + c, o_stride, m, queries);
    };
    groups.template operator()<kOutRows>();
    groups.template operator()<4>();
    groups.template operator()<2>();
    groups.template operator()<1>();
    c += kVecs * kLanes;
  };
  while (c + kOutVecs * kLanes <= o_stride) columns.template operator()<kOutVecs>();
  while (c + 2 * kLanes <= o_stride) columns.template operator()<2>();
  while (c < o_stride) columns.template operator()<1>();
}
