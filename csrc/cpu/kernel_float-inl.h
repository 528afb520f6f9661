// Products of float32, whatever the tensors hold.
class FloatForward : public Forward {
 public:
  using Forward::Forward;

  // Q^T, scaled; lanes beyond the last query are zero. Of few queries Q.
  void pack_queries() {
    if (few())
      return with_elements(p_.dtype, [&](auto* type) {
        for (int32_t m = 0; m < t_.lanes(); ++m) {
          const auto* q = row<decltype(type)>(p_.q, head_of(m), token_of(m));
          float* to = ws_ + at_.q + static_cast<int64_t>(m) * p_.head_dim;
          for (int32_t d = 0; d < p_.head_dim; ++d) to[d] = widen_one(q[d * p_.q.stride[3]]) * p_.scale;
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
    if (!full) find_live(first, count);
    if (few()) {
      few_scores_of(first, count);
    } else {
      int64_t stride;
      const float* k = rows(p_.k, first, count, p_.head_dim, p_.head_dim, at_.k, stride);
      qk_units<FloatDot>(ws_ + at_.qt, at_.bm, {reinterpret_cast<const char*>(k), 4 * stride}, count, live(full),
                         p_.head_dim, 1, s, largest);
    }
    Ahead ahead = few() && next >= 0 ? tile_at(p_.k, p_.head_dim, next) : Ahead();
    if (few() && plain(full)) {
      few_softmax(count, ahead);
    } else {
      if (few()) few_by_key(ws_ + at_.st, at_.ld, count, t_.lanes(), s, [](int32_t, vf) {});
      modify(first, count, full);
      softmax(count, full, Weights{s, at_.bm});
    }
    if (thinned())
      thin(first, count, full, [&](int32_t n, int32_t lane, vi kept) {
        float* w = s + n * at_.bm + lane;
        store(w, select(kept, load(w), vf{}));
      });
    if (few() && full) return few_values_of(first, count, ahead);
    int64_t stride;
    const float* v = rows(p_.v, first, count, p_.v_head_dim, at_.dv, at_.v, stride);
    // 0 * NaN is NaN: a value that some query must not see may not be multiplied at all, not even by a weight of zero.
    if (!full && has_nonfinite(v, stride, count))
      return pv_guarded(v, stride, count, [&](int32_t n, int32_t m) { return s[n * at_.bm + m]; });
    pv<FloatDot>(s, at_.bm, v, stride, count, live(full), ws_ + at_.alpha, ws_ + at_.o, at_.dv, t_.lanes());
  }

 private:
  // See products-inl.h and decode-inl.h. Keys that fit the cache need not be fetched: fewer queries then.
  bool few() const { return t_.lanes() <= (seq_.kv_len > c_.tile_kv ? kFewLanes : kFewLanes * 3 / 4); }

  void few_scores_of(int64_t first, int32_t count) {
    Ahead ahead = tile_at(p_.v, p_.v_head_dim, first);
    constexpr int32_t kBlock = kBlockVecs * kLanes;
    const int32_t lanes = t_.lanes(), blocks = (count + kBlock - 1) / kBlock;
    const auto from = [&](const auto* k, int64_t stride, int32_t channels) {
      const int32_t across = channels / (kLanes * kPerUnit<std::remove_cvref_t<decltype(*k)>>);
      const int32_t in_keys = ahead.share(int64_t{blocks} * kBlockVecs * across, 2);
      const int32_t in_scores = ahead.share(int64_t{blocks} * p_.head_dim * ((lanes + 3) / 4), 2);
      for (int32_t n = 0; n < count; n += kBlock) {
        const int32_t keys = count - n < kBlock ? count - n : kBlock, ld = keys <= kLanes ? kLanes : kBlock;
        transpose_keys(k + n * stride, stride, keys, channels, ws_ + at_.kt, ld, ahead, in_keys);
        few_scores(ws_ + at_.q, lanes, p_.head_dim, ws_ + at_.kt, ld, ws_ + at_.st + n, at_.ld, ahead, in_scores);
      }
    };
    with_elements(p_.dtype, [&](auto* type) {
      using Element = std::remove_pointer_t<decltype(type)>;
      if (p_.k.stride[3] == 1 && p_.head_dim % (kLanes * kPerUnit<Element>) == 0)
        return from(row<Element*>(p_.k, kv_head_, seq_.kv_start + first), p_.k.stride[2], p_.head_dim);
      const int32_t width = round_up(p_.head_dim, kLanes);
      int64_t stride;
      const float* k = rows(p_.k, first, count, p_.head_dim, width, at_.k, stride);
      from(k, stride, width);
    });
  }

  // softmax of plain scores, which are still at hand by key: as many weights at once as a vector has.
  void few_softmax(int32_t count, Ahead& ahead) {
    few_weights(ws_ + at_.st, at_.ld, count, t_.lanes(), ws_ + at_.max, ws_ + at_.alpha, ahead);
    vf sum[kSums] = {};
    few_by_key(ws_ + at_.st, at_.ld, count, t_.lanes(), ws_ + at_.s,
               [&](int32_t n, vf w) { sum[n % kSums] += n < count ? w : vf{}; });
    float* total = ws_ + at_.sum;
    store(total, fma(load(total), load(ws_ + at_.alpha), (sum[0] + sum[1]) + (sum[2] + sum[3])));
  }

  void few_values_of(int64_t first, int32_t count, Ahead& ahead) {
    const auto from = [&](auto* v, int64_t stride) {
      few_values(ws_ + at_.s, at_.bm, v, stride, count, ws_ + at_.alpha, ws_ + at_.o, at_.dv, t_.lanes(), ahead);
    };
    with_elements(p_.dtype, [&](auto* type) {
      if (p_.v.stride[3] == 1 && p_.v_head_dim == at_.dv)
        return from(row<decltype(type)>(p_.v, kv_head_, seq_.kv_start + first), p_.v.stride[2]);
      int64_t stride;
      const float* v = rows(p_.v, first, count, p_.v_head_dim, at_.dv, at_.v, stride);
      from(v, stride);
    });
  }

  // As much of a tile as there is; rows whose channels lie apart are not worth fetching.
  Ahead tile_at(const View& view, int32_t channels, int64_t first) const {
    if (view.stride[3] != 1) return {};
    const int64_t size = element_size(p_.dtype), left = seq_.kv_len - first;
    const int64_t at =
        seq_.batch * view.stride[0] + kv_head_ * view.stride[1] + (seq_.kv_start + first) * view.stride[2];
    return {view.data + at * size, view.stride[2] * size, channels * size,
            static_cast<int32_t>(left < c_.tile_kv ? left : c_.tile_kv)};
  }

  struct Weights {
    float* at;
    int32_t bm;
    static ATTNKIT_INLINE vf exp(vf x) { return exp_weight(x); }
    ATTNKIT_INLINE void put(int32_t n, int32_t lane, vf w, vf after) const {
      store(at + n * bm + lane, w);
      store(at + (n + 1) * bm + lane, after);
    }
  };
};
