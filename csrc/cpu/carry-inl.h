// What queries carry onto keys: first what each of them adds, which is the score of a program, and of one head; then
// the sums before each, in the order of queries. No instruction set and no cut into tasks changes that order.

template <class Products>
class CarryForward : public Products {
 public:
  using Products::Products;

  // Of one tile of pairs, to where the task says.
  void visit(int64_t first, int32_t count, bool full) {
    if constexpr (requires { this->few_; }) {  // these products know a way for few queries
      if (this->few_) {
        this->logits(first, count, full, kNoLines);
        this->apply_score_by_key(first, count, full);
        return put_by_query(first, count, full);
      }
    }
    if (!full) this->find_live(first, count);
    this->scores(first, count, full);
    this->apply_score(first, count, full);
    put(first, count, full);
  }

 private:
  // Lanes that are no queries get anything.
  void put(int64_t first, int32_t count, bool full) {
    const Carried& to = this->t_.carried;
    const float* s = this->ws_ + this->at_.s;
    const int32_t bm = this->at_.bm;
    const auto added = [&](int32_t n, int32_t lane) {
      const vf x = load(s + static_cast<int64_t>(n) * bm + lane);
      if (full) return x;
      return select(lane_mask(static_cast<uint32_t>(this->live_bits(n, lane / kLanes))), x, set1(-kInfinity));
    };
    for (int32_t n = 0; n < count; ++n)
      for (int32_t lane = 0; lane < bm; lane += kLanes) {
        const vf x = added(n, lane);
        if (to.by_key) {
          store(to.f + (first - to.first + n) * to.ld + lane, x);
        } else {
          for (int32_t m = lane; m < this->t_.lanes() && m < lane + kLanes; ++m)
            to.f[m * to.ld + first - to.first + n] = x[m - lane];
        }
      }
  }

  void put_by_query(int64_t first, int32_t count, bool full) {
    const Carried& to = this->t_.carried;
    for (int32_t m = 0; m < this->t_.lanes(); ++m)
      for (int32_t n = 0; n < count; n += kLanes) {
        vf x = load(this->ws_ + this->at_.st + m * this->ld_ + n);
        if (!full) {
          const vi live = load_int(this->ws_ + this->at_.live + n) & set1_int(1 << m);
          x = select(live != 0, x, set1(-kInfinity));
        }
        store(to.f + m * to.ld + first - to.first + n, x);
      }
  }
};

// A vector of keys, from one query to the next. A key that is gone gets nothing more: it may hold anything.
struct Accumulator {
  vf sum;
  vi gone;  // from which query on
  ATTNKIT_INLINE vf step(vf added, int32_t query) {
    const vi away = gone <= query;
    const vf before = select(away, set1(kInfinity), sum);
    sum += select(away | (added == set1(-kInfinity)), vf{}, added);
    return before;
  }
};

// `held` keys, of which `sums` and `gone` (which may be null) know.
inline Accumulator accumulator(const float* sums, const int32_t* gone, size_t held) {
  Accumulator keys{vf{}, set1_int(INT32_MAX)};
  __builtin_memcpy(&keys.sum, sums, held * 4);
  if (gone != nullptr) __builtin_memcpy(&keys.gone, gone, held * 4);
  keys.gone = as_int(select(keys.sum == set1(kInfinity), as_float(set1_int(-1)), as_float(keys.gone)));
  return keys;
}

// See Kernel. Keys up to the next whole vector are read and written too.
void accumulate(const Task& t, int64_t first, int64_t count, float* sums, const int32_t* gone) {
  const Carried& at = t.carried;
  const auto q_first = static_cast<int32_t>(t.q_first);
  float least = kInfinity;
  for (int64_t n = 0; n < count; n += kLanes) {
    const auto held = static_cast<size_t>(count - n < kLanes ? count - n : kLanes);
    Accumulator keys = accumulator(sums + n, gone == nullptr ? nullptr : gone + n, held);
    for (size_t i = 0; i < held; ++i) least = keys.sum[i] < least ? keys.sum[i] : least;
    const int64_t key = first - at.first + n;
    if (at.by_key) {
      for (int32_t m = 0; m < t.q_count; m += kLanes) {
        float* f = at.f + key * at.ld + m;
        vf square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(f + i * at.ld);
        transpose_square(square);
        const int32_t queries = t.q_count - m;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          if (i < queries) square[i] = keys.step(square[i], q_first + m + i);
        transpose_square(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(f + i * at.ld, square[i]);
      }
    } else {
      for (int32_t m = 0; m < t.q_count; ++m) {
        float* f = at.f + m * at.ld + key;
        store(f, keys.step(load(f), q_first + m));
      }
    }
    keys.sum = select(keys.gone < q_first + t.q_count, set1(kInfinity), keys.sum);
    __builtin_memcpy(sums + n, &keys.sum, held * 4);
  }
  at.least[first / at.tile_kv] = least;
}

template <class Products>
int32_t select_keys(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, float* sums,
                    float* workspace) {
  CarryForward<Products> selection(c, t, workspace);
  selection.pack_queries();
  selection.begin(num_ranges > 0);
  for (size_t i = 0; i < num_ranges; ++i) {
    const auto [first, count, full] = ranges[i];
    selection.visit(first, count, full);
    if (sums != nullptr) accumulate(t, first, count, sums + first, nullptr);
  }
  return selection.bad_load();
}
