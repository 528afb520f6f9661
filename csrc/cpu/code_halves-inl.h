// Few queries over codes on the product of halves: 16-bit integers, two to a lane, whose products are added to sums of
// 32 bits. A query, or of int4 and int2 its product with the scales of a group of keys, is rounded to 16 bits, and so
// are weights times the scales of values; sums of codes with them are exact, and what a unit is worth joins them once a
// run of keys, of values once a tile. Of float32 what is left is rounded to 15 bits more, a second plane beside the
// first.
//
// The halves of a word are the elements that a shift and a mask leave there (store-inl.h): channels 0 and 2, 1 and 3 of
// four adjacent ones, or tokens of int8 values; tokens 0 and 1, 2 and 3 of the others.

typedef int16_t vsh __attribute__((vector_size(2 * kLanes), may_alias, aligned(2)));  // a vector's lanes, rounded
typedef int16_t vhh __attribute__((vector_size(kBytes), may_alias));  // its halves

inline constexpr float kMostHalf = 32767;

// Pairs of halves in a word.
template <int kBits>
inline constexpr int kPairsOfWord = 16 / kBits;

// The i-th pair of every word.
template <int kBits, bool kIsKeys>
ATTNKIT_INLINE vi pair_of_words(vi words, int i) {
  if constexpr (kBits == 8) return (vi)((i == 0 ? (vhh)words << 8 : (vhh)words) >> 8);
  const int shift = kIsKeys ? kBits * (i / 2) + 8 * (i % 2) : kBits * i;
  return (words >> shift) & 0x00010001 * ((1 << kBits) - 1);
}

template <int... kLane>
ATTNKIT_INLINE vi even_then_odd(vi x, std::integer_sequence<int, kLane...>) {
  return __builtin_shuffle(x, vi{(kLane & ~3) + kLane % 2 * 2 + kLane % 4 / 2 ...});
}
inline constexpr float kSecondPlane = 0x1p-15f;  // what it is worth beside the first
// Rounds x / unit, at most kMostHalf, to halves, and what that leaves to a second plane `plane` behind; of each four
// the first and third come first, if so wanted.
template <int kPlanes, bool kEvenFirst>
ATTNKIT_INLINE void put_halves(vf x, vf unit, vf inverse, int16_t* to, int32_t plane) {
#pragma GCC unroll 2
  for (int i = 0; i < kPlanes; ++i, to += plane) {
    const vf sum = rounded(x, inverse);
    vi whole = as_int(sum);
    if constexpr (kEvenFirst) whole = even_then_odd(whole, std::make_integer_sequence<int, kLanes>{});
    *reinterpret_cast<vsh*>(to) = __builtin_convertvector(whole, vsh);
    x = fma(set1(kWhole) - sum, unit, x);
    inverse = inverse * set1(1 / kSecondPlane);
  }
}
// A sum of products with every plane.
template <int kPlanes, int kVecs>
ATTNKIT_INLINE vf sum_of_planes(const vi (*sum)[kVecs], int v) {
  const vf first = to_float(sum[0][v]);
  return kPlanes == 1 ? first : fma(to_float(sum[kPlanes - 1][v]), set1(kSecondPlane), first);
}

ATTNKIT_INLINE vf larger_magnitude_or_second(vf a, vf b) { return max_or_second(magnitude(a), b); }

// Adds the products of words with halves, of kRows rows `stride` apart.
template <int kBits, bool kIsKeys, int kRows, int kVecs>
ATTNKIT_INLINE void add_words(const vi (&words)[kVecs], const int16_t* halves, int32_t stride,
                              vi (&sum)[kRows][kVecs]) {
#pragma GCC unroll 8
  for (int i = 0; i < kPairsOfWord<kBits>; ++i) {
    vi u[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) u[v] = pair_of_words<kBits, kIsKeys>(words[v], i);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      const vi x = as_int(set1_bits(halves + m * stride + 2 * i));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[m][v] = dot_halves(sum[m][v], u[v], x);
    }
  }
}

// `kPlanes`: 1 of 16-bit queries, 2 of float32. A row is a plane of a query.
template <int kPlanes>
class HalfCodes : public CodeDecode<FloatForward> {
  static constexpr int32_t kRow = kMostCodeChannels / kPlanes;
  static constexpr int kVecs = kRun / kLanes;  // of the tokens of a run
  static constexpr int kOutCodes = 2;  // vectors of value channels at once

 public:
  HalfCodes(const Call& c, const Task& t, float* workspace) : CodeDecode(c, t, workspace, true) {}

  // How many lanes a task has does not decide: that changes with the threads.
  static bool takes(const Problem& p, const Task& t) {
    if (p.stores == nullptr || (p.dtype == DType::f32) != (kPlanes == 2) || p.skip != 0) return false;
    return are_codes(p.stores[0], p.head_dim, kRow) &&
           p.num_heads / p.num_kv_heads * p.sequences[t.sequence].q_len <= kFewLanes;
  }

  void pack_queries() {
    CodeDecode::pack_queries();
    for (int32_t m = 0; m < t_.lanes(); ++m) round_query(m);
  }

 protected:
  void code_scores(const CodeTile& k, int64_t first, const CodeTile& next) override {
    int32_t groups[CodeTile::kMost] = {};
    const bool grouped = keys_.codec != Codec::int8;
    if (grouped) groups_of_runs(k, first, groups);
    for (int32_t r = 0; grouped && r < k.count; ++r)
      if (r == 0 || groups[r] != groups[r - 1])
        by_rows(t_.lanes(), [&]<int kRows>(int32_t m) { scale_queries<kRows>(k.scales[r], groups[r], m); });
    const auto runs = [&]<int kBits>() {
      for (int32_t r = 0; r < k.count; ++r)
        by_rows(t_.lanes() * kPlanes, [&]<int kRows>(int32_t row) {
          const int32_t m = row / kPlanes, steps = p_.head_dim * kBits / 32;
          scores_of_run<kBits, kRows>(k.runs[r], k.scales[r], p_.head_dim, halves(groups[r], row), step_[groups[r]] + m,
                                      zero_[groups[r]] + m, by_query(m) + r * kRun, ld_,
                                      fetch_of(next, row == 0 ? r : next.count, steps, k.runs[r]));
        });
    };
    by_bits(keys_.codec, runs);
  }

  void newest_scores(const Lines& keys, int32_t at) override {
    few_scores<Bf16>(ws_ + at_.q, t_.lanes(), at_.dq, p_.head_dim, keys, ws_ + at_.st + at, ld_, kNothing);
  }

  bool takes_values(int64_t, int32_t) const override { return is_words(values_.codec) && p_.v_head_dim % 32 == 0; }

  void code_sums(const CodeTile& v, int32_t count, const CodeTile& next) override {
    by_bits(values_.codec, [&]<int kBits>() { sums_of<kBits>(v, count, next); });
  }

 private:
  // Of a query, and for each group of keys in the tile: what its halves are worth; what a score has besides their sum.
  float step_[kMostCodeGroups][kFewLanes + kFewRows], zero_[kMostCodeGroups][kFewLanes + kFewRows] = {};
  float broken_[kFewLanes + kFewRows] = {};  // NaN for a query whose numbers are not all finite, else 0

  const float* query(int32_t m) const { return ws_ + at_.q + static_cast<int64_t>(m) * at_.dq; }
  int16_t* halves(int32_t group, int32_t row) const {
    return reinterpret_cast<int16_t*>(ws_ + at_.code_bytes) + group * kFewLanes * kMostCodeChannels + row * kRow;
  }

  // ---- scores ----

  void round_query(int32_t m) {
    const float* x = query(m);
    vf most{}, zero{};
    for (int32_t d = 0; d < p_.head_dim; d += kLanes) {
      most = larger_magnitude_or_second(load(x + d), most);
      zero = fma(load(x + d), vf{}, zero);
    }
    broken_[m] = sum_of_lanes(zero);
    if (keys_.codec != Codec::int8) return;
    const float step = largest_lane(most) / kMostHalf, inverse = step < 0x1p-126f ? 0 : 1 / step;
    for (int32_t d = 0; d < p_.head_dim; d += kLanes)
      put_halves<kPlanes, true>(load(x + d), set1(step), set1(inverse), halves(0, m * kPlanes) + d, kRow);
    step_[0][m] = step + broken_[m];
  }

  // kRows queries times the scales of a group of keys, and their sums with its zeros.
  template <int kRows>
  __attribute__((noinline)) void scale_queries(const uint16_t* scales, int32_t group, int32_t first) {
    const float* q = query(first);
    const Bf16 *scale_at = reinterpret_cast<const Bf16*>(scales), *zero_at = scale_at + stored_channels(keys_);
    vf sum[kFewRows] = {}, most[kFewRows] = {};
    for (int32_t d = 0; d < p_.head_dim; d += kLanes) {
      const vf scale = widen(scale_at + d), zero = widen(zero_at + d);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const vf x = load(q + m * at_.dq + d);
        most[m] = larger_magnitude_or_second(x * scale, most[m]);
        sum[m] = fma(x, zero, sum[m]);
      }
    }
    const vf step = largest_of_four(most) * set1(1 / kMostHalf);
    const vi none = step < set1(0x1p-126f);
    alignas(kBytes) float unit[kLanes], inverse[kLanes];
    store(unit, step);
    store(inverse, select(none, vf{}, set1(1) / step));
    store_four(step_[group] + first, select(none, vf{}, step));
    store_four(zero_[group] + first, sums_of_four(sum));
    for (int m = 0; m < kRows; ++m) zero_[group][first + m] += broken_[first + m];
    for (int32_t d = 0; d < p_.head_dim; d += kLanes) {
      const vf scale = widen(scale_at + d);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m)
        put_halves<kPlanes, true>(load(q + m * at_.dq + d) * scale, set1(unit[m]), set1(inverse[m]),
                                  halves(group, (first + m) * kPlanes) + d, kRow);
    }
  }

  // S^T of kRows rows and a run of keys.
  template <int kBits, int kRows>
  static __attribute__((noinline)) void scores_of_run(const char* codes, const uint16_t* scales, int32_t channels,
                                                      const int16_t* q, const float* step, const float* zero, float* st,
                                                      int32_t ld, CodeFetch fetch) {
    constexpr int kPairs = kPairsOfWord<kBits>;
    vi sum[kRows][kVecs] = {};
    for (int32_t word = 0; word < channels / (2 * kPairs); ++word) {
      fetch.step(word);
      vi words[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) words[v] = load_words(codes + (word * kRun + v * kLanes) * 4);
      add_words<kBits, true>(words, q + word * kPairs * 2, kRow, sum);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const vf scale = kBits == 8 ? widen(reinterpret_cast<const Bf16*>(scales) + v * kLanes) : set1(1);
#pragma GCC unroll 4
      for (int m = 0; m < kRows / kPlanes; ++m)
        store(st + m * ld + v * kLanes,
              fma(sum_of_planes<kPlanes>(sum + m * kPlanes, v), set1(step[m]) * scale, set1(zero[m])));
    }
  }

  // ---- values ----

  template <int kBits>
  void sums_of(const CodeTile& v, int32_t count, const CodeTile& next) {
    const int32_t groups = kBits == 8 ? 1 : groups_of_channels(values_), width = kBits == 8 ? at_.dv : values_.group;
    auto* weights = reinterpret_cast<int16_t*>(ws_ + at_.code_weights);
    float* rest = ws_ + at_.code_weights + static_cast<int64_t>(kFewLanes) * c_.tile_kv * (at_.dv / 64 + 1);
    constexpr int kWords = kRun / (2 * kPairsOfWord<kBits>);  // of a channel's run
    const int32_t wide = kOutCodes * kLanes, parts = at_.dv / wide;
    for (int32_t g = 0; g < groups; ++g) {
      const float step = weigh<kBits>(v, count, g, weights, rest);
      for (int32_t c = g * width; c < at_.dv && c < (g + 1) * width; c += wide)
        by_rows(t_.lanes() * kPlanes, [&]<int kRows>(int32_t row) {
          const int32_t m = row / kPlanes;
          values_of_codes<kBits, kRows, kOutCodes>(v, at_.dv, c, weights + row * kRun, t_.lanes(), step, rest + m,
                                                   ws_ + at_.alpha + m, ws_ + at_.o + m * int64_t{at_.dv} + c, at_.dv,
                                                   next, row == 0 ? c / wide * kWords : -1, parts * kWords);
        });
    }
  }

  // Weights times the scales of a group of channels, as halves, [run][row][kRun]; returns what these are worth, for
  // no weight is more than 1. `rest`: of each query the sum with the zeros, and NaN if something is not finite.
  template <int kBits>
  float weigh(const CodeTile& v, int32_t count, int32_t g, int16_t* to, float* rest) {
    const int32_t at = kBits == 8 ? 0 : g * 2 * kScaleRun, lanes = t_.lanes();
    vf most{};
    for (int32_t r = 0; r < v.count; ++r)
      for (int32_t i = 0; i < kRun; i += kLanes)
        most = larger_magnitude_or_second(
            select(there(count - r * kRun - i), widen(reinterpret_cast<const Bf16*>(v.scales[r] + at + i)), vf{}),
            most);
    const float step = largest_lane(most) / kMostHalf, inverse = step < 0x1p-126f ? 0 : 1 / step;
    by_rows(lanes, [&]<int kRows>(int32_t m) {
      vf sum[kFewRows] = {};
      for (int32_t r = 0; r < v.count; ++r)
#pragma GCC unroll 4
        for (int32_t i = 0; i < kRun; i += kLanes) {
          const vi exists = there(count - r * kRun - i);
          const auto* scales = reinterpret_cast<const Bf16*>(v.scales[r] + at + i);
          const vf scale = select(exists, widen(scales), vf{});
          vf zero{};
          if constexpr (kBits < 8) zero = select(exists, widen(scales + kScaleRun), vf{});
#pragma GCC unroll 4
          for (int j = 0; j < kRows; ++j) {
            const vf w = select(exists, load(by_query(m + j) + r * kRun + i), vf{}), x = w * scale;
            put_halves<kPlanes, kBits == 8>(x, set1(step), set1(inverse), to + (r * lanes + m + j) * kPlanes * kRun + i,
                                            kRun);
            sum[j] = kBits == 8 ? fma(x, vf{}, sum[j]) : fma(w, zero, sum[j]);
          }
        }
      const vf sums = sums_of_four(sum);
      for (int j = 0; j < kRows; ++j) rest[m + j] = sums[j];
    });
    return step;
  }

  // Of the lanes of a vector, the first so many.
  static vi there(int32_t left) { return lane_mask(left >= kLanes ? ~0u : left <= 0 ? 0 : (1u << left) - 1); }

  // Sums of kRows rows and kWide vectors of channels, from the channel-th on. Fetches `next` meanwhile, the part-th
  // of `parts` parts of each run and those after it, if it is one.
  template <int kBits, int kRows, int kWide>
  static __attribute__((noinline)) void values_of_codes(const CodeTile& tile, int32_t stored, int32_t channel,
                                                        const int16_t* weights, int32_t lanes, float step,
                                                        const float* rest, const float* alpha, float* o,
                                                        int32_t o_stride, const CodeTile& next, int32_t part,
                                                        int32_t parts) {
    constexpr int kPairs = kPairsOfWord<kBits>;
    vi acc[kRows][kWide] = {};
    for (int32_t r = 0; r < tile.count; ++r, weights += lanes * kPlanes * kRun) {
      const char* codes = tile.runs[r] + channel * 4;
      const CodeFetch fetch = fetch_of(next, part >= 0 ? r : next.count, parts, codes);
#pragma GCC unroll 4
      for (int t = 0; t < kRun / (2 * kPairs); ++t) {
        fetch.step(part + t);
        vi words[kWide];
#pragma GCC unroll 4
        for (int c = 0; c < kWide; ++c) words[c] = load_words(codes + (t * stored + c * kLanes) * 4);
        add_words<kBits, false>(words, weights + t * kPairs * 2, kRun, acc);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows / kPlanes; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < kWide; ++c) {
        float* x = o + static_cast<int64_t>(m) * o_stride + c * kLanes;
        const vf sum = sum_of_planes<kPlanes>(acc + m * kPlanes, c);
        store(x, fma(load(x), set1(alpha[m]), fma(sum, set1(step), set1(rest[m]))));
      }
  }
};

// What attends the queries of a task to codes as they are; null where nothing here does.
inline auto run_of_codes(const Problem& p, const Task& t) -> decltype(&run<HalfCodes<1>>) {
  return HalfCodes<1>::takes(p, t) ? run<HalfCodes<1>> : HalfCodes<2>::takes(p, t) ? run<HalfCodes<2>> : nullptr;
}
