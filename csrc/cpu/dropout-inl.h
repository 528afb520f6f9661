// Which weights dropout keeps: those for which the first word of Philox 4x32-10 is at least a threshold (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the seed of the call, the counter is (sequence,
// head, query, key): nothing else counts, so every tile, split, batch, thread and direction finds the same pairs.
//
// Two of the ten rounds and half of the third treat the query and the key of a pair apart: they are done once for each
// query and each key. Of the last two rounds only what the first word needs is done.

inline constexpr uint32_t kPhilox0 = 0xD2511F53, kPhilox1 = 0xCD9E8D57;
inline constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // the golden ratio and the root of 3, less 1

// What the first rounds make of a query, and of a key: see `Philox`.
struct QueryWords {
  static constexpr int kCount = 4;
  uint32_t word[kCount];
};
struct KeyWords {
  static constexpr int kCount = 2;
  uint32_t word[kCount];
};

// Products take 64 bits, so the numbers of even and of odd lanes are apart, each in the low half of a 64-bit lane. What
// is in the high half does not matter.
//
// The words of many queries or keys: for every vector of lanes one such pair of vectors for each word.
template <class Words>
class SplitWords {
 public:
  static constexpr int64_t kVector = 2 * Words::kCount * kLanes;  // floats for a vector of lanes

  explicit SplitWords(float* at) : at_(at) {}

  void put(int32_t lane, const Words& words) const {
    for (int w = 0; w < Words::kCount; ++w)
      __builtin_memcpy(at_ + lane / kLanes * kVector + (2 * w + lane % 2) * kLanes + lane % kLanes / 2 * 2,
                       words.word + w, 4);
  }

  struct Vector {
    const float* at;
    ATTNKIT_INLINE vl get(int w, int odd) const { return load_long(at + (2 * w + odd) * kLanes); }
  };
  ATTNKIT_INLINE Vector at(int32_t lane) const { return {at_ + lane / kLanes * kVector}; }

 private:
  float* at_;
};

// One query or key, the same in all lanes.
template <class Words>
struct SameWords {
  Words words;
  ATTNKIT_INLINE vl get(int w, int) const { return set1_long(words.word[w]); }
};

class Philox {
 public:
  Philox(const Dropout& dropout, int32_t sequence) : threshold_(dropout.threshold) {
    for (uint32_t r = 0; r < kRounds; ++r) {
      key0_[r] = (dropout.seed + r * kWeyl0) & kLow;
      key1_[r] = ((dropout.seed >> 32) + r * kWeyl1) & kLow;
    }
    last_ = key0_[kRounds - 1] << 32;
    const uint64_t p = product(kPhilox0, static_cast<uint32_t>(sequence));
    high_ = high(p) ^ low(key1_[0]);
    low_ = low(p);
  }

  QueryWords query(int32_t head, int64_t index) const {
    const uint64_t first = product(kPhilox1, static_cast<uint32_t>(index));
    const uint64_t second = product(kPhilox0, high(first) ^ static_cast<uint32_t>(head) ^ low(key0_[0]));
    const uint64_t third = product(kPhilox1, high(second) ^ low_ ^ low(key1_[1]));
    return {{low(first ^ key0_[1]), low(second ^ key1_[2]), high(third) ^ low(key0_[2]), low(third)}};
  }

  KeyWords key(int64_t index) const {
    const uint64_t second = product(kPhilox1, high_ ^ static_cast<uint32_t>(index));
    return {{high(second), low(second)}};
  }

  // Tells f(row, lane, kept) of the pairs of queries (keys), which are rows, with every vector of keys (queries), which
  // are lanes: all bits of a lane of `kept` if its pair is, else none. `words_of(row)`: of a query (key).
  template <class Lanes, class Row, class F>
  ATTNKIT_INLINE void each(const SplitWords<Lanes>& words, Span lanes, Span rows, Row words_of, F f) const {
    int32_t r = rows.first;
    for (; r + 4 <= rows.end; r += 4) rows_of<4>(words, lanes, r, words_of, f);
    for (; r < rows.end; ++r) rows_of<1>(words, lanes, r, words_of, f);
  }

 private:
  template <int kRows, class Lanes, class Row, class F>
  ATTNKIT_INLINE void rows_of(const SplitWords<Lanes>& words, Span lanes, int32_t first, Row words_of, F f) const {
    constexpr bool kQueries = std::is_same_v<Lanes, QueryWords>;  // are in lanes
    SameWords<std::conditional_t<kQueries, KeyWords, QueryWords>> of_row[kRows];
    for (int i = 0; i < kRows; ++i) of_row[i] = {words_of(first + i)};
    const auto in_row = [&](int i) { return of_row[i]; };
    for (int32_t lane = lanes.first; lane < lanes.end; lane += kLanes) {
      const auto in_lanes = [at = words.at(lane)](int) { return at; };
      vi kept[kRows];
      if constexpr (kQueries) {
        keep<kRows>(in_lanes, in_row, kept);
      } else {
        keep<kRows>(in_row, in_lanes, kept);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) f(first + i, lane, kept[i]);
    }
  }

  // Which pairs are kept of a vector of lanes with each of kCount rows: all bits of a lane, or none. `query(row)` and
  // `key(row)` are the words of either. Four rows at once take two thirds of the time of one by one: a product takes
  // longer than one row has work meanwhile.
  template <int kCount, class Query, class Key>
  ATTNKIT_INLINE void keep(const Query& query, const Key& key, vi* kept) const {
    constexpr int kParts = 2 * kCount;  // even and odd lanes of each row
    const vl m0 = set1_long(kPhilox0), m1 = set1_long(kPhilox1);
    vl c0[kParts], c1[kParts], c2[kParts], c3[kParts], p0[kParts], p1[kParts];
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      const auto q = query(i / 2);
      const auto k = key(i / 2);
      c3[i] = multiply_low(k.get(0, i % 2) ^ q.get(0, i % 2), m0);
      c2[i] = (c3[i] >> 32) ^ q.get(1, i % 2);
      c0[i] = q.get(2, i % 2) ^ k.get(1, i % 2);
      c1[i] = q.get(3, i % 2);
    }
#pragma GCC unroll 8
    for (int r = 3; r < kRounds - 2; ++r) {
      const vl key0 = set1_long(key0_[r]), key1 = set1_long(key1_[r]);
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i) {
        p0[i] = multiply_low(c0[i], m0);
        p1[i] = multiply_low(c2[i], m1);
        c0[i] = (p1[i] >> 32) ^ c1[i] ^ key0;
        c1[i] = p1[i];
        c2[i] = (p0[i] >> 32) ^ c3[i] ^ key1;
        c3[i] = p0[i];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      p0[i] = multiply_low(c0[i], m0);
      c1[i] = multiply_low(c2[i], m1);
      p1[i] = multiply_low((p0[i] >> 32) ^ c3[i] ^ set1_long(key1_[kRounds - 2]), m1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const vl even = (p1[2 * i] >> 32) ^ c1[2 * i] ^ set1_long(key0_[kRounds - 1]);
      const vl odd = p1[2 * i + 1] ^ (c1[2 * i + 1] << 32) ^ set1_long(last_);
      const vu word = reinterpret_cast<vu>((even & set1_long(kLow)) | (odd & set1_long(~kLow)));
      kept[i] = word >= vu(set1_int(static_cast<int32_t>(threshold_)));
    }
  }

  static constexpr int kRounds = 10;
  static constexpr uint64_t kLow = 0xffffffff;

  static uint64_t product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
  static uint32_t low(uint64_t x) { return static_cast<uint32_t>(x); }
  static uint32_t high(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

  uint64_t key0_[kRounds], key1_[kRounds];  // 64 bits each: an instruction can spread them over its lanes
  uint64_t last_;  // key0_, for odd lanes
  uint32_t high_, low_;  // of the first product, of the sequence
  uint32_t threshold_;
};
