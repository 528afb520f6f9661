// Products on the bfloat16 dot-product instruction: queries and keys as pairs of channels, weights and values as pairs
// of keys. Sums are float32. (The instruction takes subnormal numbers for zero.)

struct PairDot {
  static constexpr int kKeys = 2;
  float scale = 1;  // of scores: scaled queries would be rounded once more
  ATTNKIT_INLINE PairDot at(int32_t, int32_t) const { return *this; }
  ATTNKIT_INLINE vf start(int32_t) const { return vf{}; }
  ATTNKIT_INLINE vf finish(vf sum, int32_t, int, bool) const { return sum * set1(scale); }
  static ATTNKIT_INLINE vf run(vf a, vf b, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

ATTNKIT_INLINE uint32_t pair_of(Bf16 first, Bf16 second) {
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
}

// The conversion puts one vector after the other, and pairs want them shuffled together.
ATTNKIT_INLINE vf in_pairs(__m512i both) {
  alignas(64) static constexpr int16_t kShuffle[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(kShuffle), both);
}
// Elements kFirst to kFirst + 15 of two vectors, side by side.
template <int kFirst>
ATTNKIT_INLINE vf shuffle_pairs(vf a, vf b) {
  alignas(64) static constexpr struct Order {
    int16_t at[32];
    constexpr Order() : at() {
      for (int i = 0; i < 32; ++i) at[i] = static_cast<int16_t>(kFirst + i / 2 + i % 2 * 32);
    }
  } kOrder;
  return (vf)_mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(kOrder.at), (__m512i)b);
}
// Rounds to nearest.
ATTNKIT_INLINE vf pairs_of(vf first, vf second) {
  return in_pairs((__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

// For what is rounded to 8 bits next: a polynomial of second degree is exact enough.
struct RoughExp {
  static ATTNKIT_INLINE vf remainder(vf x, vf n) { return fma(n, set1(-kLn2), x); }
  template <int kCount>
  static ATTNKIT_INLINE void less_one(const vf* r, vf* p) {
    ATTNKIT_EACH p[i] = fma(set1(0.5f), r[i], set1(1.0f));
    ATTNKIT_EACH p[i] = p[i] * r[i];
  }
};

inline void copy_row(const Bf16* from, int64_t stride, int32_t width, int32_t padded, Bf16* to) {
  if (stride == 1)
    __builtin_memcpy(to, from, static_cast<size_t>(width) * sizeof(Bf16));
  else
    for (int32_t d = 0; d < width; ++d) to[d] = from[d * stride];
  for (int32_t d = width; d < padded; ++d) to[d] = Bf16{0};
}

class PairForward : public Forward {
 public:
  PairForward(const Call& c, const Task& t, float* workspace, bool few = false) : Forward(c, t, workspace, few) {
    const bool there = are_pairs() && p_.stores == nullptr && p_.groups == nullptr && p_.k.stride[2] == p_.head_dim;
    kept_ = Kept(c, t, there ? 0 : pairs() * kKeptKeys, at_.dv * kKeptKeys / 2, workspace);
  }

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
    if (!full) find_live(first, count);
    scores(first, count, full);
    modify(first, count, full);
    const bool all = weigh_all(count, full);
    softmax(count, all, Weights{ws_ + at_.weights, at_.bm});
    thin_weights(first, count, full);
    bool finite = true;
    const float* values = value_pairs(first, count, full, finite);
    if (!finite && !full) return pv_guarded<PairDot>(ws_ + at_.weights, values, at_.dv, count);
    pv<PairDot>(ws_ + at_.weights, at_.bm, values, at_.dv, count, live(all), ws_ + at_.alpha, ws_ + at_.o, at_.dv,
                t_.lanes());
  }

 protected:
  // Codes as bfloat16: copies of the tile's, keys in rows of whole vectors.
  Lines keys_of(int64_t first, int32_t count) {
    if (p_.stores == nullptr) return Forward::keys_of(first, count);
    return halves(decoded(p_.stores[0], first, count, round_up(p_.head_dim, 2 * kLanes), at_.k), at_.k);
  }
  Lines values_of(int64_t first, int32_t count) {
    const Lines values = Forward::values_of(first, count);
    return p_.stores == nullptr ? values : halves(values, at_.v);
  }

  virtual void scores(int64_t first, int32_t count, bool full) {
    const KeyRows keys = key_pairs(first, count);
    float* largest = start_largest(full);
    with_less(PairDot{p_.scale}, first, [&](const auto& dot) {
      qk_units(ws_ + at_.qt, at_.bm, keys, count, live(full), (p_.head_dim + 1) / 2, dot, ws_ + at_.s, largest);
    });
  }

  struct Weights {
    float* at;
    int32_t bm;

    using Exp = RoughExp;
    ATTNKIT_INLINE void put(int32_t n, int32_t lane, vf w, vf after) const {
      store(at + n / 2 * bm + lane, pairs_of(w, after));
    }
  };

  void thin_weights(int64_t first, int32_t count, bool full) {
    if (!thinned()) return;
    thin(first, count, full, [&](int32_t n, int32_t lane, vi kept) {
      float* w = ws_ + at_.weights + n / 2 * at_.bm + lane;
      store_int(w, load_int(w) & (kept | (n % 2 ? 0xffff : ~0xffff)));
    });
  }

 private:
  int32_t pairs() const { return (p_.head_dim + 1) / 2; }
  bool are_pairs() const { return channel_of(p_.k) == 1 && p_.head_dim % 2 == 0; }

  // Rows of floats at `at`, where there are as many as whole runs have, rounded where they lie.
  Lines halves(const Lines& floats, size_t at) const {
    const float* from = ws_ + at;
    Bf16* to = reinterpret_cast<Bf16*>(ws_ + at);
    const int64_t end = round_up(floats.count, Lines::kRun) * floats.stride / 4;
    for (int64_t i = 0; i < end; i += 2 * kLanes) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(from + i + kLanes), (__m512)load(from + i));
      __builtin_memcpy(to + i, &both, sizeof both);
    }
    return {to, floats.stride / 2, floats.bytes / 2, floats.count};
  }

  // Where they lie, if they do so one after the other; else as Rows of FloatForward.
  KeyRows key_pairs(int64_t first, int32_t count) {
    if (kept_.keys()) {
      const float* chunk =
          kept_.keys(first, count, [&](int64_t n, int32_t keys, float* to) { copy_keys(keys_of(n, keys), to); });
      return {reinterpret_cast<const char*>(chunk + first % kKeptKeys * pairs()), 4 * pairs()};
    }
    const Lines keys = keys_of(first, count);
    if (are_pairs() && keys.adjacent(0, count) == count) return {keys.at(0), keys.stride};
    copy_keys(keys, ws_ + at_.k);
    return {reinterpret_cast<const char*>(ws_ + at_.k), 4 * pairs()};
  }
  void copy_keys(const Lines& keys, float* to) const {
    for (int32_t n = 0; n < keys.count; ++n, to += pairs())
      copy_row(reinterpret_cast<const Bf16*>(keys.at(n)), channel_of(p_.k), p_.head_dim, 2 * pairs(),
               reinterpret_cast<Bf16*>(to));
  }

  const float* value_pairs(int64_t first, int32_t count, bool full, bool& finite) {
    if (kept_.values())
      return first % kKeptKeys / 2 * at_.dv +
             kept_.values(first, count, finite, [&](int64_t n, int32_t keys, float* to) {
               pack_values(values_of(n, keys), to);
               return are_finite(to, keys);
             });
    float* to = ws_ + at_.values;
    pack_values(values_of(first, count), to);
    if (!full) finite = are_finite(to, count);
    return to;
  }
  bool are_finite(const float* pairs, int32_t count) const {
    constexpr int32_t kLow = 0x7f80, kHigh = kLow << 16;
    vi infinite{};
    for (int64_t i = 0; i < (count + 1) / 2 * int64_t{at_.dv}; i += kLanes) {
      const vi x = load_int(pairs + i);
      infinite |= ((x & kLow) == kLow) | ((x & kHigh) == kHigh);
    }
    return !any(infinite);
  }
  void pack_values(const Lines& values, float* to) const {
    for (int32_t n = 0; n < values.count; n += Lines::kRun) {
      const int32_t left = values.count - n;
      pack_run(reinterpret_cast<const Bf16*>(values.at(n)), {values.stride / 2, channel_of(p_.v)},
               left < Lines::kRun ? left : Lines::kRun, p_.v_head_dim, to + n / 2 * at_.dv, at_.dv);
    }
  }

  struct Strides {
    int64_t row, channel;
  };
  // Of adjacent rows. Not inlined: inside `run` there are no registers for it.
  static __attribute__((noinline)) void pack_run(const Bf16* v, Strides stride, int32_t count, int32_t width, float* to,
                                                 int32_t dv) {
    int32_t d = 0;
    const auto columns = [&](int32_t channels, auto pack) {
      for (; d + channels <= width; d += channels) {
        const Bf16* row = v + d;
        float* pairs = to + d;
        for (int32_t n = 0; n < count; n += 2, row += 2 * stride.row, pairs += dv)
          pack(row, n + 1 < count ? row + stride.row : nullptr, pairs);
      }
    };
    if (stride.channel == 1) {
      columns(2 * kLanes, [](const Bf16* row, const Bf16* next, float* pairs) {
        const vf a = load_units(row), b = next != nullptr ? load_units(next) : vf{};
        store(pairs, shuffle_pairs<0>(a, b));
        store(pairs + kLanes, shuffle_pairs<16>(a, b));
      });
      columns(kLanes, [](const Bf16* row, const Bf16* next, float* pairs) {
        store_int(pairs, vi(widen_bits(row) | (next != nullptr ? widen_bits(next) << 16 : vu{})));
      });
    }
    for (; d < dv; ++d)
      for (int32_t n = 0; n < count; n += 2) {
        const Bf16* row = v + n * stride.row + d * stride.channel;
        uint32_t pair = 0;
        if (d < width) pair = pair_of(*row, n + 1 < count ? row[stride.row] : Bf16{0});
        __builtin_memcpy(to + n / 2 * dv + d, &pair, 4);
      }
  }
};

// How many queries read a key. What decides is this, and not how many lanes a task has: that changes with the threads.
inline int64_t queries_of_key(const Problem& p, const Task& t) {
  return p.num_heads / p.num_kv_heads * int64_t{p.sequences[t.sequence].q_len};
}
// They are bound by memory.
inline bool has_few_queries(const Problem& p, const Task& t) { return queries_of_key(p, t) <= kFewLanes; }

// Whether what heads select is multiplied as pairs.
inline bool selects_pairs(const Problem& p, const Task& t) {
  return p.dtype == DType::bf16 && p.stores == nullptr && !has_few_queries(p, t);
}

// Queries of bfloat16, over a cache of no more bits: codes lose less when they are rounded than when they were made.
inline bool multiplies_pairs(const Problem& p) {
  const auto rounds = [](const Store& s) { return s.codec != Codec::plain || s.dtype == DType::bf16; };
  return p.dtype == DType::bf16 && (p.stores == nullptr || (rounds(p.stores[0]) && rounds(p.stores[1])));
}

// Few queries: scores on the dot product, as rows of both lie in memory; the rest in float32.
class PairDecode : public FloatForward {
 public:
  PairDecode(const Call& c, const Task& t, float* workspace)
      : FloatForward(c, t, workspace, true), width_(round_up(p_.head_dim, kPairChannels)) {}

  void pack_queries() {
    for (int32_t m = 0; m < t_.lanes(); ++m)
      copy_row(row<const Bf16*>(p_.q, head_of(m), token_of(m)), p_.q.stride[3], p_.head_dim, width_,
               queries() + m * width_);
  }

 protected:
  static constexpr int32_t kPairChannels = 2 * kLanes;

  Bf16* queries() const { return reinterpret_cast<Bf16*>(ws_ + at_.q); }

  void few_scores_of(const Lines& keys, const Ahead& ahead) override {
    if (p_.k.stride[3] == 1 && width_ == p_.head_dim) return scores_of(keys, ahead);
    scores_of(copied_keys(keys, 0, keys.count), ahead);
  }

  // Keys first .. first + count - 1, with zeros up to a whole vector of pairs.
  Lines copied_keys(const Lines& keys, int32_t first, int32_t count) {
    Bf16* to = reinterpret_cast<Bf16*>(ws_ + at_.k);
    for (int32_t n = 0; n < count; ++n)
      copy_row(reinterpret_cast<const Bf16*>(keys.at(first + n)), channel_of(p_.k), p_.head_dim, width_,
               to + n * width_);
    return {to, 2 * width_, 2 * width_, count};
  }

  // Into S^T from column `at` on.
  void scores_of(const Lines& keys, const Ahead& ahead, int32_t at = 0) {
    by_rows(t_.lanes(), [&]<int kRows>(int32_t m) {
      dot_rows<kRows>(queries() + m * width_, width_, keys, p_.scale, ws_ + at_.st + m * ld_ + at, ld_,
                      m == 0 ? ahead : kNothing);
    });
  }

  const int32_t width_;  // channels, with zeros up to a whole vector of pairs

 private:
  // S^T of kRows queries and keys up to a whole vector of them: the last key is repeated.
  template <int kRows>
  static __attribute__((noinline)) void dot_rows(const Bf16* q, int32_t width, const Lines& k, float scale, float* st,
                                                 int32_t ld, const Ahead& ahead) {
    constexpr int kKeys = kLanes / kRows, kAtOnce = kKeys < 8 ? kKeys : 8;  // as many addresses as there are registers
    const int32_t count = k.count;
    Fetches fetches(ahead, 0);
    for (int32_t n = 0; n < round_up(count, kLanes); n += kKeys) {
      const char *key[kKeys], *at = k.at(n < count ? n : count - 1);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        key[i] = at;
        if (n + i + 1 < count) at += k.stride;
      }
      for (int i = 0; i < kKeys; ++i) fetches.row();
      vf acc[kRows * kKeys] = {};
#pragma GCC unroll 2
      for (int first = 0; first < kKeys; first += kAtOnce)
        for (int32_t d = 0; d < width; d += kPairChannels) {
          vf x[kRows];
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) x[m] = load_units(q + m * width + d);
#pragma GCC unroll 8
          for (int i = first; i < first + kAtOnce; ++i) {
            const vf y = load_units(reinterpret_cast<const Bf16*>(key[i]) + d);
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m) acc[m * kKeys + i] = PairDot::run(x[m], y, acc[m * kKeys + i]);
          }
        }
      const vf scores = sums_of_lanes(acc) * set1(scale);
      alignas(kBytes) float by_query[kLanes];
      store(by_query, scores);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) __builtin_memcpy(st + m * ld + n, by_query + m * kKeys, 4 * kKeys);
    }
  }

  // Lane i: the sum of the lanes of x[i].
  static ATTNKIT_INLINE vf sums_of_lanes(const vf* x) {
    const auto both = []<Step kFirst, Step kSecond>(vf a, vf b)
                          __attribute__((always_inline)) { return shuffle<kFirst>(a, b) + shuffle<kSecond>(a, b); };
    vf quads[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      quads[i] =
          both.template operator()<kLow2, kHigh2>(both.template operator()<kLow1, kHigh1>(x[4 * i], x[4 * i + 1]),
                                                  both.template operator()<kLow1, kHigh1>(x[4 * i + 2], x[4 * i + 3]));
    return both.template operator()<kEven4, kOdd4>(both.template operator()<kEven4, kOdd4>(quads[0], quads[1]),
                                                   both.template operator()<kEven4, kOdd4>(quads[2], quads[3]));
  }
};
