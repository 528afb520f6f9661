// Products of float32, whatever the tensors hold.
class FloatForward : public Forward {
 public:
  // Of one tile, keys need not be fetched: then fewer queries are few.
  FloatForward(const Call& c, const Task& t, float* workspace)
      : FloatForward(
            c, t, workspace,
            t.lanes() <= (c.problem->sequences[t.sequence].kv_len > c.tile_kv ? kFewLanes : kFewLanes * 3 / 4)) {}

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

  // `next`: where the keys after these begin, or -1.
  void keys(int64_t first, int32_t count, bool full, int64_t next) {
    float *s = ws_ + at_.s, *largest = start_largest(full);
    const Lines keys = keys_of(first, count), values = values_of(first, count);
    if (!full) find_live(first, count);
    if (few_) {
      few_scores_of(keys, {keys, values});
    } else {
      const Rows k = rows(p_.k, keys, p_.head_dim, p_.head_dim, at_.k);
      qk_units<FloatDot>(ws_ + at_.qt, at_.bm, {reinterpret_cast<const char*>(k.data), 4 * k.stride}, count, live(full),
                         p_.head_dim, 1, s, largest);
    }
    weigh(first, count, full);
    sum_values(values, count, full, next < 0 ? first : next);
  }

 protected:
  // Scores, of few queries still by query, become weights.
  void weigh(int64_t first, int32_t count, bool full) {
    float* s = ws_ + at_.s;
    if (few_ && plain(full)) {
      few_softmax(count);
    } else {
      if (few_) few_by_key(ws_ + at_.st, at_.ld, count, t_.lanes(), s, [](int32_t, vf) {});
      modify(first, count, full);
      softmax(count, full, Weights{s, at_.bm});
    }
    if (thinned())
      thin(first, count, full, [&](int32_t n, int32_t lane, vi kept) {
        float* w = s + n * at_.bm + lane;
        store(w, select(kept, load(w), vf{}));
      });
  }

  // `next`: where the keys that are needed next begin.
  void sum_values(const Lines& values, int32_t count, bool full, int64_t next) {
    const float* s = ws_ + at_.s;
    if (few_ && full) {
      const Lines then = keys_ahead(next);
      return few_values_of(values, {values, then});
    }
    const Rows v = rows(p_.v, values, p_.v_head_dim, at_.dv, at_.v);
    // 0 * NaN is NaN: a value that some query must not see may not be multiplied at all, not even by a weight of zero.
    if (!full && !is_finite(v, count, at_.dv)) return pv_guarded<FloatDot>(s, v.data, v.stride, count);
    pv<FloatDot>(s, at_.bm, v.data, v.stride, count, live(full), ws_ + at_.alpha, ws_ + at_.o, at_.dv, t_.lanes());
  }

  FloatForward(const Call& c, const Task& t, float* workspace, bool few) : Forward(c, t, workspace), few_(few) {}

  // S^T of few queries.
  virtual void few_scores_of(const Lines& keys, const Ahead& ahead) {
    const auto from = [&](auto* type, const Lines& k, int32_t channels) {
      few_scores<std::remove_pointer_t<decltype(type)>>(ws_ + at_.q, t_.lanes(), at_.dq, channels, k, ws_ + at_.st,
                                                        at_.ld, ahead);
    };
    with_elements(p_.dtype, [&](auto* type) {
      if (p_.stores == nullptr && p_.k.stride[3] == 1 && p_.head_dim == at_.dq) return from(type, keys, p_.head_dim);
      const int32_t width = round_up(p_.head_dim, kLanes);
      from(ws_, lines_of(rows(p_.k, keys, p_.head_dim, width, at_.k), keys.count), width);
    });
  }

 private:
  // softmax of plain scores, which are still at hand by key: as many weights at once as a vector has.
  void few_softmax(int32_t count) {
    few_weights(ws_ + at_.st, at_.ld, count, t_.lanes(), ws_ + at_.max, ws_ + at_.alpha);
    vf sum[kSums] = {};
    few_by_key(ws_ + at_.st, at_.ld, count, t_.lanes(), ws_ + at_.s,
               [&](int32_t n, vf w) { sum[n % kSums] += n < count ? w : vf{}; });
    float* total = ws_ + at_.sum;
    store(total, fma(load(total), load(ws_ + at_.alpha), (sum[0] + sum[1]) + (sum[2] + sum[3])));
  }

  void few_values_of(const Lines& values, const Ahead& ahead) {
    const auto from = [&](auto* type, const Lines& v) {
      few_values<std::remove_pointer_t<decltype(type)>>(ws_ + at_.s, at_.bm, v, ws_ + at_.guarded, ws_ + at_.alpha,
                                                        ws_ + at_.o, at_.dv, t_.lanes(), ahead);
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
    if (p_.stores != nullptr) return kNoLines;
    const int64_t left = seq_.kv_len - first;
    return lines(p_.k, p_.head_dim, first, left < c_.tile_kv ? static_cast<int32_t>(left) : c_.tile_kv);
  }

  static Lines lines_of(Rows rows, int32_t count) {
    return {rows.data, 4 * rows.stride, static_cast<int32_t>(4 * rows.stride), count};
  }

  struct Weights {
    float* at;
    int32_t bm;
    static constexpr int kVecs = 1, kKeys = kSoftmaxKeys;
    template <int kCount>
    static ATTNKIT_INLINE void exp(vf* x) {
      exp_weights<kCount>(x);
    }
    ATTNKIT_INLINE void put(int32_t n, int32_t lane, vf w, vf after) const {
      store(at + n * bm + lane, w);
      store(at + (n + 1) * bm + lane, after);
    }
  };

  const bool few_;  // see decode-inl.h; else products-inl.h
};
