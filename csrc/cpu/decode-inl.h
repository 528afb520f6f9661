// The products of a tile with few queries: its lanes would mostly be empty, and memory is what limits.
//
// Keys become the lanes of the scores instead: a block of them is transposed in registers, from the elements that
// memory holds, and the queries are its rows. Every sum has the order that it has in products-inl.h, so that which of
// the two is taken changes no bit. All the while what is needed next is fetched into the cache, a few lines at each
// step: in one burst they would make arithmetic wait for memory. A tile's values are fetched while its scores are
// computed, the next tile's keys while its values are used; farther ahead they would push each other out of the cache.

inline constexpr int kFewLanes = kLanes;            // beyond, lanes are full enough
inline constexpr int kBlockVecs = 2;  // vectors of keys in a block: small, it shares the cache with a tile
inline constexpr int kFewVecs = kAccumulators / 6;  // vectors of value channels at once, for up to four queries

// ---- transposition ----

// The six shuffles of a transposition, by their lanes. Within 128 bits: the low or high elements of two vectors in
// turn, one or two at a time. Across: the even or the odd quarters of both.
enum Step { kLow1, kHigh1, kLow2, kHigh2, kEven4, kOdd4 };
constexpr int step_lane(Step step, int lane) {
  const int quad = lane & ~3, at = lane & 3;
  switch (step) {
    case kLow1: return quad + at / 2 + at % 2 * kLanes;
    case kHigh1: return quad + 2 + at / 2 + at % 2 * kLanes;
    case kLow2: return quad + at % 2 + at / 2 * kLanes;
    case kHigh2: return quad + 2 + at % 2 + at / 2 * kLanes;
    case kEven4: return quad * 2 % kLanes + at + quad * 2 / kLanes * kLanes;
    default: return quad * 2 % kLanes + 4 + at + quad * 2 / kLanes * kLanes;
  }
}
template <Step kStep, int... kLane>
ATTNKIT_INLINE vf shuffle_lanes(vf a, vf b, std::integer_sequence<int, kLane...>) {
  return __builtin_shuffle(a, b, vi{step_lane(kStep, kLane)...});
}
template <Step kStep>
ATTNKIT_INLINE vf shuffle(vf a, vf b) {
  return shuffle_lanes<kStep>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// r[i][j] becomes r[j][i].
ATTNKIT_INLINE void transpose(vf* r) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 4) {
    const vf a = shuffle<kLow1>(r[i], r[i + 1]), b = shuffle<kHigh1>(r[i], r[i + 1]);
    const vf c = shuffle<kLow1>(r[i + 2], r[i + 3]), d = shuffle<kHigh1>(r[i + 2], r[i + 3]);
    r[i] = shuffle<kLow2>(a, c);
    r[i + 1] = shuffle<kHigh2>(a, c);
    r[i + 2] = shuffle<kLow2>(b, d);
    r[i + 3] = shuffle<kHigh2>(b, d);
  }
  // r[4 g + j] holds column 4 q + j of rows 4 g .. 4 g + 3 in its quarter q.
  if constexpr (kLanes == 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf a = r[j], b = r[4 + j];
      r[j] = shuffle<kEven4>(a, b);
      r[4 + j] = shuffle<kOdd4>(a, b);
    }
  }
  if constexpr (kLanes == 16) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf a = shuffle<kEven4>(r[j], r[4 + j]), b = shuffle<kOdd4>(r[j], r[4 + j]);
      const vf c = shuffle<kEven4>(r[8 + j], r[12 + j]), d = shuffle<kOdd4>(r[8 + j], r[12 + j]);
      r[j] = shuffle<kEven4>(a, c);
      r[8 + j] = shuffle<kOdd4>(a, c);
      r[4 + j] = shuffle<kEven4>(b, d);
      r[12 + j] = shuffle<kOdd4>(b, d);
    }
  }
}

// to[d][n] = f(rows[n][d]), `ld` floats from one d to the next; zeros up to a whole vector of rows.
template <class T, class F>
void transpose_rows(const T* const* rows, int32_t count, int32_t width, F f, float* to, int64_t ld) {
  for (int32_t n = 0; n < count; n += kLanes) {
    int32_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = n + i < count ? f(widen(rows[n + i] + d)) : vf{};
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * ld + n, r[i]);
    }
    for (; d < width; ++d)
      for (int i = 0; i < kLanes; ++i) to[d * ld + n + i] = n + i < count ? f(widen_one(rows[n + i][d])) : 0;
  }
}

// ---- elements ----

// 4 bytes of a row of keys, a unit: one channel or two. Transposed as they are, then widened.
template <class T>
inline constexpr int kPerUnit = 4 / static_cast<int>(sizeof(T));
ATTNKIT_INLINE vf widen_unit(const float*, vf unit, int) { return unit; }
ATTNKIT_INLINE vf widen_unit(const Bf16*, vf unit, int channel) {
  const vi x = as_int(unit);
  return as_float(channel == 0 ? x << 16 : x & static_cast<int32_t>(0xffff0000));
}
ATTNKIT_INLINE vf widen_unit(const F16*, vf unit, int channel) {
  const vu x = vu(as_int(unit));
  return widen_half(channel == 0 ? x & 0xffff : x >> 16);
}

// ---- what is needed next ----

// Fetches rows of a tile, line by line.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const char* rows, int64_t stride, int64_t bytes, int32_t count)
      : at_(rows), row_(rows), stride_(stride), bytes_(bytes), lines_((bytes + kLine - 1) / kLine * count) {}

  // Lines to fetch at each of so many steps, which are one of the `phases` phases that are left.
  int32_t share(int64_t steps, int32_t phases) const {
    return static_cast<int32_t>((lines_ + steps * phases - 1) / (steps * phases));
  }

  ATTNKIT_INLINE void fetch(int32_t lines) {
    for (; lines > 0 && lines_ > 0; --lines, --lines_) {
      __builtin_prefetch(at_);
      at_ += kLine;
      if (at_ >= row_ + bytes_) at_ = row_ += stride_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_ = nullptr, *row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, lines_ = 0;
};

// ---- scores ----

// K^T of a block of at most kBlockVecs vectors of keys, channels by `ld` keys, in float32. The last key is repeated to
// a whole vector.
template <class T>
void transpose_keys(const T* k, int64_t stride, int32_t count, int32_t channels, float* kt, int32_t ld, Ahead& shared,
                    int32_t share) {
  Ahead ahead = shared;  // kept in registers
  constexpr int kAtOnce = kLanes * kPerUnit<T>;
  for (int32_t n = 0; n < count; n += kLanes)
    for (int32_t d = 0; d < channels; d += kAtOnce) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        r[i] = load(reinterpret_cast<const float*>(k + (n + i < count ? n + i : count - 1) * stride + d));
      ahead.fetch(share);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 2
        for (int u = 0; u < kPerUnit<T>; ++u)
          store(kt + static_cast<int64_t>(d + i * kPerUnit<T> + u) * ld + n,
                widen_unit(static_cast<const T*>(nullptr), r[i], u));
    }
  shared = ahead;
}

// S^T of kRows queries and kVecs vectors of keys: qk_tile with the roles exchanged.
template <int kRows, int kVecs>
__attribute__((noinline)) void few_tile(const float* q, int32_t head_dim, const float* kt, float* st, int32_t st_stride,
                                        Ahead& shared, int32_t share) {
  Ahead ahead = shared;  // kept in registers
  for (int32_t d = 0; d < head_dim; d += kChannels) {
    const int32_t end = head_dim - d < kChannels ? head_dim : d + kChannels;
    vf acc[kRows][kVecs] = {};
    for (int32_t c = d; c < end; ++c) {
      ahead.fetch(share);
      vf key[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) key[v] = load(kt + static_cast<int64_t>(c) * kVecs * kLanes + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const vf x = set1(q[static_cast<int64_t>(r) * head_dim + c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, key[v], acc[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* x = st + r * st_stride + v * kLanes;
        store(x, d == 0 ? acc[r][v] : load(x) + acc[r][v]);
      }
  }
  shared = ahead;
}

// S^T of all queries for one block, which has kBlockVecs vectors of keys or one.
inline void few_scores(const float* q, int32_t lanes, int32_t head_dim, const float* kt, int32_t ld, float* st,
                       int32_t st_stride, Ahead& ahead, int32_t share) {
  int32_t m = 0;
  const auto rows = [&]<int kRows>() {
    const auto tile = ld == kLanes ? few_tile<kRows, 1> : few_tile<kRows, kBlockVecs>;
    tile(q + static_cast<int64_t>(m) * head_dim, head_dim, kt, st + m * st_stride, st_stride, ahead, share);
    m += kRows;
  };
  while (lanes - m >= 4) rows.template operator()<4>();
  while (lanes - m >= 2) rows.template operator()<2>();
  if (lanes > m) rows.template operator()<1>();
}

// ---- weights ----

// The weights of plain scores, elementwise as softmax has them; the maxima and the factors of what was before.
inline void few_weights(float* st, int32_t ld, int32_t count, int32_t lanes, float* max, float* alpha, Ahead& ahead) {
  const int32_t share = ahead.share(int64_t{lanes} * ((count + kLanes - 1) / kLanes), 2);
  for (int32_t m = 0; m < lanes; ++m, st += ld) {
    vf largest = set1(-kInfinity);
    for (int32_t n = 0; n < count; n += kLanes) largest = max_or_second(load(st + n), largest);
    float top = max[m];
    for (int i = 0; i < kLanes; ++i) top = largest[i] > top ? largest[i] : top;
    const vf pivot = set1(top == -kInfinity ? 0 : top);
    alpha[m] = exp_weight(set1(max[m]) - pivot)[0];
    max[m] = top;
    for (int32_t n = 0; n < count; n += kLanes) {
      ahead.fetch(share);
      store(st + n, exp_weight(load(st + n) - pivot));
    }
  }
}

// A row of kLanes queries for each key, from S^T. Told every row.
template <class F>
ATTNKIT_INLINE void few_by_key(const float* st, int32_t ld, int32_t count, int32_t lanes, float* s, F each) {
  for (int32_t n = 0; n < count; n += kLanes) {
    vf r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = i < lanes ? load(st + i * ld + n) : vf{};
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      store(s + (n + i) * kLanes, r[i]);
      each(n + i, r[i]);
    }
  }
}

// ---- values ----

// As pv, of few queries, on the elements that memory holds.
template <class T>
void few_values(const float* p, int32_t bm, const T* v, int64_t v_stride, int32_t count, const float* alpha, float* o,
                int32_t o_stride, int32_t lanes, Ahead& shared) {
  Ahead ahead = shared;  // kept in registers
  const int32_t share =
      ahead.share(int64_t{count} * ((o_stride + kFewVecs * kLanes - 1) / (kFewVecs * kLanes)) * ((lanes + 3) / 4), 1);
  const auto fetch = [&](int32_t) { ahead.fetch(share); };
  int32_t c = 0;
  const auto columns = [&]<int kVecs>() {
    int32_t m = 0;
    const auto rows = [&]<int kRows>() {
      pv_tile<FloatDot, kRows, kVecs>(p + m, bm, v + c, v_stride, count, alpha + m,
                                      o + static_cast<int64_t>(m) * o_stride + c, o_stride, fetch);
      m += kRows;
    };
    while (lanes - m >= 4) rows.template operator()<4>();
    while (lanes - m >= 2) rows.template operator()<2>();
    if (lanes > m) rows.template operator()<1>();
    c += kVecs * kLanes;
  };
  while (c + kFewVecs * kLanes <= o_stride) columns.template operator()<kFewVecs>();
  while (c < o_stride) columns.template operator()<1>();
  shared = ahead;
}
