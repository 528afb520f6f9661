// The products of a tile with few queries: its lanes would mostly be empty, and memory is what limits.
//
// Keys become the lanes of the scores instead: a tile of them is transposed in registers, from the elements that memory
// holds, and the queries are its rows. Every sum has the order that it has in products-inl.h, so that which of the two
// is taken changes no bit. While a tile's keys are read its values are fetched into the cache, and while its values are
// read the keys of the next: memory never waits for arithmetic.

inline constexpr int kFewLanes = kLanes * 3 / 4;  // where both ways to the scores cost the same
inline constexpr int kFewVecs = kAccumulators / 6;  // vectors of keys at once, for up to four queries

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

// Rows that will be needed next. To the second level of cache: the first has its hands full.
struct Ahead {
  const char* at;  // null: nothing
  int64_t stride, bytes;
  int32_t rows;

  // The part of a row that lies beside a stretch of another: from `first` of `of` bytes on.
  ATTNKIT_INLINE void fetch(int32_t row, int64_t first, int64_t end) const {
    if (row >= rows) return;
    for (int64_t i = first; i < (end < bytes ? end : bytes); i += 64) __builtin_prefetch(at + row * stride + i, 0, 2);
  }
};

// ---- scores ----

// K^T of `count` keys, channels by `ld` keys, in float32. The last key is repeated to a whole vector.
template <class T>
void transpose_keys(const T* k, int64_t stride, int32_t count, int32_t head_dim, float* kt, int32_t ld,
                    const Ahead& ahead) {
  constexpr int kChannelsAtOnce = kLanes * kPerUnit<T>;
  for (int32_t n = 0; n < count; n += kLanes)
    for (int32_t d = 0; d < head_dim; d += kChannelsAtOnce) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const T* row = k + (n + i < count ? n + i : count - 1) * stride + d;
        r[i] = load(reinterpret_cast<const float*>(row));
      }
      const int64_t first = d * static_cast<int64_t>(sizeof(T)), more = kLanes * 4;
      const int64_t end = d + kChannelsAtOnce < head_dim ? first + more : ahead.bytes;
      for (int i = 0; i < kLanes; ++i) ahead.fetch(n + i, first, end);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 2
        for (int u = 0; u < kPerUnit<T>; ++u)
          store(kt + static_cast<int64_t>(d + i * kPerUnit<T> + u) * ld + n,
                widen_unit(static_cast<const T*>(nullptr), r[i], u));
    }
}

// S^T of kRows queries: the roles of qk_tile exchanged.
template <int kRows>
void few_rows(const float* q, int32_t head_dim, const float* kt, int32_t ld, float* st) {
  for (int32_t d = 0; d < head_dim; d += kChannels) {
    const int32_t depth = head_dim - d < kChannels ? head_dim - d : kChannels;
    const KeyRows queries{reinterpret_cast<const char*>(q + d), 4 * static_cast<int64_t>(head_dim)};
    const float* channel = kt + static_cast<int64_t>(d) * ld;
    int32_t n = 0;
    for (; n + kFewVecs * kLanes <= ld; n += kFewVecs * kLanes)
      qk_tile<FloatDot, kRows, kFewVecs>(channel + n, ld, queries, kRows, depth, 1, d == 0, st + n, nullptr);
    for (; n < ld; n += kLanes)
      qk_tile<FloatDot, kRows, 1>(channel + n, ld, queries, kRows, depth, 1, d == 0, st + n, nullptr);
  }
}

// S, a row of kLanes queries for each key.
inline void few_scores(const float* q, int32_t lanes, int32_t head_dim, const float* kt, int32_t ld, float* st,
                       float* s) {
  int32_t m = 0;
  const auto rows = [&]<int kRows>() {
    few_rows<kRows>(q + static_cast<int64_t>(m) * head_dim, head_dim, kt, ld, st + m * ld);
    m += kRows;
  };
  while (lanes - m >= 4) rows.template operator()<4>();
  while (lanes - m >= 2) rows.template operator()<2>();
  if (lanes > m) rows.template operator()<1>();
  for (int32_t n = 0; n < ld; n += kLanes) {
    vf r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = i < lanes ? load(st + i * ld + n) : vf{};
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(s + (n + i) * kLanes, r[i]);
  }
}

// ---- values ----

// As pv, on the elements that memory holds, of few queries.
template <class T>
void few_values(const float* p, int32_t bm, const T* v, int64_t v_stride, int32_t count, const float* alpha, float* o,
                int32_t o_stride, int32_t lanes, const Ahead& ahead) {
  int32_t c = 0;
  const auto columns = [&]<int kVecs>() {
    const int64_t first = c * static_cast<int64_t>(sizeof(T)), more = kVecs * kLanes * static_cast<int64_t>(sizeof(T));
    const int64_t end = c + kVecs * kLanes < o_stride ? first + more : ahead.bytes;
    const auto fetch = [&](int32_t n) { ahead.fetch(n, first, end); };
    int32_t m = 0;
    const auto rows = [&]<int kRows>(auto each) {
      pv_tile<FloatDot, kRows, kVecs>(p + m, bm, v + c, v_stride, count, alpha + m,
                                      o + static_cast<int64_t>(m) * o_stride + c, o_stride, each);
      m += kRows;
    };
    if (lanes >= 4) rows.template operator()<4>(fetch);
    while (lanes - m >= 4) rows.template operator()<4>(Nothing{});
    if (lanes - m >= 2) m == 0 ? rows.template operator()<2>(fetch) : rows.template operator()<2>(Nothing{});
    if (lanes > m) m == 0 ? rows.template operator()<1>(fetch) : rows.template operator()<1>(Nothing{});
    c += kVecs * kLanes;
  };
  while (c + kFewVecs * kLanes <= o_stride) columns.template operator()<kFewVecs>();
  while (c < o_stride) columns.template operator()<1>();
}
