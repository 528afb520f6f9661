// Few queries of bfloat16 on the tile registers of AMX, over keys and values where they lie in memory.
//
// Scores: tokens are the rows of the left factor, queries, as pairs of channels, the columns of the right one.
//
// Values: a row of the right factor is to be pairs of tokens, and memory has pairs of channels. So 16 tokens of 32
// channels are multiplied as if they were that: a query has a row that weighs the first channel of each pair, with
// zeros for the other, and a row for the second. Nothing is shuffled, and no more is multiplied than if it were. A
// weight is two numbers, its first bits and what they leave, which have rows of their own: it is hardly rounded.

// Numbers as two bfloat16, which fill the upper half of each lane: their first bits, and what these leave, rounded.
struct SplitFloats {
  vi high, rest;
};
ATTNKIT_INLINE SplitFloats split(vf x) {
  constexpr int32_t kHigh = static_cast<int32_t>(0xffff0000);
  const vi high = as_int(x) & kHigh;
  return {high, (as_int(x - as_float(high)) + 0x8000) & kHigh};
}

class AmxDecode : public PairDecode {
 public:
  using PairDecode::PairDecode;

  // Whether few queries of this call can be multiplied so.
  static bool takes(const Call& c) {
    const Problem& p = *c.problem;
    return p.head_dim >= kTileRows && c.tile_kv % kTileDepth == 0 && p.dropout.threshold == 0 && !c.code.unnormalized;
  }

  void pack_queries() {
    PairDecode::pack_queries();
    const float* pairs[kFewLanes];
    for (int32_t m = 0; m < t_.lanes(); ++m) pairs[m] = reinterpret_cast<const float*>(queries() + m * width_);
    transpose_rows(pairs, t_.lanes(), width_ / 2, [](auto x) { return x; }, ws_ + at_.qt, kFewLanes);
  }

 protected:
  void few_scores_of(const Lines& keys, const Ahead& ahead) override { score_rows(keys, 0, ahead); }

  void add_few(int64_t, const Lines& values, int32_t first, int32_t count, bool full, const Ahead& ahead) override {
    hide_tail(first, count);
    weigh_by_key(first, count);
    add_weighed(values, first, count, first, full, ahead);
  }

  // Into S^T from column `column` on.
  void score_rows(const Lines& keys, int32_t column, const Ahead& ahead) {
    const int32_t count = keys.count, whole = count / kTileRows * kTileRows;
    if (!are_whole(p_.k, p_.head_dim))
      return score_tiles(copied_keys(keys, 0, count), column, round_up(count, kTileRows), ahead);
    score_tiles(keys, column, whole, ahead);
    if (whole < count) score_tiles(copied_keys(keys, whole, count - whole), column + whole, kTileRows, kNothing);
  }

  // Adds values first .. first + count - 1 of `values`, whose weights S^T has from column `column` on.
  void add_weighed(const Lines& values, int32_t first, int32_t count, int32_t column, bool full, const Ahead& ahead) {
    const bool whole = are_whole(p_.v, p_.v_head_dim);
    Values there = whole ? values_at(values, first, count) : copied_values(values, first, count, false);
    bool finite = true;  // as far as is known
    for (int32_t m = 0; m < t_.lanes(); m += kFewRows) {
      split_weights(m, column, count);
      multiply_values(there, m == 0 ? ahead : kNothing);
      if (finite && !join(m, true)) {
        finite = false;
        there = copied_values(values, first, count, true);
        multiply_values(there, kNothing);
      }
      if (finite) continue;
      join(m, false);
      add_what_is_not_finite(m, values, first, count, column, full);
    }
  }

 private:
  static constexpr int32_t kPairs = 2 * kTileRows;  // channels of a tile of values

  bool are_whole(const View& view, int32_t channels) const {
    return channel_of(view) == 1 && channels % kTileDepth == 0;
  }

  // ---- scores ----

  // Of `count` rows, whole tiles of them, into S^T from column `column` on.
  __attribute__((noinline)) void score_tiles(const Lines& keys, int32_t column, int32_t count, const Ahead& ahead) {
    const float* q = ws_ + at_.qt;
    const TileFactor queries{q, q, kTileBytes, kTileBytes * kTileRows};
    Fetches fetches(ahead, 0);
    for (int32_t first = 0, end; first < count; first = end) {  // as many as there is room for
      end = first + c_.tile_kv < count ? first + c_.tile_kv : count;
      float* s = ws_ + at_.s;
      {
        TileProducts<> products;
        for (int32_t n = first; n < end; n += 2 * kTileRows, s += 2 * kTileRows * kLanes) {
          const int32_t rows = end - n < 2 * kTileRows ? kTileRows : 2 * kTileRows;
          for (int32_t i = 0; &ahead != &kNothing && i < rows; ++i) fetches.row();
          const TileFactor tokens{keys.at(n), keys.at(n + kTileRows), keys.stride, kTileBytes};
          products.multiply(tokens, rows, queries, kTileRows, width_ / kTileDepth, false, s, kLanes);
        }
      }
      spread(column + first, end - first);
    }
  }

  // S, [token][query], becomes S^T, scaled.
  void spread(int32_t column, int32_t count) {
    for (int32_t m = 0; m < t_.lanes(); m += kFewRows) {
      const float* s = ws_ + at_.s + m;
      float* st = ws_ + at_.st + m * ld_ + column;
      for (int32_t n = 0; n < count; n += kLanes, s += kLanes * kLanes, st += kLanes) {
        vf x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) x[i] = load_quarters(s + i * kLanes, 4 * kLanes);
        transpose_quads(x);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(st + i * ld_, x[i] * set1(p_.scale));
      }
    }
  }

  // ---- values ----

  // Values first .. first + count - 1 of `lines`; the last of them, if they are no whole tile, at `rest`.
  struct Values {
    Lines lines;
    int32_t first, count;
    const Bf16* rest;
    int32_t rest_stride;  // bytes
  };

  int32_t value_width() const { return round_up(p_.v_head_dim, kPairs); }

  Values values_at(const Lines& values, int32_t first, int32_t count) {
    const int32_t whole = count / kTileRows * kTileRows, width = value_width();
    Bf16* to = reinterpret_cast<Bf16*>(ws_ + at_.values);
    for (int32_t n = whole; n < round_up(count, kTileRows); ++n)
      copy_value(values, first, n, count, to + (n - whole) * width);
    return {values, first, count, to, 2 * width};
  }
  // All of them, with zeros for what is not finite, if so wanted.
  Values copied_values(const Lines& values, int32_t first, int32_t count, bool finite) {
    const int32_t width = value_width(), end = round_up(count, kTileRows);
    Bf16* to = reinterpret_cast<Bf16*>(ws_ + at_.v);
    for (int32_t n = 0; n < end; ++n) copy_value(values, first, n, count, to + n * width);
    if (finite) clear_not_finite(to, end * width);
    return {{to, 2 * width, 2 * width, end}, 0, end, nullptr, 0};
  }
  void copy_value(const Lines& values, int32_t first, int32_t n, int32_t count, Bf16* to) const {
    const auto* row = reinterpret_cast<const Bf16*>(values.at(first + (n < count ? n : 0)));
    copy_row(row, channel_of(p_.v), n < count ? p_.v_head_dim : 0, value_width(), to);
  }

  // The weights of four queries from `m` on, as left factors of 16 tokens each: rows for the first channels of pairs
  // and for the second, and the same of what is left.
  void split_weights(int32_t m, int32_t column, int32_t count) {
    float* to = ws_ + at_.s;
    for (int32_t n = 0; n < count; n += kLanes, to += kTileRows * kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < kFewRows; ++i) {
        const vf weight = m + i < t_.lanes() ? load(ws_ + at_.st + (m + i) * ld_ + column + n) : vf{};
        const auto [high, rest] = split(weight);
        store_int(to + i * kLanes, (vi)((vu)high >> 16));
        store_int(to + (kFewRows + i) * kLanes, high);
        store_int(to + (2 * kFewRows + i) * kLanes, (vi)((vu)rest >> 16));
        store_int(to + (3 * kFewRows + i) * kLanes, rest);
      }
  }

  void multiply_values(const Values& v, const Ahead& ahead) {
    by_rows(value_width() / kPairs,
            [&]<int kTiles>(int32_t block) { multiply_blocks<kTiles>(v, block, block == 0 ? ahead : kNothing); });
  }

  // Sums of kTiles tiles of channels, from the block-th on.
  template <int kTiles>
  __attribute__((noinline)) void multiply_blocks(const Values& v, int32_t block, const Ahead& ahead) {
    Fetches fetches(ahead, v.first);
    tile_zero<0>();
    if constexpr (kTiles > 1) tile_zero<1>();
    if constexpr (kTiles > 2) {
      tile_zero<2>();
      tile_zero<3>();
    }
    const float* weights = ws_ + at_.s;
    for (int32_t n = 0; n < v.count; n += kTileRows, weights += kTileRows * kLanes) {
      const bool whole = v.count - n >= kTileRows;
      for (int32_t i = 0; &ahead != &kNothing && whole && i < kTileRows; ++i) fetches.row();
      const char* at = whole ? v.lines.at(v.first + n) : reinterpret_cast<const char*>(v.rest);
      const int64_t stride = whole ? v.lines.stride : v.rest_stride;
      at += block * kTileBytes;
      tile_load<4>(weights, kTileBytes);
      tile_load<5>(at, stride);
      tile_multiply<0, 4, 5>();
      if constexpr (kTiles > 1) {
        tile_load<6>(at + kTileBytes, stride);
        tile_multiply<1, 4, 6>();
      }
      if constexpr (kTiles > 2) {
        tile_load<7>(at + 2 * kTileBytes, stride);
        tile_multiply<2, 4, 7>();
        tile_load<5>(at + 3 * kTileBytes, stride);
        tile_multiply<3, 4, 5>();
      }
    }
    float* sums = ws_ + at_.guarded + static_cast<int64_t>(block) * kTileRows * kLanes;
    tile_store<0>(sums, kTileBytes);
    if constexpr (kTiles > 1) tile_store<1>(sums + kTileRows * kLanes, kTileBytes);
    if constexpr (kTiles > 2) {
      tile_store<2>(sums + 2 * kTileRows * kLanes, kTileBytes);
      tile_store<3>(sums + 3 * kTileRows * kLanes, kTileBytes);
    }
  }

  // What was summed of four queries from `m` on joins their outputs; false if it should be finite, and is not.
  bool join(int32_t m, bool finite) {
    const int32_t lanes = t_.lanes() - m < kFewRows ? t_.lanes() - m : kFewRows;
    float* apart = ws_ + at_.apart;
    vf zero{};
    for (int32_t i = 0; i < lanes; ++i)
      for (int32_t d = 0; d < at_.dv; d += kPairs) {
        const float* sums = ws_ + at_.guarded + static_cast<int64_t>(d / kPairs) * kTileRows * kLanes + i * kLanes;
        vf even = load(sums) + load(sums + 2 * kFewRows * kLanes);
        vf odd = load(sums + kFewRows * kLanes) + load(sums + 3 * kFewRows * kLanes);
        zero = fma(even, vf{}, fma(odd, vf{}, zero));
        interleave(even, odd);
        store(apart + i * at_.dv + d, even);
        if (d + kLanes < at_.dv) store(apart + i * at_.dv + d + kLanes, odd);
      }
    if (finite && any(zero != vf{})) return false;
    for (int32_t i = 0; i < lanes; ++i) {
      const vf alpha = set1(ws_[at_.alpha + m + i]);
      float* o = ws_ + at_.o + static_cast<int64_t>(m + i) * at_.dv;
      for (int32_t d = 0; d < at_.dv; d += kLanes) store(o + d, fma(load(o + d), alpha, load(apart + i * at_.dv + d)));
    }
    return true;
  }

  // 0 * NaN is NaN: what is no number, or infinite, is added by itself, to the queries that see it.
  __attribute__((noinline)) void add_what_is_not_finite(int32_t m, const Lines& values, int32_t first, int32_t count,
                                                        int32_t column, bool full) {
    each_not_finite(values, first, count, channel_of(p_.v), p_.v_head_dim, [&](int32_t n, int32_t d, float value) {
      const int32_t at = n - first + column;
      for (int32_t i = m; i < m + kFewRows && i < t_.lanes(); ++i)
        if (full || exists(at, i))
          ws_[at_.o + static_cast<int64_t>(i) * at_.dv + d] += value * ws_[at_.st + i * ld_ + at];
    });
  }

  const TileRegisters registers_;
};
