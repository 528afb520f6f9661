// Products of float32, whatever the tensors hold.
class FloatForward : public Forward {
 public:
  // Of one tile, keys need not be fetched: then fewer queries are few. Few leave nothing out.
  FloatForward(const Call& c, const Task& t, float* workspace)
      : FloatForward(
            c, t, workspace,
            c.problem->skip == 0 &&
                t.lanes() <= (c.problem->sequences[t.sequence].kv_len > c.tile_kv ? kFewLanes : kFewLanes * 3 / 4)) {}

  FloatForward(const Call& c, const Task& t, float* workspace, bool few) : Forward(c, t, workspace, few), few_(few) {
    if (!few_) kept_ = Kept(c, t, floats_of(p_.k, p_.head_dim), floats_of(p_.v, p_.v_head_dim), workspace);
  }

  // Q^T, scaled; lanes beyond the last query are zero. Of few queries Q.
  void pack_queries() {
    if (few_)
      return with_elements(p_.dtype, [&](auto* type) {
        for (int32_t m = 0; m < t_.lanes(); ++m) {
          const auto* q = row<decltype(type)>(p_.q, head_of(m), token_of(m));
          float* to = ws_ + at_.q + static_cast<int64_t>(m) * at_.dq;
          for (int32_t d = 0; d < p_.head_dim; ++d) to[d] = widen_one(q[d * p_.q.stride[3]]) * p_.scale;
          for (int32_t d = p_.head_dim; d < at_.dq; ++d) to[d] = 0;
        }
      });
    with_elements(p_.dtype, [&](auto* type) {
      decltype(type) q[kMaxTileQ];
      for (int32_t m = 0; m < t_.lanes(); ++m) q[m] = row<decltype(type)>(p_.q, head_of(m), token_of(m));
      if (p_.q.stride[3] == 1)
        return transpose_rows(q, t_.lanes(), p_.head_dim, [&](auto x) { return x * p_.scale; }, ws_ + at_.qt, at_.bm);
      for (int32_t d = 0; d < p_.head_dim; ++d) {
        float* qt = ws_ + at_.qt + static_cast<int64_t>(d) * at_.bm;
        for (int32_t m = 0; m < t_.lanes(); ++m) qt[m] = widen_one(q[m][d * p_.q.stride[3]]) * p_.scale;
        for (int32_t m = t_.lanes(); m < at_.bm; ++m) qt[m] = 0;
      }
    });
  }

  // Few queries go on with keys for a while before they turn to values: memory is read faster in long runs. The tiles
  // are weighed and summed one after the other all the same.
  int64_t reach(int64_t first, bool full) const {
    const bool plain = p_.stores == nullptr && p_.codes == nullptr && t_.carried.f == nullptr;
    if (!few_ || !full || !plain || c_.tile_kv % Lines::kRun != 0) return Forward::reach(first, full);
    const int64_t end = (first / c_.tile_kv + kMaxTileKv / c_.tile_kv) * c_.tile_kv,
                  stretch = (first / c_.split_kv + 1) * c_.split_kv;
    return end < stretch ? end : stretch;
  }

  // `next`: where the keys after these begin, or -1.
  void keys(int64_t first, int32_t count, bool full, int64_t next) {
    if (few_) {
      const Lines values = values_of(first, count);
      logits(first, count, full, values);
      return few_tiles(first, values, full, next < 0 ? first : next);
    }
    logits(first, count, full, kNoLines);
    modify(first, count, full);
    const bool all = weigh_all(count, full);
    if (!needed_) return;
    softmax(count, all, Weights{ws_ + at_.s, at_.bm});
    thin_weights(first, count, full);
    const Rows v = value_rows(first, count);
    // 0 * NaN is NaN: a value that some query must not see may not be multiplied at all, not even by a weight of zero.
    if (!full && !is_finite(v, count, at_.dv)) return pv_guarded<FloatDot>(ws_ + at_.s, v.data, v.stride, count);
    pv<FloatDot>(ws_ + at_.s, at_.bm, v.data, v.stride, count, live(all), ws_ + at_.alpha, ws_ + at_.o, at_.dv,
                 t_.lanes());
  }

 protected:
  // Of pairs that exist; before them, which those are. `then`: what memory is read after the keys.
  void logits(int64_t first, int32_t count, bool full, const Lines& then) {
    if (few_) {
      const Lines keys = keys_of(first, count);
      ld_ = round_up(count, kBlockVecs * kLanes);
      tile_.narrow(0, ld_);
      if (!full) find_live_by_key(first, count);
      return few_scores_of(keys, {keys, then});
    }
    if (!full) find_live(first, count);
    scores(first, count, full);
  }

  // As rows of floats: where they lie, if they lie so one after the other, else kept, or (beyond what is) a copy of the
  // tile's; but what is float is read there then too.
  Rows key_rows(int64_t first, int32_t count) {
    if (!kept_.keys()) return rows(p_.k, keys_of(first, count), p_.head_dim, p_.head_dim, at_.k);
    const int32_t width = round_up(p_.head_dim, kLanes);
    const float* chunk = kept_.keys(first, count, [&](int64_t n, int32_t keys, float* to) {
      put_rows(p_.k, keys_of(n, keys), p_.head_dim, width, to);
    });
    return {chunk + first % kKeptKeys * width, width};
  }
  Rows value_rows(int64_t first, int32_t count) {
    if (!kept_.values()) return rows(p_.v, values_of(first, count), p_.v_head_dim, at_.dv, at_.v);
    bool finite;
    const float* chunk = kept_.values(first, count, finite, [&](int64_t n, int32_t keys, float* to) {
      put_rows(p_.v, values_of(n, keys), p_.v_head_dim, at_.dv, to);
      return true;
    });
    return {chunk + first % kKeptKeys * at_.dv, at_.dv};
  }

  virtual void scores(int64_t first, int32_t count, bool full) {
    const Rows k = key_rows(first, count);
    const KeyRows keys{reinterpret_cast<const char*>(k.data), 4 * k.stride};
    float* largest = start_largest(full);
    with_less(FloatDot{}, first, [&](const auto& dot) {
      qk_units(ws_ + at_.qt, at_.bm, keys, count, live(full), p_.head_dim, dot, ws_ + at_.s, largest);
    });
  }

  void thin_weights(int64_t first, int32_t count, bool full) {
    if (!thinned()) return;
    float* s = ws_ + at_.s;
    thin(first, count, full, [&](int32_t n, int32_t lane, vi kept) {
      float* w = s + n * at_.bm + lane;
      store(w, select(kept, load(w), vf{}));
    });
  }

  // From the scores of few queries on. `next`: where the keys that are needed next begin.
  void few_tiles(int64_t first, const Lines& values, bool full, int64_t next) {
    modify_by_key(first, values.count, full);
    const Lines then = keys_ahead(next);
    for (int32_t n = 0, some; n < values.count; n += some) {
      const auto tile = static_cast<int32_t>(c_.tile_kv - (first + n) % c_.tile_kv);
      some = values.count - n < tile ? values.count - n : tile;
      add_few(first + n, values, n, some, full, {values, then});
    }
  }

  // Weighs the scores of `count` keys, from the n-th value on, and adds their values; the first is key `first`.
  virtual void add_few(int64_t first, const Lines& values, int32_t n, int32_t count, bool full, const Ahead& ahead) {
    few_softmax(n, count);
    thin_weights(first, count, full);
    few_sum(values, n, count, full, ahead);
  }

  // Adds `count` of the values, from `first` on.
  void few_sum(const Lines& values, int32_t first, int32_t count, bool full, const Ahead& ahead) {
    if (full) return few_values_of(values, first, count, ws_ + at_.alpha, ws_ + at_.o, ahead);
    if (few_values_apart(values, ahead)) return;
    const Rows v = rows(p_.v, values, p_.v_head_dim, at_.dv, at_.v);
    pv_guarded<FloatDot>(ws_ + at_.s, v.data, v.stride, count);
  }

  int32_t ld_ = 0;  // keys in a row of S^T, now

  // S^T of few queries.
  virtual void few_scores_of(const Lines& keys, const Ahead& ahead) {
    const auto from = [&](auto* type, const Lines& k, int32_t channels) {
      few_scores<std::remove_pointer_t<decltype(type)>>(ws_ + at_.q, t_.lanes(), at_.dq, channels, k, ws_ + at_.st, ld_,
                                                        ahead);
    };
    with_elements(p_.dtype, [&](auto* type) {
      if (p_.stores == nullptr && p_.k.stride[3] == 1 && p_.head_dim == at_.dq) return from(type, keys, p_.head_dim);
      const int32_t width = round_up(p_.head_dim, kLanes);
      from(ws_, lines_of(rows(p_.k, keys, p_.head_dim, width, at_.k), keys.count), width);
    });
  }

  // As find_live: the mask of few queries, of which one vector has all.
  void find_live_by_key(int64_t first, int32_t count) {
    tile_.keys(first, count);
    tile_.run_strip(0, t_.lanes(), false, true);
    if (!has_score_) tile_.check_loads(0, t_.lanes(), count, false);
    const Operand mask = tile_.operand(c_.code.mask, kTile, 0);
    Span& span = spans_[0] = {count, 0};
    for (int32_t n = 0; n < count; n += kLanes) {
      vi queries{};
      for (int32_t m = 0; m < t_.lanes(); ++m) {
        vi exists = live_by_key(mask, m, n);
        if (c_.some_gone) exists &= tile_.stays(0, m, n);
        queries |= exists & set1_int(1 << m);
      }
      if (n + kLanes > count) queries &= lane_mask((uint32_t{1} << (count - n)) - 1);
      store_int(ws_ + at_.live + n, queries);
      const uint32_t seen = lane_bits(queries != 0);
      if (seen == 0) continue;
      if (span.end == 0) span.first = n + __builtin_ctz(seen);
      span.end = n + 32 - __builtin_clz(seen);
    }
  }

  // Applies the score, and hides what does not exist.
  void modify_by_key(int64_t first, int32_t count, bool full) {
    apply_score_by_key(first, count, full);
    if (full) return;
    for (int32_t m = 0; m < t_.lanes(); ++m)
      for (int32_t n = 0; n < count; n += kLanes) {
        float* s = ws_ + at_.st + m * ld_ + n;
        store(s, select((load_int(ws_ + at_.live + n) & set1_int(1 << m)) != 0, load(s), set1(-kInfinity)));
      }
  }

  void apply_score_by_key(int64_t first, int32_t count, bool full) {
    if (!has_score_) return;
    const Shape shape{t_.lanes(), ld_};
    if (full) tile_.keys(first, count);
    tile_.run_strip(0, shape.rows, true, !full && tile_.checked());
    if (c_.code.in_place < 0) map1(ws_ + at_.st, shape, tile_.operand(c_.code.score, kTile, 0), [](vf x) { return x; });
    tile_.check_loads(0, shape.rows, count, full);
  }

  static vi live_by_key(const Operand& mask, int32_t m, int32_t n) {
    const float* row = mask.p + static_cast<int64_t>(m) * mask.step;
    return as_int(mask.vec ? load(row + n) : set1_bits(row));
  }

  void few_take(const float* st, int32_t count) {
    float* s = ws_ + at_.s;
    start_unnormalized(0);
    few_by_key(st, ld_, count, t_.lanes(), s, [](int32_t, vf) {});
    for (int32_t n = 0; n < count; ++n) store(s + n * at_.bm, unless_gone(load(s + n * at_.bm)));
  }

  // Scores behind the last of a whole vector, from the first-th on: anything may be there.
  void hide_tail(int32_t first, int32_t count) {
    for (int32_t m = 0; m < t_.lanes(); ++m)
      for (int32_t n = count; n < round_up(count, kLanes); ++n) ws_[at_.st + m * ld_ + first + n] = -kInfinity;
  }

  // S^T becomes weights.
  void weigh_by_key(int32_t first, int32_t count) {
    alignas(kBytes) float sums[kFewLanes + kLanes];
    few_weights(ws_ + at_.st + first, ld_, count, t_.lanes(), ws_ + at_.max, ws_ + at_.alpha, sums);
    float* total = ws_ + at_.sum;
    store(total, fma(load(total), load(ws_ + at_.alpha), load(sums)));
  }

  // softmax of scores that are at hand by key, from the first-th on: as many weights at once as a vector has.
  void few_softmax(int32_t first, int32_t count) {
    float* st = ws_ + at_.st + first;
    if (c_.code.unnormalized) return few_take(st, count);
    few_weights(st, ld_, count, t_.lanes(), ws_ + at_.max, ws_ + at_.alpha);
    vf sum[kSums] = {};
    few_by_key(st, ld_, count, t_.lanes(), ws_ + at_.s,
               [&](int32_t n, vf w) { sum[n % kSums] += n < count ? w : vf{}; });
    float* total = ws_ + at_.sum;
    store(total, fma(load(total), load(ws_ + at_.alpha), (sum[0] + sum[1]) + (sum[2] + sum[3])));
  }

 private:
  // Of a chunk that is kept; none of what lies so.
  int64_t floats_of(const View& view, int32_t width) const {
    const int32_t padded = round_up(width, kLanes);
    const bool there = p_.dtype == DType::f32 && p_.stores == nullptr && p_.groups == nullptr && view.stride[3] == 1 &&
                       view.stride[2] == width && width == padded;
    return there ? 0 : int64_t{kKeptKeys} * padded;
  }
  void put_rows(const View& view, const Lines& lines, int32_t width, int32_t padded, float* to) {
    Rows there{reinterpret_cast<const float*>(lines.at(0)), lines.stride / 4};  // codes, as they were decoded
    if (p_.stores == nullptr) there = rows_of(lines, p_.dtype, view.stride[3], width, padded, to);
    if (there.data == to) return;
    for (int32_t n = 0; n < lines.count; ++n)
      __builtin_memcpy(to + n * padded, there.data + n * there.stride, static_cast<size_t>(padded) * sizeof(float));
  }

  // few_values_of values that not every query may see. A sum that is not finite may have met one: then false, and o is
  // as it was.
  bool few_values_apart(const Lines& values, const Ahead& ahead) {
    const int32_t lanes = t_.lanes();
    float *apart = ws_ + at_.apart, *o = ws_ + at_.o;
    alignas(kBytes) static constexpr float kNone[kFewLanes] = {};
    clear(at_.apart, static_cast<int64_t>(lanes) * at_.dv);
    few_values_of(values, 0, values.count, kNone, apart, ahead);
    if (!is_finite({apart, at_.dv}, lanes, at_.dv)) return false;
    for (int32_t m = 0; m < lanes; ++m, apart += at_.dv, o += at_.dv)
      for (int32_t d = 0; d < at_.dv; d += kLanes)
        store(o + d, fma(load(o + d), set1(ws_[at_.alpha + m]), load(apart + d)));
    return true;
  }

  void few_values_of(const Lines& values, int32_t first, int32_t count, const float* alpha, float* o,
                     const Ahead& ahead) {
    const auto from = [&](auto* type, const Lines& v) {
      few_values<std::remove_pointer_t<decltype(type)>>(ws_ + at_.s, at_.bm, v, first, count, ws_ + at_.guarded, alpha,
                                                        o, at_.dv, t_.lanes(), ahead);
    };
    with_elements(p_.dtype, [&](auto* type) {
      if (p_.stores == nullptr && p_.v.stride[3] == 1 &&
          p_.v_head_dim % (kLanes * kPerUnit<std::remove_pointer_t<decltype(type)>>) == 0)
        return from(type, values);
      from(ws_, lines_of(rows(p_.v, values, p_.v_head_dim, at_.dv, at_.v), values.count));
    });
  }

  // As many keys from `first` on as a tile has: they need not all be seen.
  Lines keys_ahead(int64_t first) const {
    if (p_.stores != nullptr || p_.groups != nullptr) return kNoLines;  // not to be copied twice
    const int64_t left = seq_.kv_len - first;
    return lines(p_.k, p_.head_dim, first, left < c_.tile_kv ? static_cast<int32_t>(left) : c_.tile_kv, at_.listed_k);
  }

  static Lines lines_of(Rows rows, int32_t count) {
    return {rows.data, 4 * rows.stride, static_cast<int32_t>(4 * rows.stride), count};
  }

  struct Weights {
    float* at;
    int32_t bm;
    using Exp = FineExp;
    ATTNKIT_INLINE void put(int32_t n, int32_t lane, vf w, vf after) const {
      store(at + n * bm + lane, w);
      store(at + (n + 1) * bm + lane, after);
    }
  };

 protected:
  const bool few_;  // see decode-inl.h; else products-inl.h
};
