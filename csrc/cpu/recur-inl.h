// A recurrence in chunks of tokens, for one state head of one sequence. With the decays of recur_rows-inl.h and, for
// rows r and columns s <= r, D_rs = e_{s+1} ... e_r:
//
//   U = V, or with beta the solution of U_r = beta_r (V_r - up_to_r K_r S - sum_{s<r} (K_r . K_s D_rs) U_s)
//   O = (up_to Q) S + tril(Q K^T D) U              S' = total S + (after K)^T U
//
// A bonus reads before the decay of its own token: rows lag by one, and the diagonal is the bonus's.

// left[r] . K_s D_rs for s <= r (or `strict`: s < r), zero for s > r as far as products of halves read.
inline void decay_lower(float* a, int64_t stride, int32_t rows, const float* each, bool strict) {
  vi lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  vf decay[kMaxChunk / kLanes] = {};
  const int32_t last = padded(rows) / kLanes - 1;
  for (int32_t r = 0; r < rows; ++r) {
    const vi row = set1_int(r), end = set1_int(strict ? r : r + 1);
    const vf e = set1(each == nullptr ? 1.0f : each[r]);
    float* x = a + r * stride;
    const int32_t own = r / kLanes;
    for (int32_t v = 0; v <= own; ++v) {
      const vi column = lane + v * kLanes;
      decay[v] = select(column == row, set1(1), decay[v] * e);
      store(x + v * kLanes, select(column < end, load(x + v * kLanes) * decay[v], vf{}));
    }
    for (int32_t v = own + 1; v <= last && v * kLanes < r + 16; ++v) store(x + v * kLanes, vf{});
  }
}

// In groups of vectors, whose chains of operations go in step.
template <class F>
ATTNKIT_INLINE void in_groups(int32_t width, F group) {
  int32_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) group.template operator()<4>(d);
  for (; d < width; d += kLanes) group.template operator()<1>(d);
}

// to[i] = the sum of the lanes of sums[i], kLanes of them.
ATTNKIT_INLINE vf sums_of_lanes(vf* sums) {
  transpose_square(sums);
#pragma GCC unroll 4
  for (int by = kLanes / 2; by > 0; by /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < by; ++i) sums[i] += sums[i + by];
  return sums[0];
}

// The same where each channel has its decay: the products of a row go back in time, decaying what is left of it.
// `lag`: the row does not take part in its own decay.
inline void decay_channels(Rows left, Rows right, const float* each, int32_t rows, int32_t width, const float* diagonal,
                           bool strict, bool lag, float* a, int64_t stride) {
  for (int32_t r = 0; r < rows; ++r) {
    vf sums[kChannelChunk];
    for (int32_t s = 0; s < kChannelChunk; ++s) sums[s] = vf{};
    in_groups(width, [&]<int kVecs>(int32_t d) {
      vf reach[kVecs];
      vf own{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int32_t at = d + v * kLanes;
        reach[v] = load(left.data + r * left.stride + at);
        const vf read = diagonal == nullptr ? reach[v] : reach[v] * load(diagonal + at);
        own = fma(read, load(right.data + r * right.stride + at), own);
        if (!lag) reach[v] *= load(each + r * width + at);
      }
      if (!strict) sums[r] += own;
      for (int32_t s = r - 1; s >= 0; --s) {
        vf sum{};
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const int32_t at = d + v * kLanes;
          sum = fma(reach[v], load(right.data + s * right.stride + at), sum);
          reach[v] *= load(each + s * width + at);
        }
        sums[s] += sum;
      }
    });
    for (int32_t s = 0; s < kChannelChunk; s += kLanes) {
      if (s <= r)
        store(a + r * stride + s, sums_of_lanes(sums + s));
      else
        store(a + r * stride + s, vf{});
    }
  }
}

// What both directions know of a chunk.
class Chunk {
 public:
  const Recurrence& p;
  const int32_t width, v_width, stride;  // of keys, values and matrices of pairs, padded
  const bool decays, delta;
  const int32_t gate_width;  // factors for a token: 0, 1 or (channels) the width
  int32_t batch = 0, head = 0, n = 0;
  int64_t token = 0;
  Rows k{}, v{}, u{};
  Rows k_up_to{}, k_after{};  // times decays

  Chunk(const Recurrence& problem, Arena& arena)
      : p(problem),
        width(padded(p.head_dim)),
        v_width(padded(p.v_head_dim)),
        stride(padded(p.chunk)),
        decays(p.gate.at != nullptr || p.bonus != nullptr),
        delta(p.beta.at != nullptr),
        gate_width(!decays                            ? 0
                   : p.channels || p.bonus != nullptr ? width
                                                      : 1),
        e(arena, stride, gate_width),
        keys_(arena.take(int64_t{stride} * width)),
        values_(arena.take(int64_t{stride} * v_width)),
        columns_(arena.take(int64_t{stride} * width)),
        after_(arena.take(int64_t{stride} * width)),
        up_to_(arena.take(delta ? int64_t{stride} * width : 0)),
        solved_(arena.take(delta ? int64_t{stride} * v_width : 0)),
        unscaled_(arena.take(delta ? int64_t{stride} * v_width : 0)),
        pairs_(arena.take(delta ? int64_t{stride} * stride : 0)),
        beta_(arena.take(delta ? stride : 0)),
        bonus_(arena.take(p.bonus != nullptr ? width : 0)) {}

  Decays e;
  Upcoming upcoming;  // what the next chunk will read; its parts are fetched between products

  bool in_channels() const { return gate_width > 1; }
  // What the state is multiplied with over the chunk.
  const float* total() const { return decays ? e.total : &kOne; }
  int32_t total_step() const { return in_channels() ? 1 : 0; }

  void load_keys(int32_t of_batch, int32_t of_head, int64_t at, int32_t tokens) {
    batch = of_batch;
    head = of_head;
    token = at;
    n = tokens;
    turned_ = false;
    k = mapped_rows(p, p.k, batch, key_head(head), token, n, keys_);
    v = rows_of(p.v, p.dtype, batch, head, token, n, p.v_head_dim, v_width, values_);
    if (p.bonus != nullptr) read_bonus();
    if (decays) {
      read_gates();
      e.multiply_out(n, gate_width);
    }
    k_after = times(k, e.after, after_);
  }
  int32_t key_head(int32_t of_head) const { return of_head / (p.heads / p.k_heads); }

  // Rows times decays `factor` of the chunk.
  Rows times(Rows rows, const float* factor, float* to) const {
    if (!decays) return rows;
    in_channels() ? multiply_rows(rows, factor, n, width, to) : scale_rows(rows, factor, n, width, to);
    return {to, width};
  }

  // The decays with which rows read the state before the chunk: a bonus's before their own.
  const float* reading() const { return p.bonus == nullptr ? e.up_to : e.ones; }

  // left[r] . K_s D_rs, the lower half.
  void pairs(Rows left, bool strict, float* a) {
    const bool lag = p.bonus != nullptr;
    upcoming.part();
    if (in_channels()) {
      return decay_channels(left, k, e.each, n, width, lag ? bonus_ : nullptr, strict, lag, a, stride);
    }
    if (!turned_) transpose(k.data, k.stride, n, width, columns_, padded(n));
    turned_ = true;
    for (int32_t r = 0; r < n; r += 16)
      product<false>(left.data + r * left.stride, left.stride, columns_, padded(n), n - r < 16 ? n - r : 16, p.head_dim,
                     r + 16, {a + r * stride, stride});
    decay_lower(a, stride, n, decays ? e.each : nullptr, strict);
  }

  // What the tokens write to a state that is S before; null is a state of zeros.
  void solve(const float* s) {
    u = v;
    if (delta) {
      k_up_to = times(k, e.up_to, up_to_);
      pairs(k, true, pairs_);
      if (s != nullptr)
        product<false>(k_up_to.data, k_up_to.stride, s, v_width, n, p.head_dim, v_width, {solved_, v_width});
      for (int32_t r = 0; r < n; ++r) {
        beta_[r] = p.beta.at[batch * p.beta.stride[0] + head * p.beta.stride[1] + (token + r) * p.beta.stride[2]];
        for (int32_t c = 0; c < v_width; c += kLanes)
          store(solved_ + r * v_width + c,
                load(v.data + r * v.stride + c) - (s == nullptr ? vf{} : load(solved_ + r * v_width + c)));
      }
      for (int32_t r = 0; r < n; r += 16) substitute(r, n - r < 16 ? n : r + 16);
      u = {solved_, v_width};
    }
  }
  bool finite() const { return is_finite(u, n, v_width); }  // U is

  // U is beta (row by row) times this; what rows correct of each other is pairs().
  const float* unscaled() const { return unscaled_; }
  const float* corrections() const { return pairs_; }
  const float* beta() const { return beta_; }
  const float* bonus() const { return bonus_; }

  // S' = total S + (after K)^T U; `from` may be `to`, and null is a state of zeros.
  void advance(const float* from, float* to) {
    upcoming.part();
    Sum sum{to, v_width, from == nullptr ? nullptr : total(), total_step()};
    sum.in = from;
    product<true>(k_after.data, k_after.stride, u.data, u.stride, p.head_dim, n, v_width, sum);
  }
  // The same for a value of 1.
  void advance_norm(float* z) const {
    for (int32_t d = 0; d < width; d += kLanes) {
      vf sum = load(z + d);
      if (decays) sum *= in_channels() ? load(e.total + d) : set1(*e.total);
      for (int32_t r = 0; r < n; ++r) sum += load(k_after.data + r * k_after.stride + d);
      store(z + d, sum);
    }
  }

 private:
  void read_gates() {
    if (p.gate.at == nullptr) {
      for (int32_t i = 0; i < n * gate_width; ++i) e.each[i] = 1;
      return;
    }
    read_decays(p, batch, head, token, n, gate_width, e.each);
  }

  void read_bonus() {
    for (int32_t d = 0; d < width; ++d)
      bonus_[d] = d < p.head_dim ? p.bonus[static_cast<int64_t>(head) * p.head_dim + d] : 0;
  }

  // Rows r .. end - 1 of U, given those before.
  void substitute(int32_t r, int32_t end) {
    if (r > 0)
      product<false>(pairs_ + r * stride, stride, solved_, v_width, end - r, r, v_width,
                     added_to(solved_ + r * v_width, v_width, -1));
    for (int32_t c = 0; c < v_width; c += kLanes)
      for (int32_t i = r; i < end; ++i) {
        vf x = load(solved_ + i * v_width + c);
        for (int32_t s = r; s < i; ++s) x = fma(set1(-pairs_[i * stride + s]), load(solved_ + s * v_width + c), x);
        store(unscaled_ + i * v_width + c, x);
        store(solved_ + i * v_width + c, x * set1(beta_[i]));
      }
  }

  bool turned_ = false;  // the columns are there
  float *keys_, *values_, *columns_, *after_, *up_to_, *solved_, *unscaled_, *pairs_, *beta_, *bonus_;
};
