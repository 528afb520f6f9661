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
    const CodeTile k(keys_, p_.pages, seq_, kv_head_, first, k_codes);
    const bool direct = full && !thinned() && takes_values();
    const CodeTile v = direct ? CodeTile(values_, p_.pages, seq_, kv_head_, first, v_codes) : CodeTile();
    const CodeTile then = next < 0 ? CodeTile() : codes_from(keys_, next);
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
    if (next >= 0) open_pages(codes_from(values_, next));
    const bool bytes = values_.codec == Codec::int8;
    if (v.count > 0 && bytes) byte_sums(v, v_codes, then);
    if (v.count > 0 && !bytes) pair_sums(v, then);
    if (v_codes < count) newest_sums(first, v_codes, count);
  }

 private:
  const Store& keys_ = p_.stores[0];
  const Store& values_ = p_.stores[1];
  int64_t group_ = -1;  // whose scales are in the queries' bytes
  // Of a query: the scale; what its bytes are worth; what a score has besides their sum; and what that is too large.
  float factor_[kFewLanes], step_[kFewLanes], zero_[kFewLanes];
  int32_t offset_[kFewLanes];

  float* query(int32_t m) const { return ws_ + at_.code_q + m * at_.dq; }
  char* bytes(int32_t m) const { return reinterpret_cast<char*>(ws_ + at_.code_bytes) + m * 2 * kPlane; }
  char* codes_of_weights() const { return reinterpret_cast<char*>(ws_ + at_.code_weights); }
  float* by_query(int32_t m) const { return ws_ + at_.st + m * ld_; }

  // How many of the tokens from `first` on are codes.
  int32_t codes_of(const Store& s, int64_t first, int32_t count) const {
    if (s.newest == nullptr || first + count <= seq_.num_coded) return count;
    return first < seq_.num_coded ? static_cast<int32_t>(seq_.num_coded - first) : 0;
  }

  // Of as many tokens from `first` on as a tile has: they need not all be seen.
  CodeTile codes_from(const Store& s, int64_t first) const {
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
      most = max_or_second(magnitude(load(x + d)), most);
      zero = fma(load(x + d), vf{}, zero);
    }
    factor_[m] = any(zero != vf{}) ? __builtin_nanf("") : p_.scale;
    if (keys_.codec != Codec::int8) return;
    // A power of two: then only what is small beside the largest is rounded.
    const uint32_t up = __builtin_bit_cast(uint32_t, largest_lane(most) / kMostQuery) + 0x7fffff;
    const float step = up < 0x1000000 ? 0 : __builtin_bit_cast(float, up & 0xff800000);
    round_to_bytes(x, p_.head_dim, step, bytes(m), bytes(m) + kPlane);
    step_[m] = step * factor_[m];
    vi high{}, low{};  // codes are read 128 larger than they are
    const vi ones = set1_int(0x01010101);
    for (int32_t d = 0; d < p_.head_dim; d += 4 * kLanes) {
      dot_bytes(high, ones, load_words(bytes(m) + d));
      dot_bytes(low, ones, load_words(bytes(m) + kPlane + d));
    }
    offset_[m] = _mm512_reduce_add_epi32((__m512i)((high << 8) + low)) * 128;
  }

  // kRows queries times the scales of a group of keys.
  template <int kRows>
  __attribute__((noinline)) void scale_queries(const uint16_t* scales, int32_t first) {
    const uint16_t* zeros = scales + p_.head_dim;
    float* x = query(kFewLanes);
    vf sum[kRows] = {}, most[kRows] = {};
    for (int32_t d = 0; d < p_.head_dim; d += kLanes) {
      const vf scale = widen_scales(scales + d), zero = widen_scales(zeros + d);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const vf q = load(query(first + m) + d), y = q * scale;
        store(x + m * at_.dq + d, y);
        most[m] = max_or_second(magnitude(y), most[m]);
        sum[m] = fma(q, zero, sum[m]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      float step = largest_lane(most[m]) / kMostQuery;
      if (step < 0x1p-126f) step = 0;
      round_to_bytes(x + m * at_.dq, p_.head_dim, step, bytes(first + m), bytes(first + m) + kPlane);
      step_[first + m] = step * factor_[first + m];
      zero_[first + m] = sum_of_lanes(sum[m]) * p_.scale;
    }
  }

  // Fetches `next` meanwhile.
  void scores(const CodeTile& k, int64_t first, const CodeTile& next) {
    for (int32_t r = 0; r < k.count;) {
      const int64_t token = first + r * kRun;
      int32_t runs = k.count - r < 2 ? 1 : 2;
      if (keys_.codec != Codec::int8) {
        const int64_t group = token / keys_.group;
        if (runs == 2 && (token + kRun) / keys_.group != group) runs = 1;
        if (group != group_) blocks([&]<int kRows>(int32_t m) { scale_queries<kRows>(k.scales[r], m); });
        group_ = group;
      }
      const auto with_runs = [&]<int kRuns>() {
        if (keys_.codec == Codec::int8) return scores_of_runs<8, kRuns>(k, r, next);
        if (keys_.codec == Codec::int4) return scores_of_runs<4, kRuns>(k, r, next);
        scores_of_runs<2, kRuns>(k, r, next);
      };
      if (runs == 2)
        with_runs.template operator()<2>();
      else
        with_runs.template operator()<1>();
      r += runs;
    }
  }

  template <int kBits, int kRuns>
  void scores_of_runs(const CodeTile& k, int32_t r, const CodeTile& next) {
    CodeFetch fetch[kRuns];
    blocks([&]<int kRows>(int32_t m) {
      for (int i = 0; i < kRuns; ++i)
        fetch[i] = fetch_of(next, m == 0 ? r + i : next.count, p_.head_dim * kBits / 32, k.runs[r]);
      code_scores<kBits, kRows, kRuns>(k.runs + r, k.scales + r, p_.head_dim, bytes(m), step_ + m, zero_ + m,
                                       offset_ + m, by_query(m) + r * kRun, ld_, fetch);
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
    const int32_t end = round_up(count, kLanes);
    few_weights(ws_ + at_.st, ld_, count, t_.lanes(), ws_ + at_.max, ws_ + at_.alpha);
    for (int32_t m = 0; m < t_.lanes(); ++m) {
      vf sum[2] = {};
      for (int32_t n = 0; n < end; n += kLanes) sum[n / kLanes % 2] += load(by_query(m) + n);
      float* total = ws_ + at_.sum + m;
      *total = __builtin_fmaf(*total, ws_[at_.alpha + m], sum_of_lanes(sum[0] + sum[1]));
    }
  }

  // ---- values ----

  bool takes_values() const { return is_words(values_.codec) && p_.v_head_dim % 32 == 0; }

  template <class F>
  void blocks(F f) const {
    int32_t m = 0;
    const auto rows = [&]<int kRows>() {
      f.template operator()<kRows>(m);
      m += kRows;
    };
    while (t_.lanes() - m >= 4) rows.template operator()<4>();
    while (t_.lanes() - m >= 2) rows.template operator()<2>();
    if (t_.lanes() > m) rows.template operator()<1>();
  }

  void byte_sums(const CodeTile& v, int32_t count, const CodeTile& next) {
    const int32_t lanes = t_.lanes();
    float steps[kFewLanes];
    for (int32_t m = 0; m < lanes; ++m) steps[m] = byte_weights(v, count, m);
    const int32_t parts = at_.dv / (2 * kLanes);
    for (int32_t c = 0; c < at_.dv; c += 2 * kLanes)
      blocks([&]<int kRows>(int32_t m) {
        byte_values<kRows, 2>(v, at_.dv, c, codes_of_weights() + m * 2 * kRun, lanes, steps + m, ws_ + at_.alpha + m,
                              ws_ + at_.o + static_cast<int64_t>(m) * at_.dv + c, at_.dv, next,
                              m == 0 ? c / (2 * kLanes) : parts, parts);
      });
  }

  // Weights times scales as 16 bits; returns what a unit of them is worth.
  float byte_weights(const CodeTile& v, int32_t count, int32_t m) {
    vf w[CodeTile::kMost], most{}, zero{};
    for (int32_t r = 0; r < v.count; ++r) {
      vi token{};
      for (int i = 0; i < kLanes; ++i) token[i] = r * kRun + i;
      w[r] = load(by_query(m) + r * kRun) * widen_scales(v.scales[r]);
      w[r] = select(token < count, w[r], vf{});  // what lies beyond has no scale
      most = max_or_second(w[r], most);
      zero = fma(w[r], vf{}, zero);
    }
    const float step = largest_lane(most) / 65535;
    const vf inverse = set1(step < 0x1p-126f ? 0 : 1 / step);
    for (int32_t r = 0; r < v.count; ++r) {
      const __m512i x = _mm512_cvtps_epi32((__m512)(w[r] * inverse));
      char* to = codes_of_weights() + (r * t_.lanes() + m) * 2 * kRun;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kRun), _mm512_cvtepi32_epi8(x));
    }
    return any(zero != vf{}) ? __builtin_nanf("") : step;
  }

  void pair_sums(const CodeTile& v, const CodeTile& next) {
    const int32_t groups = at_.dv / 32;
    float* rest = ws_ + at_.code_weights + static_cast<int64_t>(kFewLanes) * c_.tile_kv * (at_.dv / 64 + 1);
    for (int32_t g = 0; g < groups; ++g)
      blocks([&]<int kRows>(int32_t m) { pair_weights<kRows>(v, g, groups, m, rest + m * groups + g); });
    const int32_t parts = (groups + 1) / 2;
    for (int32_t g = 0; g < groups; g += 2)
      blocks([&]<int kRows>(int32_t m) {
        const auto sums = [&]<int kBits, int kGroups>() {
          pair_values<kBits, kRows, kGroups>(v, at_.dv, g * 32, codes_of_weights() + (m * groups + g) * 2 * kRun,
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
    const __m256i ones = _mm256_set1_epi16(0x3f80);
    vf zeros[kRows] = {};
    __m256 weights[kRows] = {};
    for (int32_t r = 0; r < v.count; ++r) {
      const uint16_t* scales = v.scales[r] + at;
      const vf scale = widen_scales(scales), zero = fma(scale, set1(middle), widen_scales(scales + kScaleRun));
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const vf w = load(by_query(first + m) + r * kRun);
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)(w * scale));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(codes_of_weights() + ((r * t_.lanes() + first + m) * groups + g) * 2 * kRun),
            (__m256i)rounded);
        weights[m] = _mm256_dpbf16_ps(weights[m], rounded, (__m256bh)ones);
        zeros[m] = fma(w, zero, zeros[m]);
      }
    }
    for (int m = 0; m < kRows; ++m) {
      const float sum = sum_of_lanes((vf)_mm512_zextps256_ps512(weights[m]));
      rest[m * groups] = sum_of_lanes(zeros[m]) - (128 + middle) * sum;
    }
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
