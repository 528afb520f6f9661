// The forward kernel, one task: up to kMaxTileQ queries of one head against the keys they may see. Here is all but the
// products, which are another file for each way to multiply: kernel_float-inl.h, kernel_bf16-inl.h,
// kernel_encoded-inl.h.
//
// Scores are held key-major: a tile has one row per key and one lane per query. K and V are then read as they lie in
// memory, the softmax statistics are vertical vectors, and no horizontal reduction is ever needed; only the queries are
// transposed, once per task. (FlashAttention's online softmax: Milakov & Gimelshein 2018, Dao 2022.)

// All but the products.
class Forward {
 public:
  // `few`: queries are so few that keys are the lanes of their scores, S^T.
  Forward(const Call& c, const Task& t, float* workspace, bool few = false)
      : c_(c),
        p_(*c.problem),
        t_(t),
        seq_(p_.sequences[t.sequence]),
        at_(c, t.lanes(), few),
        ws_(workspace),
        has_score_(c.has_score && !(c.subtracts && t.carried.by_key)),
        tile_(c.code, p_, t.sequence, at_.tile, workspace, workspace + (few ? at_.st : at_.s),
              few ? kPerKey : kPerQuery),
        now_{ws_ + at_.o, ws_ + at_.max, ws_ + at_.sum, at_.dv},
        before_{ws_ + at_.before_o, ws_ + at_.before_max, ws_ + at_.before_sum, at_.dv},
        philox_(p_.dropout, t.sequence),
        random_(ws_ + at_.random) {
    kv_head_ = t.head / (p_.num_heads / p_.num_kv_heads);
    query_norm_ = query_norm();
  }

  // `any_keys`: false where nothing is visible; then no index of the sequence was proven, and none may be used.
  void begin(bool any_keys) {
    start();
    prepare(any_keys);
  }

  void prepare(bool any_keys) {
    if (thinned())
      for (int32_t m = 0; m < t_.lanes(); ++m)
        random_.put(m, philox_.query(static_cast<int32_t>(head_of(m)), t_.query(m % t_.q_count)));
    if (!any_keys || (!has_score_ && !c_.has_mask)) return;
    tile_.begin();
    tile_.queries(t_);
  }

  // A stretch of keys of which nothing has been seen.
  void start() { start_fold(now_, at_.bm); }

  // What the stretch has given joins those before it; or it is kept for, or taken from, another task.
  void end_stretch() {
    if (any_before_) {
      merge(before_, before_, now_, t_.lanes(), at_.dv);
    } else {
      copy(before_, now_, t_.lanes(), at_.dv);
    }
    any_before_ = true;
  }
  void save(const Fold& part) const { copy(part, now_, t_.lanes(), at_.dv); }
  void take(const Fold& part) { copy(now_, part, t_.lanes(), at_.dv); }

  // The same of queries that are listed: what there is of query `first` and those after it.
  void save_listed(const Fold& rows, int64_t first) const {
    for (int32_t m = 0; m < t_.lanes(); ++m) copy_lane(rows.at(t_.query(m) - first), now_.at(m), at_.dv);
  }
  void take_listed(const Fold& rows, int64_t first) {
    for (int32_t m = 0; m < t_.lanes(); ++m) copy_lane(now_.at(m), rows.at(t_.query(m) - first), at_.dv);
    for (int32_t m = t_.lanes(); m < at_.bm; ++m) {
      ws_[at_.max + m] = -kInfinity;
      ws_[at_.sum + m] = 0;
    }
  }

  int32_t finish() {
    if (any_before_) merge(now_, before_, now_, t_.lanes(), at_.dv);
    for (int32_t m = 0; m < t_.lanes(); ++m) {
      const int32_t head = head_of(m);
      const int64_t token = p_.result_at(t_.sequence, t_.query(m % t_.q_count));
      float max = ws_[at_.max + m], sum = ws_[at_.sum + m], rescale = 1;
      if (p_.sink != nullptr) add_sink(p_.sink[head], max, sum, rescale);
      const bool dead = sum == 0;
      const float norm = dead ? 0 : (c_.code.unnormalized ? 1 : rescale / sum) * p_.dropout.factor;
      float* o = ws_ + at_.o + static_cast<int64_t>(m) * at_.dv;
      if (dead) clear(at_.o + static_cast<size_t>(m) * static_cast<size_t>(at_.dv), at_.dv);
      with_elements(p_.o_dtype(), [&](auto* type) {
        narrow_row(row<decltype(type)>(p_.o, head, token), p_.o.stride[3], o, p_.v_head_dim, norm);
      });
      if (p_.lse != nullptr) {
        const double lse = static_cast<double>(max) + __builtin_log(static_cast<double>(sum));
        p_.lse[seq_.batch * p_.lse_stride[0] + head * p_.lse_stride[1] + token * p_.lse_stride[2]] =
            dead ? -kInfinity : static_cast<float>(lse);
      }
    }
    return bad_load();
  }

  int32_t bad_load() const { return tile_.bad_load(); }

  // Where the keys end that are taken at once from `first` on.
  int64_t reach(int64_t first, bool) const { return (first / c_.tile_kv + 1) * c_.tile_kv; }

  // What a row leaves out: of tiles that may be skipped never the first, nor the last two; of keys that are forgotten
  // those whose weights are exactly 0, unless zeros are not all that they would add.
  void turn(int64_t tile, int64_t tiles, int64_t first) {
    may_skip_ = p_.skip > 0 && tile > 0 && tile < tiles - 2;
    const int64_t i = first / c_.tile_kv;
    if (query_norm_ >= 0) may_skip_ = t_.carried.least[i] * kLog2e > kNoWeight / 2 && norm_of_tile(i) < kInfinity;
  }

  // Whether the tiles from `first` to `end` have only weights of 0 beside what the stretch has seen, or (`all`, of a
  // whole one) those before it; as far as norms can tell.
  bool forgets(int64_t first, int64_t end, bool all) {
    if (query_norm_ < 0 || (all && !any_before_)) return false;
    const float* max = ws_ + (all ? at_.before_max : at_.max);
    float lowest = kInfinity;
    for (int32_t m = 0; m < t_.lanes(); ++m) lowest = max[m] < lowest ? max[m] : lowest;
    for (int64_t tile = first / c_.tile_kv; tile * c_.tile_kv < end; ++tile) {
      const float least = t_.carried.least[tile];
      if (!((-least - lowest) * kLog2e <= -kNoWeight)) return false;
      const float norm = norm_of_tile(tile), most = query_norm_ * norm * 1.0001f - least;
      if (!(norm < kInfinity && (most - lowest) * kLog2e <= -kNoWeight)) return false;
    }
    return true;
  }

 protected:
  static constexpr int32_t kSkipLanes = 16;
  static constexpr float kNoWeight = 152;  // 2^-152 is 0

  // The largest norm of a query, by which scores are bounded, where what is carried may leave keys without weight; else
  // negative.
  float query_norm() const {
    if (!t_.carried.by_key || !c_.subtracts || p_.q.stride[3] != 1 || p_.head_dim % kLanes != 0) return -1;
    return with_elements(p_.dtype, [&](auto* type) {
      float most = 0;
      for (int32_t m = 0; m < t_.lanes(); ++m) {
        const float square = square_of(row<decltype(type)>(p_.q, head_of(m), token_of(m)), p_.head_dim);
        if (!(square < kInfinity)) return -1.0f;
        if (square > most) most = square;
      }
      return __builtin_sqrtf(most) * __builtin_fabsf(p_.scale);
    });
  }

  template <class T>
  static float square_of(const T* x, int32_t width) {
    vf sum{};
    for (int32_t d = 0; d < width; d += kLanes) sum = fma(widen(x + d), widen(x + d), sum);
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    return total;
  }

  // Worked out once for all heads and queries.
  float norm_of_tile(int64_t tile) {
    const int64_t tiles = (seq_.kv_len + c_.tile_kv - 1) / c_.tile_kv, first = tile * c_.tile_kv;
    float *known = t_.carried.norms + kv_head_ * tiles + tile, found;
    __atomic_load(known, &found, __ATOMIC_RELAXED);
    if (found != 0) return found;
    const auto count = static_cast<int32_t>(seq_.kv_len - first < c_.tile_kv ? seq_.kv_len - first : c_.tile_kv);
    const Rows k = rows(p_.k, keys_of(first, count), p_.head_dim, p_.head_dim, at_.k);
    found = 0x1p-60f;
    for (int32_t n = 0; n < count; ++n) {
      const float square = square_of(k.data + n * k.stride, p_.head_dim);
      if (square > found) found = square;
      if (!(square < kInfinity)) found = kInfinity;
    }
    const Rows v = rows(p_.v, values_of(first, count), p_.v_head_dim, at_.dv, at_.v);
    found = found < kInfinity && is_finite(v, count, at_.dv) ? __builtin_sqrtf(found) : kInfinity;
    __atomic_store(known, &found, __ATOMIC_RELAXED);
    return found;
  }

  // The products find the largest scores on their way; not so where expressions change them.
  bool plain(bool full) const { return full && !has_score_; }

  // Where products that find them leave the largest scores.
  float* start_largest(bool full) {
    float* largest = ws_ + at_.largest;
    __builtin_memcpy(largest, ws_ + at_.max, static_cast<size_t>(at_.bm) * sizeof(float));
    if (may_skip_)
      for (int32_t m = 0; m < at_.bm; ++m) largest[m] = -kInfinity;
    return plain(full) ? largest : nullptr;
  }

  // Calls f with the dot product of scores: less what is carried onto the keys, where nothing else changes them.
  template <class Dot, class F>
  void with_less(const Dot& dot, int64_t first, F f) {
    const Carried& from = t_.carried;
    if (has_score_ || !c_.has_score) return f(dot);
    const float* less = from.f + (first - from.first) * from.ld;
    less_next_ = less + c_.tile_kv * from.ld;
    f(LessDot<Dot>{dot, less, from.ld});
  }

  // What the next tile's scores lose comes from far, once for every head: a part of it, while a vector of queries is
  // weighed.
  void fetch_less(int32_t lane) const {
    if (less_next_ == nullptr) return;
    const int64_t floats = c_.tile_kv * t_.carried.ld / (at_.bm / kLanes);
    const float* from = less_next_ + lane / kLanes * floats;
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i, 0, 2);
  }

  int32_t head_of(int32_t lane) const { return t_.head + lane / t_.q_count; }
  int64_t token_of(int32_t lane) const { return p_.query_at(t_.sequence, t_.query(lane % t_.q_count)); }

  template <class P>  // a pointer to the elements
  P row(const View& view, int32_t head, int64_t token) const {
    return row_of<P>(view, seq_.batch, head, token);
  }

  // Keys or values as they lie in memory; of groups a copy of the tile's.
  Lines lines(const View& view, int32_t channels, int64_t first, int32_t count, size_t listed) const {
    if (p_.groups != nullptr)
      return listed_lines(view, p_.dtype, seq_.batch, kv_head_, seq_.kv_start, p_.groups[t_.sequence].keys + first,
                          count, channels, ws_ + listed);
    return lines_of(view, p_.pages, p_.dtype, seq_.batch, kv_head_, seq_.kv_start + first, count, channels);
  }

  // From channel to channel, in elements; those of codes lie side by side once they are decoded.
  int64_t channel_of(const View& view) const { return p_.stores == nullptr ? view.stride[3] : 1; }

  // Keys and values: of a cache that keeps codes, a copy of the tile as float32.
  Lines keys_of(int64_t first, int32_t count) {
    if (p_.stores == nullptr) return lines(p_.k, p_.head_dim, first, count, at_.listed_k);
    return decoded(p_.stores[0], first, count, round_up(p_.head_dim, kLanes), at_.k);
  }
  Lines values_of(int64_t first, int32_t count) {
    if (p_.stores == nullptr) return lines(p_.v, p_.v_head_dim, first, count, at_.listed_v);
    return decoded(p_.stores[1], first, count, at_.dv, at_.v);
  }
  Lines decoded(const Store& s, int64_t first, int32_t count, int32_t padded, size_t at) {
    decode_tile(s, p_.pages, seq_, kv_head_, first, count, padded, ws_ + at);
    return {ws_ + at, 4 * padded, 4 * padded, count};
  }

  // As float32, `padded` channels wide: where they lie, if they lie so, else in the workspace.
  Rows rows(const View& view, const Lines& lines, int32_t width, int32_t padded, size_t at) {
    if (p_.stores != nullptr) return {reinterpret_cast<const float*>(lines.at(0)), lines.stride / 4};
    return rows_of(lines, p_.dtype, view.stride[3], width, padded, ws_ + at);
  }

  void clear(size_t at, int64_t n) { __builtin_memset(ws_ + at, 0, static_cast<size_t>(n) * sizeof(float)); }

  // ---- the user's expressions ----

  // Which pairs of a partial tile exist, before anything is multiplied: a bit for each, and for every vector of queries
  // the keys from the first to the last that one of them sees. What lies outside is neither multiplied nor weighed.
  void find_live(int64_t first, int32_t count) {
    tile_.keys(first, count);
    const int32_t vecs = at_.bm / kLanes;
    for (int32_t v = 0; v < vecs; ++v) spans_[v] = {count, 0};
    for (int32_t strip = 0; strip < count; strip += kStrip) {
      const int32_t rows = count - strip < kStrip ? count - strip : kStrip;
      tile_.run_strip(strip, rows, false, true);
      if (!has_score_) tile_.check_loads(strip, rows, t_.lanes(), false);
      const Operand mask = tile_.operand(c_.code.mask, kTile, strip);
      with(mask.vec, [&](auto vec) {
        for (int32_t r = 0; r < rows; ++r) {
          const Row<vec.value> row(mask, r);
          for (int32_t v = 0; v < vecs; ++v) {
            auto bits = static_cast<int32_t>(lane_bits(as_int(row.at(v * kLanes))));
            if (c_.some_gone) bits &= static_cast<int32_t>(lane_bits(tile_.stays(strip, r, v * kLanes)));
            __builtin_memcpy(ws_ + at_.live + (strip + r) * vecs + v, &bits, 4);
            if (bits == 0) continue;
            if (spans_[v].end == 0) spans_[v].first = strip + r;
            spans_[v].end = strip + r + 1;
          }
        }
      });
    }
  }

  const Span* live(bool full) const { return full ? nullptr : spans_; }

  // Whether every query weighs every key of a tile whose scores are there. Of those that do not exist, and of a tile
  // that 16 queries leave out, spans_ says which it weighs; `needed_`, whether any query weighs any.
  bool weigh_all(int32_t count, bool full) {
    needed_ = true;
    if (!may_skip_) return full;
    needed_ = false;
    const float skip = query_norm_ >= 0 ? kNoWeight : p_.skip;
    float *largest = ws_ + at_.largest, *max = ws_ + at_.max;
    bool all = full;
    for (int32_t lane = 0; lane < at_.bm; lane += kSkipLanes) {
      bool needed = false;
      for (int32_t m = lane; m < lane + kSkipLanes && m < at_.bm; ++m) {
        if (m < t_.lanes() && largest[m] > -kInfinity) needed |= !((largest[m] - max[m]) * kLog2e <= -skip);
        if (max[m] > largest[m]) largest[m] = max[m];
      }
      for (int32_t v = lane / kLanes; v * kLanes < lane + kSkipLanes && v * kLanes < at_.bm; ++v)
        if (!needed)
          spans_[v] = {0, 0};
        else if (full)
          spans_[v] = {0, count};
      all &= needed;
      needed_ |= needed;
    }
    return all;
  }

  int32_t live_bits(int32_t n, int32_t vec) const { return int_at(ws_ + at_.live + n * (at_.bm / kLanes) + vec); }

  bool exists(int32_t n, int32_t m) const { return (live_bits(n, m / kLanes) >> m % kLanes & 1) != 0; }

  // Applies the score. The products have found the largest scores only where nothing changes them.
  void modify(int64_t first, int32_t count, bool full) {
    apply_score(first, count, full);
    if (!full) return hide_dead(count);
    if (has_score_) find_largest(count);
  }

  void apply_score(int64_t first, int32_t count, bool full) {
    if (!has_score_) return;
    if (full) tile_.keys(first, count);
    for (int32_t strip = 0; strip < count; strip += kStrip) {
      const Shape shape{count - strip < kStrip ? count - strip : kStrip, at_.bm};
      float* s = ws_ + at_.s + static_cast<int64_t>(strip) * at_.bm;
      tile_.run_strip(strip, shape.rows, true, !full && tile_.checked());
      if (c_.code.in_place < 0) map1(s, shape, tile_.operand(c_.code.score, kTile, strip), [](vf x) { return x; });
      tile_.check_loads(strip, shape.rows, t_.lanes(), full);
    }
  }

  // Every other score by itself: a maximum takes longer than a load.
  void find_largest(int32_t count) {
    for (int32_t lane = 0; lane < at_.bm; lane += kLanes) {
      const float* s = ws_ + at_.s + lane;
      vf even = load(ws_ + at_.largest + lane), odd = even;
      int32_t n = 0;
      for (; n + 2 <= count; n += 2, s += 2 * at_.bm) {
        even = max_or_second(load(s), even);
        odd = max_or_second(load(s + at_.bm), odd);
      }
      if (n < count) even = max_or_second(load(s), even);
      store(ws_ + at_.largest + lane, max_or_second(even, odd));
    }
  }

  // The score of a pair that does not exist is -inf, in whole turns of softmax.
  void hide_dead(int32_t count) {
    for (int32_t v = 0; v * kLanes < at_.bm; ++v) {
      const Span keys = turns(spans_[v], count);
      float* largest = ws_ + at_.largest + v * kLanes;
      vf most = load(largest);
      for (int32_t n = keys.first; n < keys.end; ++n) {
        float* s = ws_ + at_.s + static_cast<int64_t>(n) * at_.bm + v * kLanes;
        const vf x = select(lane_mask(static_cast<uint32_t>(live_bits(n, v))), load(s), set1(-kInfinity));
        store(s, x);
        most = max_or_second(x, most);
      }
      store(largest, most);
    }
  }

  // ---- softmax ----

  // Weights are summed in turns: many equal small ones added to a large one would all be rounded the same way. Keys
  // start at multiples of kStrip, so the turns do not depend on what was trimmed.
  static constexpr int kSums = 4;

  // The keys of a span, in whole turns.
  static Span turns(Span keys, int32_t count) {
    if (keys.end == 0) return {0, 0};
    const int32_t end = round_up(keys.end, kSums);
    return {keys.first / kSums * kSums, end < count ? end : count};
  }

  // Scores that are the weights: a stretch is as heavy as another, and one of -infinity weighs nothing.
  void start_unnormalized(int32_t lane) {
    store(ws_ + at_.max + lane, vf{});
    store(ws_ + at_.sum + lane, set1(1));
    store(ws_ + at_.alpha + lane, set1(1));
  }
  static ATTNKIT_INLINE vf unless_gone(vf x) { return select(x == set1(-kInfinity), vf{}, x); }
  template <class Weights>
  __attribute__((noinline)) void take_lanes(int32_t lane, Span keys, const Weights& weights) {
    const float* s = ws_ + at_.s + lane;
    start_unnormalized(lane);
    const auto weight = [&](int32_t n) { return n < keys.end ? unless_gone(load(s + n * at_.bm)) : vf{}; };
    for (int32_t n = keys.first; n < keys.end; n += 2) weights.put(n, lane, weight(n), weight(n + 1));
  }

  // A vector of queries.
  template <class Weights>
  __attribute__((noinline)) void softmax_lanes(int32_t lane, Span keys, const Weights& weights) {
    if (c_.code.unnormalized) return take_lanes(lane, keys, weights);
    const float* s = ws_ + at_.s + lane;
    float *max = ws_ + at_.max + lane, *alpha = ws_ + at_.alpha + lane;
    const vf old_max = load(max), new_max = load(ws_ + at_.largest + lane);
    // Nothing seen so far: any finite pivot keeps (-inf) - (-inf) from being computed.
    const vf pivot = new_max == set1(-kInfinity) ? vf{} : new_max;
    store(max, new_max);
    store(alpha, exp_weight(old_max - pivot));
    vf sum[kSums] = {};
    const auto begin = [&]<int kKeys>(ExpSteps<typename Weights::Exp, kKeys>& steps, int32_t n) {
      vf x[kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) x[i] = load(s + (n + i) * at_.bm) - pivot;
      steps.begin(x);
    };
    const auto put = [&]<int kKeys>(const vf(&w)[kKeys], int32_t n, int u) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; i += 2) {
        const vf after = i + 1 < kKeys ? w[(i + 1) % kKeys] : vf{};
        sum[u + i] += w[i];
        sum[u + i + 1] += after;
        weights.put(n + i, lane, w[i], after);
      }
    };
    const int32_t whole = keys.first + (keys.end - keys.first) / kSums * kSums;
    ExpSteps<typename Weights::Exp, kSoftmaxKeys> steps;
    if (keys.first < whole) begin(steps, keys.first);
    for (int32_t n = keys.first; n < whole; n += kSums)
#pragma GCC unroll 4
      for (int u = 0; u < kSums; u += kSoftmaxKeys) {
        vf w[kSoftmaxKeys];
        steps.end(w);
        if (n + u + kSoftmaxKeys < whole) begin(steps, n + u + kSoftmaxKeys);
        put(w, n + u, u);
      }
    const auto rest = [&]<int kKeys>(int32_t n, int u) {
      ExpSteps<typename Weights::Exp, kKeys> few;
      vf w[kKeys];
      begin(few, n);
      few.end(w);
      put(w, n, u);
    };
#pragma GCC unroll 2
    for (int u = 0; u < kSums; u += 2) {
      if (whole + u + 1 < keys.end)
        rest.template operator()<2>(whole + u, u);
      else if (whole + u < keys.end)
        rest.template operator()<1>(whole + u, u);
    }
    float* total = ws_ + at_.sum + lane;
    store(total, fma(load(total), load(alpha), (sum[0] + sum[1]) + (sum[2] + sum[3])));
  }

  // Scores become weights, as `weights` computes them (Exp), some keys in step, and puts them, two keys at a time; the
  // row after the last is zero.
  template <class Weights>
  void softmax(int32_t count, bool full, const Weights& weights) {
    if (!full) return softmax_of_live(count, weights);
    for (int32_t lane = 0; lane < at_.bm; lane += kLanes) {
      fetch_less(lane);
      softmax_lanes(lane, {0, count}, weights);
    }
  }

  // A row of the products may reach beyond the span of a vector: there are zeros.
  template <class Weights>
  void softmax_of_live(int32_t count, const Weights& weights) {
    for (int32_t v = 0; v * kLanes < at_.bm; ++v) {
      const Span keys = turns(spans_[v], count);
      for (int32_t n = 0; n < keys.first; n += 2) weights.put(n, v * kLanes, vf{}, vf{});
      softmax_lanes(v * kLanes, keys, weights);
      for (int32_t n = keys.end; n < count; n += 2) weights.put(n, v * kLanes, vf{}, vf{});
    }
  }

  // The sink is one more logit in the denominator, without a value.
  static void add_sink(float sink, float& max, float& sum, float& rescale) {
    const float top = max > sink ? max : sink;
    if (top == -kInfinity) return;
    rescale = __builtin_expf(max - top);
    sum = sum * rescale + __builtin_expf(sink - top);
    max = top;
  }

  // ---- dropout ----

  bool thinned() const { return p_.dropout.threshold != 0; }

  // What is not kept of the weights becomes zero, by `drop(key, lane, kept)`. Their sum is left as it was.
  template <class F>
  __attribute__((noinline)) void thin(int64_t first, int32_t count, bool full, F drop) const {
    const int32_t lanes = full ? at_.bm : kLanes;
    for (int32_t lane = 0; lane < at_.bm; lane += lanes) {
      const Span keys = full ? Span{0, count} : spans_[lane / kLanes];
      philox_.each(random_, {lane, lane + lanes}, keys, [&](int32_t n) { return philox_.key(first + n); }, drop);
    }
  }

  // ---- values that not every query may see ----

  // The same sums in the same order as pv, but zeros stand for the values of pairs that do not exist.
  template <class Dot>
  void pv_guarded(const float* weights, const float* v, int64_t stride, int32_t count) {
    constexpr int kBits = 32 / Dot::kKeys;
    float *o = ws_ + at_.o, *acc = ws_ + at_.guarded;
    clear(at_.guarded, static_cast<int64_t>(at_.bm) * at_.dv);
    for (int32_t m = 0; m < t_.lanes(); ++m)
      for (int32_t n = 0; n < count; n += Dot::kKeys) {
        uint32_t alive = 0;
        for (int i = 0; i < Dot::kKeys && n + i < count; ++i)
          if (exists(n + i, m)) alive |= ~uint32_t{0} >> (32 - kBits) << kBits * i;
        if (alive == 0) continue;
        const vf w = set1_bits(weights + n / Dot::kKeys * at_.bm + m);
        const float* values = v + n / Dot::kKeys * stride;
        for (int32_t d = 0; d < at_.dv; d += kLanes) {
          float* x = acc + static_cast<int64_t>(m) * at_.dv + d;
          store(x, Dot::run(w, as_float(load_int(values + d) & static_cast<int32_t>(alive)), load(x)));
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
  const bool has_score_;  // that is to be applied to a tile of scores
  int32_t kv_head_;
  Tile tile_;
  Span spans_[kMaxTileQ / kLanes];  // of a partial tile
  const Fold now_, before_;
  const Philox philox_;
  const SplitWords<QueryWords> random_;
  bool any_before_ = false, may_skip_ = false, needed_ = true;
  float query_norm_ = -1;
  const float* less_next_ = nullptr;  // see fetch_less
  Kept kept_;  // by the products, as they need it
};

template <class Products>
int32_t run(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, const Parts* parts,
            float* workspace) {
  Products forward(c, t, workspace);
  forward.pack_queries();
  forward.begin(num_ranges > 0);
  int64_t stretch = num_ranges > 0 ? ranges[0].first / c.split_kv : -1;
  int64_t tile = 0, tiles = 0;
  for (size_t i = 0; i < num_ranges; ++i)
    tiles += (ranges[i].first + ranges[i].count - 1) / c.tile_kv - ranges[i].first / c.tile_kv + 1;
  const auto save = [&] {
    if (stretch < 0) return;
    forward.save(fold_of(*parts, stretch, *c.problem, t.lanes()));
    parts->there[stretch] = 1;
  };
  for (size_t i = 0; i < num_ranges; ++i) {
    // Tiles start at multiples of tile_kv whatever the ranges are, so that the order of sums depends on nothing else.
    int64_t first = ranges[i].first;
    const int64_t end = first + ranges[i].count;
    while (first < end) {
      const int64_t reach = forward.reach(first, ranges[i].full), stop = reach < end ? reach : end;
      if (first / c.split_kv != stretch) {
        if (parts != nullptr) {
          save();
        } else {
          forward.end_stretch();
        }
        forward.start();
        stretch = first / c.split_kv;
        const int64_t whole = (stretch + 1) * c.split_kv;
        if (parts == nullptr && ranges[i].full && first % c.split_kv == 0 && whole <= end &&
            forward.forgets(first, whole, true)) {
          first = whole;
          continue;
        }
      }
      const int64_t next = stop < end ? stop : i + 1 < num_ranges ? ranges[i + 1].first : -1;
      forward.turn(tile++, tiles, first);
      if (!ranges[i].full || !forward.forgets(first, stop, false))
        forward.keys(first, static_cast<int32_t>(stop - first), ranges[i].full, next);
      first = stop;
    }
  }
  if (parts == nullptr) return forward.finish();
  save();
  return forward.bad_load();
}

void merge_parts(const Call& c, const Task& t, const Parts& parts, float* workspace) {
  Forward forward(c, t, workspace);
  forward.start();
  bool any = false;
  for (int64_t i = 0; i < parts.count; ++i) {
    if (parts.there[i] == 0) continue;
    if (any) forward.end_stretch();
    forward.take(fold_of(parts, i, *c.problem, t.lanes()));
    any = true;
  }
  forward.finish();
}
