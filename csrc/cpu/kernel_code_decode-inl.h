// Few queries of bfloat16 over a cache that keeps codes. What expressions change, and pairs that do not exist, take
// values as a tile of floats; so do values of codecs that have no product here.

class CodeDecode : public PairDecode {
 public:
  using PairDecode::PairDecode;

  static bool takes(const Problem& p) {
    const Store& k = p.stores[0];
    // Beyond, sums of bytes of int8 would not fit 32 bits.
    const int32_t most = k.codec == Codec::int8 ? kMostCodeChannels / 2 : kMostCodeChannels;
    return is_words(k.codec) && p.head_dim % 32 == 0 && p.head_dim <= most;
  }

  void pack_queries() {
    PairDecode::pack_queries();
    for (int32_t m = 0; m < t_.lanes(); ++m) {
      for (int32_t d = 0; d < p_.head_dim; d += kLanes) store(query(m) + d, widen(queries() + m * width_ + d));
      round_query(m);
    }
  }

  void keys(int64_t first, int32_t count, bool full, int64_t next) {
    const int32_t k_codes = codes_of(keys_, first, count), v_codes = codes_of(values_, first, count);
    const bool direct = full && !thinned() && takes_values(first, v_codes);
    CodeTile k = ahead_k_, v = ahead_v_;
    if (first != ahead_) {
      k = codes_from(keys_, first);
      v = codes_from(values_, first);
    }
    k.count = blocks_of_runs(k_codes);
    v.count = direct ? blocks_of_runs(v_codes) : 0;
    ahead_ = next;
    ahead_k_ = codes_from(keys_, next);
    ahead_v_ = codes_from(values_, next);
    const CodeTile& then = ahead_k_;
    open_pages(then);
    ld_ = round_up(count, kBlockVecs * kLanes);
    tile_.narrow(0, ld_);
    if (!full) find_live_by_key(first, count);
    scores(k, first, v);
    if (k_codes < count) scores_of(newest(keys_, p_.head_dim, first + k_codes, count - k_codes), kNothing, k_codes);
    modify_by_key(first, count, full);
    hide_tail(count);
    if (!direct) {
      few_softmax(0, count);
      thin_weights(first, count, full);
      const Lines values = values_of(first, count);
      return few_sum(values, 0, count, full, {values, kNoLines});
    }
    weights(count);
    open_pages(ahead_v_);
    const bool bytes = values_.codec == Codec::int8;
    if (v.count > 0 && bytes) byte_sums(v, v_codes, then);
    if (v.count > 0 && !bytes) pair_sums(v, then);
    if (v_codes < count) newest_sums(first, v_codes, count);
  }

 private:
  const Store& keys_ = p_.stores[0];
  const Store& values_ = p_.stores[1];
  int64_t ahead_ = -1;  // the first token of the tile that comes next, and where it lies
  CodeTile ahead_k_, ahead_v_;
  // Of a query: the scale; and what the sum of bytes of int8 is too large.
  float factor_[2 * kFewLanes];
  int32_t offset_[kFewLanes];
  // For each group of keys in the tile: what its bytes are worth, and 1 over it; what a score has besides their sum.
  float step_[kMostCodeGroups][kFewLanes + kFewRows], inverse_[kMostCodeGroups][kFewLanes + kFewRows],
      zero_[kMostCodeGroups][kFewLanes + kFewRows];

  float* query(int32_t m) const { return ws_ + at_.code_q + m * width_; }
  char* bytes(int32_t group, int32_t m) const {
    return reinterpret_cast<char*>(ws_ + at_.code_bytes) + (group * kFewLanes + m) * 2 * kPlane;
  }
  char* codes_of_weights() const { return reinterpret_cast<char*>(ws_ + at_.code_weights); }
  float* by_query(int32_t m) const { return ws_ + at_.st + m * ld_; }

  static int32_t blocks_of_runs(int32_t tokens) { return (tokens + kRun - 1) / kRun; }

  // How many of the tokens from `first` on are codes.
  int32_t codes_of(const Store& s, int64_t first, int32_t count) const {
    if (s.newest == nullptr || first + count <= seq_.num_coded) return count;
    return first < seq_.num_coded ? static_cast<int32_t>(seq_.num_coded - first) : 0;
  }

  // Of as many tokens from `first` on as a tile has: they need not all be seen. Nothing if there is none (-1).
  CodeTile codes_from(const Store& s, int64_t first) const {
    if (first < 0 || !is_words(s.codec)) return {};
    const int64_t left = seq_.kv_len - first;
    const int32_t count = left < c_.tile_kv ? static_cast<int32_t>(left) : c_.tile_kv;
    return {s, p_.pages, seq_, kv_head_, first, codes_of(s, first, count)};
  }

  // Tokens that are kept as they are, `first` at the beginning of a run.
  Lines newest(const Store& s, int32_t channels, int64_t first, int32_t count) const {
    Lines lines(newest_at(s, seq_.batch, kv_head_, first), 2 * channels, 2 * channels, count);
    for (int32_t n = 0; n < count; n += kRun)
      lines.run[n / kRun] = reinterpret_cast<const char*>(newest_at(s, seq_.batch, kv_head_, first + n));
    return lines;
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

  // Fetches `next` meanwhile.
  void scores(const CodeTile& k, int64_t first, const CodeTile& next) {
    const bool grouped = keys_.codec != Codec::int8;
    const auto group_of = [&](int32_t r) {
      return grouped ? static_cast<int32_t>((first + r * kRun) / keys_.group - first / keys_.group) : 0;
    };
    // Of all groups first one, then the other: a step takes long to be known.
    const auto each_group = [&](auto f) {
      for (int32_t r = 0; grouped && r < k.count; ++r)
        if (r == 0 || group_of(r) != group_of(r - 1)) f(k.scales[r], group_of(r));
    };
    each_group([&](const uint16_t* scales, int32_t group) {
      by_rows(t_.lanes(), [&]<int kRows>(int32_t m) { measure_queries<kRows>(scales, group, m); });
    });
    each_group([&](const uint16_t* scales, int32_t group) {
      by_rows(t_.lanes(), [&]<int kRows>(int32_t m) { scale_queries<kRows>(scales, group, m); });
    });
    for (int32_t r = 0; r < k.count;) {
      const int32_t group = group_of(r), runs = r + 1 < k.count && group_of(r + 1) == group ? 2 : 1;
      const auto with_runs = [&]<int kRuns>() {
        if (keys_.codec == Codec::int8) return scores_of_runs<8, kRuns>(k, r, group, next);
        if (keys_.codec == Codec::int4) return scores_of_runs<4, kRuns>(k, r, group, next);
        scores_of_runs<2, kRuns>(k, r, group, next);
      };
      if (runs == 2)
        with_runs.template operator()<2>();
      else
        with_runs.template operator()<1>();
      r += runs;
    }
  }

  template <int kBits, int kRuns>
  void scores_of_runs(const CodeTile& k, int32_t r, int32_t group, const CodeTile& next) {
    CodeFetch fetch[kRuns];
    by_rows(t_.lanes(), [&]<int kRows>(int32_t m) {
      for (int i = 0; i < kRuns; ++i)
        fetch[i] = fetch_of(next, m == 0 ? r + i : next.count, p_.head_dim * kBits / 32, k.runs[r]);
      code_scores<kBits, kRows, kRuns>(k.runs + r, k.scales + r, p_.head_dim, bytes(group, m), step_[group] + m,
                                       zero_[group] + m, offset_ + m, by_query(m) + r * kRun, ld_, fetch);
    });
  }

  template <int kBits, int kRows, int kRuns>
  static __attribute__((noinline)) void code_scores(const char* const* codes, const uint16_t* const* scales,
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

  // ---- weights ----

  // Behind the last token of a run anything may be.
  void hide_tail(int32_t count) {
    for (int32_t m = 0; m < t_.lanes(); ++m)
      for (int32_t n = count; n < round_up(count, kLanes); ++n) by_query(m)[n] = -kInfinity;
  }

  void weights(int32_t count) {
    alignas(kBytes) float sums[kFewLanes + kLanes];
    few_weights(ws_ + at_.st, ld_, count, t_.lanes(), ws_ + at_.max, ws_ + at_.alpha, sums);
    float* total = ws_ + at_.sum;
    store(total, fma(load(total), load(ws_ + at_.alpha), load(sums)));
  }

  // ---- values ----

  // Values of int4 and int2 are weighed a stretch of scales at a time.
  bool takes_values(int64_t first, int32_t count) const {
    const bool whole = values_.codec == Codec::int8 || (first % kScaleRun == 0 && count % kScaleRun == 0);
    return is_words(values_.codec) && p_.v_head_dim % 32 == 0 && whole;
  }

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
    float* rest = ws_ + at_.code_weights + static_cast<int64_t>(kFewLanes) * c_.tile_kv * (at_.dv / 64 + 1);
    for (int32_t g = 0; g < groups; ++g)
      by_rows(t_.lanes(), [&]<int kRows>(int32_t m) { pair_weights<kRows>(v, g, groups, m, rest + m * groups + g); });
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

  // Weights times the scales of a group of channels as bfloat16; and what the zeros add, and what is too much in the
  // codes: they are read 128 larger, and weighed from their middle, of which less is lost by rounding weights.
  template <int kRows>
  void pair_weights(const CodeTile& v, int32_t g, int32_t groups, int32_t first, float* rest) {
    const float middle = values_.codec == Codec::int4 ? 7.5f : 1.5f;
    const int32_t at = g * 32 / values_.group * 2 * kScaleRun;
    const vf ones = as_float(set1_int(0x3f803f80));
    const int32_t count = v.count, ld = ld_;
    const int64_t step = int64_t{4} * kRun * groups, block = step * t_.lanes();
    const float* w = by_query(first);
    char* to = codes_of_weights() + first * step + g * 4 * kRun;
    vf zeros[kFewRows] = {}, weights[kFewRows] = {};
    for (int32_t r = 0; r < count; r += 2, w += 2 * kRun, to += block) {
      vf scale[2], zero[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const uint16_t* scales = v.scales[r] + at + i * kRun;
        scale[i] = widen_scales(scales);
        zero[i] = fma(scale[i], set1(middle), widen_scales(scales + kScaleRun));
      }
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const vf x = load(w + m * ld), y = load(w + m * ld + kLanes);
        const vf rounded = (vf)_mm512_cvtne2ps_pbh((__m512)(y * scale[1]), (__m512)(x * scale[0]));
        store(reinterpret_cast<float*>(to + m * step), rounded);
        weights[m] = PairDot::run(rounded, ones, weights[m]);
        zeros[m] = fma(x, zero[0], fma(y, zero[1], zeros[m]));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) zeros[m] = fma(set1(-128 - middle), weights[m], zeros[m]);
    const vf sum = sums_of_four(zeros);
    for (int m = 0; m < kRows; ++m) rest[m * groups] = sum[m];
  }

  // The newest tokens, as they are.
  void newest_sums(int64_t first, int32_t codes, int32_t count) {
    const Lines lines = newest(values_, p_.v_head_dim, first + codes, count - codes);
    few_by_key(ws_ + at_.st + codes, ld_, count - codes, t_.lanes(), ws_ + at_.s, [](int32_t, vf) {});
    alignas(kBytes) float kept[kFewLanes];
    for (int32_t m = 0; m < kFewLanes; ++m) kept[m] = codes > 0 ? 1 : ws_[at_.alpha + m];
    few_values<Bf16>(ws_ + at_.s, at_.bm, lines, 0, lines.count, ws_ + at_.guarded, kept, ws_ + at_.o, at_.dv,
                     t_.lanes(), kNothing);
  }
};

// What heads select, as `run_by_dtype` has it.
int32_t select_by_dtype(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, float* sums,
                        float* workspace) {
  const Problem& p = *c.problem;
  const bool few = p.num_heads / p.num_kv_heads * p.sequences[t.sequence].q_len <= kFewLanes;
  const bool pairs = p.dtype == DType::bf16 && p.stores == nullptr && !few;
  return (pairs ? select_keys<PairForward> : select_keys<FloatForward>)(c, t, ranges, num_ranges, sums, workspace);
}
