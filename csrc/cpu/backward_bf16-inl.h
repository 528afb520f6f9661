// The backward on the bfloat16 dot-product instruction: queries, cotangents, keys and values as pairs of channels where
// scores are computed; weights and slopes as pairs of queries for dv and dk, and as pairs of keys for dq. Weights and
// slopes are rounded to bfloat16 once, after float32 has made them; all sums are float32. The scale is a factor of
// sums.

struct PairLayout : BackwardLayout {
  int32_t units_k, units_v;  // of a row of channels, a whole number of vectors
  size_t q_units, do_units;  // rows of units, where memory has them otherwise; before the tiles, of k and v
  size_t q_pairs, do_pairs;  // [pair of rows][channel]
  size_t k_pairs;  // likewise, of_keys
  size_t weights, slopes, slope_rows;  // [pair of queries][key]; [query][pair of keys]

  explicit PairLayout(const BackwardCall& c)
      : BackwardLayout(c),
        units_k(round_up(c.problem->head_dim, 2 * kLanes) / 2),
        units_v(round_up(c.problem->v_head_dim, 2 * kLanes) / 2) {
    const int32_t most = c.tile_q > c.tile_kv ? c.tile_q : c.tile_kv, q_rows = (c.tile_q + 1) / 2;
    q_units = places.take(most, units_k);
    do_units = places.take(most, units_v);
    q_pairs = places.take(q_rows, 2 * units_k);
    do_pairs = places.take(q_rows, 2 * units_v);
    k_pairs = of_keys.take((c.tile_kv + 1) / 2, 2 * units_k);
    weights = places.take(q_rows, bn);
    slopes = places.take(q_rows, bn);
    slope_rows = places.take(c.tile_q, bn / 2);
  }
};

// ---- what a product's result becomes ----

struct StoreScaled {
  float* c;
  int64_t stride;
  float scale;
  ATTNKIT_INLINE vf operator()(vf x, const float*, int32_t) const { return x * set1(scale); }
};

struct Slopes {  // the same pairs, twice
  float *pairs, *rows;
  int64_t stride;

  ATTNKIT_INLINE void put(vf first, vf second, int32_t row, bool two, int32_t lane) const {
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    store(pairs + row / 2 * stride + lane, in_pairs(both));
    float* at = rows + (row * stride + lane) / 2;
    put_row(at, _mm512_castsi512_si256(both));
    if (two) put_row(at + stride / 2, _mm512_extracti64x4_epi64(both, 1));
  }
  static ATTNKIT_INLINE void put_row(float* at, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), x); }
};

// 2^x of what is rounded to 8 bits next, several vectors in step. Between sixteenths a straight line is right
// to 1.2e-4, a sixteenth of that rounding. Multiplications wait for dot products, additions do not: there are as few as
// can be.
template <int kCount>
ATTNKIT_INLINE void exp2_rough(vf* x) {
  const vf magic = set1(786432.0f);
  vf t[kCount], n[kCount], power[kCount];
  ATTNKIT_EACH x[i] = max_or_second(set1(-160.0f), x[i]);
  ATTNKIT_EACH t[i] = x[i] + magic;
  ATTNKIT_EACH n[i] = t[i] - magic;
  ATTNKIT_EACH x[i] = fma(x[i] - n[i], set1(kLn2), set1(1.17e-4f));
  ATTNKIT_EACH power[i] = look_up(kSixteenths, as_int(t[i]));
  ATTNKIT_EACH x[i] = scale_or_zero(fma(power[i], x[i], power[i]), n[i], kLeastPower);
}

// What weights and slopes of pairs are made of, where no program changes them. `at`: the first key of a vector.
struct AllPairs {
  ATTNKIT_INLINE vf exponent(vf s, float scale, float lse, int32_t, int32_t) const {
    return fma(s, set1(scale * kLog2e), set1(-lse * kLog2e));
  }
  ATTNKIT_INLINE vf existing(vf x, int32_t, int32_t) const { return x; }
  ATTNKIT_INLINE void lose(vf, int32_t, int32_t) const {}
};

struct LivePairs : AllPairs {
  const float* live;  // the bits of pairs that exist, for each row and vector of keys
  int32_t stride;

  ATTNKIT_INLINE vf existing(vf x, int32_t row, int32_t at) const {
    const int32_t bits = int_at(live + row * stride + at / kLanes);
    return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)x);
  }
};

// Scores lose what is carried, which loses the slopes.
struct CarriedPairs : AllPairs {
  const float* f;  // [query][key], `stride` wide
  float* d_f;  // likewise
  int64_t stride;

  ATTNKIT_INLINE vf exponent(vf s, float scale, float lse, int32_t row, int32_t at) const {
    return fma(s, set1(scale), vf{} - (load(f + row * stride + at) + set1(lse))) * set1(kLog2e);
  }
  ATTNKIT_INLINE void lose(vf slope, int32_t row, int32_t at) const {
    float* x = d_f + row * stride + at;
    store(x, load(x) - slope);
  }
};

// Weights and slopes of rows from their scores and do . v.
template <class Pairs>
struct PairSlopes {
  Pairs pairs;
  const float *lse, *delta;
  float scale;
  float* weights;
  Slopes to;

  // Of row `row` and (`two`) the next. `s`, `dp`: sums of both rows, kVecs vectors each.
  template <int kVecs>
  ATTNKIT_INLINE void put(const float* s, const float* dp, int32_t row, bool two, int32_t lane) const {
    constexpr int kWidth = kVecs * kLanes;
    const int32_t rows[2] = {row, two ? row + 1 : row};
    vf w[2][kVecs];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        w[i][v] = pairs.exponent(load(s + i * kWidth + v * kLanes), scale, lse[rows[i]], rows[i], lane + v * kLanes);
    exp2_rough<2 * kVecs>(w[0]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const int32_t at = lane + v * kLanes;
      const auto weight = [&](int i) { return pairs.existing(w[i][v], rows[i], at); };
      const auto slope = [&](int i) {
        const vf d = load(dp + i * kWidth + v * kLanes) - set1(delta[rows[i]]);
        const vf x = pairs.existing(w[i][v] * d, rows[i], at);
        pairs.lose(x, rows[i], at);
        return x;
      };
      store(weights + row / 2 * to.stride + at, pairs_of(weight(0), two ? weight(1) : vf{}));
      const vf first = slope(0);
      to.put(first, two ? slope(1) : vf{}, row, two, at);
    }
  }
};

class PairBackward : public Backward {
 public:
  using Layout = PairLayout;

  PairBackward(const BackwardCall& c, const BackwardTask& t, float* workspace)
      : Backward(c, t, workspace),
        pairs_(c),
        weights_(ws_ + pairs_.weights),
        slopes_{ws_ + pairs_.slopes, ws_ + pairs_.slope_rows, 0} {
    keys_ = workspace + pairs_.places.next;
  }

  void begin(const float* gone = nullptr) {
    const auto [k, v] = units_of_keys(gone);
    const auto same = [](vf x) { return x; };
    transpose(k, (p_.head_dim + 1) / 2, keys_ + at_.kt, at_.bn, same);
    transpose(v, (p_.v_head_dim + 1) / 2, keys_ + at_.vt, at_.bn, same);
    pair_rows(k, t_.count, pairs_.units_k, keys_ + pairs_.k_pairs);
  }

 protected:
  Operands operands(const BackwardTile& tile) override {
    slopes_.stride = extent(tile).lanes;
    return {units_of(p_.q, query_lines(tile), p_.head_dim, pairs_.q_units),
            units_of(g_.d_o, cotangent_lines(tile), p_.v_head_dim, pairs_.do_units)};
  }
  int32_t depth_k() const { return (p_.head_dim + 1) / 2; }
  int32_t depth_v() const { return (p_.v_head_dim + 1) / 2; }

  void scores(const BackwardTile& tile, const Operands& of_tile) override {
    const Extent of = extent(tile);
    float* s = ws_ + at_.s;
    in_stretches<PairDot>(of_tile.q, of.rows, keys_ + at_.kt + of.lane, depth_k(), of.lanes,
                          StoreScaled{s, of.lanes, p_.scale}, AddScaled{s, of.lanes, p_.scale});
  }
  void slopes(const BackwardTile& tile, const Operands& of_tile) override {
    const Extent of = extent(tile);
    float* dp = ws_ + at_.dp;
    in_stretches<PairDot>(of_tile.d_o, of.rows, keys_ + at_.vt + of.lane, depth_v(), of.lanes, Put{dp, of.lanes},
                          Add{dp, of.lanes});
  }

  void add_products(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile) override {
    round_tile(extent(tile));
    multiply_rounded(tile, tiles, of_tile);
  }

  bool at_once(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile) override {
    if (!plain(tile) || !in_one_stretch()) return false;
    with_slopes(tile, [&](const auto& make) { products(tile, tiles, of_tile, make); });
    return true;
  }

  bool in_one_stretch() const { return depth_k() <= kChannels && depth_v() <= kChannels; }
  // `make`: rounded weights and slopes, of a micro-tile's sums.
  void products(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile, const auto& make) {
    const Extent of = extent(tile);
    in_columns(of.lanes, [&]<int kVecs>(int32_t lane) {
      plain_columns<kVecs>(of_tile.q, depth_k(), keys_ + at_.kt + of.lane, of_tile.d_o, depth_v(),
                           keys_ + at_.vt + of.lane, at_.bn, of.rows, lane, make);
    });
    multiply_rounded(tile, tiles, of_tile);
  }

  // What rounded weights and slopes add.
  virtual void multiply_rounded(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile) {
    const Extent of = extent(tile);
    const int32_t rows = of.rows, lanes = of.lanes, deep = (rows + 1) / 2;
    float *q_pairs = ws_ + pairs_.q_pairs, *do_pairs = ws_ + pairs_.do_pairs;
    pair_rows(of_tile.d_o, rows, pairs_.units_v, do_pairs);
    columns_times<PairDot>(weights_, lanes, tile.count, do_pairs, 2 * pairs_.units_v, at_.dv, deep, d_values(of),
                           at_.dv);
    pair_rows(of_tile.q, rows, pairs_.units_k, q_pairs);
    columns_times<PairDot>(slopes_.pairs, lanes, tile.count, q_pairs, 2 * pairs_.units_k, at_.dk, deep, d_keys(of),
                           at_.dk);
    end_rows(tile.count, rows);
    add_to_queries(tile, tiles, [&](float* sum, int64_t stride) {
      const float* k = keys_ + pairs_.k_pairs + static_cast<int64_t>(of.lane) * pairs_.units_k;
      rows_times<PairDot>(slopes_.rows, lanes / 2, rows, k, 2 * pairs_.units_k, at_.dk, (tile.count + 1) / 2,
                          AddScaled{sum, stride, p_.scale});
    });
  }

  // Whether nothing but weights and slopes is made of a tile's products.
  bool plain(const BackwardTile& tile) const {
    return !c_.has_score && !thinned() && !tile.rows.dead && !guarded(tile);
  }
  template <class Pairs>
  PairSlopes<Pairs> slopes_of(const BackwardTile& tile, const Pairs& pairs) const {
    return {pairs, tile.rows.lse, tile.rows.delta, p_.scale, weights_, slopes_};
  }
  template <class F>
  void with_slopes(const BackwardTile& tile, F f) {
    if (tile.full) return f(slopes_of(tile, AllPairs{}));
    f(slopes_of(tile, LivePairs{{}, live_bits(0, extent(tile).lane), at_.bn / kLanes}));
  }
  PairSlopes<CarriedPairs> carried_slopes(const BackwardTile& tile, const float* f, float* d_f, int64_t stride) const {
    return slopes_of(tile, CarriedPairs{{}, f, d_f, stride});
  }

  // Both products of a micro-tile, then what becomes of them: sums go no further than the first cache.
  template <int kVecs>
  static __attribute__((noinline)) void plain_columns(Rows qs, int32_t depth_k, const float* kt, Rows dos,
                                                      int32_t depth_v, const float* vt, int64_t stride, int32_t rows,
                                                      int32_t lane, const auto& slopes) {
    constexpr int kRows = tile_rows(kVecs), kWidth = kVecs * kLanes;
    alignas(kBytes) float s[kRows * kWidth], dp[kRows * kWidth];
    const auto product = [=](float* to, Rows a, const float* b, int32_t depth,
                             int32_t m) __attribute__((always_inline)) {
      vf sums[kRows][kVecs];
      rows_tile<PairDot>(sums, a.data + m * a.stride, a.stride, rows - m, b + lane, stride, depth);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(to + r * kWidth + v * kLanes, sums[r][v]);
    };
    for (int32_t m = 0; m < rows; m += kRows) {
      product(s, qs, kt, depth_k, m);
      product(dp, dos, vt, depth_v, m);
      const int32_t count = rows - m < kRows ? rows - m : kRows;
      for (int32_t r = 0; r < count; r += 2)
        slopes.template put<kVecs>(s + r * kWidth, dp + r * kWidth, m + r, r + 1 < count, lane);
    }
  }

  // Pairs of channels, padded with zeros to whole vectors; where they lie, if they lie so.
  Rows units_of(const View& view, const Lines& lines, int32_t width, size_t at) const {
    const Bf16* from = reinterpret_cast<const Bf16*>(lines.at(0));
    const int64_t stride = lines.stride / 2, channel = view.stride[3];
    if (channel == 1 && width % (2 * kLanes) == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0)
      return {reinterpret_cast<const float*>(from), stride / 2};
    const int32_t padded = round_up(width, 2 * kLanes);
    Bf16* to = reinterpret_cast<Bf16*>(ws_ + at);
    for (int32_t r = 0; r < lines.count; ++r, from += stride, to += padded) {
      __builtin_memset(to + width, 0, static_cast<size_t>(padded - width) * sizeof(Bf16));
      if (channel == 1) {
        __builtin_memcpy(to, from, static_cast<size_t>(width) * sizeof(Bf16));
      } else {
        for (int32_t d = 0; d < width; ++d) to[d] = from[d * channel];
      }
    }
    return {ws_ + at, padded / 2};
  }

  // Two rows at a time, shuffled together; the last may be alone.
  static void pair_rows(Rows from, int32_t rows, int32_t units, float* to) {
    alignas(64) static constexpr int16_t kShuffle[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kShuffle), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int32_t r = 0; r < rows; r += 2) {
      const float *first = from.data + r * from.stride, *second = first + from.stride;
      for (int32_t u = 0; u < units; u += kLanes, to += 2 * kLanes) {
        const auto a = (__m512i)load_int(first + u), b = (__m512i)(r + 1 < rows ? load_int(second + u) : vi{});
        store_int(to, (vi)_mm512_permutex2var_epi16(a, low, b));
        store_int(to + kLanes, (vi)_mm512_permutex2var_epi16(a, high, b));
      }
    }
  }

  // The keys and values of the task, as pairs of channels.
  struct KeyUnits {
    Rows k, v;
  };
  KeyUnits units_of_keys(const float* gone) {
    take_keys(gone);
    const auto units = [&](const View& view, const Lines& lines, int32_t width, int32_t padded, size_t at) {
      return present(units_of(view, lines, width, at), padded, gone, ws_ + at);
    };
    return {units(p_.k, key_lines(), p_.head_dim, pairs_.units_k, pairs_.q_units),
            units(p_.v, value_lines(), p_.v_head_dim, pairs_.units_v, pairs_.do_units)};
  }

  // What float32 has made of the tile, for the products.
  void round_tile(const Extent& of) {
    const auto [rows, lane, lanes] = of;
    const float *s = ws_ + at_.s, *dp = ws_ + at_.dp;
    for (int32_t r = 0; r < rows; r += 2) {
      const bool two = r + 1 < rows;
      for (int32_t j = 0; j < lanes; j += kLanes) {
        const int64_t at = static_cast<int64_t>(r) * lanes + j;
        const auto next = [&](const float* x) { return two ? load(x + at + lanes) : vf{}; };
        store(weights_ + r / 2 * slopes_.stride + j, pairs_of(load(s + at), next(s)));
        slopes_.put(load(dp + at), next(dp), r, two, j);
      }
    }
  }

  // A last key that is alone has a neighbour in its pair that does not exist.
  void end_rows(int32_t count, int32_t rows) {
    if (count % 2 == 0) return;
    Bf16* slope = reinterpret_cast<Bf16*>(slopes_.rows) + count;
    for (int32_t r = 0; r < rows; ++r, slope += slopes_.stride) *slope = {0};
  }

  const PairLayout pairs_;
  float* weights_;
  Slopes slopes_;
};

inline int32_t backward_by_dtype(const BackwardCall& c, const BackwardTask& t, const Tiles& tiles, float* workspace) {
  return (c.problem->dtype == DType::bf16 ? backward_as<PairBackward> : kAvx512Kernel.backward)(c, t, tiles, workspace);
}

inline size_t backward_bytes_by_dtype(const BackwardCall& c) {
  return c.problem->dtype == DType::bf16 ? PairLayout(c).bytes() : kAvx512Kernel.backward_bytes(c);
}

inline size_t carried_backward_bytes_by_dtype(const CarriedBackwardCall& c) {
  return c.pairs.problem->dtype == DType::bf16 ? carried_backward_bytes<PairBackward>(c)
                                               : kAvx512Kernel.carry.backward_bytes(c);
}

inline int32_t carried_backward_by_dtype(const CarriedBackwardCall& c, const BackwardTask& t, const CarriedTiles& tiles,
                                         float* workspace) {
  return (c.pairs.problem->dtype == DType::bf16 ? carried_backward<PairBackward> : kAvx512Kernel.carry.backward)(
      c, t, tiles, workspace);
}
