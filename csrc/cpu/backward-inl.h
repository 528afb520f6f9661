// The backward kernel, one task: a block of keys of one kv head, against the blocks of queries that see it.
//
// With p = exp(score - lse) and delta = sum_c do o - dlse, of each pair
//   dscore = p (do . v - delta),  ds = dscore * d score / d s,
//   dv += p do,  dk += scale ds q,  dq += scale ds k
// (FlashAttention-2, Dao 2023.) Here a tile has one row per query and one lane per key: the keys are transposed, once
// per task, and queries and cotangents are read as they lie in memory. dk and dv grow in the task's own memory; dq is
// added to in the order of key blocks, which the scheduler sees to.

class Backward {
 public:
  using Layout = BackwardLayout;

  Backward(const BackwardCall& c, const BackwardTask& t, float* workspace)
      : c_(c),
        p_(*c.problem),
        g_(*c.gradients),
        t_(t),
        seq_(p_.sequences[t.sequence]),
        at_(c),
        ws_(workspace),
        keys_(workspace + at_.places.next),
        tile_(c.code, p_, t.sequence, at_.tile, workspace, workspace + at_.s, kPerKey),
        philox_(p_.dropout, t.sequence),
        random_(ws_ + at_.random) {}

  void start() {
    clear(keys_ + at_.d_keys, static_cast<int64_t>(at_.bn) * at_.dk);
    clear(keys_ + at_.d_values, static_cast<int64_t>(at_.bn) * at_.dv);
  }

  // Before the first tile, if there is one. `gone`: where it is infinite a key and its value may hold anything, and
  // zeros stand for them.
  void begin(const float* gone = nullptr) {
    take_keys(gone);
    const Rows v = present(rows(p_.v, value_lines(), p_.v_head_dim, at_.dv, ws_ + at_.v), at_.dv, gone, ws_ + at_.v);
    const vf scale = set1(p_.scale);
    transpose(k_, p_.head_dim, keys_ + at_.kt, at_.bn, [=](vf x) { return x * scale; });
    transpose(v, p_.v_head_dim, keys_ + at_.vt, at_.bn, [](vf x) { return x; });
  }

  void visit(const BackwardTile& tile, const Tiles& tiles) {
    const Operands of_tile = operands(tile);
    if (at_once(tile, tiles, of_tile)) return;
    scores(tile, of_tile);
    slopes(tile, of_tile);
    modify(tile, tiles);
    if (guarded(tile)) return add_guarded_products(tile, tiles);
    add_products(tile, tiles, of_tile);
  }

  // Calls f with the parts of a partial tile that hold pairs, as tiles: a few rows each, and the keys these see.
  template <class F>
  void parts(const BackwardTile& tile, F f) {
    const int32_t lane = extent(tile).lane, lanes = extent(tile).lanes;
    for (int32_t m = 0; m < tile.queries.q_count; m += kPart) {
      BackwardTile part = tile;
      part.queries = tile.queries.part(m, tile.queries.q_count - m < kPart ? tile.queries.q_count - m : kPart);
      part.rows.lse += m;
      part.rows.delta += m;
      const Span keys = find_live(part, lane, lanes);
      if (keys.first >= keys.end) continue;
      part.first += keys.first;
      part.count = (keys.end < tile.count ? keys.end : tile.count) - keys.first;
      f(part);
    }
  }

  int32_t finish() {
    put(g_.dk, keys_ + at_.d_keys, at_.dk, p_.head_dim, p_.scale);
    put(g_.dv, keys_ + at_.d_values, at_.dv, p_.v_head_dim, p_.dropout.factor);
    return tile_.bad_load();
  }

 protected:
  // A tile's queries and cotangents, as its products take them.
  struct Operands {
    Rows q, d_o;
  };
  virtual Operands operands(const BackwardTile& tile) { return {queries(tile), cotangents(tile)}; }

  // Scores go to s; do . v, of which slopes are made, to dp.
  virtual void scores(const BackwardTile& tile, const Operands& of_tile) {
    const Extent of = extent(tile);
    float* s = ws_ + at_.s;
    in_stretches<FloatDot>(of_tile.q, of.rows, keys_ + at_.kt + of.lane, p_.head_dim, of.lanes, Put{s, of.lanes},
                           Add{s, of.lanes});
  }
  virtual void slopes(const BackwardTile& tile, const Operands& of_tile) {
    const Extent of = extent(tile);
    float* dp = ws_ + at_.dp;
    in_stretches<FloatDot>(of_tile.d_o, of.rows, keys_ + at_.vt + of.lane, p_.v_head_dim, of.lanes, Put{dp, of.lanes},
                           Add{dp, of.lanes});
  }

  // What the weights in s and the slopes in dp add.
  virtual void add_products(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile) {
    add_to_values(tile, ws_ + at_.s, of_tile.d_o);
    multiply(tile, tiles, of_tile.q, ws_ + at_.dp);
  }

  // Adds all that a tile does, if nothing but weights and slopes is made of its sums: where they are.
  virtual bool at_once(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile) {
    if (!exists(tile) || c_.has_score || thinned() || !in_one_stretch()) return false;
    float* s = ws_ + at_.s;
    const int32_t lanes = extent(tile).lanes;
    products(tile, tiles, of_tile, Weigh{s, lanes, tile.rows.lse}, Slope{s, lanes, tile.rows.delta}, [](float*) {});
    return true;
  }

  bool in_one_stretch() const { return p_.head_dim <= kChannels && p_.v_head_dim <= kChannels; }
  // s becomes weights, and slopes, to which `then` may add.
  void products(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile, const auto& weigh,
                const auto& slope, const auto& then) {
    const Extent of = extent(tile);
    const auto [qs, dos] = of_tile;
    float* s = ws_ + at_.s;
    rows_times(qs.data, qs.stride, of.rows, keys_ + at_.kt + of.lane, at_.bn, of.lanes, p_.head_dim, weigh);
    add_to_values(tile, s, dos);
    rows_times(dos.data, dos.stride, of.rows, keys_ + at_.vt + of.lane, at_.bn, of.lanes, p_.v_head_dim, slope);
    then(s);
    multiply(tile, tiles, qs, s);
  }

  // By the slopes: what they add to keys and queries.
  void multiply(const BackwardTile& tile, const Tiles& tiles, Rows qs, const float* ds) {
    const Extent of = extent(tile);
    columns_times(ds, of.lanes, tile.count, qs.data, qs.stride, at_.dk, of.rows, d_keys(of), at_.dk);
    add_to_queries(tile, tiles, [&](float* sum, int64_t stride) {
      rows_times(ds, of.lanes, of.rows, k_.data + of.lane * k_.stride, k_.stride, at_.dk, tile.count,
                 AddScaled{sum, stride, p_.scale});
    });
  }

  // Which pairs of a part exist, a bit for each; and from the first to the last key that one of its rows sees, in whole
  // vectors of the lanes given.
  Span find_live(const BackwardTile& tile, int32_t lane, int32_t lanes) {
    Span keys{lanes, 0};
    tile_.queries(tile.queries);
    tile_.narrow(lane, lanes);
    for (int32_t strip = 0; strip < tile.queries.q_count; strip += kStrip) {
      const int32_t left = tile.queries.q_count - strip, rows = left < kStrip ? left : kStrip;
      tile_.run_strip(strip, rows, false, true);
      tile_.check_loads(strip, rows, tile.count, false);
      const Operand mask = tile_.operand(c_.code.mask, kTile, strip);
      with(mask.vec, [&](auto vec) {
        for (int32_t r = 0; r < rows; ++r) {
          const Row<vec.value> row(mask, r);
          for (int32_t j = 0; j < lanes; j += kLanes) {
            const auto bits = static_cast<int32_t>(lane_bits(as_int(row.at(j))));
            __builtin_memcpy(live_bits(strip + r, lane + j), &bits, 4);
            if (bits == 0) continue;
            if (j < keys.first) keys.first = j;
            if (j + kLanes > keys.end) keys.end = j + kLanes;
          }
        }
      });
    }
    return keys;
  }

  float* live_bits(int32_t row, int32_t lane) const {
    return ws_ + at_.live + static_cast<int64_t>(row) * (at_.bn / kLanes) + lane / kLanes;
  }

  // Where a tile lies among the task's keys.
  struct Extent {
    int32_t rows, lane, lanes;
  };
  Extent extent(const BackwardTile& tile) const {
    return {tile.queries.q_count, static_cast<int32_t>(tile.first - t_.first), round_up(tile.count, kLanes)};
  }
  bool exists(const BackwardTile& tile) const { return tile.full && !tile.rows.dead; }
  // 0 * NaN is NaN: what a pair that does not exist would read may not be multiplied at all, not even by zero.
  bool guarded(const BackwardTile& tile) const { return !exists(tile) && !(finite_ && tile.rows.finite); }
  float* d_keys(const Extent& of) const { return keys_ + at_.d_keys + static_cast<int64_t>(of.lane) * at_.dk; }
  float* d_values(const Extent& of) const { return keys_ + at_.d_values + static_cast<int64_t>(of.lane) * at_.dv; }

  // Tokens as they lie in memory; of what is listed a copy of the tile's.
  Lines query_lines(const View& view, const BackwardTile& tile, int32_t width, size_t listed) const {
    const Task& t = tile.queries;
    const int32_t* list = p_.groups != nullptr ? p_.groups[t.sequence].queries + t.q_first : t.listed;
    if (list != nullptr)
      return listed_lines(view, p_.dtype, seq_.batch, t.head, seq_.q_start, list, t.q_count, width, ws_ + listed);
    return lines_of(view, {}, p_.dtype, seq_.batch, t.head, seq_.q_start + t.q_first, t.q_count, width);
  }
  Lines key_lines(const View& view, int32_t width, size_t listed) const {
    if (p_.groups != nullptr)
      return listed_lines(view, p_.dtype, seq_.batch, t_.kv_head, seq_.kv_start, p_.groups[t_.sequence].keys + t_.first,
                          t_.count, width, ws_ + listed);
    return lines_of(view, {}, p_.dtype, seq_.batch, t_.kv_head, seq_.kv_start + t_.first, t_.count, width);
  }
  Lines query_lines(const BackwardTile& tile) const { return query_lines(p_.q, tile, p_.head_dim, at_.listed_q); }
  Lines cotangent_lines(const BackwardTile& tile) const {
    return query_lines(g_.d_o, tile, p_.v_head_dim, at_.listed_do);
  }
  Lines key_lines() const { return key_lines(p_.k, p_.head_dim, at_.listed_k); }
  Lines value_lines() const { return key_lines(p_.v, p_.v_head_dim, at_.listed_v); }

  // As float32, `padded` channels wide.
  Rows rows(const View& view, const Lines& lines, int32_t width, int32_t padded, float* to) const {
    return rows_of(lines, p_.dtype, view.stride[3], width, padded, to, true);
  }
  Rows queries(const BackwardTile& tile) const {
    return rows(p_.q, query_lines(tile), p_.head_dim, at_.dk, ws_ + at_.q);
  }
  Rows cotangents(const BackwardTile& tile) const {
    return rows(g_.d_o, cotangent_lines(tile), p_.v_head_dim, at_.dv, ws_ + at_.d_o);
  }

  static void clear(float* at, int64_t n) { __builtin_memset(at, 0, static_cast<size_t>(n) * sizeof(float)); }

  // The task's keys or values, with zeros for those that are gone.
  Rows present(Rows from, int32_t units, const float* gone, float* to) const {
    bool all = true;
    for (int32_t n = 0; gone != nullptr && n < t_.count; ++n) all = all && gone[n] != kInfinity;
    if (all) return from;
    for (int32_t n = 0; n < t_.count; ++n)
      if (gone[n] == kInfinity) {
        clear(to + n * units, units);
      } else if (from.data != to) {
        __builtin_memcpy(to + n * units, from.data + n * from.stride, static_cast<size_t>(units) * sizeof(float));
      }
    return {to, units};
  }

  void take_keys(const float* gone) {
    k_ = present(rows(p_.k, key_lines(), p_.head_dim, at_.dk, keys_ + at_.k), at_.dk, gone, keys_ + at_.k);
    finite_ = is_finite(k_, t_.count, at_.dk);
    tile_.begin();
    tile_.keys(t_.first, t_.count);
  }

  // [unit][key]; lanes beyond the last key are zero.
  template <class F>
  void transpose(Rows from, int32_t width, float* to, int64_t ld, F f) {
    for (int32_t n = 0; n < t_.count; n += kLanes)
      for (int32_t d = 0; d < width; d += kLanes) {
        vf square[kLanes];
#pragma GCC unroll 16
        for (int32_t r = 0; r < kLanes; ++r)
          square[r] = n + r < t_.count ? f(load(from.data + (n + r) * from.stride + d)) : vf{};
        transpose_square(square);
#pragma GCC unroll 16
        for (int32_t r = 0; r < kLanes; ++r)
          if (d + r < width) store(to + (d + r) * ld + n, square[r]);
      }
  }

  void add_to_values(const BackwardTile& tile, const float* p, Rows dos) {
    const Extent of = extent(tile);
    columns_times(p, of.lanes, tile.count, dos.data, dos.stride, at_.dv, of.rows, d_values(of), at_.dv);
  }

  // `add(sum, stride)` adds to rows of whole vectors.
  template <class F>
  void add_to_queries(const BackwardTile& tile, const Tiles& tiles, F add) {
    tiles.wait(tiles.state, tile);
    const View& view = g_.dq;
    const auto row = [&](int32_t m) {
      return row_of<float*>(view, seq_.batch, tile.queries.head, p_.result_at(t_.sequence, tile.queries.query(m)));
    };
    const bool adjacent = (p_.groups == nullptr && tile.queries.listed == nullptr) || p_.q_rows;
    if (adjacent && view.stride[3] == 1 && at_.dk == p_.head_dim) return add(row(0), view.stride[2]);
    const int32_t rows = tile.queries.q_count;
    float* sum = ws_ + at_.dq;
    clear(sum, static_cast<int64_t>(rows) * at_.dk);
    add(sum, at_.dk);
    for (int32_t m = 0; m < rows; ++m) {
      float* dq = row(m);
      if (view.stride[3] == 1)
        for (int32_t d = 0; d < p_.head_dim; ++d) dq[d] += sum[m * at_.dk + d];
      else
        for (int32_t d = 0; d < p_.head_dim; ++d) dq[d * view.stride[3]] += sum[m * at_.dk + d];
    }
  }

  // As the forward sums scores.
  template <class Dot>
  void in_stretches(Rows a, int32_t rows, const float* b, int32_t units, int32_t lanes, const auto& first,
                    const auto& rest) {
    for (int32_t d = 0; d < units; d += kChannels) {
      const int32_t depth = units - d < kChannels ? units - d : kChannels;
      const float* part = b + static_cast<int64_t>(d) * at_.bn;
      if (d == 0) {
        rows_times<Dot>(a.data, a.stride, rows, part, at_.bn, lanes, depth, first);
      } else {
        rows_times<Dot>(a.data + d, a.stride, rows, part, at_.bn, lanes, depth, rest);
      }
    }
  }

  // s becomes p, and do . v becomes ds.
  void modify(const BackwardTile& tile, const Tiles& tiles) {
    const auto [rows, lane, lanes] = extent(tile);
    if (c_.has_score || !tile.full) {
      tile_.queries(tile.queries);
      tile_.narrow(lane, lanes);
    }
    if (c_.code.num_loads > 0) tiles.order(tiles.state, tile);
    if (thinned())
      for (int32_t n = 0; n < tile.count; ++n) random_.put(n, philox_.key(tile.first + n));
    for (int32_t strip = 0; strip < rows; strip += kStrip) {
      const Shape shape{rows - strip < kStrip ? rows - strip : kStrip, lanes};
      if (c_.has_score || !tile.full) {
        tile_.run_strip(strip, shape.rows, c_.has_score, !tile.full);
        tile_.check_loads(strip, shape.rows, tile.count, tile.full);
      }
      if (thinned()) draw(tile, strip, shape);
      weigh(tile, strip, shape);
      if (thinned()) drop(strip, shape);
      for (int32_t i = 0; i < c_.code.num_loads; ++i) collect(i, strip, shape, tile.count);
      follow(strip, shape);
    }
  }

  // ---- dropout: o has only the kept weights, times a factor; what they were divided by is the sum of all ----

  bool thinned() const { return p_.dropout.threshold != 0; }

  // Which pairs of a strip are kept; of do . v what is left.
  __attribute__((noinline)) void draw(const BackwardTile& tile, int32_t strip, Shape shape) {
    float *kept = ws_ + at_.kept, *dp = ws_ + at_.dp + static_cast<int64_t>(strip) * shape.lanes;
    const vf factor = set1(p_.dropout.factor);
    const auto query = [&](int32_t r) { return philox_.query(tile.queries.head, tile.queries.query(strip + r)); };
    philox_.each(random_, {0, shape.lanes}, {0, shape.rows}, query, [&](int32_t r, int32_t j, vi k) {
      const int64_t i = static_cast<int64_t>(r) * shape.lanes + j;
      store_int(kept + i, k);
      store(dp + i, select(k, load(dp + i) * factor, vf{}));
    });
  }

  // The weights, for dv, which is multiplied by the factor at the end.
  void drop(int32_t strip, Shape shape) {
    float* s = ws_ + at_.s + static_cast<int64_t>(strip) * shape.lanes;
    map2(s, shape, {s, shape.lanes, true}, {ws_ + at_.kept, shape.lanes, true},
         [](vf w, vf kept) { return select(as_int(kept), w, vf{}); });
  }

  // Adds d score / d load, times dscore, to the gradient of what was loaded.
  void collect(int32_t which, int32_t strip, Shape shape, int32_t count) {
    const LoadSlope& of = c_.code.loads[which];
    const Instruction& in = c_.code.code[of.load];
    float* e = ws_ + at_.e;
    map2(e, shape, {ws_ + at_.dp + static_cast<int64_t>(strip) * shape.lanes, shape.lanes, true},
         tile_.operand(of.slope, kTile, strip), [](vf d, vf slope) { return select(d == vf{}, vf{}, d * slope); });
    Operand index[kMaxArgs];
    for (int a = 0; a < in.nargs; ++a) index[a] = tile_.operand(in.args[a], kTile, strip);
    LoadSums sums(t_.targets[which], p_.buffers[in.attr], c_.code.load_in_bounds[of.load] != 0);
    sums.add(index, e, shape, count);
    sums.flush();
  }

  // s becomes p, and do . v becomes dscore.
  void weigh(const BackwardTile& tile, int32_t strip, Shape shape) {
    const int64_t at = static_cast<int64_t>(strip) * shape.lanes;
    float *s = ws_ + at_.s + at, *dp = ws_ + at_.dp + at;
    const Operand score =
        c_.code.score < 0 ? Operand{s, shape.lanes, true} : tile_.operand(c_.code.score, kTile, strip);
    const float *lse = tile.rows.lse + strip, *delta = tile.rows.delta + strip;
    const auto weights = [&](const auto& alive) {
      with(score.vec, [&](auto vec) {
        with(c_.code.unnormalized, [&](auto unnormalized) {
          for (int32_t r = 0; r < shape.rows; ++r) {
            const Row<vec.value> x(score, r);
            const auto exists = alive(r);
            for (int32_t j = 0; j < shape.lanes; j += kLanes) {
              const int64_t i = static_cast<int64_t>(r) * shape.lanes + j;
              const vf d = load(dp + i);
              if constexpr (unnormalized.value) {
                const vi gone = x.at(j) == set1(-kInfinity);
                store(s + i, exists(select(gone, vf{}, x.at(j)), j));
                store(dp + i, exists(select(gone, vf{}, d), j));
              } else {
                const vf w = exp_weight(x.at(j) - set1(lse[r]));
                store(s + i, exists(w, j));
                store(dp + i, exists(w * (d - set1(delta[r])), j));
              }
            }
          }
        });
      });
    };
    if (tile.full) {
      weights([](int32_t) { return [](vf x, int32_t) { return x; }; });
    } else {
      const Operand mask = tile_.operand(c_.code.mask, kTile, strip);
      with(mask.vec, [&](auto vec) {
        weights([&](int32_t r) {
          return [m = Row<vec.value>(mask, r)](vf x, int32_t j) { return select(as_int(m.at(j)), x, vf{}); };
        });
      });
    }
    if (tile.rows.dead)
      for (int32_t r = 0; r < shape.rows; ++r)
        if (lse[r] == kInfinity)
          for (float* row : {s, dp})
            for (int32_t j = 0; j < shape.lanes; ++j) row[static_cast<int64_t>(r) * shape.lanes + j] = 0;
  }

  // dscore becomes ds. A pair without weight has none, whatever the slope is there.
  void follow(int32_t strip, Shape shape) {
    if (c_.code.slope < 0) return;
    float* dp = ws_ + at_.dp + static_cast<int64_t>(strip) * shape.lanes;
    map2(dp, shape, {dp, shape.lanes, true}, tile_.operand(c_.code.slope, kTile, strip),
         [](vf d, vf slope) { return select(d == vf{}, vf{}, d * slope); });
  }

  void put(const View& view, const float* from, int32_t padded, int32_t width, float factor) const {
    with_elements(p_.key_result_dtype(), [&](auto* type) {
      for (int32_t n = 0; n < t_.count; ++n) {
        const int64_t token = p_.key_result_at(t_.sequence, t_.first + n);
        narrow_row(row_of<decltype(type)>(view, seq_.batch, t_.kv_head, token), view.stride[3],
                   from + static_cast<size_t>(n * padded), width, factor);
      }
    });
  }

  // ---- values that not every pair may see ----

  // The same sums in the same order as the products, but a pair that does not exist is skipped:
  // C[i] += factor sum_j A[i][j] B[j] with A[i][j] at a[i * i_step + j * j_step].
  void add_guarded(const float* a, int64_t i_step, int64_t j_step, int32_t count_i, int32_t count_j, Rows b,
                   int32_t width, float factor, float* c, int64_t c_stride) {
    const float* alive = ws_ + at_.alive;
    for (int32_t i = 0; i < count_i; ++i)
      for (int32_t d = 0; d < width; d += kLanes) {
        vf acc{};
        for (int32_t j = 0; j < count_j; ++j)
          if (alive[i * i_step + j * j_step] != 0)
            acc = fma(set1(a[i * i_step + j * j_step]), load(b.data + j * b.stride + d), acc);
        float* x = c + i * c_stride + d;
        store(x, fma(acc, set1(factor), load(x)));
      }
  }

  void add_guarded_products(const BackwardTile& tile, const Tiles& tiles) {
    const Extent of = extent(tile);
    const Rows qs = queries(tile), dos = cotangents(tile);
    const float *s = ws_ + at_.s, *ds = ws_ + at_.dp;
    find_alive(tile, of.rows, of.lanes);
    add_guarded(s, 1, of.lanes, tile.count, of.rows, dos, at_.dv, 1, d_values(of), at_.dv);
    add_guarded(ds, 1, of.lanes, tile.count, of.rows, qs, at_.dk, 1, d_keys(of), at_.dk);
    add_to_queries(tile, tiles, [&](float* sum, int64_t stride) {
      const Rows k{k_.data + of.lane * k_.stride, k_.stride};
      add_guarded(ds, of.lanes, 1, of.rows, tile.count, k, at_.dk, p_.scale, sum, stride);
    });
  }

  void find_alive(const BackwardTile& tile, int32_t rows, int32_t lanes) {
    for (int32_t strip = 0; strip < rows; strip += kStrip) {
      const int32_t count = rows - strip < kStrip ? rows - strip : kStrip;
      if (!tile.full) tile_.run_strip(strip, count, false, true);
      for (int32_t r = 0; r < count; ++r)
        for (int32_t n = 0; n < tile.count; ++n)
          ws_[at_.alive + static_cast<size_t>((strip + r) * lanes + n)] =
              tile.rows.lse[strip + r] != kInfinity && (tile.full || tile_.live(strip, r, n)) ? 1 : 0;
    }
  }

  const BackwardCall& c_;
  const Problem& p_;
  const Gradients& g_;
  const BackwardTask& t_;
  const Sequence& seq_;
  const BackwardLayout at_;
  float* const ws_;
  float* keys_;  // memory of_keys
  Tile tile_;
  const Philox philox_;
  const SplitWords<KeyWords> random_;
  Rows k_{};
  bool finite_ = true;
};

template <class Kind>
int32_t backward_as(const BackwardCall& c, const BackwardTask& t, const Tiles& tiles, float* workspace) {
  Kind task(c, t, workspace);
  task.start();
  BackwardTile tile;
  for (bool begun = false; tiles.next(tiles.state, &tile); begun = true) {
    if (!begun) task.begin();
    if (tile.full) {
      task.visit(tile, tiles);
    } else {
      task.parts(tile, [&](const BackwardTile& part) { task.visit(part, tiles); });
      tiles.order(tiles.state, tile);  // there may be no part, and turns are taken in order
      tiles.wait(tiles.state, tile);
    }
    tiles.done(tiles.state, tile);
  }
  return task.finish();
}

int32_t backward(const BackwardCall& c, const BackwardTask& t, const Tiles& tiles, float* workspace) {
  return backward_as<Backward>(c, t, tiles, workspace);
}

size_t backward_bytes(const BackwardCall& c) { return BackwardLayout(c).bytes(); }
