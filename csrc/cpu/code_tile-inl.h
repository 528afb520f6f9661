// The codes of a tile of keys or values as words of a cache (store-inl.h), for products that take them as they are.

ATTNKIT_INLINE vi word_at(const char* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return set1_int(word);
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

// A float whose low bits are the whole number next to a product.
inline constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
ATTNKIT_INLINE vf rounded(vf x, vf factor) { return fma(x, factor, set1(kWhole)); }
// The first four lanes.
ATTNKIT_INLINE void store_four(float* p, vf x) { __builtin_memcpy(p, &x, 16); }

// Calls f<bits of a code>().
template <class F>
void by_bits(Codec codec, F f) {
  if (codec == Codec::int8) return f.template operator()<8>();
  if (codec == Codec::int4) return f.template operator()<4>();
  f.template operator()<2>();
}
