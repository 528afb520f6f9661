// Few queries of bfloat16 over int4 and int2 on the tile registers of AMX. A shift and a choice of bits make codes
// bfloat16: they become the first bits of a mantissa, of 16 + a code of int4, of 4 + one of int2, and what that is too
// much is taken from the sums. What a vector of words then holds is a row of a right factor: pairs of channels of 16
// keys, pairs of tokens of 16 channels.
//
// Queries times the scales of a group of keys are two numbers, their first bits and what they leave, which have rows of
// their own.
//
// Products wait for what was unpacked to be in the cache: they come a few tiles later.

// Of 32 channels the first two, or the last two, of each four: as floats, so that those of one vector and of the other
// are the pairs that words of keys hold.
struct CodeOrder {
  alignas(64) int16_t at[32];
  constexpr explicit CodeOrder(int first) : at() {
    for (int i = 0; i < 32; ++i) at[i] = static_cast<int16_t>(i / 4 * 4 + first + i % 4 / 2);
  }
};
inline constexpr CodeOrder kFirstTwo{0}, kLastTwo{2};
ATTNKIT_INLINE vf widen_two(vf both, const CodeOrder& order) {
  const vi words = (vi)_mm512_permutexvar_epi16(_mm512_load_si512(order.at), (__m512i)both);
  return as_float(words & static_cast<int32_t>(0xffff0000));
}

// The codes of kBits from bit `first` on of each half of a word, as bfloat16, kBase too large.
template <int kBits>
inline constexpr int32_t kBase = 1 << kBits;
template <int kBits>
ATTNKIT_INLINE vi code_pairs(vi words, int first) {
  constexpr int32_t kMantissa = 7, kMask = ((1 << kBits) - 1) << (kMantissa - kBits),
                    kExponent = (127 + kBits) << kMantissa;
  const int right = first + kBits - kMantissa;
  const vi there = right < 0 ? words << -right : (vi)((vu)words >> right);
  return (there & kMask * 0x10001) | kExponent * 0x10001;
}

class AmxCodes : public PairCodes<AmxDecode> {
 public:
  using PairCodes::PairCodes;

  static bool takes(const Call& c) {
    const Problem& p = *c.problem;
    return AmxDecode::takes(c) && has_zeros(p.stores[0].codec) && has_zeros(p.stores[1].codec) &&
           p.v_head_dim % kTileDepth == 0 && are_codes(p.stores[0], p.head_dim, kMostCodeChannels / 2);
  }

  void pack_queries() {
    AmxDecode::pack_queries();
    for (int32_t m = 0; m < t_.lanes(); ++m)
      for (int32_t d = 0; d < p_.head_dim; d += kTileDepth) {
        const vf both = load_units(queries() + m * width_ + d);
        store(query(m) + d, widen_two(both, kFirstTwo));
        store(query(m) + d + kLanes, widen_two(both, kLastTwo));
      }
  }

 protected:
  void code_scores(const CodeTile& k, int64_t first, const CodeTile& next) override {
    if (k.count == 0) return;
    int32_t groups[CodeTile::kMost];
    groups_of_runs(k, first, groups);
    keys_.codec == Codec::int4 ? multiply_keys<4>(k, groups, next) : multiply_keys<2>(k, groups, next);
    for (int32_t r = 0; r < k.count; ++r)
      by_rows(t_.lanes(), [&]<int kRows>(int32_t m) {
        const float* sums = ws_ + at_.v + (m / kHigh * kTileRows + m % kHigh) * ld_ + r * kRun;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
          store(by_query(m + i) + r * kRun, fma(load(sums + i * ld_) + load(sums + (kHigh + i) * ld_), set1(p_.scale),
                                                set1(zero_[groups[r]][m + i])));
      });
  }

  void newest_scores(const Lines& keys, int32_t at) override { score_rows(keys, at, kNothing); }
  void newest_sums(const Lines& values, int32_t at) override {
    add_weighed(values, 0, values.count, at, true, kNothing);
  }
  void add_few(int64_t first, const Lines& values, int32_t from, int32_t count, bool full,
               const Ahead& ahead) override {
    PairDecode::add_few(first, values, from, count, full, ahead);  // they are floats
  }

  void code_sums(const CodeTile& v, int32_t, const CodeTile& next) override {
    values_.codec == Codec::int4 ? sums<4>(v, next) : sums<2>(v, next);
  }

 private:
  static constexpr int32_t kHigh = kTileRows / 2;  // rows of queries' first bits, before those of the rest
  static constexpr int32_t kTile = kTileRows * kTileBytes;
  static constexpr int32_t kLater = 2;  // steps by which products of keys come after what unpacks them

  float zero_[kMostCodeGroups][kFewLanes + kFewRows];  // what a score has besides the product, of a group of keys

  int32_t blocks() const { return (t_.lanes() + kHigh - 1) / kHigh; }
  int32_t steps() const { return p_.head_dim / kTileDepth; }
  // The left factors of eight queries each and a group of keys: of that group, and of those still to be multiplied.
  char* factor(int32_t group) const {
    return reinterpret_cast<char*>(ws_ + at_.code_bytes) + group % (kLater + 1) * blocks() * steps() * kTile;
  }
  char* room() const { return reinterpret_cast<char*>(ws_ + at_.k); }  // for what is unpacked

  // ---- scores ----

  // kRows queries times the scales of a group of keys, and their sums with its zeros.
  template <int kBits, int kRows>
  __attribute__((noinline)) void scale_queries(const uint16_t* scales, int32_t group, int32_t first) {
    const Bf16 *pairs = queries() + first * width_, *from = reinterpret_cast<const Bf16*>(scales);
    const float* q = query(first);
    char* to = factor(group) + (first / kHigh * steps() * kTileRows + first % kHigh) * kTileBytes;
    vf sum[kFewRows] = {}, base[kFewRows] = {};
    for (int32_t d = 0; d < p_.head_dim; d += kTileDepth, to += kTile) {
      const vf scale = load_units(from + d), zero = load_units(from + stored_ + d);
      const vf one = widen_two(scale, kFirstTwo), two = widen_two(scale, kLastTwo);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const vf x = load(q + m * width_ + d) * one, y = load(q + m * width_ + d + kLanes) * two;
        const SplitFloats first_of_pair = split(x), second_of_pair = split(y);
        float* row = reinterpret_cast<float*>(to + m * kTileBytes);
        store_int(row, (vi)((vu)first_of_pair.high >> 16) | second_of_pair.high);
        store_int(row + kHigh * kLanes, (vi)((vu)first_of_pair.rest >> 16) | second_of_pair.rest);
        const vf pair = load_units(pairs + m * width_ + d);
        sum[m] = PairDot::run(pair, zero, sum[m]);
        base[m] = PairDot::run(pair, scale, base[m]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) sum[m] = fma(set1(-kBase<kBits>), base[m], sum[m]);
    store_four(zero_[group] + first, sums_of_four(sum) * set1(p_.scale));
  }

  // Keys of up to two runs that share scales, 32 channels at a time.
  template <int kBits>
  __attribute__((noinline)) void multiply_keys(const CodeTile& k, const int32_t* groups, const CodeTile& next) {
    constexpr int kRoom = 2 * kLater;  // for steps, of two tiles each
    const int32_t steps = this->steps(), block = steps * kTile;
    struct Stretch {
      int32_t run, runs;
    } stretches[CodeTile::kMost];
    int32_t count = 0;
    for (int32_t r = 0; r < k.count; r += stretches[count++].runs)
      stretches[count] = {r, r + 1 < k.count && groups[r + 1] == groups[r] ? 2 : 1};
    CodeFetch fetch[2];
    const auto unpack = [&](const Stretch& s, int32_t d, char* to) __attribute__((always_inline)) {
      if (d == 0) {
        if (s.run == 0 || groups[s.run] != groups[s.run - 1])
          by_rows(t_.lanes(),
                  [&]<int kRows>(int32_t m) { scale_queries<kBits, kRows>(k.scales[s.run], groups[s.run], m); });
        for (int32_t i = 0; i < s.runs; ++i) fetch[i] = fetch_of(next, s.run + i, steps * kBits, k.runs[s.run]);
      }
      for (int32_t i = 0; i < s.runs; ++i, to += kTile) unpack_keys<kBits>(k.runs[s.run + i], d, fetch[i], to);
    };
    const auto put = [&](const Stretch& s) __attribute__((always_inline)) {
      float* sums = ws_ + at_.v + s.run * kRun;
      tile_store<0>(sums, 4 * ld_);
      if (s.runs > 1) tile_store<1>(sums + kRun, 4 * ld_);
      if (t_.lanes() <= kHigh) return;
      tile_store<2>(sums + kTileRows * ld_, 4 * ld_);
      if (s.runs > 1) tile_store<3>(sums + kTileRows * ld_ + kRun, 4 * ld_);
    };
    const auto multiply = [&](int32_t at, int32_t d, const char* from) __attribute__((always_inline)) {
      const Stretch& s = stretches[at];
      if (d == 0) {
        if (at > 0) put(stretches[at - 1]);
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
      }
      const char* q = factor(groups[s.run]) + d * kTile;
      tile_load<4>(q, kTileBytes);
      tile_load<6>(from, kTileBytes);
      tile_multiply<0, 4, 6>();
      if (s.runs > 1) {
        tile_load<7>(from + kTile, kTileBytes);
        tile_multiply<1, 4, 7>();
      }
      if (t_.lanes() <= kHigh) return;
      tile_load<5>(q + block, kTileBytes);
      tile_multiply<2, 5, 6>();
      if (s.runs > 1) tile_multiply<3, 5, 7>();
    };
    int32_t at = 0, d = 0;
    for (int32_t n = 0, stretch = 0, step = 0; at < count; ++n) {
      if (stretch < count) {
        unpack(stretches[stretch], step, room() + n % kRoom * 2 * kTile);
        if (++step == steps) ++stretch, step = 0;
      }
      if (n < kLater) continue;
      multiply(at, d, room() + (n - kLater) % kRoom * 2 * kTile);
      if (++d == steps) ++at, d = 0;
    }
    put(stretches[count - 1]);
  }

  template <int kBits>
  static ATTNKIT_INLINE void unpack_keys(const char* codes, int32_t d, const CodeFetch& fetch, char* to) {
    constexpr int kFields = 8 / kBits;
#pragma GCC unroll 4
    for (int w = 0; w < kBits; ++w) {
      fetch.step(d * kBits + w);
      const vi words = load_words(codes + (d * kBits + w) * kTileBytes);
#pragma GCC unroll 8
      for (int f = 0; f < 2 * kFields; ++f)
        store_int(reinterpret_cast<float*>(to + (w * 2 * kFields + f % kFields * 2 + f / kFields) * kTileBytes),
                  code_pairs<kBits>(words, f * kBits));
    }
  }

  // ---- values ----

  template <int kBits>
  void sums(const CodeTile& v, const CodeTile& next) {
    const int32_t groups = at_.dv / kTileDepth;
    const float* rest = scale_weights(v, kBase<kBits>);
    for (int32_t g = 0; g < groups; g += 2)
      g + 1 < groups ? multiply_values<kBits, 2>(v, g, groups, next) : multiply_values<kBits, 1>(v, g, groups, next);
    for (int32_t m = 0; m < t_.lanes(); ++m) {
      const vf alpha = set1(ws_[at_.alpha + m]);
      float* o = ws_ + at_.o + static_cast<int64_t>(m) * at_.dv;
      const float* sums = ws_ + at_.guarded + static_cast<int64_t>(m) * at_.dv;
      for (int32_t d = 0; d < at_.dv; d += kLanes)
        store(o + d, fma(load(o + d), alpha, load(sums + d) + set1(rest[m * groups + d / kTileDepth])));
    }
  }

  // Sums of kGroups groups of channels, 32 tokens at a time.
  template <int kBits, int kGroups>
  __attribute__((noinline)) void multiply_values(const CodeTile& v, int32_t g, int32_t groups, const CodeTile& next) {
    constexpr int kTiles = 2 * kGroups, kWords = kRun * kBits / 32;
    const int32_t parts = (groups + 1) / 2;
    CodeFetch fetch[2];
    // Of run r and the one after it 16 channels.
    const auto unpack = [&](int32_t r, int c) __attribute__((always_inline)) {
      char* to = room() + (r / 2 % 2 * kTiles + c) * kTile;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const char* codes = v.runs[r + i] + (g * kTileDepth + c * kLanes) * 4;
        if (c == 0) fetch[i] = fetch_of(next, r + i, 4 * parts, codes);
        fetch[i].step(2 * g + c);
#pragma GCC unroll 2
        for (int w = 0; w < kWords; ++w) {
          const vi words = load_words(codes + w * at_.dv * 4);
#pragma GCC unroll 8
          for (int t = 0; t < 16 / kBits; ++t, to += kTileBytes)
            store_int(reinterpret_cast<float*>(to), code_pairs<kBits>(words, t * kBits));
        }
      }
    };
    const int64_t row = int64_t{kTileBytes} * groups;
    const char* w = codes_of_weights() + g * kTileBytes;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int c = 0; c < kTiles; ++c) unpack(0, c);
    for (int32_t r = 0; r < v.count; r += 2, w += row * t_.lanes()) {
      const char* from = room() + r / 2 % 2 * kTiles * kTile;
      const bool more = r + 2 < v.count;
      if (more) unpack(r + 2, 0);
      tile_load<4>(w, row);
      tile_load<6>(from, kTileBytes);
      tile_multiply<0, 4, 6>();
      if (more) unpack(r + 2, 1);
      tile_load<7>(from + kTile, kTileBytes);
      tile_multiply<1, 4, 7>();
      if constexpr (kGroups == 2) {
        if (more) unpack(r + 2, 2);
        tile_load<5>(w + kTileBytes, row);
        tile_load<6>(from + 2 * kTile, kTileBytes);
        tile_multiply<2, 5, 6>();
        if (more) unpack(r + 2, 3);
        tile_load<7>(from + 3 * kTile, kTileBytes);
        tile_multiply<3, 5, 7>();
      }
    }
    float* to = ws_ + at_.guarded + g * kTileDepth;
    tile_store<0>(to, 4 * at_.dv);
    tile_store<1>(to + kLanes, 4 * at_.dv);
    if constexpr (kGroups == 2) {
      tile_store<2>(to + 2 * kLanes, 4 * at_.dv);
      tile_store<3>(to + 3 * kLanes, 4 * at_.dv);
    }
  }

  const int32_t stored_ = stored_channels(keys_);
};
