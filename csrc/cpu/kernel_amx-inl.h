// The forward of bfloat16 on the tile registers of AMX. Scores are as PairForward has them, a row for each key and a
// lane for each query: keys are a left factor where they lie, queries as pairs of channels a right one. Weights, as
// pairs of keys, are a right factor too, so outputs grow transposed, [channel][query], and the values of a tile are
// transposed.
//
// Keys are summed 32 at a time, from multiples of 32 on whatever is trimmed, so that no bit depends on other queries.

// 2^x, of what is rounded to 8 bits next but summed before: right to 4e-7, and 1 at 0. Where tile registers
// are at work, one vector can be multiplied a cycle, but others added and shuffled beside it: of a weight, four
// multiplications and one scaling by a power.
template <int kCount>
ATTNKIT_INLINE void exp2_weights(vf* x) {
  const vf magic = set1(786432.0f);  // 1.5 * 2^19: adding it leaves four bits of the fraction
  vf t[kCount], n[kCount], power[kCount];
  ATTNKIT_EACH t[i] = x[i] + magic;
  ATTNKIT_EACH n[i] = t[i] - magic;
  ATTNKIT_EACH x[i] = (vf)_mm512_reduce_ps((__m512)x[i], 4 << 4 | _MM_FROUND_TO_NEAREST_INT);  // to sixteenths
  ATTNKIT_EACH power[i] = look_up(kSixteenths, as_int(t[i]));
  // Minimax of (2^r - 1) / r for |r| <= 1/32.
  ATTNKIT_EACH t[i] = fma(set1(0.240226448f), x[i], set1(0.693187714f));
  ATTNKIT_EACH x[i] = x[i] * power[i];
  ATTNKIT_EACH x[i] = fma(x[i], t[i], power[i]);
  ATTNKIT_EACH x[i] = scale_or_zero(x[i], n[i], kLeastPower);
}

class AmxForward : public PairForward {
 public:
  AmxForward(const Call& c, const Task& t, float* workspace, bool few = false) : PairForward(c, t, workspace, few) {
    const bool there = rows_are_whole() && p_.stores == nullptr && p_.k.stride[2] == p_.head_dim;
    const int64_t of_keys = there ? 0 : depth() * kTileDepth;
    kept_ = Kept(c, t, of_keys * kTileDepth / 2, at_.dv * kTileDepth / 2, workspace);
  }

  // Whether the forward of this call can be multiplied so.
  static bool takes(const Call& c) { return c.problem->head_dim >= kTileRows && c.tile_kv % kTileDepth == 0; }

  void pack_queries() {
    PairForward::pack_queries();
    const int32_t units = (p_.head_dim + 1) / 2, deep = depth() * kTileRows;
    clear(at_.qt + static_cast<size_t>(units) * static_cast<size_t>(at_.bm),
          static_cast<int64_t>(deep - units) * at_.bm);
  }

  // Outputs lie in rows where they are merged and stored, in columns where they grow.
  void begin(bool any_keys) {
    start();
    prepare(any_keys);
  }
  void start() {
    start_fold({outputs_, now_.max, now_.sum, 0}, at_.bm);  // outputs: see nothing_yet_
    in_columns_ = nothing_yet_ = true;
  }
  // Stretches are merged in columns: of few keys each, turning them would cost more than their products.
  void end_stretch() {
    write_zeros();
    if (any_before_) {
      merge_columns(before_, before_outputs_);
    } else {
      float* outputs = outputs_;
      outputs_ = before_outputs_;
      before_outputs_ = outputs;
      for (int32_t m = 0; m < at_.bm; m += kLanes) {
        store(before_.max + m, load(now_.max + m));
        store(before_.sum + m, load(now_.sum + m));
      }
    }
    any_before_ = true;
  }
  void save(const Fold& part) {
    to_rows();
    Forward::save(part);
  }
  void save_listed(const Fold& rows, int64_t first) {
    to_rows();
    Forward::save_listed(rows, first);
  }
  void take(const Fold& part) {
    Forward::take(part);
    in_columns_ = false;
  }
  void take_listed(const Fold& rows, int64_t first) {
    Forward::take_listed(rows, first);
    in_columns_ = false;
  }
  int32_t finish() {
    write_zeros();
    if (any_before_) merge_columns(now_, outputs_);
    any_before_ = false;
    to_rows();
    return Forward::finish();
  }

  void keys(int64_t first, int32_t count, bool full, int64_t) {
    if (first % kTileDepth != 0) {  // of a partial tile, trimmed: keys that nobody sees join it
      first -= kTileRows;
      count += kTileRows;
    }
    to_columns();
    const bool finite = transpose_values(first, count);
    if (finite && plain(full) && !may_skip_ && !thinned() && !c_.code.unnormalized && p_.scale > 0) {
      plain_tile(first, count);
      nothing_yet_ = false;
    } else {
      write_zeros();
      changed_tile(first, count, full);
    }
    if (!finite) add_what_is_not_finite(values_of(first, count), full);
  }

 protected:
  // Scores and weights of one or two vectors of queries: rows of them `ld` floats apart.
  struct Column {
    float *s, *weights;
    int32_t ld;
  };
  Column column(int32_t lane) const { return {ws_ + at_.s + lane, ws_ + at_.weights + lane, at_.bm}; }
  template <class F>
  void in_columns(F f) const {
    for (int32_t lane = 0; lane < at_.bm; lane += 2 * kLanes) f(lane, at_.bm - lane < 2 * kLanes ? kLanes : 2 * kLanes);
  }

  void scores(int64_t first, int32_t count, bool full) override {
    const Lines keys = key_rows(first, count);
    float* largest = start_largest(full);
    with_less(PairDot{p_.scale}, first, [&](const auto& dot) {
      in_columns([&](int32_t lane, int32_t lanes) {
        multiply_keys<TilePairs>(keys, column(lane), lane, lanes, seen(live(full), lane, lanes, count));
        finish_scores(dot, column(lane), lane, lanes, count, live(full), largest);
      });
    });
  }

  // Sums of products become scores.
  template <class Dot>
  void finish_scores(const Dot& dot, const Column& c, int32_t lane, int32_t lanes, int32_t count, const Span* live,
                     float* largest) {
    for (int32_t at = 0; at < lanes; at += kLanes) {
      const int32_t v = (lane + at) / kLanes;
      const Span span = seen(live, lane + at, kLanes, count);
      vf most = load(ws_ + at_.largest + lane + at);
      for (int32_t n = span.first; n < span.end; ++n) {
        float* s = c.s + static_cast<int64_t>(n) * c.ld + at;
        const vf x = dot.finish(load(s), n, v, true);
        store(s, x);
        most = max_or_second(x, most);
      }
      if (largest != nullptr) store(largest + lane + at, most);
    }
  }

  // Scores of the tiles of keys that are seen, from rows of whole tiles of elements.
  template <class Elements>
  __attribute__((noinline)) void multiply_keys(const Lines& keys, const Column& c, int32_t lane, int32_t lanes,
                                               Span span) {
    const int32_t first = span.first / kTileRows * kTileRows, count = round_up(span.end - first, kTileRows);
    const int32_t steps = keys.bytes / kTileBytes;
    const float* q = ws_ + at_.qt + lane;
    const TileFactor queries{q, q + kLanes, 4 * at_.bm, 4 * kTileRows * at_.bm};
    TileProducts<Elements> products;
    for (int32_t n = first; n < first + count; n += 2 * kTileRows)
      products.multiply({keys.at(n), keys.at(n + kTileRows), keys.stride, kTileBytes}, first + count - n, queries,
                        lanes, steps, false, c.s + static_cast<int64_t>(n) * c.ld, c.ld);
  }

  // A tile that nothing changes, but for what is carried onto its keys.
  virtual void plain_tile(int64_t first, int32_t count) {
    const Lines keys = key_rows(first, count);
    if (c_.has_score)
      return with_less(PairDot{p_.scale}, first, [&](const auto& dot) {
        float* largest = start_largest(true);
        each_column(count, 1, [&](const Column& column, int32_t lane, int32_t lanes) {
          for (int32_t v = 0; v < lanes; v += kLanes) fetch_less(lane + v);
          multiply_keys<TilePairs>(keys, column, lane, lanes, {0, count});
          finish_scores(dot, column, lane, lanes, count, nullptr, largest);
        });
      });
    each_column(count, p_.scale, [&](const Column& column, int32_t lane, int32_t lanes) {
      multiply_keys<TilePairs>(keys, column, lane, lanes, {0, count});
      for (int32_t v = 0; v < lanes; v += kLanes) {
        const vf most = largest_of({column.s + v, column.weights + v, column.ld}, count) * set1(p_.scale);
        store(ws_ + at_.largest + lane + v, max_or_second(most, load(ws_ + at_.max + lane + v)));
      }
    });
  }

  // Adds a whole tile column by column, each in the same place, which the first cache holds: f(column, lane, lanes)
  // puts its scores there, which are still to be multiplied by `factor`, and what they have risen to.
  template <class F>
  void each_column(int32_t count, float factor, F f) {
    const Column column{ws_ + at_.s, ws_ + at_.weights, at_.bm < 2 * kLanes ? kLanes : 2 * kLanes};
    in_columns([&](int32_t lane, int32_t lanes) {
      f(column, lane, lanes);
      for (int32_t v = 0; v < lanes; v += kLanes)
        weigh_lanes({column.s + v, column.weights + v, column.ld}, lane + v, {0, count}, factor);
      add_values(column, lane, lanes, count, {0, count});
    });
  }

 private:
  static constexpr float kMostGrowth = 5.5f;  // of a logit: weights stay below 2^8

  int32_t depth() const { return (p_.head_dim + kTileDepth - 1) / kTileDepth; }

  void changed_tile(int64_t first, int32_t count, bool full) {
    if (!full) find_live(first, count);
    scores(first, count, full);
    modify(first, count, full);
    const bool all = weigh_all(count, full);
    if (!needed_) return;
    weigh(count, live(all));
    thin_weights(first, count, full);
    in_columns([&](int32_t lane, int32_t lanes) {
      add_values(column(lane), lane, lanes, count, seen(live(all), lane, lanes, count));
    });
  }

  static vf largest_of(const Column& c, int32_t count) {
    vf even = load(c.s), odd = even;
    int32_t n = 0;
    for (const float* s = c.s; n + 2 <= count; n += 2, s += 2 * c.ld) {
      even = max_or_second(load(s), even);
      odd = max_or_second(load(s + c.ld), odd);
    }
    if (n < count) even = max_or_second(load(c.s + n * c.ld), even);
    return max_or_second(even, odd);
  }

  // As softmax, of scores that are scaled.
  void weigh(int32_t count, const Span* live) {
    for (int32_t lane = 0; lane < at_.bm; lane += kLanes) {
      fetch_less(lane);
      const Column c = column(lane);
      const Span keys = live == nullptr ? Span{0, count} : turns(live[lane / kLanes], count);
      const auto clear_rows = [&](int32_t n, int32_t end) {
        for (; n < end; n += 2) store(c.weights + n / 2 * c.ld, vf{});
      };
      clear_rows(0, keys.first);
      if (c_.code.unnormalized) {
        take_lanes(lane, keys, Weights{ws_ + at_.weights, at_.bm});
      } else {
        weigh_lanes(c, lane, keys, 1);
      }
      clear_rows(round_up(keys.end, kSums), count);
    }
  }

  // As softmax_lanes, of scores that are to be multiplied by `factor`, in powers of two. The last turn of weights is
  // whole.
  void weigh_lanes(const Column& c, int32_t lane, Span keys, float factor) {
    // By a power of two the difference may be multiplied as well: no bit changes.
    const bool exact = factor <= 1 && (__builtin_bit_cast(uint32_t, factor) & 0x7fffff) == 0;
    exact ? weigh_lanes<true>(c, lane, keys, factor) : weigh_lanes<false>(c, lane, keys, factor);
  }
  template <bool kExact>
  __attribute__((noinline)) void weigh_lanes(const Column& c, int32_t lane, Span keys, float factor) {
    float *max = ws_ + at_.max + lane, *total = ws_ + at_.sum + lane;
    const vf old_max = load(max), largest = load(ws_ + at_.largest + lane), nothing = set1(-kInfinity);
    // A maximum that has hardly grown stays what weights are measured by: then nothing before them is to be rescaled.
    const vi stays = (old_max > nothing) & ~(largest > old_max + set1(may_skip_ ? 0 : kMostGrowth));
    const vf new_max = select(stays, old_max, largest), pivot = select(new_max == nothing, vf{}, new_max);
    const vf alpha = select(old_max == nothing, set1(1), exp_weight(old_max - pivot));
    store(max, new_max);
    store(ws_ + at_.alpha + lane, alpha);
    const vf taken = kExact ? pivot * set1(1 / factor) : pivot, to_power = set1(kExact ? factor * kLog2e : kLog2e);
    vf sum[kSums] = {};
    const auto turn = [&](int32_t n, int32_t left) __attribute__((always_inline)) {
      const float* s = c.s + n * c.ld;
      vf w[kSums];
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const vf x = i < left ? load(s + i * c.ld) : set1(-kInfinity);
        w[i] = ((kExact ? x : x * set1(factor)) - taken) * to_power;
      }
      exp2_weights<kSums>(w);
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) sum[i] += w[i];
#pragma GCC unroll 2
      for (int i = 0; i < kSums; i += 2) store(c.weights + (n + i) / 2 * c.ld, pairs_of(w[i], w[i + 1]));
    };
    int32_t n = keys.first;
    for (; n + kSums <= keys.end; n += kSums) turn(n, kSums);
    if (n < keys.end) turn(n, keys.end - n);
    store(total, fma(load(total), alpha, (sum[0] + sum[1]) + (sum[2] + sum[3])));
  }

  // Where they lie, if they lie in whole rows one after the other; else a copy. (Rows that lie apart, as tokens of
  // several heads do, share few sets of the cache; beyond what is kept they are read there all the same.)
  Lines key_rows(int64_t first, int32_t count) {
    const int32_t padded = depth() * kTileDepth;
    if (kept_.keys()) {
      const auto copy = [&](int64_t n, int32_t keys, float* to) { copied_keys(keys_of(n, keys), as_halves(to)); };
      return {kept_.keys(first, count, copy), 2 * padded, 2 * padded, count};
    }
    const Lines keys = keys_of(first, count);
    if (p_.stores != nullptr || (rows_are_whole() && count % kTileRows == 0)) return keys;
    return copied_keys(keys, as_halves(ws_ + at_.k));
  }
  bool rows_are_whole() const { return p_.k.stride[3] == 1 && p_.head_dim % kTileDepth == 0; }
  static Bf16* as_halves(float* p) { return reinterpret_cast<Bf16*>(p); }
  Lines copied_keys(const Lines& keys, Bf16* to) const {
    const int32_t padded = depth() * kTileDepth;
    for (int32_t n = 0; n < keys.count; ++n)
      copy_row(reinterpret_cast<const Bf16*>(keys.at(n)), channel_of(p_.k), p_.head_dim, padded, to + n * padded);
    return {to, 2 * padded, 2 * padded, keys.count};
  }

  // Adds the weighed values of a tile, of the keys that are seen, to the outputs.
  __attribute__((noinline)) void add_values(const Column& c, int32_t lane, int32_t lanes, int32_t count, Span span) {
    rescale(lane, lanes);
    const int32_t first = span.first / kTileDepth, steps = (span.end + kTileDepth - 1) / kTileDepth - first;
    if (steps <= 0) return;
    for (int32_t n = (count + 1) / 2; n < (first + steps) * kTileRows; ++n)  // there may be anything
      for (int32_t v = 0; v < lanes; v += kLanes) store(c.weights + n * c.ld + v, vf{});
    const TileMatrix values{transposed_ + static_cast<int64_t>(first) * at_.dv * kTileDepth, kTileBytes,
                            kTileBytes * at_.dv, kTileBytes * kTileRows};
    const TileMatrix weights{c.weights + static_cast<int64_t>(first) * kTileRows * c.ld, 4 * c.ld, 4 * kTileRows * c.ld,
                             kTileBytes};
    tile_products(values, at_.dv, weights, lanes, steps, !nothing_yet_, outputs_ + lane, at_.bm);
  }

  // What was before and the stretch, as `merge` has them.
  __attribute__((noinline)) void merge_columns(const Fold& to, float* outputs) const {
    vf a[kMaxTileQ / kLanes], b[kMaxTileQ / kLanes];
    for (int32_t lane = 0; lane < at_.bm; lane += kLanes) {
      const Shares of = shares(load(before_.max + lane), load(now_.max + lane));
      const vf sum = load(before_.sum + lane) * of.a + load(now_.sum + lane) * of.b;
      store(to.max + lane, of.max);
      store(to.sum + lane, sum);
      a[lane / kLanes] = of.a;
      b[lane / kLanes] = of.b;
    }
    for (int32_t d = 0, at = 0; d < at_.dv; ++d)
      for (int32_t lane = 0; lane < at_.bm; lane += kLanes, at += kLanes)
        store(outputs + at, fma(load(before_outputs_ + at), a[lane / kLanes], load(outputs_ + at) * b[lane / kLanes]));
  }

  void rescale(int32_t lane, int32_t lanes) {
    for (int32_t at = lane; at < lane + lanes; at += kLanes) {
      const vf alpha = load(ws_ + at_.alpha + at);
      if (!any(alpha != set1(1))) continue;
      float* o = outputs_ + at;
      for (int32_t d = 0; d < at_.dv; ++d, o += at_.bm) store(o, load(o) * alpha);
    }
  }

  // The values of a tile, the keys of each channel side by side, zero where they are not finite; returns whether all
  // are.
  bool transpose_values(int64_t first, int32_t count) {
    bool finite = true;
    const auto transpose = [&](int64_t n, int32_t keys, float* to) {
      return transpose_chunk_of(values_of(n, keys), as_halves(to));
    };
    if (kept_.values()) {
      transposed_ = as_halves(kept_.values(first, count, finite, transpose));
      return finite;
    }
    transposed_ = as_halves(ws_ + at_.values);
    for (int32_t n = 0; n < count; n += kTileDepth) {
      const int32_t keys = count - n < kTileDepth ? count - n : kTileDepth;
      finite &= transpose(first + n, keys, ws_ + at_.values + n * at_.dv / 2);
    }
    return finite;
  }
  bool transpose_chunk_of(const Lines& values, Bf16* to) {
    const Bf16* rows[kTileDepth];
    for (int32_t i = 0; i < values.count; ++i) rows[i] = reinterpret_cast<const Bf16*>(values.at(i));
    if (transpose_chunk<true>(rows, values.count, channel_of(p_.v), p_.v_head_dim, at_.dv, to)) return true;
    clear_not_finite(to, at_.dv * kTileDepth);
    return false;
  }

  // 0 * NaN is NaN: what is no number, or infinite, is added by itself, to the queries that see it.
  __attribute__((noinline)) void add_what_is_not_finite(const Lines& values, bool full) {
    const auto* weights = reinterpret_cast<const Bf16*>(ws_ + at_.weights);
    each_not_finite(values, 0, values.count, channel_of(p_.v), p_.v_head_dim, [&](int32_t n, int32_t d, float value) {
      for (int32_t m = 0; m < t_.lanes(); ++m)
        if (full || exists(n, m))
          outputs_[static_cast<int64_t>(d) * at_.bm + m] +=
              value * widen_one(weights[2 * (n / 2 * at_.bm + m) + n % 2]);
    });
  }

  void to_rows() {
    write_zeros();
    if (in_columns_) transpose_floats(outputs_, at_.dv, ws_ + at_.o, at_.bm);
    in_columns_ = false;
  }
  void to_columns() {
    if (!in_columns_) transpose_floats(ws_ + at_.o, at_.bm, outputs_, at_.dv);
    in_columns_ = true;
  }
  void write_zeros() {
    if (nothing_yet_) __builtin_memset(outputs_, 0, static_cast<size_t>(at_.dv * at_.bm) * sizeof(float));
    nothing_yet_ = false;
  }
  // Columns of `from`, of which there are `columns`, become rows.
  static void transpose_floats(const float* from, int32_t rows, float* to, int32_t columns) {
    for (int32_t r = 0; r < rows; r += kLanes)
      for (int32_t c = 0; c < columns; c += kLanes) {
        vf square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(from + static_cast<int64_t>(r + i) * columns + c);
        transpose_square(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + static_cast<int64_t>(c + i) * rows + r, square[i]);
      }
  }

  const TileRegisters registers_;
  float *outputs_ = ws_ + at_.guarded, *before_outputs_ = ws_ + at_.before_o;  // [channel][query]
  const Bf16* transposed_ = nullptr;  // values of the tile, [32 keys][channel][key]
  bool in_columns_ = false;
  bool nothing_yet_ = false;  // outputs are 0, but not written: a whole tile writes them at once
};

// Queries and keys as int8 (kernel_encoded-inl.h), of which a unit is four signed codes.
struct SignedBytes : ByteUnits {
  struct Dot {
    const int32_t* starts;  // not needed: no code is moved
    const float *factor, *shift;

    ATTNKIT_INLINE vf finish(vf sum, int32_t, int v, bool) const {
      return fma(to_float(as_int(sum)), load(factor + v * kLanes), load(shift + v * kLanes));
    }
  };

  static void pack(const int8_t* const* rows, int32_t queries, int32_t channels, float* qt, int32_t bm) {
    pack_units(rows, queries, channels, [](auto x) { return x; }, qt, bm);
  }
  static ATTNKIT_INLINE vf code(const float* qt, int32_t channel, int32_t bm) {
    const vi units = load_int(qt + channel / kCodes * bm);
    return to_float(units << 8 * (3 - channel % kCodes) >> 24);
  }
};

class EncodedOnTiles : public EncodedForward<AmxForward, SignedBytes> {
 public:
  using EncodedForward::EncodedForward;

 protected:
  void scores(int64_t first, int32_t count, bool full) override {
    float* largest = start_largest(full);
    in_columns([&](int32_t lane, int32_t lanes) {
      score_column(column(lane), lane, lanes, first, count, live(full), largest);
    });
  }

  void plain_tile(int64_t first, int32_t count) override {
    float* largest = start_largest(true);
    each_column(count, 1, [&](const Column& column, int32_t lane, int32_t lanes) {
      score_column(column, lane, lanes, first, count, nullptr, largest);
    });
  }

 private:
  void score_column(const Column& c, int32_t lane, int32_t lanes, int64_t first, int32_t count, const Span* live,
                    float* largest) {
    each_step(first, count, {lane, lane + lanes}, live,
              [&](const KeyRows& keys, int32_t row, int32_t some, const Span* seen_of_step, const auto& dot) {
                const auto width = static_cast<int32_t>(keys.stride);
                const Column rows{c.s + static_cast<int64_t>(row) * c.ld, c.weights, c.ld};
                multiply_keys<TileBytes>({keys.data, width, width, some}, rows, lane, lanes,
                                         seen(seen_of_step, lane, lanes, some));
                finish_scores(dot, rows, lane, lanes, some, seen_of_step, largest);
              });
  }
};

int32_t run_on_tiles(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, const Parts* parts,
                     float* workspace) {
  const Problem& p = *c.problem;
  const bool few = has_few_queries(p, t) && p.skip == 0;
  const auto run_it = [&] {
    if (!multiplies_pairs(p) || !AmxForward::takes(c)) return dot_products().run;
    if (p.codes != nullptr) return run<EncodedOnTiles>;
    if (!few) return run<AmxForward>;
    if (p.stores != nullptr && AmxCodes::takes(c)) return run<AmxCodes>;
    const bool shared = queries_of_key(p, t) > 1;  // one query is faster without
    return p.stores == nullptr && shared && AmxDecode::takes(c) ? run<AmxDecode> : dot_products().run;
  }();
  return run_it(c, t, ranges, num_ranges, parts, workspace);
}

int32_t gather_on_tiles(const Call& c, const Task& t, const Pieces& pieces, float* workspace) {
  const bool tiles = c.problem->dtype == DType::bf16 && AmxForward::takes(c);
  return (tiles ? gather<AmxForward> : dot_products().gather)(c, t, pieces, workspace);
}

int32_t select_on_tiles(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, float* sums,
                        float* workspace) {
  const bool tiles = selects_pairs(*c.problem, t) && AmxForward::takes(c);
  return (tiles ? select_keys<AmxForward> : dot_products().carry.select)(c, t, ranges, num_ranges, sums, workspace);
}
