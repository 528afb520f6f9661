// The forward kernel, one task: up to kMaxTileQ queries of one head against the keys they may see.
//
// Scores are held key-major: a tile has one row per key and one lane per query. K and V are then read as they lie in
// memory, the softmax statistics are vertical vectors, and no horizontal reduction is ever needed; only the queries are
// transposed, once per task. (FlashAttention's online softmax: Milakov & Gimelshein 2018, Dao 2022.)

inline int32_t round_up(int32_t n, int32_t to) { return (n + to - 1) / to * to; }

// Where things lie in a thread's workspace, in floats; every part starts on a cache line.
struct Layout {
  int32_t bm, dv;  // query lanes, value channels rounded up to whole vectors
  size_t qt, s, o, guarded, max, sum, alpha, k, v, scalars, per_query, per_key, strips, bad_scalar, bad_query, bad_key,
      bad_strip, total;

  Layout(const Call& c, int32_t lanes) {
    const Problem& p = *c.problem;
    bm = round_up(lanes, kLanes);
    dv = round_up(p.v_head_dim, kLanes);
    size_t next = 0;
    const auto take = [&](int64_t rows, int64_t columns) {
      const size_t at = next;
      next += (static_cast<size_t>(rows * columns) + 15) / 16 * 16;
      return at;
    };
    qt = take(p.head_dim, bm);
    s = take(c.tile_kv + kMaxKeyRows, bm);
    o = take(bm, dv);
    guarded = take(bm, dv);
    max = take(1, bm);
    sum = take(1, bm);
    alpha = take(1, bm);
    k = take(c.tile_kv, p.head_dim);
    v = take(c.tile_kv, dv);
    scalars = take(c.code.slots[kScalar], 16);
    per_query = take(c.code.slots[kPerQuery], kMaxTileQ);
    per_key = take(c.code.slots[kPerKey], kMaxTileKv);
    strips = take(c.code.slots[kTile], kStrip * bm);
    bad_scalar = take(1, 16);
    bad_query = take(1, kMaxTileQ);
    bad_key = take(1, kMaxTileKv);
    bad_strip = take(kStrip, bm);
    total = next;
  }
};

class Forward {
 public:
  Forward(const Call& c, const Task& t, float* workspace)
      : c_(c), p_(*c.problem), t_(t), seq_(p_.sequences[t.sequence]), at_(c, t.lanes()), ws_(workspace) {
    kv_head_ = t.head / (p_.num_heads / p_.num_kv_heads);
  }

  // `any_keys`: false where nothing is visible; then no index of the sequence was proven, and none may be used.
  void begin(bool any_keys) {
    pack_queries();
    for (int32_t m = 0; m < at_.bm; ++m) {
      ws_[at_.max + m] = -kInfinity;
      ws_[at_.sum + m] = 0;
    }
    float* o = ws_ + at_.o;
    for (int64_t i = 0; i < static_cast<int64_t>(at_.bm) * at_.dv; ++i) o[i] = 0;
    if (!any_keys || (!c_.has_score && !c_.has_mask)) return;
    clear(at_.bad_scalar, 16);
    clear(at_.bad_query, kMaxTileQ);
    run_section(kScalar);
    run_section(kPerQuery);
  }

  void keys(int64_t first, int32_t count, bool full) {
    int64_t k_stride, v_stride;
    const float* k = rows(p_.k, first, count, p_.head_dim, p_.head_dim, at_.k, k_stride);
    const float* v = rows(p_.v, first, count, p_.v_head_dim, at_.dv, at_.v, v_stride);

    qk(ws_ + at_.qt, at_.bm, k, k_stride, count, p_.head_dim, ws_ + at_.s);
    if (c_.has_score || !full) modify(first, count, full);
    softmax(count);
    // 0 * NaN is NaN: a value that some query must not see may not be multiplied at all, not even by a weight of zero.
    if (!full && has_nonfinite(v, v_stride, count)) {
      pv_guarded(v, v_stride, first, count);
    } else {
      pv(ws_ + at_.s, at_.bm, v, v_stride, count, ws_ + at_.alpha, ws_ + at_.o, at_.dv, t_.lanes());
    }
  }

  int32_t finish() {
    for (int32_t m = 0; m < t_.lanes(); ++m) {
      const int64_t head = head_of(m), token = token_of(m);
      float max = ws_[at_.max + m], sum = ws_[at_.sum + m], rescale = 1;
      if (p_.sink != nullptr) add_sink(p_.sink[head], max, sum, rescale);
      const bool dead = sum == 0;
      const float norm = dead ? 0 : rescale / sum;
      float* o = ws_ + at_.o + static_cast<int64_t>(m) * at_.dv;
      if (dead) clear(at_.o + static_cast<size_t>(m) * static_cast<size_t>(at_.dv), at_.dv);
      with_elements(p_.dtype, [&](auto* type) {
        narrow_row(row<decltype(type)>(p_.o, head, token), p_.o.stride[3], o, p_.v_head_dim, norm);
      });
      if (p_.lse != nullptr) {
        const double lse = static_cast<double>(max) + __builtin_log(static_cast<double>(sum));
        p_.lse[seq_.batch * p_.lse_stride[0] + head * p_.lse_stride[1] + token * p_.lse_stride[2]] =
            dead ? -kInfinity : static_cast<float>(lse);
      }
    }
    return bad_load_;
  }

 private:
  int32_t head_of(int32_t lane) const { return t_.head + lane / t_.q_count; }
  int64_t token_of(int32_t lane) const { return seq_.q_start + t_.q_first + lane % t_.q_count; }

  template <class P>  // a pointer to the elements
  P row(const View& view, int64_t head, int64_t token) const {
    return reinterpret_cast<P>(view.data) + seq_.batch * view.stride[0] + head * view.stride[1] +
           token * view.stride[2];
  }

  // Keys or values as float32, `padded` channels wide: where they lie, if they lie so, else in the workspace.
  const float* rows(const View& view, int64_t first, int32_t count, int32_t width, int32_t padded, size_t at,
                    int64_t& stride) {
    const int64_t token = seq_.kv_start + first;
    stride = view.stride[2];
    if (p_.dtype == DType::f32 && view.stride[3] == 1 && width == padded) return row<float*>(view, kv_head_, token);
    with_elements(p_.dtype, [&](auto* type) {
      widen_rows(row<decltype(type)>(view, kv_head_, token), stride, view.stride[3], count, width, padded, ws_ + at);
    });
    stride = padded;
    return ws_ + at;
  }

  void clear(size_t at, int64_t n) { __builtin_memset(ws_ + at, 0, static_cast<size_t>(n) * sizeof(float)); }

  // Q^T, scaled; lanes beyond the last query are zero.
  void pack_queries() {
    with_elements(p_.dtype, [&](auto* type) {
      decltype(type) q[kMaxTileQ];
      for (int32_t m = 0; m < t_.lanes(); ++m) q[m] = row<decltype(type)>(p_.q, head_of(m), token_of(m));
      for (int32_t d = 0; d < p_.head_dim; ++d) {
        float* qt = ws_ + at_.qt + static_cast<int64_t>(d) * at_.bm;
        for (int32_t m = 0; m < t_.lanes(); ++m) qt[m] = widen_one(q[m][d * p_.q.stride[3]]) * p_.scale;
        for (int32_t m = t_.lanes(); m < at_.bm; ++m) qt[m] = 0;
      }
    });
  }

  // ---- the user's score and mask ----

  float* value(const Instruction& in) {
    switch (in.rank) {
      case kScalar: return ws_ + at_.scalars + static_cast<size_t>(in.slot) * 16;
      case kPerQuery: return ws_ + at_.per_query + static_cast<size_t>(in.slot) * kMaxTileQ;
      case kPerKey: return ws_ + at_.per_key + static_cast<size_t>(in.slot) * kMaxTileKv;
      default: return ws_ + at_.strips + static_cast<size_t>(in.slot) * static_cast<size_t>(kStrip * at_.bm);
    }
  }

  // How a value is read where a result of rank `rank` is computed, from key `strip` of the tile on.
  Operand operand(int32_t number, Rank rank, int32_t strip) {
    const Instruction& in = c_.code.code[number];
    if (in.op == Op::var_s) return {ws_ + at_.s + static_cast<int64_t>(strip) * at_.bm, at_.bm, true};
    const float* p = value(in);
    if (in.rank == kTile) return {p, at_.bm, true};
    if (in.rank == kScalar) return {p, 0, false};
    if (in.rank == kPerQuery) return {p, 0, true};
    return rank == kPerKey ? Operand{p, 0, true} : Operand{p + strip, 1, false};
  }

  void fill(float* dst, int32_t bits) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(dst + i, &bits, 4);
  }

  void execute(int32_t number, Shape shape, int32_t strip) {
    const Instruction& in = c_.code.code[number];
    float* dst = in.op == Op::var_s ? nullptr : value(in);
    Operand a[kMaxArgs];
    for (int i = 0; i < in.nargs; ++i) a[i] = operand(in.args[i], in.rank, strip);
    switch (in.op) {
      case Op::const_f:
      case Op::const_i: return fill(dst, in.attr);
      case Op::const_b: return fill(dst, in.attr != 0 ? ~0 : 0);
      case Op::param: return fill(dst, __builtin_bit_cast(int32_t, p_.params[in.attr]));
      case Op::var_b: return fill(dst, t_.sequence);
      case Op::var_q_len: return fill(dst, static_cast<int32_t>(seq_.q_len));
      case Op::var_kv_len: return fill(dst, static_cast<int32_t>(seq_.kv_len));
      case Op::var_s: return;
      // Lanes past the end repeat the last one, so that every lane stays inside what the analysis has proven.
      case Op::var_h: return fill_lanes(dst, shape.lanes, t_.lanes(), [&](int32_t m) { return head_of(m); });
      case Op::var_q_idx:
        return fill_lanes(dst, shape.lanes, t_.lanes(), [&](int32_t m) { return t_.q_first + m % t_.q_count; });
      case Op::var_kv_idx: return fill_lanes(dst, shape.lanes, tile_count_, [&](int32_t n) { return tile_first_ + n; });
      case Op::load_f:
      case Op::load_i:
      case Op::load_b: {
        float* bad = nullptr;
        if (!c_.code.load_in_bounds[number]) {
          bad_candidate_ = number;
          const size_t mark[4] = {at_.bad_scalar, at_.bad_query, at_.bad_key, at_.bad_strip};
          bad = ws_ + mark[in.rank];
        }
        return load_buffer(dst, shape, p_.buffers[in.attr], a, bad);
      }
      default: return compute(in.op, dst, shape, a);
    }
  }

  template <class F>
  void fill_lanes(float* dst, int32_t lanes, int32_t count, F index) {
    for (int32_t i = 0; i < lanes; ++i) {
      const int32_t value = static_cast<int32_t>(index(i < count ? i : count - 1));
      __builtin_memcpy(dst + i, &value, 4);
    }
  }

  void run_section(Rank rank) {
    Shape shape{1, rank == kScalar ? 16 : rank == kPerQuery ? at_.bm : round_up(tile_count_, kLanes)};
    for (int32_t i = 0; i < c_.code.order_size[rank]; ++i) execute(c_.code.order[rank][i], shape, 0);
  }

  void run_strip(int32_t strip, int32_t rows, bool score, bool mask) {
    for (int32_t i = 0; i < c_.code.order_size[kTile]; ++i) {
      const int32_t number = c_.code.order[kTile][i];
      const Instruction& in = c_.code.code[number];
      if ((score && in.for_score) || (mask && in.for_mask)) execute(number, {rows, at_.bm}, strip);
    }
  }

  void modify(int64_t first, int32_t count, bool full) {
    tile_first_ = first;
    tile_count_ = count;
    const bool checked = !c_.code.all_loads_in_bounds;
    if (checked) clear(at_.bad_key, kMaxTileKv);
    run_section(kPerKey);
    static constexpr float minus_infinity = -kInfinity;
    for (int32_t strip = 0; strip < count; strip += kStrip) {
      const Shape shape{count - strip < kStrip ? count - strip : kStrip, at_.bm};
      float* s = ws_ + at_.s + static_cast<int64_t>(strip) * at_.bm;
      if (checked) clear(at_.bad_strip, static_cast<int64_t>(kStrip) * at_.bm);
      run_strip(strip, shape.rows, c_.has_score, !full);
      if (c_.has_score) map1(s, shape, operand(c_.code.score, kTile, strip), [](vf x) { return x; });
      if (checked) check_loads(strip, shape.rows, full);
      if (!full)
        select_rows(s, shape, operand(c_.code.mask, kTile, strip), {s, at_.bm, true}, {&minus_infinity, 0, false});
    }
  }

  // A clamped load matters only where a pair exists.
  void check_loads(int32_t strip, int32_t rows, bool full) {
    for (int32_t r = 0; r < rows; ++r)
      for (int32_t m = 0; m < t_.lanes(); ++m)
        if ((full || live(strip, r, m)) &&
            (bits(at_.bad_scalar) | bits(at_.bad_strip + static_cast<size_t>(r * at_.bm + m)) |
             bits(at_.bad_query + static_cast<size_t>(m)) | bits(at_.bad_key + static_cast<size_t>(strip + r))) != 0)
          bad_load_ = bad_candidate_;
  }

  int32_t bits(size_t at) const { return int_at(ws_ + at); }

  bool live(int32_t strip, int32_t r, int32_t m) {
    const Operand o = operand(c_.code.mask, kTile, strip);
    return int_at(o.p + static_cast<int64_t>(r) * o.step + (o.vec ? m : 0)) != 0;
  }

  // ---- softmax ----

  // Weights are summed in turns: many equal small ones added to a large one would all be rounded the same way. Keys
  // start at multiples of kStrip, so the turns do not depend on what was trimmed.
  static constexpr int kSums = 4;

  template <int kVecs>
  void softmax_lanes(int32_t lane, int32_t count) {
    float* s = ws_ + at_.s + lane;
    vf largest[kVecs], pivot[kVecs], sum[kSums][kVecs] = {};
    for (int v = 0; v < kVecs; ++v) largest[v] = set1(-kInfinity);
    for (int32_t n = 0; n < count; ++n)
      for (int v = 0; v < kVecs; ++v) largest[v] = max_or_second(load(s + n * at_.bm + v * kLanes), largest[v]);
    for (int v = 0; v < kVecs; ++v) {
      float* max = ws_ + at_.max + lane + v * kLanes;
      const vf old_max = load(max), new_max = max_or_second(largest[v], old_max);
      // Nothing seen so far: any finite pivot keeps (-inf) - (-inf) from being computed.
      pivot[v] = new_max == set1(-kInfinity) ? vf{} : new_max;
      store(max, new_max);
      store(ws_ + at_.alpha + lane + v * kLanes, exp_weight(old_max - pivot[v]));
    }
    const auto weigh = [&](int32_t n, int u) {
      for (int v = 0; v < kVecs; ++v) {
        float* x = s + n * at_.bm + v * kLanes;
        const vf w = exp_weight(load(x) - pivot[v]);
        sum[u][v] += w;
        store(x, w);
      }
    };
    int32_t n = 0;
    for (; n + kSums <= count; n += kSums)
#pragma GCC unroll 4
      for (int u = 0; u < kSums; ++u) weigh(n + u, u);
#pragma GCC unroll 4
    for (int u = 0; u < kSums; ++u)
      if (n + u < count) weigh(n + u, u);
    for (int v = 0; v < kVecs; ++v) {
      float* total = ws_ + at_.sum + lane + v * kLanes;
      store(total, fma(load(total), load(ws_ + at_.alpha + lane + v * kLanes),
                       (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v])));
    }
  }

  void softmax(int32_t count) {
    int32_t lane = 0;
    for (; lane + kSoftmaxVecs * kLanes <= at_.bm; lane += kSoftmaxVecs * kLanes)
      softmax_lanes<kSoftmaxVecs>(lane, count);
    for (; lane < at_.bm; lane += kLanes) softmax_lanes<1>(lane, count);
  }

  // The sink is one more logit in the denominator, without a value.
  static void add_sink(float sink, float& max, float& sum, float& rescale) {
    const float top = max > sink ? max : sink;
    if (top == -kInfinity) return;
    rescale = __builtin_expf(max - top);
    sum = sum * rescale + __builtin_expf(sink - top);
    max = top;
  }

  // ---- values that not every query may see ----

  bool has_nonfinite(const float* v, int64_t stride, int32_t count) const {
    vf zero{};  // x * 0 is NaN for infinities and NaN, and NaN stays
    for (int32_t n = 0; n < count; ++n)
      for (int32_t d = 0; d < at_.dv; d += kLanes) zero = fma(load(v + n * stride + d), vf{}, zero);
    return any(zero != vf{});
  }

  // The same sums in the same order as pv, but a pair that does not exist is skipped.
  void pv_guarded(const float* v, int64_t stride, int64_t first, int32_t count) {
    tile_first_ = first;
    tile_count_ = count;
    float *o = ws_ + at_.o, *acc = ws_ + at_.guarded;
    clear(at_.guarded, static_cast<int64_t>(at_.bm) * at_.dv);
    for (int32_t strip = 0; strip < count; strip += kStrip) {
      const int32_t rows = count - strip < kStrip ? count - strip : kStrip;
      run_strip(strip, rows, false, true);
      for (int32_t m = 0; m < t_.lanes(); ++m)
        for (int32_t r = 0; r < rows; ++r) {
          if (!live(strip, r, m)) continue;
          const vf w = set1(ws_[at_.s + static_cast<size_t>((strip + r) * at_.bm + m)]);
          for (int32_t d = 0; d < at_.dv; d += kLanes) {
            float* x = acc + static_cast<int64_t>(m) * at_.dv + d;
            store(x, fma(w, load(v + (strip + r) * stride + d), load(x)));
          }
        }
    }
    for (int32_t m = 0; m < t_.lanes(); ++m)
      for (int32_t d = 0; d < at_.dv; d += kLanes) {
        const int64_t i = static_cast<int64_t>(m) * at_.dv + d;
        store(o + i, fma(load(o + i), set1(ws_[at_.alpha + m]), load(acc + i)));
      }
  }

  const Call& c_;
  const Problem& p_;
  const Task& t_;
  const Sequence& seq_;
  const Layout at_;
  float* ws_;
  int64_t kv_head_;
  int64_t tile_first_ = 0;
  int32_t tile_count_ = 1;
  int32_t bad_candidate_ = -1, bad_load_ = -1;
};

int32_t run(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, float* workspace) {
  Forward forward(c, t, workspace);
  forward.begin(num_ranges > 0);
  for (size_t i = 0; i < num_ranges; ++i) {
    // Tiles start at multiples of tile_kv whatever the ranges are, so that the order of sums depends on nothing else.
    int64_t first = ranges[i].first;
    const int64_t end = first + ranges[i].count;
    while (first < end) {
      const int64_t tile_end = (first / c.tile_kv + 1) * c.tile_kv;
      const int64_t stop = tile_end < end ? tile_end : end;
      forward.keys(first, static_cast<int32_t>(stop - first), ranges[i].full);
      first = stop;
    }
  }
  return forward.finish();
}

size_t workspace_bytes(const Call& c) { return Layout(c, kMaxTileQ).total * sizeof(float); }
