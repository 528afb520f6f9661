// Products on the bfloat16 dot-product instruction: queries and keys as pairs of channels, weights and values as pairs
// of keys. Sums are float32. (The instruction takes subnormal numbers for zero.)

struct PairDot {
  static constexpr int kKeys = 2;
  static constexpr bool kScaled = true;  // scaled queries would be rounded once more
  static ATTNKIT_INLINE vf run(vf a, vf b, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

ATTNKIT_INLINE uint32_t pair_of(Bf16 first, Bf16 second) {
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
}

// Rounds to nearest; the conversion puts one vector after the other, and pairs want them shuffled together.
ATTNKIT_INLINE vf pairs_of(vf first, vf second) {
  alignas(64) static constexpr int16_t kShuffle[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(kShuffle), both);
}

// exp_weight for what is rounded to 8 bits next: a polynomial of second degree is exact enough.
ATTNKIT_INLINE vf exp_rough(vf x) {
  const vf magic = set1(786432.0f);
  x = max_or_second(set1(-115.0f), x);
  const vf t = fma(x, set1(kLog2e), magic), n = t - magic, r = fma(n, set1(-0.693147182464599609375f), x);
  const vf power = look_up(kSixteenths, as_int(t));
  return scale_by_power(fma(power, fma(set1(0.5f), r, set1(1.0f)) * r, power), n);
}

class PairForward : public Forward {
 public:
  using Forward::Forward;

  void pack_queries() {
    const Bf16* q[kMaxTileQ];
    for (int32_t m = 0; m < t_.lanes(); ++m) q[m] = row<const Bf16*>(p_.q, head_of(m), token_of(m));
    const int64_t stride = p_.q.stride[3];
    if (stride == 1 && p_.head_dim % (2 * kLanes) == 0) {
      const float* pairs[kMaxTileQ];
      for (int32_t m = 0; m < t_.lanes(); ++m) pairs[m] = reinterpret_cast<const float*>(q[m]);
      return transpose_rows(pairs, t_.lanes(), p_.head_dim / 2, [](auto x) { return x; }, ws_ + at_.qt, at_.bm);
    }
    for (int32_t d = 0; d < p_.head_dim; d += 2) {
      float* qt = ws_ + at_.qt + static_cast<int64_t>(d / 2) * at_.bm;
      for (int32_t m = 0; m < at_.bm; ++m) {
        uint32_t pair = 0;
        if (m < t_.lanes()) pair = pair_of(q[m][d * stride], d + 1 < p_.head_dim ? q[m][(d + 1) * stride] : Bf16{0});
        __builtin_memcpy(qt + m, &pair, 4);
      }
    }
  }

  void keys(int64_t first, int32_t count, bool full, int64_t) {
    const int32_t pairs = (p_.head_dim + 1) / 2;
    if (!full) find_live(first, count);
    qk_units<PairDot>(ws_ + at_.qt, at_.bm, keys_as_pairs(first, count), count, live(full), pairs, p_.scale,
                      ws_ + at_.s, start_largest(full));
    modify(first, count, full);
    softmax(count, full, Weights{ws_ + at_.weights, at_.bm});
    if (thinned())
      thin(first, count, full, [&](int32_t n, int32_t lane, vi kept) {
        float* w = ws_ + at_.weights + n / 2 * at_.bm + lane;
        store_int(w, load_int(w) & (kept | (n % 2 ? 0xffff : ~0xffff)));
      });
    if (!full) {
      int64_t stride;
      const float* v = rows(p_.v, first, count, p_.v_head_dim, at_.dv, at_.v, stride);
      if (has_nonfinite(v, stride, count))
        return pv_guarded(v, stride, count, [&](int32_t n, int32_t m) { return weight(n, m); });
    }
    pack_values(first, count);
    pv<PairDot>(ws_ + at_.weights, at_.bm, ws_ + at_.values, at_.dv, count, live(full), ws_ + at_.alpha, ws_ + at_.o,
                at_.dv, t_.lanes());
  }

 private:
  struct Weights {
    float* at;
    int32_t bm;

    static ATTNKIT_INLINE vf exp(vf x) { return exp_rough(x); }
    ATTNKIT_INLINE void put(int32_t n, int32_t lane, vf w, vf after) const {
      store(at + n / 2 * bm + lane, pairs_of(w, after));
    }
  };

  float weight(int32_t n, int32_t m) const {
    uint32_t pair;
    __builtin_memcpy(&pair, ws_ + at_.weights + n / 2 * at_.bm + m, 4);
    return widen_one(Bf16{static_cast<uint16_t>(n % 2 ? pair >> 16 : pair)});
  }

  // Where they lie, if their channels are adjacent and even in number.
  KeyRows keys_as_pairs(int64_t first, int32_t count) {
    const Bf16* k = row<const Bf16*>(p_.k, kv_head_, seq_.kv_start + first);
    const int64_t stride = p_.k.stride[2], channel = p_.k.stride[3];
    if (channel == 1 && p_.head_dim % 2 == 0) return {reinterpret_cast<const char*>(k), 2 * stride};
    const int32_t padded = (p_.head_dim + 1) / 2 * 2;
    Bf16* to = reinterpret_cast<Bf16*>(ws_ + at_.k);
    for (int32_t n = 0; n < count; ++n)
      for (int32_t d = 0; d < padded; ++d) to[n * padded + d] = d < p_.head_dim ? k[n * stride + d * channel] : Bf16{0};
    return {reinterpret_cast<const char*>(to), 2 * padded};
  }

  void pack_values(int64_t first, int32_t count) {
    const Bf16* v = row<const Bf16*>(p_.v, kv_head_, seq_.kv_start + first);
    const int64_t stride = p_.v.stride[2], channel = p_.v.stride[3];
    for (int32_t n = 0; n < count; n += 2, v += 2 * stride) {
      float* to = ws_ + at_.values + static_cast<int64_t>(n / 2) * at_.dv;
      const bool second = n + 1 < count;
      int32_t d = 0;
      if (channel == 1)
        for (; d + kLanes <= p_.v_head_dim; d += kLanes)
          store_int(to + d, vi(widen_bits(v + d) | (second ? widen_bits(v + stride + d) << 16 : vu{})));
      for (; d < at_.dv; ++d) {
        uint32_t pair = 0;
        if (d < p_.v_head_dim) pair = pair_of(v[d * channel], second ? v[stride + d * channel] : Bf16{0});
        __builtin_memcpy(to + d, &pair, 4);
      }
    }
  }
};

int32_t run_by_dtype(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, const Parts* parts,
                     float* workspace) {
  // Few queries are bound by memory; and how many lanes a task has may not decide, for that changes with the threads.
  const Problem& p = *c.problem;
  const bool few = p.num_heads / p.num_kv_heads * p.sequences[t.sequence].q_len <= kFewLanes;
  const auto run_it = p.dtype == DType::bf16 && !few ? run<PairForward> : run<FloatForward>;
  return run_it(c, t, ranges, num_ranges, parts, workspace);
}
