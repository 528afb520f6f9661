// Read-outs of one task (readout.h): scores as the forward has them, weights, and what is asked of these. Sums over
// queries go by tiles of them, in order; those over keys too.

struct ReadoutLayout {
  Places places;
  size_t lse, row_max, entropy, least;

  explicit ReadoutLayout(const Call& c) : places(Layout(c, kMaxTileQ, false).places) {
    for (size_t* at : {&lse, &row_max, &entropy, &least}) *at = places.take(1, kMaxTileQ);
  }
};

class ReadoutForward : public FloatForward {
 public:
  ReadoutForward(const Call& c, const Task& t, const Readout& out, float* workspace)
      : FloatForward(c, t, workspace, false), out_(out), own_(c) {}

  void prepare() {
    for (size_t at : {own_.row_max, own_.entropy, own_.least}) clear(at, at_.bm);
    for (int32_t m = 0; m < at_.bm; ++m) {
      float lse = kInfinity;  // of lanes that are no queries, and of rows without weights
      if (m < t_.lanes()) {
        const float of_row =
            p_.lse[seq_.batch * p_.lse_stride[0] + head_of(m) * p_.lse_stride[1] + token_of(m) * p_.lse_stride[2]];
        if (of_row != -kInfinity) lse = of_row;
      }
      ws_[own_.lse + static_cast<size_t>(m)] = lse;
    }
  }

  void visit(int64_t first, int32_t count, bool full) {
    if (!full) find_live(first, count);
    scores(first, count, full);
    apply_score(first, count, full);
    weigh(count, full);
    const int64_t key = seq_.kv_start + first;
    if (out_.column_sum != nullptr) fold_columns(out_.column_sum + key, count, [](auto a, auto b) { return a + b; });
    if (out_.column_max != nullptr) fold_columns(out_.column_max + key, count, Larger{});
    if (out_.best != nullptr) keep_best(key, count);
    if (out_.weights != nullptr) put_weights(key, count);
  }

  void finish() {
    for (int32_t m = 0; m < t_.lanes(); ++m) {
      const int64_t row = row_of_query(m);
      if (out_.row_max != nullptr) out_.row_max[row] = ws_[own_.row_max + static_cast<size_t>(m)];
      if (out_.entropy != nullptr) out_.entropy[row] = ws_[own_.entropy + static_cast<size_t>(m)];
      if (out_.best != nullptr) sort_best(row);
    }
  }

 private:
  struct Larger {  // NaN stays
    ATTNKIT_INLINE vf operator()(vf a, vf b) const { return max_nan(a, b); }
    ATTNKIT_INLINE float operator()(float a, float b) const { return a > b || a != a ? a : b; }
  };

  int64_t row_of_head(int32_t lane) const { return int64_t{seq_.batch} * p_.num_heads + head_of(lane); }
  int64_t row_of_query(int32_t lane) const { return row_of_head(lane) * out_.queries + token_of(lane); }

  // Scores become weights, 0 where no pair is; and what is known of rows is brought up to them.
  void weigh(int32_t count, bool full) {
    for (int32_t lane = 0; lane < at_.bm; lane += kLanes) {
      const vf lse = load(ws_ + own_.lse + lane);
      vf most = load(ws_ + own_.row_max + lane), entropy{};  // of the tile: short sums
      for (int32_t n = 0; n < count; ++n) {
        float* s = ws_ + at_.s + static_cast<int64_t>(n) * at_.bm + lane;
        const vf log = load(s) - lse;
        vf w = exp_weight(log);
        if (!full) w = select(lane_mask(static_cast<uint32_t>(live_bits(n, lane / kLanes))), w, vf{});
        store(s, w);
        most = max_nan(w, most);
        entropy -= select(w == vf{}, vf{}, w * log);
      }
      store(ws_ + own_.row_max + lane, most);
      store(ws_ + own_.entropy + lane, load(ws_ + own_.entropy + lane) + entropy);
    }
  }

  // Of each key the weights of a head's queries are brought together, and join what was there. Weights are not below 0,
  // and 0 changes none of them.
  template <class F>
  void fold_columns(float* out, int32_t count, F fold) {
    for (int32_t head = 0; head < t_.heads; ++head) {
      float* column = out + row_of_head(head * t_.q_count) * out_.keys;
      for (int32_t n = 0; n < count; ++n) {
        const float* w = ws_ + at_.s + static_cast<int64_t>(n) * at_.bm;
        float all = 0;
        if (t_.heads == 1) {
          vf lanes{};
          for (int32_t lane = 0; lane < at_.bm; lane += kLanes) lanes = fold(load(w + lane), lanes);
          for (int i = 0; i < kLanes; ++i) all = fold(lanes[i], all);
        } else {
          for (int32_t m = head * t_.q_count; m < (head + 1) * t_.q_count; ++m) all = fold(w[m], all);
        }
        column[n] = fold(all, column[n]);
      }
    }
  }

  // ---- the largest weights of a row: a heap, the least of them on top ----

  void keep_best(int64_t key, int32_t count) {
    for (int32_t lane = 0; lane < at_.bm; lane += kLanes) {
      float* least = ws_ + own_.least + lane;
      for (int32_t n = 0; n < count; ++n) {
        const vf w = load(ws_ + at_.s + static_cast<int64_t>(n) * at_.bm + lane);
        for (uint32_t more = lane_bits(w > load(least)); more != 0; more &= more - 1) {
          const int i = __builtin_ctz(more);
          const int64_t row = row_of_query(lane + i) * out_.top_k;
          sink(out_.best + row, out_.best_keys + row, out_.top_k, w[i], key + n);
          least[i] = out_.best[row];
        }
      }
    }
  }

  // Puts a weight where the top of a heap was.
  static void sink(float* w, int64_t* keys, int32_t size, float weight, int64_t key) {
    const auto worse = [&](int32_t a, int32_t b) { return w[a] < w[b] || (w[a] == w[b] && keys[a] > keys[b]); };
    int32_t at = 0;
    for (int32_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && worse(child + 1, child)) ++child;
      if (!(w[child] < weight || (w[child] == weight && keys[child] > key))) break;
      w[at] = w[child];
      keys[at] = keys[child];
    }
    w[at] = weight;
    keys[at] = key;
  }

  void sort_best(int64_t row) {
    float* w = out_.best + row * out_.top_k;
    int64_t* keys = out_.best_keys + row * out_.top_k;
    for (int32_t last = out_.top_k - 1; last > 0; --last) {
      const float worst = w[0];
      const int64_t its_key = keys[0];
      sink(w, keys, last, w[last], keys[last]);
      w[last] = worst;
      keys[last] = its_key;
    }
  }

  void put_weights(int64_t key, int32_t count) {
    for (int32_t m = 0; m < t_.lanes(); ++m) {
      float* to = out_.weights + (row_of_head(m) * out_.num_rows + m) * out_.keys + key;
      for (int32_t n = 0; n < count; ++n) to[n] = ws_[at_.s + static_cast<size_t>(n * at_.bm + m)];
    }
  }

  const Readout& out_;
  const ReadoutLayout own_;
};

// See ReadoutKernel.
int32_t readout(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, const Readout& out,
                float* workspace) {
  ReadoutForward forward(c, t, out, workspace);
  forward.pack_queries();
  forward.begin(num_ranges > 0);
  forward.prepare();
  for (size_t i = 0; i < num_ranges; ++i)
    for (int64_t first = ranges[i].first, end = first + ranges[i].count; first < end;) {
      const int64_t reach = forward.reach(first, false), stop = reach < end ? reach : end;
      forward.visit(first, static_cast<int32_t>(stop - first), ranges[i].full);
      first = stop;
    }
  forward.finish();
  return forward.bad_load();
}

size_t readout_bytes(const Call& c) { return ReadoutLayout(c).places.next * sizeof(float); }

constexpr ReadoutKernel kReadoutKernel{readout_bytes, readout};
