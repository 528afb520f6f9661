// Few queries over codes, which no tile of floats is made of: keys on the byte dot product, values on the byte or the
// bfloat16 one. Sums of bytes are integers, so they are exact; scales join them once a run of keys (of values: once a
// tile).
//
// A query, or of int4 and int2 its product with the scales of a group of keys, is rounded to 16 bits, in two bytes: q =
// 256 high + low. Weights of int8 values, times their scales, are 16 bits of the largest of their tile; those of int4
// and int2 are bfloat16, and codes become bfloat16 by setting the bits of 128 in front of them.

// ---- queries as bytes ----

inline constexpr float kMostQuery = 32512;  // 127 * 256

// Of 64 numbers that are `rounded`, up to kMostQuery, the two bytes each.
ATTNKIT_INLINE void put_bytes(const vf* x, char* high, char* low) {
  alignas(64) static constexpr int16_t kHalves[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), halves = _mm512_load_si512(kHalves);
  __m512i top[2], rest[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i both = _mm512_permutex2var_epi16((__m512i)x[2 * i], halves, (__m512i)x[2 * i + 1]);
    top[i] = _mm512_srli_epi16(_mm512_add_epi16(both, _mm512_set1_epi16(128)), 8);
    rest[i] = _mm512_and_si512(both, _mm512_set1_epi16(255));
  }
  _mm512_storeu_si512(high, _mm512_permutexvar_epi64(order, _mm512_packus_epi16(top[0], top[1])));
  _mm512_storeu_si512(low, _mm512_permutexvar_epi64(order, _mm512_packus_epi16(rest[0], rest[1])));
}

// Rounds `count` numbers times `inverse`, at most kMostQuery; `count` is a multiple of 2 kLanes.
ATTNKIT_INLINE void round_to_bytes(const float* x, int32_t count, float inverse, char* high, char* low) {
  for (int32_t c = 0; c < count; c += 4 * kLanes) {
    vf whole[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      whole[i] = rounded(c + i * kLanes < count ? load(x + c + i * kLanes) : vf{}, set1(inverse));
    put_bytes(whole, high + c, low + c);
  }
}
ATTNKIT_INLINE vf larger_magnitude(vf a, vf b) {
  return (vf)_mm512_range_ps((__m512)a, (__m512)b, 0xb);
}  // b if a is NaN

// ---- keys ----

// Sums of kRows queries with the codes of kRuns runs of keys, which are kBits wide and read as unsigned. The planes of
// bytes of a query lie kPlane apart.
inline constexpr int32_t kPlane = kMostCodeChannels;
template <int kBits, int kRows, int kRuns>
ATTNKIT_INLINE void dot_runs(const char* const* codes, int32_t channels, const char* q, vi (&sum)[kRuns][kRows],
                             const CodeFetch* fetch) {
  constexpr int kFields = 8 / kBits;
  vi high[kRuns][kRows] = {}, low[kRuns][kRows] = {};
  for (int32_t d = 0; d < channels / 4; d += kFields) {
#pragma GCC unroll 2
    for (int r = 0; r < kRuns; ++r) fetch[r].step(d / kFields);
    vi words[kRuns];
#pragma GCC unroll 2
    for (int r = 0; r < kRuns; ++r) words[r] = load_words(codes[r] + d / kFields * kLanes * 4);
#pragma GCC unroll 4
    for (int f = 0; f < kFields; ++f) {
      vi u[kRuns];
#pragma GCC unroll 2
      for (int r = 0; r < kRuns; ++r) {
        if constexpr (kBits == 8)
          u[r] = words[r] ^ static_cast<int32_t>(0x80808080);  // 128 more
        else
          u[r] = (words[r] >> kBits * f) & 0x01010101 * ((1 << kBits) - 1);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const vi top = word_at(q + 2 * m * kPlane + (d + f) * 4),
                 rest = word_at(q + (2 * m + 1) * kPlane + (d + f) * 4);
#pragma GCC unroll 2
        for (int r = 0; r < kRuns; ++r) {
          dot_bytes(high[r][m], u[r], top);
          dot_bytes(low[r][m], u[r], rest);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRuns; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) sum[r][m] = (high[r][m] << 8) + low[r][m];
}

// ---- values ----

// Sums of kRows queries and kVecs vectors of channels over int8 values, four tokens at a time. `weights`:
// [run][query][high, low][kRun].
template <int kRows, int kVecs>
__attribute__((noinline)) void byte_values(const CodeTile& tile, int32_t stored, int32_t channel, const char* weights,
                                           int32_t lanes, const float* steps, const float* alpha, float* o,
                                           int32_t o_stride, const CodeTile& next, int32_t part, int32_t parts) {
  vi high[kRows][kVecs] = {}, low[kRows][kVecs] = {};
  for (int32_t r = 0; r < tile.count; ++r) {
    const char* codes = tile.runs[r] + channel * 4;
    const CodeFetch fetch = fetch_of(next, part < parts ? r : next.count, 4 * parts, codes);
    const char* w = weights + static_cast<int64_t>(r) * lanes * 2 * kRun;
#pragma GCC unroll 4
    for (int t = 0; t < kRun / 4; ++t) {
      fetch.step(4 * part + t);
      vi v[kVecs];
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) v[c] = load_words(codes + (t * stored + c * kLanes) * 4);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const vi top = word_at(w + 2 * m * kRun + t * 4), rest = word_at(w + (2 * m + 1) * kRun + t * 4);
#pragma GCC unroll 4
        for (int c = 0; c < kVecs; ++c) {
          dot_bytes(high[m][c], top, v[c]);
          dot_bytes(low[m][c], rest, v[c]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      float* x = o + static_cast<int64_t>(m) * o_stride + c * kLanes;
      store(x, fma(load(x), set1(alpha[m]), to_float((high[m][c] << 8) + low[m][c]) * set1(steps[m])));
    }
}

// The same over int4 or int2 values of kGroups groups of 32 channels. `weights`: bfloat16 [two runs][query][group][2
// kRun]; `rest`: what is added to each group of channels, [query][group].
template <int kBits, int kRows, int kGroups>
__attribute__((noinline)) void pair_values(const CodeTile& tile, int32_t stored, int32_t channel, const char* weights,
                                           int32_t lanes, int32_t groups, const float* rest, const float* alpha,
                                           float* o, int32_t o_stride, const CodeTile& next, int32_t part,
                                           int32_t parts) {
  constexpr int kPairs = 16 / kBits;  // of tokens in a word
  constexpr int32_t kMask = 0x00010001 * ((1 << kBits) - 1);
  vf acc[kRows][2 * kGroups] = {};
  for (int32_t r = 0; r < tile.count; ++r) {
    const char* codes = tile.runs[r] + channel * 4;
    const CodeFetch fetch = fetch_of(next, part < parts ? r : next.count, 4 * parts, codes);
    const char* w = weights + (static_cast<int64_t>(r / 2) * lanes * groups * 2 + r % 2) * 2 * kRun;
#pragma GCC unroll 2
    for (int t = 0; t < 8; t += kPairs) {
      for (int i = 0; i < kPairs / 2; ++i) fetch.step(4 * part + t / 2 + i);
      vi words[2 * kGroups];
#pragma GCC unroll 4
      for (int c = 0; c < 2 * kGroups; ++c) words[c] = load_words(codes + (t / kPairs * stored + c * kLanes) * 4);
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) {
        vf v[2 * kGroups];
#pragma GCC unroll 4
        for (int c = 0; c < 2 * kGroups; ++c)
          v[c] = as_float(((words[c] >> kBits * i) & kMask) | 0x43004300);  // 128 + code, twice
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) {
            const vf weight = set1_bits(w + (m * groups + g) * 4 * kRun + (t + i) * 4);
            acc[m][2 * g] = PairDot::run(weight, v[2 * g], acc[m][2 * g]);
            acc[m][2 * g + 1] = PairDot::run(weight, v[2 * g + 1], acc[m][2 * g + 1]);
          }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * kGroups; ++c) {
      float* x = o + static_cast<int64_t>(m) * o_stride + c * kLanes;
      store(x, fma(load(x), set1(alpha[m]), acc[m][c] + set1(rest[m * groups + c / 2])));
    }
}

// ---- queries of bfloat16 ----

class ByteCodes : public PairCodes<PairDecode> {
 public:
  using PairCodes::PairCodes;

  static bool takes(const Problem& p) { return are_codes(p.stores[0], p.head_dim, kMostCodeChannels); }

  void pack_queries() {
    PairDecode::pack_queries();
    for (int32_t m = 0; m < t_.lanes(); ++m) {
      for (int32_t d = 0; d < p_.head_dim; d += kLanes) store(query(m) + d, widen(queries() + m * width_ + d));
      round_query(m);
    }
  }

 protected:
  void code_scores(const CodeTile& k, int64_t first, const CodeTile& next) override {
    int32_t groups[CodeTile::kMost] = {};
    const bool grouped = keys_.codec != Codec::int8;
    if (grouped) groups_of_runs(k, first, groups);
    // Of all groups first one, then the other: a step takes long to be known.
    const auto each_group = [&](auto f) {
      for (int32_t r = 0; grouped && r < k.count; ++r)
        if (r == 0 || groups[r] != groups[r - 1]) f(k.scales[r], groups[r]);
    };
    each_group([&](const uint16_t* scales, int32_t group) {
      by_rows(t_.lanes(), [&]<int kRows>(int32_t m) { measure_queries<kRows>(scales, group, m); });
    });
    each_group([&](const uint16_t* scales, int32_t group) {
      by_rows(t_.lanes(), [&]<int kRows>(int32_t m) { scale_queries<kRows>(scales, group, m); });
    });
    by_bits(keys_.codec, [&]<int kBits>() {
      for (int32_t r = 0; r < k.count;) {
        const int32_t group = groups[r], runs = r + 1 < k.count && groups[r + 1] == group ? 2 : 1;
        runs == 2 ? scores_of_runs<kBits, 2>(k, r, group, next) : scores_of_runs<kBits, 1>(k, r, group, next);
        r += runs;
      }
    });
  }

  void newest_scores(const Lines& keys, int32_t at) override { scores_of(keys, kNothing, at); }

  void code_sums(const CodeTile& v, int32_t count, const CodeTile& next) override {
    if (values_.codec == Codec::int8) return byte_sums(v, count, next);
    pair_sums(v, next);
  }

 private:
  // Of a query: the scale; and what the sum of bytes of int8 is too large.
  float factor_[2 * kFewLanes];
  int32_t offset_[kFewLanes];
  // For each group of keys in the tile: what its bytes are worth, and 1 over it; what a score has besides their sum.
  float step_[kMostCodeGroups][kFewLanes + kFewRows], inverse_[kMostCodeGroups][kFewLanes + kFewRows],
      zero_[kMostCodeGroups][kFewLanes + kFewRows];

  char* bytes(int32_t group, int32_t m) const {
    return reinterpret_cast<char*>(ws_ + at_.code_bytes) + (group * kFewLanes + m) * 2 * kPlane;
  }

  // ---- scores ----

  // Of numbers that are not all finite the step is NaN, and so will scores be.
  void round_query(int32_t m) {
    const float* x = query(m);
    vf most = vf{}, zero = vf{};
    for (int32_t d = 0; d < p_.head_dim; d += kLanes) {
      most = larger_magnitude(load(x + d), most);
      zero = fma(load(x + d), vf{}, zero);
    }
    factor_[m] = any(zero != vf{}) ? __builtin_nanf("") : p_.scale;
    if (keys_.codec != Codec::int8) return;
    // A power of two: then only what is small beside the largest is rounded.
    const uint32_t up = __builtin_bit_cast(uint32_t, largest_lane(most) / kMostQuery) + 0x7fffff;
    const float step = up < 0x1000000 ? 0 : __builtin_bit_cast(float, up & 0xff800000);
    round_to_bytes(x, p_.head_dim, step == 0 ? 0 : 1 / step, bytes(0, m), bytes(0, m) + kPlane);
    step_[0][m] = step * factor_[m];
    vi high{}, low{};  // codes are read 128 larger than they are
    const vi ones = set1_int(0x01010101);
    for (int32_t d = 0; d < p_.head_dim; d += 4 * kLanes) {
      dot_bytes(high, ones, load_words(bytes(0, m) + d));
      dot_bytes(low, ones, load_words(bytes(0, m) + kPlane + d));
    }
    offset_[m] = _mm512_reduce_add_epi32((__m512i)((high << 8) + low)) * 128;
  }

  // What kRows queries have with a group of keys: the steps of their products with its scales, the sums with its zeros.
  template <int kRows>
  __attribute__((noinline)) void measure_queries(const uint16_t* scales, int32_t group, int32_t first) {
    const float* q = query(first);
    const Bf16 *pairs = queries() + first * width_, *zeros = reinterpret_cast<const Bf16*>(scales) + width_;
    vf sum[kFewRows] = {}, most[kFewRows] = {};
    for (int32_t d = 0; d < width_; d += 2 * kLanes) {
      const vf scale[2] = {widen_scales(scales + d), widen_scales(scales + d + kLanes)};
      const vf zero = load_units(zeros + d);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        most[m] = larger_magnitude(load(q + m * width_ + d) * scale[0], most[m]);
        most[m] = larger_magnitude(load(q + m * width_ + d + kLanes) * scale[1], most[m]);
        sum[m] = PairDot::run(load_units(pairs + m * width_ + d), zero, sum[m]);
      }
    }
    const vf step = largest_of_four(most) * set1(1 / kMostQuery), inverse = set1(1) / step;
    const vi none = step < set1(0x1p-126f);
    store_four(inverse_[group] + first, select(none, vf{}, inverse));
    store_four(step_[group] + first, select(none, vf{}, step) * load(factor_ + first));
    store_four(zero_[group] + first, sums_of_four(sum) * set1(p_.scale));
  }

  // kRows queries times these scales.
  template <int kRows>
  __attribute__((noinline)) void scale_queries(const uint16_t* scales, int32_t group, int32_t first) {
    const float* q = query(first);
    char* to = bytes(group, first);
    const float* inverse = inverse_[group] + first;
    for (int32_t d = 0; d < width_; d += 4 * kLanes) {
      const int32_t vecs = width_ - d < 4 * kLanes ? 2 : 4;
      vf scale[4] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        if (i < vecs) scale[i] = widen_scales(scales + d + i * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        vf whole[4] = {};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          if (i < vecs) whole[i] = rounded(load(q + m * width_ + d + i * kLanes) * scale[i], set1(inverse[m]));
        put_bytes(whole, to + 2 * m * kPlane + d, to + (2 * m + 1) * kPlane + d);
      }
    }
  }

  template <int kBits, int kRuns>
  void scores_of_runs(const CodeTile& k, int32_t r, int32_t group, const CodeTile& next) {
    CodeFetch fetch[kRuns];
    by_rows(t_.lanes(), [&]<int kRows>(int32_t m) {
      for (int i = 0; i < kRuns; ++i)
        fetch[i] = fetch_of(next, m == 0 ? r + i : next.count, p_.head_dim * kBits / 32, k.runs[r]);
      scores_of_rows<kBits, kRows, kRuns>(k.runs + r, k.scales + r, p_.head_dim, bytes(group, m), step_[group] + m,
                                          zero_[group] + m, offset_ + m, by_query(m) + r * kRun, ld_, fetch);
    });
  }

  template <int kBits, int kRows, int kRuns>
  static __attribute__((noinline)) void scores_of_rows(const char* const* codes, const uint16_t* const* scales,
                                                       int32_t channels, const char* q, const float* step,
                                                       const float* zero, const int32_t* offset, float* st, int32_t ld,
                                                       const CodeFetch* fetch) {
    vi sum[kRuns][kRows];
    dot_runs<kBits, kRows, kRuns>(codes, channels, q, sum, fetch);
#pragma GCC unroll 2
    for (int r = 0; r < kRuns; ++r) {
      const vf scale = kBits == 8 ? widen_scales(scales[r]) : vf{};
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        float* to = st + m * ld + r * kRun;
        if constexpr (kBits == 8)
          store(to, to_float(sum[r][m] - offset[m]) * set1(step[m]) * scale);
        else
          store(to, fma(to_float(sum[r][m]), set1(step[m]), set1(zero[m])));
      }
    }
  }

  // ---- values ----

  void byte_sums(const CodeTile& v, int32_t count, const CodeTile& next) {
    const int32_t lanes = t_.lanes();
    float steps[kFewLanes + kFewRows];
    by_rows(t_.lanes(), [&]<int kRows>(int32_t m) { byte_weights<kRows>(v, count, m, steps + m); });
    const int32_t parts = at_.dv / (2 * kLanes);
    for (int32_t c = 0; c < at_.dv; c += 2 * kLanes)
      by_rows(t_.lanes(), [&]<int kRows>(int32_t m) {
        byte_values<kRows, 2>(v, at_.dv, c, codes_of_weights() + m * 2 * kRun, lanes, steps + m, ws_ + at_.alpha + m,
                              ws_ + at_.o + static_cast<int64_t>(m) * at_.dv + c, at_.dv, next,
                              m == 0 ? c / (2 * kLanes) : parts, parts);
      });
  }

  // Weights times scales, in their place, and as 16 bits of which a unit is worth `steps`.
  template <int kRows>
  void byte_weights(const CodeTile& v, int32_t count, int32_t first, float* steps) {
    vf most[kFewRows] = {}, zero[kFewRows] = {};
    for (int32_t r = 0; r < v.count; ++r) {
      const int32_t left = count - r * kRun;  // what lies beyond has no scale
      const vi there = lane_mask(left < kRun ? (1u << left) - 1 : 0xffff);
      const vf scale = select(there, widen_scales(v.scales[r]), vf{});
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        float* w = by_query(first + m) + r * kRun;
        const vf x = load(w) * scale;
        store(w, x);
        most[m] = larger_magnitude(x, most[m]);
        zero[m] = fma(x, vf{}, zero[m]);
      }
    }
    const vf step = largest_of_four(most) / set1(65535), none = sums_of_four(zero);
    const vf inverse = select(step < set1(0x1p-126f), vf{}, set1(1) / step);
    store_four(steps, select(none == vf{}, step, set1(__builtin_nanf(""))));
    for (int32_t r = 0; r < v.count; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const __m512i x = _mm512_cvtps_epi32((__m512)(load(by_query(first + m) + r * kRun) * set1(inverse[m])));
        char* to = codes_of_weights() + (r * t_.lanes() + first + m) * 2 * kRun;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kRun), _mm512_cvtepi32_epi8(x));
      }
  }

  void pair_sums(const CodeTile& v, const CodeTile& next) {
    const int32_t groups = at_.dv / 32;
    const float* rest = scale_weights(v, 128);
    const int32_t parts = (groups + 1) / 2;
    for (int32_t g = 0; g < groups; g += 2)
      by_rows(t_.lanes(), [&]<int kRows>(int32_t m) {
        const auto sums = [&]<int kBits, int kGroups>() {
          pair_values<kBits, kRows, kGroups>(v, at_.dv, g * 32, codes_of_weights() + (m * groups + g) * 4 * kRun,
                                             t_.lanes(), groups, rest + m * groups + g, ws_ + at_.alpha + m,
                                             ws_ + at_.o + static_cast<int64_t>(m) * at_.dv + g * 32, at_.dv, next,
                                             m == 0 ? g / 2 : parts, parts);
        };
        const bool four = values_.codec == Codec::int4;
        if (g + 1 < groups)
          four ? sums.template operator()<4, 2>() : sums.template operator()<2, 2>();
        else
          four ? sums.template operator()<4, 1>() : sums.template operator()<2, 1>();
      });
  }
};
