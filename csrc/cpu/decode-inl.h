// The products of a tile with few queries: its lanes would mostly be empty, and memory is what limits.
//
// Keys become the lanes of the scores instead: squares of them are transposed in registers, from the elements that
// memory holds, and multiplied there. Values are widened in the registers of the product. Every sum has the order that
// it has in products-inl.h, so that which of the two is taken changes no bit.
//
// All the while what is needed next is fetched into the cache, in the order of memory, a row for each row that is
// used: in one burst the fetches would make arithmetic wait for memory.

inline constexpr int kFewLanes = kLanes;            // beyond, lanes are full enough
inline constexpr int kFewRows = 4;                  // queries at once,
inline constexpr int kBlockVecs = 2;  // with so many vectors of keys: sums enough to hide how long a product takes,
inline constexpr int kBlockKeys = 32;  // keys that are in use, and as many are being fetched: they share the cache
inline constexpr int kFewVecs = kAccumulators / 6;  // or with so many vectors of value channels

// Calls f<rows>(first) for the rows of all lanes, four, two or one at a time.
template <class F>
ATTNKIT_INLINE void by_rows(int32_t lanes, F f) {
  int32_t m = 0;
  for (; lanes - m >= kFewRows; m += kFewRows) f.template operator()<kFewRows>(m);
  for (; lanes - m >= 2; m += 2) f.template operator()<2>(m);
  if (lanes > m) f.template operator()<1>(m);
}

// ---- transposition ----

// to[d][n] = f(rows[n][d]), `ld` floats from one d to the next; zeros up to a whole vector of rows.
template <class T, class F>
void transpose_rows(const T* const* rows, int32_t count, int32_t width, F f, float* to, int64_t ld) {
  for (int32_t n = 0; n < count; n += kLanes) {
    int32_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = n + i < count ? f(widen(rows[n + i] + d)) : vf{};
      transpose_square(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * ld + n, r[i]);
    }
    for (; d < width; ++d)
      for (int i = 0; i < kLanes; ++i) to[d * ld + n + i] = n + i < count ? f(widen_one(rows[n + i][d])) : 0;
  }
}

// ---- elements ----

// 4 bytes, a unit: one channel, or two of bfloat16, which are transposed as they lie in memory and then widened.
template <class T>
inline constexpr int kPerUnit = 1;
template <>
inline constexpr int kPerUnit<Bf16> = 2;
ATTNKIT_INLINE vf load_units(const float* p) { return load(p); }
ATTNKIT_INLINE vf load_units(const F16* p) { return widen(p); }
ATTNKIT_INLINE vf load_units(const Bf16* p) { return load(reinterpret_cast<const float*>(p)); }
ATTNKIT_INLINE vf load_units(const float* low, const float* high) { return load_halves(low, high); }
ATTNKIT_INLINE vf load_units(const F16* low, const F16* high) {
  return widen_halves(load_halves(&low->bits, &high->bits));
}
ATTNKIT_INLINE vf load_units(const Bf16* low, const Bf16* high) {
  return load_halves(reinterpret_cast<const float*>(low), reinterpret_cast<const float*>(high));
}
template <class T>
ATTNKIT_INLINE vf widen_unit(const T*, vf unit, int) {
  return unit;
}
ATTNKIT_INLINE vf widen_unit(const Bf16*, vf unit, int channel) {
  const vi x = as_int(unit);
  return as_float(channel == 0 ? x << 16 : x & static_cast<int32_t>(0xffff0000));
}

// Even and odd channels become neighbours.
template <int... kLane>
ATTNKIT_INLINE void interleave_lanes(vf& even, vf& odd, std::integer_sequence<int, kLane...>) {
  const vf low = __builtin_shuffle(even, odd, vi{kLane / 2 + kLane % 2 * kLanes...});
  odd = __builtin_shuffle(even, odd, vi{(kLanes + kLane) / 2 + kLane % 2 * kLanes...});
  even = low;
}
ATTNKIT_INLINE void interleave(vf& even, vf& odd) {
  interleave_lanes(even, odd, std::make_integer_sequence<int, kLanes>{});
}

// ---- what is needed next ----

// The rows in use, and those that follow them.
struct Ahead {
  const Lines &now, &next;

  const char* at(int32_t n) const { return n < now.count ? now.at(n) : next.at(n - now.count); }
};

// While rows are used, one after the other, fetches those that are used a block later. A fetch does not wait for the
// address of a page of memory to be found, and so may come to nothing where its page is new: a line of each page is
// fetched a block earlier still. Not a line of each row: lines out of turn cost half the speed of memory. Rows that
// begin elsewhere are a new stream to the machine: it is given their first lines early.
class Fetches {
 public:
  ATTNKIT_INLINE Fetches(const Ahead& ahead, int32_t first)
      : ahead_(ahead), n_(first), near_(ahead.at(first + kRows)), far_(ahead.at(first + kPageRows)) {}

  ATTNKIT_INLINE void row() {
    for (int32_t b = 0; b < ahead_.now.bytes; b += kLine) __builtin_prefetch(near_ + b);
    const char* last = far_ + ahead_.now.bytes - 1;
    const bool opens = static_cast<int64_t>(reinterpret_cast<uintptr_t>(last) % kPage) < ahead_.now.stride;
    if (opens) __builtin_prefetch(last);
    near_ += ahead_.now.stride;
    far_ += ahead_.now.stride;
    if (++n_ % Lines::kRun == 0) aim();
  }

 private:
  static constexpr int32_t kRows = kBlockKeys, kPageRows = 2 * kRows, kLine = 64, kPage = 4096, kFirstLines = 16;

  ATTNKIT_INLINE void aim() {
    near_ = ahead_.at(n_ + kRows);
    const char* far = ahead_.at(n_ + kPageRows);
    if (far != far_)
      for (int32_t b = 0; b < kFirstLines * kLine; b += kLine) __builtin_prefetch(far + b);
    far_ = far;
  }

  const Ahead& ahead_;
  int32_t n_;
  const char *near_, *far_;
};

// Constants of the compiler: what ran when the library is loaded would run on machines without this instruction set.
inline constexpr char kNowhere = 0;
inline constexpr Lines kNoLines = [] {
  Lines lines;
  for (const char*& run : lines.run) run = &kNowhere;
  return lines;
}();
inline constexpr Ahead kNothing{kNoLines, kNoLines};

// ---- scores ----

// Units of keys transposed at once: of each key half a vector of them, so that those of all keys fit the registers.
inline constexpr int kStripUnits = kLanes > 8 ? kLanes / 2 : 4;

// r[u]: unit u of kLanes rows.
template <class T>
ATTNKIT_INLINE void transpose_strip(const T* const* rows, int64_t at, vf* r) {
#pragma GCC unroll 8
  for (int i = 0; i < kStripUnits; ++i) {
    if constexpr (kStripUnits == kLanes) {
      r[i] = load_units(rows[i] + at);
    } else {
      const int n = i / 4 * 8 + i % 4;
      r[i] = load_units(rows[n] + at, rows[n + 4] + at);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kStripUnits; i += 4) transpose_quads(r + i);
  if constexpr (kStripUnits == 8) part_quads(r);
}

// S^T of kRows queries and at most kVecs vectors of keys: qk_tile with the roles exchanged. `channels` is a whole
// number of vectors of units; rows of queries are `q_stride` wide, with zeros where there are no channels.
template <int kRows, int kVecs, class T>
__attribute__((noinline)) void few_tile(const float* q, int64_t q_stride, int32_t channels, const Lines& k,
                                        int32_t first, float* st, int32_t st_stride, const Ahead& ahead) {
  constexpr int kStep = kStripUnits * kPerUnit<T>;
  const T* key[kVecs * kLanes];  // the last key is repeated
  for (int v = 0; v < kVecs; ++v) {
    const int32_t left = k.count - 1 - first - v * kLanes;
    const char* at = k.at(left < 0 ? k.count - 1 : first + v * kLanes);
    for (int i = 0; i < kLanes; ++i)
      key[v * kLanes + i] = reinterpret_cast<const T*>(at + (left < 0 ? 0 : i < left ? i : left) * k.stride);
  }
  const int32_t at_once = (kVecs * kLanes * kStep + channels - 1) / channels;
  Fetches fetches(ahead, first);
  int32_t rows = k.count - first < kVecs * kLanes ? k.count - first : kVecs * kLanes;  // to be fetched
  for (int32_t stretch = 0; stretch < channels; stretch += kChannels) {
    const int32_t end = channels - stretch < kChannels ? channels : stretch + kChannels;
    vf acc[kRows][kVecs] = {};
    for (int32_t d = stretch; d < end; d += kStep) {
      for (int i = 0; i < at_once && rows > 0; ++i, --rows) fetches.row();
      vf r[kVecs][kStripUnits];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) transpose_strip(key + v * kLanes, d, r[v]);
#pragma GCC unroll 8
      for (int i = 0; i < kStripUnits; ++i)
#pragma GCC unroll 2
        for (int u = 0; u < kPerUnit<T>; ++u) {
          vf x[kVecs];
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) x[v] = widen_unit(static_cast<const T*>(nullptr), r[v][i], u);
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) {
            const vf y = set1(q[m * q_stride + d + i * kPerUnit<T> + u]);
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) acc[m][v] = fma(y, x[v], acc[m][v]);
          }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* x = st + m * st_stride + v * kLanes;
        store(x, stretch == 0 ? acc[m][v] : load(x) + acc[m][v]);
      }
  }
}

// S^T of all queries and keys.
template <class T>
void few_scores(const float* q, int32_t lanes, int64_t q_stride, int32_t channels, const Lines& k, float* st,
                int32_t st_stride, const Ahead& ahead) {
  for (int32_t n = 0; n < k.count; n += kBlockVecs * kLanes) {
    by_rows(lanes, [&]<int kRows>(int32_t m) {
      few_tile<kRows, kBlockVecs, T>(q + static_cast<int64_t>(m) * q_stride, q_stride, channels, k, n,
                                     st + m * st_stride + n, st_stride, m == 0 ? ahead : kNothing);
    });
  }
}

// ---- weights ----

ATTNKIT_INLINE float largest_lane(vf x) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    vi other{};
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ half;
    x = max_or_second(__builtin_shuffle(x, other), x);
  }
  return x[0];
}

ATTNKIT_INLINE vf sums_of_four(const vf* x) {
  return fold_lanes(x, [](vf a, vf b) __attribute__((always_inline)) { return a + b; });
}
ATTNKIT_INLINE vf largest_of_four(const vf* x) {
  return fold_lanes(x, [](vf a, vf b) __attribute__((always_inline)) { return max_or_second(a, b); });
}

// The weights of plain scores, elementwise as softmax has them; the maxima and the factors of what was before. Into
// `sums`, if it is there, those of the weights; it has room for kFewLanes + kLanes.
inline void few_weights(float* st, int32_t ld, int32_t count, int32_t lanes, float* max, float* alpha,
                        float* sums = nullptr) {
  alignas(kBytes) float top[kFewLanes + kLanes] = {};
  by_rows(lanes, [&]<int kRows>(int32_t m) __attribute__((always_inline)) {
    vf largest[kFewRows] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) largest[i] = set1(max[m + i]);
    for (int32_t n = 0; n < count; n += kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) largest[i] = max_or_second(load(st + (m + i) * ld + n), largest[i]);
    store(top + m, largest_of_four(largest));
  });
  const vf largest = load(top), pivot = largest == set1(-kInfinity) ? vf{} : largest;
  store(alpha, exp_weight(load(max) - pivot));
  store(max, largest);
  store(top, pivot);
  by_rows(lanes, [&]<int kRows>(int32_t m) __attribute__((always_inline)) {
    vf sum[kFewRows] = {};
    for (int32_t n = 0; n < count; n += kLanes) {
      vf x[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) x[i] = load(st + (m + i) * ld + n) - set1(top[m + i]);
      exp_each<FineExp, kRows>(x);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        store(st + (m + i) * ld + n, x[i]);
        sum[i] += x[i];
      }
    }
    if (sums != nullptr) store(sums + m, sums_of_four(sum));
  });
}

// A row of kLanes queries for each key, from S^T. Told every row.
template <class F>
ATTNKIT_INLINE void few_by_key(const float* st, int32_t ld, int32_t count, int32_t lanes, float* s, F each) {
  for (int32_t n = 0; n < count; n += kLanes) {
    vf r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = i < lanes ? load(st + i * ld + n) : vf{};
    transpose_square(r);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      store(s + (n + i) * kLanes, r[i]);
      each(n + i, r[i]);
    }
  }
}

// ---- values ----

// O of kRows queries and kVecs vectors of units: pv_tile on the elements that memory holds. Keys of a tile come in
// blocks, whose rows begin at `v`, the number-th row of `ahead`: what the first have summed is in `sums`. Not inlined:
// it would spill.
template <int kRows, int kVecs, class T>
__attribute__((noinline)) void few_values_tile(const float* p, int32_t bm, const T* v, int64_t v_stride, int32_t first,
                                               int32_t end, bool last, float* sums, const float* alpha, float* o,
                                               int32_t o_stride, const Ahead& ahead, int32_t number, int32_t part,
                                               int32_t parts) {
  constexpr int kUnit = kPerUnit<T>;
  vf acc[kRows][kVecs][kUnit] = {};
  const auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c)
#pragma GCC unroll 2
        for (int u = 0; u < kUnit; ++u)
          f(r, acc[r][c][u], static_cast<int64_t>(r) * o_stride + (c * kUnit + u) * kLanes);
  };
  if (first > 0) each([&](int, vf& x, int64_t at) __attribute__((always_inline)) { x = load(sums + at); });
  const int32_t rows = end - first, fetched = rows * part / parts, share = rows * (part + 1) / parts - fetched;
  Fetches fetches(ahead, number + fetched);
  for (int32_t n = first, due = 0; n < end; ++n) {
    if ((due += share) >= rows) {
      due -= rows;
      fetches.row();
    }
    vf value[kVecs][kUnit];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      const vf x = load_units(v + (n - first) * v_stride + c * kLanes * kUnit);
#pragma GCC unroll 2
      for (int u = 0; u < kUnit; ++u) value[c][u] = widen_unit(v, x, u);
    }
    const float* weight = p + static_cast<int64_t>(n) * bm;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vf w = set1_bits(weight + r);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c)
#pragma GCC unroll 2
        for (int u = 0; u < kUnit; ++u) acc[r][c][u] = fma(w, value[c][u], acc[r][c][u]);
    }
  }
  if (!last) return each([&](int, vf& x, int64_t at) __attribute__((always_inline)) { store(sums + at, x); });
  if constexpr (kUnit == 2)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) interleave(acc[r][c][0], acc[r][c][1]);
  each([&](int r, vf& x, int64_t at)
           __attribute__((always_inline)) { store(o + at, fma(load(o + at), set1(alpha[r]), x)); });
}

// As pv, of few queries and of `count` values, from the first-th on. `sums`: room as for o.
template <class T>
void few_values(const float* p, int32_t bm, const Lines& v, int32_t first, int32_t count, float* sums,
                const float* alpha, float* o, int32_t o_stride, int32_t lanes, const Ahead& ahead) {
  constexpr int kUnit = kPerUnit<T>, kVecs = (kFewVecs + kUnit - 1) / kUnit, kWide = kVecs * kUnit * kLanes;
  const int32_t parts = (o_stride + kWide - 1) / kWide * ((lanes + kFewRows - 1) / kFewRows);
  for (int32_t n = 0, end; n < count; n = end) {
    end = n + v.adjacent(first + n, count - n < kBlockKeys ? count - n : kBlockKeys);
    const T* rows_of_block = reinterpret_cast<const T*>(v.at(first + n));
    int32_t c = 0, part = 0;
    const auto columns = [&]<int kWidth>() {
      by_rows(lanes, [&]<int kRows>(int32_t m) {
        const int64_t at = static_cast<int64_t>(m) * o_stride + c;
        few_values_tile<kRows, kWidth>(p + m, bm, rows_of_block + c, v.stride / static_cast<int64_t>(sizeof(T)), n, end,
                                       end == count, sums + at, alpha + m, o + at, o_stride, ahead, first + n, part++,
                                       parts);
      });
      c += kWidth * kUnit * kLanes;
    };
    while (c + kWide <= o_stride) columns.template operator()<kVecs>();
    while (c < o_stride) columns.template operator()<1>();
  }
}
