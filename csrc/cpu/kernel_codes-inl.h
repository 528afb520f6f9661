// Few queries over codes, which no tile of floats is made of: keys on the byte dot product, values on the byte or the
// bfloat16 one. Sums of bytes are integers, so they are exact; scales join them once a run of keys (of values: once a
// tile).
//
// A query, or of int4 and int2 its product with the scales of a group of keys, is rounded to 16 bits, in two bytes: q =
// 256 high + low. Weights of int8 values, times their scales, are 16 bits of the largest of their tile; those of int4
// and int2 are bfloat16, and codes become bfloat16 by setting the bits of 128 in front of them.

ATTNKIT_INLINE vi word_at(const char* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return set1_int(word);
}
// The compiler's own widening takes five instructions.
ATTNKIT_INLINE vf widen_scales(const uint16_t* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
}

// Where the codes of a tile lie and their scales begin, a run of tokens after the other.
struct CodeTile {
  static constexpr int32_t kMost = kMaxTileKv / kRun;

  const char* runs[kMost];
  const uint16_t* scales[kMost];
  const char* fetched[kMost];  // the part of the scales that comes with the run
  int32_t count = 0;  // runs
  int32_t lines[2] = {};  // of memory, of that part and of the codes of a run

  CodeTile() = default;
  CodeTile(const Store& s, const Pages& pages, const Sequence& sequence, int32_t head, int64_t first, int32_t tokens)
      : count((tokens + kRun - 1) / kRun) {
    int32_t together = 1;  // tokens that share scales
    const int64_t bytes = scales_of_run(s, &together) * 2,
                  part = together == 1 ? bytes * kRun : bytes * kRun / together;
    lines[0] = static_cast<int32_t>((part + 63) / 64);
    lines[1] = static_cast<int32_t>((run_bytes(s) + 63) / 64);
    const int64_t run = run_bytes(s), page = int64_t{1} << pages.shift;
    const uint16_t* base = nullptr;
    int64_t within = 0;  // of the tokens that share scales, the first of the run
    for (int32_t r = 0; r < count; ++r) {
      const int64_t token = first + r * kRun;
      if (r == 0 || (pages.table != nullptr && (token & (page - 1)) == 0)) {
        const Place place = place_of(pages, sequence.batch, token);
        runs[r] = codes_at(s, place, head);
        base = scales_at(s, place, head);
        within = together == 1 ? 0 : place.token % together;
      } else {
        runs[r] = runs[r - 1] + run;
        within += kRun;
        if (within >= together) {
          base += bytes / 2 * (together == 1 ? kRun : 1);
          within = 0;
        }
      }
      scales[r] = base + (s.is_keys ? 0 : within);
      fetched[r] = reinterpret_cast<const char*>(base) + within / kRun * part;
    }
  }
};

// A fetch comes to nothing where its page of memory is new: one line of each is fetched earlier still.
inline void open_pages(const CodeTile& tile) {
  for (int32_t r = 0; r < tile.count; ++r) {
    __builtin_prefetch(tile.runs[r] + tile.lines[1] * 64 - 1);
    __builtin_prefetch(tile.fetched[r] + tile.lines[0] * 64 - 1);
  }
}

// Fetches the codes of a run that is needed next, while those in use go by in steps; its scales come first, at once.
// What is not there are codes that have been used.
struct CodeFetch {
  const char* at;
  int32_t lines;  // in each step

  ATTNKIT_INLINE void step(int32_t n) const {
    for (int32_t i = 0; i < lines; ++i) __builtin_prefetch(at + (n * lines + i) * 64);
  }
};
inline CodeFetch fetch_of(const CodeTile& next, int32_t r, int32_t steps, const char* used) {
  if (r >= next.count) return {used, 0};
  for (int32_t i = 0; i < next.lines[0]; ++i) __builtin_prefetch(next.fetched[r] + i * 64);
  return {next.runs[r], (next.lines[1] + steps - 1) / steps};
}

// ---- queries as bytes ----

inline constexpr float kMostQuery = 32512;  // 127 * 256

// A float whose low bits are the whole number next to a product; of 64 of them, up to kMostQuery, the two bytes each.
ATTNKIT_INLINE vf rounded(vf x, vf factor) { return fma(x, factor, set1(12582912.0f)); }  // 1.5 * 2^23
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
// The first four lanes.
ATTNKIT_INLINE void store_four(float* p, vf x) { _mm_storeu_ps(p, _mm512_castps512_ps128((__m512)x)); }
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
