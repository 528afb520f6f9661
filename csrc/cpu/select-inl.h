// Rows and columns as means of tokens, their scores, and which columns a row keeps. Lanes are columns.

struct SelectLayout {
  static constexpr int32_t kTokens = 128;  // widened at a time

  Places places;
  int32_t width;  // channels, whole vectors
  int32_t bm;     // columns of a tile of expressions
  size_t tokens, centered, mean, unit, inverse, rows, kept_whole, live, forced, scores, weights, kept;
  size_t turned_keys, turned_weights;  // [column][row]

  explicit SelectLayout(const Selection& p)
      : width(round_up(p.head_dim, kLanes)),
        bm(static_cast<int32_t>(p.stride < kMaxTileKv ? p.stride : int64_t{kMaxTileKv})) {
    tokens = places.take(kTokens, width);
    centered = places.take(kTokens, width);
    mean = places.take(1, width);
    unit = places.take(1, width);
    inverse = places.take(1, kTokens);
    rows = places.take(kSelectRows, width);
    kept_whole = places.take(1, kSelectRows);
    live = places.take(kSelectRows, p.stride);
    forced = places.take(kSelectRows, p.stride);
    scores = places.take(kSelectRows, p.stride);
    weights = places.take(kSelectRows, p.stride);
    kept = places.take(kSelectRows, p.stride);
    turned_keys = places.take(p.stride, kLanes);
    turned_weights = places.take(p.stride, kLanes);
  }

  // Whoever evaluates expressions has them after all else: they are not needed at the same time.
  TileLayout tile(const CodeView& code, Places& after) const { return TileLayout(code, bm, after); }
};

class Selector {
 public:
  Selector(const Selection& p, int32_t b, float* workspace) : p_(p), b_(b), at_(p), ws_(workspace) {}

  static size_t bytes(const Selection& p) {
    const SelectLayout at(p);
    size_t most = at.places.next;
    for (const CodeView* code : {p.mask, p.force})
      if (code != nullptr) {
        Places places = at.places;
        at.tile(*code, places);
        most = places.next > most ? places.next : most;
      }
    return most * sizeof(float);
  }

  void center(int32_t head) {
    pool(p_.k, head, 0, p_.kv_len, nullptr, false);
    __builtin_memcpy(center_of(head), ws_ + at_.mean, static_cast<size_t>(p_.head_dim) * sizeof(float));
  }

  void columns(int32_t head, int64_t first, int32_t count) {
    const int64_t of_head = int64_t{b_} * p_.k_heads + head;
    float* means = p_.means + of_head * p_.head_dim * p_.stride + first;
    for (int32_t c = 0; c < count; ++c) {
      const float* center = p_.centered ? center_of(head) : nullptr;
      const bool coherent = pool(p_.k, head, (first + c) * p_.column_block,
                                 end_of(first + c, p_.column_block, p_.kv_len), center, p_.coherent);
      for (int32_t d = 0; d < p_.head_dim; ++d) means[d * p_.stride + c] = ws_[at_.mean + static_cast<size_t>(d)];
      if (p_.coherent) p_.is_coherent[of_head * p_.stride + first + c] = coherent ? -1 : 0;
    }
  }

  int32_t rows(int32_t chooser, int64_t first, int32_t count) {
    const int32_t group = p_.q_heads / p_.k_heads, heads = p_.of_group ? group : 1;
    const int32_t head = p_.of_group ? chooser * group : chooser, kv_head = head / group;
    int32_t bad = evaluate(p_.mask, true, at_.live, head, first, count);
    if (bad < 0) bad = evaluate(p_.force, false, at_.forced, head, first, count);
    if (bad >= 0) return bad;
    seen_ = 0;
    for (int32_t g = 0; g < heads; ++g) {
      const size_t live = g == 0 ? at_.live : at_.weights;
      if (g > 0) bad = evaluate(p_.mask, true, live, head + g, first, count);
      if (bad >= 0) return bad;
      leave_out_incoherent(live, kv_head, count);
      const int64_t seen = last_seen(live, count);
      if (seen > seen_) seen_ = seen;
      pool_rows(head + g, first, count, g == 0);
      multiply(kv_head, count, seen);
      if (p_.of_group) add_weights(live, heads, count);
    }
    if (p_.of_group) __builtin_memcpy(ws_ + at_.scores, ws_ + at_.kept, row_bytes(count));
    rank(count);
    write(chooser, kv_head, first, count);
    return -1;
  }

 private:
  static int64_t end_of(int64_t block, int64_t size, int64_t length) {
    return (block + 1) * size < length ? (block + 1) * size : length;
  }

  float* center_of(int32_t head) const { return p_.center + (int64_t{b_} * p_.k_heads + head) * p_.head_dim; }
  float* row(size_t at, int32_t r) const { return ws_ + at + static_cast<size_t>(r * p_.stride); }
  size_t row_bytes(int32_t count) const { return static_cast<size_t>(count * p_.stride) * sizeof(float); }

  // ---- means of tokens ----

  // The mean of tokens first .. end - 1, without `center`, in the workspace; whether they are coherent, if that is
  // asked.
  bool pool(const View& tokens, int32_t head, int64_t first, int64_t end, const float* center, bool ask) {
    clear(at_.mean, at_.width);
    clear(at_.unit, at_.width);
    for (int64_t t = first; t < end; t += SelectLayout::kTokens) {
      const auto n = static_cast<int32_t>(end - t < SelectLayout::kTokens ? end - t : int64_t{SelectLayout::kTokens});
      Rows x = rows_of(tokens, p_.dtype, b_, head, t, n, p_.head_dim, at_.width, ws_ + at_.tokens);
      if (center != nullptr) x = without(x, n, center);
      add(x, n, nullptr, ws_ + at_.mean);
      if (!ask) continue;
      for (int32_t i = 0; i < n; ++i) ws_[at_.inverse + static_cast<size_t>(i)] = inverse_length(x, i);
      add(x, n, ws_ + at_.inverse, ws_ + at_.unit);
    }
    const float share = 1 / static_cast<float>(end - first);
    vf square{};
    for (int32_t d = 0; d < at_.width; d += kLanes) {
      store(ws_ + at_.mean + d, load(ws_ + at_.mean + d) * set1(share));
      const vf u = load(ws_ + at_.unit + d) * set1(share);
      square = fma(u, u, square);
    }
    return sum_of_lanes(square) > p_.least;  // a token of zeros has made it NaN
  }

  Rows without(Rows x, int32_t n, const float* center) {
    float* to = ws_ + at_.centered;
    for (int32_t i = 0; i < n; ++i)
      for (int32_t d = 0; d < at_.width; ++d)
        to[i * at_.width + d] = d < p_.head_dim ? x.data[i * x.stride + d] - center[d] : 0;
    return {to, at_.width};
  }

  float inverse_length(Rows x, int32_t i) const {
    vf square{};
    for (int32_t d = 0; d < at_.width; d += kLanes) {
      const vf a = load(x.data + i * x.stride + d);
      square = fma(a, a, square);
    }
    return 1 / __builtin_sqrtf(sum_of_lanes(square));
  }

  // Adds n rows, or so much of each, to `to`.
  void add(Rows x, int32_t n, const float* share, float* to) const {
    in_groups(at_.width, [&]<int kVecs>(int32_t d) {
      vf sum[kVecs];
      for (int v = 0; v < kVecs; ++v) sum[v] = load(to + d + v * kLanes);
      for (int32_t i = 0; i < n; ++i) {
        const vf by = set1(share == nullptr ? 1.0f : share[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[v] = fma(load(x.data + i * x.stride + d + v * kLanes), by, sum[v]);
      }
      for (int v = 0; v < kVecs; ++v) store(to + d + v * kLanes, sum[v]);
    });
  }

  void pool_rows(int32_t head, int64_t first, int32_t count, bool ask) {
    if (p_.row_block == 1 && !p_.coherent) {
      clear(at_.kept_whole, kSelectRows);
      rows_ = rows_of(p_.q, p_.dtype, b_, head, first, count, p_.head_dim, at_.width, ws_ + at_.rows);
      return;
    }
    rows_ = {ws_ + at_.rows, at_.width};
    for (int32_t r = 0; r < count; ++r) {
      const int64_t at = (first + r) * p_.row_block;
      const bool coherent =
          pool(p_.q, head, at, end_of(first + r, p_.row_block, p_.q_len), nullptr, ask && p_.coherent);
      __builtin_memcpy(ws_ + at_.rows + static_cast<size_t>(r * at_.width), ws_ + at_.mean,
                       static_cast<size_t>(at_.width) * sizeof(float));
      if (ask) ws_[at_.kept_whole + static_cast<size_t>(r)] = p_.coherent && !coherent ? 1.0f : 0.0f;
    }
  }

  // ---- scores ----

  // How many columns there are up to the last that some row has as a candidate, two whole vectors at a time.
  int64_t last_seen(size_t live, int32_t count) const {
    for (int64_t end = p_.stride; end > 0; end -= 2 * kLanes) {
      vi some{};
      for (int32_t r = 0; r < count; ++r) {
        const float* of_row = row(live, r) + end;
        some |= load_int(of_row - kLanes) | load_int(of_row - 2 * kLanes);
      }
      if (any(some)) return end;
    }
    return 0;
  }

  // Scores of so many columns.
  void multiply(int32_t kv_head, int32_t count, int64_t columns) {
    const float* means = p_.means + (int64_t{b_} * p_.k_heads + kv_head) * p_.head_dim * p_.stride;
    int32_t r = 0;
    for (; r + 4 <= count; r += 4) multiply_rows<4>(means, r, columns);
    for (; r < count; ++r) multiply_rows<1>(means, r, columns);
  }

  // Not inlined: the compiler would keep the rows' addresses in memory.
  template <int kRows>
  __attribute__((noinline)) void multiply_rows(const float* means, int32_t r, int64_t columns) {
    const float* x = rows_.data + r * rows_.stride;
    for (int64_t c = 0; c < columns; c += 2 * kLanes) {
      vf sum[kRows][2] = {};
      for (int32_t d = 0; d < p_.head_dim; ++d) {
        const vf a = load(means + d * p_.stride + c), b = load(means + d * p_.stride + c + kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const vf by = set1_bits(x + i * rows_.stride + d);
          sum[i][0] = fma(by, a, sum[i][0]);
          sum[i][1] = fma(by, b, sum[i][1]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        store(row(at_.scores, r + i) + c, sum[i][0] * set1(p_.scale));
        store(row(at_.scores, r + i) + c + kLanes, sum[i][1] * set1(p_.scale));
      }
    }
  }

  // ---- expressions ----

  // Whether one holds for each pair of these rows and the columns, as masks; `otherwise` where there is none. Lanes
  // past the last column are false.
  int32_t evaluate(const CodeView* code, bool otherwise, size_t to, int32_t head, int64_t first, int32_t count) {
    const int64_t columns = p_.columns();
    if (code == nullptr) {
      for (int32_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < p_.stride; c += kLanes)
          store_int(row(to, r) + c, otherwise ? before(columns - c) : vi{});
      return -1;
    }
    Places places = at_.places;
    const TileLayout layout = at_.tile(*code, places);
    Tile tile(*code, *p_.pairs, b_, layout, ws_, nullptr, kPerKey);
    const Task task{b_, head, 1, first, count};
    tile.begin();
    tile.queries(task);
    for (int64_t c = 0; c < p_.stride; c += at_.bm) {
      const auto lanes = static_cast<int32_t>(p_.stride - c < at_.bm ? p_.stride - c : int64_t{at_.bm});
      const auto n = static_cast<int32_t>(columns - c < lanes ? columns - c : int64_t{lanes});
      if (n > 0) {
        tile.keys(c, n);
        tile.run_strip(0, count, false, true);
        tile.check_loads(0, count, n, false);
      }
      for (int32_t r = 0; r < count; ++r)
        for (int32_t v = 0; v < lanes; v += kLanes) {
          const Operand o = n > 0 ? tile.operand(code->mask, kTile, 0) : Operand{};
          vi holds{};
          if (n > 0) with(o.vec, [&](auto vec) { holds = as_int(Row<vec.value>(o, r).at(v)) & before(n - v); });
          store_int(row(to, r) + c + v, holds);
        }
    }
    return tile.bad_load();
  }

  // The lanes before lane n.
  static vi before(int64_t n) {
    vi lane{};
    for (int32_t i = 0; i < kLanes; ++i) lane[i] = i;
    return lane < set1_int(static_cast<int32_t>(n < 0 ? 0 : n < kLanes ? n : int64_t{kLanes}));
  }

  void leave_out_incoherent(size_t of, int32_t kv_head, int32_t count) {
    if (!p_.coherent) return;
    const auto* flags = reinterpret_cast<const float*>(coherent_columns(kv_head));
    for (int32_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < p_.stride; c += kLanes) {
        float* live = row(of, r) + c;
        store_int(live, load_int(live) & load_int(flags + c));
      }
  }

  const int32_t* coherent_columns(int32_t kv_head) const {
    return p_.is_coherent + (int64_t{b_} * p_.k_heads + kv_head) * p_.stride;
  }

  // ---- choosing ----

  // e^(s - largest) of the candidates that are no NaN, into `to`; returns their sum.
  float exponentials(size_t live, size_t to, int32_t r) const {
    const float *s = row(at_.scores, r), *is_live = row(live, r);
    const auto scored = [&](int64_t c) { return load_int(is_live + c) & (load(s + c) == load(s + c)); };
    vf most = set1(-kInfinity);
    for (int64_t c = 0; c < p_.stride; c += kLanes)
      most = max_or_second(select(scored(c), load(s + c), set1(-kInfinity)), most);
    float largest = -kInfinity;
    for (int32_t i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
    const vf pivot = set1(largest == -kInfinity ? 0 : largest);
    vf sum{};
    for (int64_t c = 0; c < p_.stride; c += kLanes) {
      const vf e = select(scored(c), exp_weight(load(s + c) - pivot), vf{});
      store(row(to, r) + c, e);
      sum += e;
    }
    return sum_of_lanes(sum);
  }

  // The softmax of one head of a group joins those before it; what one of them may choose, all may.
  void add_weights(size_t own, int32_t heads, int32_t count) {
    const bool first = own == at_.live;
    for (int32_t r = 0; r < count; ++r) {
      if (!first)
        for (int64_t c = 0; c < p_.stride; c += kLanes) {
          float* live = row(at_.live, r) + c;
          store_int(live, load_int(live) | load_int(row(own, r) + c));
        }
      const float total = exponentials(own, at_.scores, r);
      const vf share = set1(total == 0 ? 0 : 1 / (total * static_cast<float>(heads)));
      for (int64_t c = 0; c < p_.stride; c += kLanes) {
        const vf before = first ? vf{} : load(row(at_.kept, r) + c);
        store(row(at_.kept, r) + c, fma(load(row(at_.scores, r) + c), share, before));
      }
    }
  }

  // An integer for each score that orders as they do: what is no candidate comes last, NaN just before. Where the rule
  // weighs columns, their weights.
  void rank(int32_t count) {
    float limit[kSelectRows] = {};
    const bool weighs = p_.rule == Rule::mass;
    for (int32_t r = 0; r < count; ++r) {
      limit[r] = weighs ? p_.value * exponentials(at_.live, at_.weights, r) : p_.value;
      for (int64_t c = 0; c < p_.stride; c += kLanes) {
        float* s = row(at_.scores, r) + c;
        const vf x = load(s) + vf{};  // -0 is 0
        const vi live = load_int(row(at_.live, r) + c), bits = as_int(x);
        if (p_.rule == Rule::threshold) {
          store_int(row(at_.kept, r) + c, live & (x > set1(p_.value)));
          continue;
        }
        const vi key = x == x ? bits ^ ((bits >> 31) & INT32_MAX) : set1_int(INT32_MIN + 1);
        store_int(s, live ? key : set1_int(INT32_MIN));
      }
    }
    if (p_.rule == Rule::threshold) return;
    for (int32_t r = 0; r < count; r += kLanes) {
      const int32_t some = count - r < kLanes ? count - r : kLanes;
      weighs ? keep<true>(r, some, limit) : keep<false>(r, some, limit);
    }
  }

  // Keeps columns in falling order of their keys, of equal ones the first, as long as together they weigh no more than
  // the limit. The key where they begin to weigh more is found bit by bit, or until some weigh just as much; here rows
  // are the lanes.
  template <bool kWeighs>
  void keep(int32_t first, int32_t count, const float* limits) {
    turn(at_.scores, first, count, at_.turned_keys);
    if (kWeighs) turn(at_.weights, first, count, at_.turned_weights);
    const float *keys = ws_ + at_.turned_keys, *weights = ws_ + at_.turned_weights;
    const vf limit = load(limits + first);
    vi last = set1_int(INT32_MIN), open = set1_int(-1);
    for (uint32_t bit = 1u << 31; bit != 0 && any(open); bit >>= 1) {
      const vi from = vi(vu(last) + bit);
      vf sum[4] = {};
      for (int64_t c = 0; c < seen_ * kLanes; c += 4 * kLanes)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int64_t at = c + i * kLanes;
          sum[i] += select(load_int(keys + at) >= from, kWeighs ? load(weights + at) : set1(1.0f), vf{});
        }
      const vf total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      const vi exact = kWeighs ? vi{} : open & (total == limit);
      last = (exact | (open & (total > limit))) ? from + exact : last;
      open &= ~exact;
    }
    for (int32_t r = first; r < first + count; ++r) {
      const int32_t of_row = last[r - first];
      vf sum{};
      vi some{};
      for (int64_t c = 0; c < p_.stride; c += kLanes) {
        const vi above = load_int(row(at_.scores, r) + c) > set1_int(of_row);
        store_int(row(at_.kept, r) + c, above);
        sum += select(above, kWeighs ? load(row(at_.weights, r) + c) : set1(1.0f), vf{});
        some |= above;
      }
      if (of_row != INT32_MIN) keep_equal<kWeighs>(r, of_row, limits[r], sum_of_lanes(sum), !any(some));
    }
  }

  // Rows become lanes of columns that some row has as a candidate.
  void turn(size_t from, int32_t first, int32_t count, size_t to) {
    for (int64_t c = 0; c < seen_; c += kLanes) {
      vf square[kLanes];
#pragma GCC unroll 16
      for (int32_t r = 0; r < kLanes; ++r) square[r] = load(row(from, first + (r < count ? r : 0)) + c);
      transpose_square(square);
#pragma GCC unroll 16
      for (int32_t i = 0; i < kLanes; ++i) store(ws_ + to + (c + i) * kLanes, square[i]);
    }
  }

  template <bool kWeighs>
  void keep_equal(int32_t r, int32_t key, float limit, float sum, bool none) {
    const float* keys = row(at_.scores, r);
    for (int64_t c = 0; c < p_.stride; c += kLanes)
      for (uint32_t equal = lane_bits(load_int(keys + c) == set1_int(key)); equal != 0; equal &= equal - 1) {
        const int64_t at = c + __builtin_ctz(equal);
        sum += kWeighs ? row(at_.weights, r)[at] : 1;
        if (sum > limit && !(none && p_.at_least_one)) return;
        none = false;
        store_bits(row(at_.kept, r) + at, -1);
      }
  }

  static void store_bits(float* to, int32_t bits) { __builtin_memcpy(to, &bits, 4); }

  void write(int32_t chooser, int32_t kv_head, int64_t first, int32_t count) const {
    const int64_t columns = p_.columns();
    uint8_t* to = p_.chosen + (int64_t{b_} * p_.choosers() + chooser) * columns * p_.rows() + first;
    const auto* flags = reinterpret_cast<const float*>(coherent_columns(kv_head));
    for (int32_t r = 0; r < count; r += kLanes)
      for (int64_t c = 0; c < columns; c += kLanes) {
        vf square[kLanes];
        for (int32_t i = 0; i < kLanes; ++i) {
          const int32_t at = r + i < count ? r + i : r;
          vi chosen = load_int(row(at_.kept, at) + c) | load_int(row(at_.forced, at) + c);
          if (p_.coherent) chosen |= ~load_int(flags + c);
          if (ws_[at_.kept_whole + static_cast<size_t>(at)] != 0) chosen = set1_int(-1);
          square[i] = as_float(chosen);
        }
        transpose_square(square);
        const auto some = static_cast<size_t>(count - r < kLanes ? count - r : kLanes);
        for (int64_t i = 0; i < kLanes && c + i < columns; ++i) {
          const auto bytes = __builtin_convertvector(as_int(square[i]) & 1, vb);
          __builtin_memcpy(to + (c + i) * p_.rows() + r, &bytes, some);
        }
      }
  }

  void clear(size_t at, int64_t n) { __builtin_memset(ws_ + at, 0, static_cast<size_t>(n) * sizeof(float)); }

  const Selection& p_;
  const int32_t b_;
  const SelectLayout at_;
  float* ws_;
  Rows rows_{};
  int64_t seen_ = 0;  // columns that some row has as a candidate, and those before them
};

inline constexpr SelectKernel kSelectKernel{
    Selector::bytes,
    [](const Selection& p, int32_t b, int32_t head, float* workspace) { Selector(p, b, workspace).center(head); },
    [](const Selection& p, int32_t b, int32_t head, int64_t first, int32_t count, float* workspace) {
      Selector(p, b, workspace).columns(head, first, count);
    },
    [](const Selection& p, int32_t b, int32_t head, int64_t first, int32_t count, float* workspace) {
      return Selector(p, b, workspace).rows(head, first, count);
    }};
