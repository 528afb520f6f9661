// The gradients of a recurrence, for one state head of one sequence: forwards once more, keeping the states between
// chunks, and back through the chunks with dS, the cotangent of the state after each. With U, A = tril(Q K^T D) and G:
//
//   dU = A^T dO + (after K) dS                   dA = tril(dO U^T)
//   dQ = up_to (dO S^T) + (dA D) K               dK = after (U dS^T) + (dA D)^T Q
//   dV = dU, or with beta, where W = V - up_to K S and N = tril(K K^T D, -1), U = beta (W - N U):
//   dV = G = beta (dU - N^T G)                   dN = -tril(G U^T, -1), and up_to K has -G S^T
//   dS' = total dS + (up_to Q)^T dO - (up_to K)^T G
//
// A gate's gradient is what reads across it less what is read later, per channel: of every later token of the chunk
// q dq + k dk as a reader - k dk as what was written, and of the state after it S dS.

class RecurBackward {
 public:
  RecurBackward(const Recurrence& problem, Arena arena)
      : p(problem),
        chunk_(p, arena),
        width_(chunk_.width),
        v_width_(chunk_.v_width),
        stride_(chunk_.stride),
        state_floats_(int64_t{width_} * (v_width_ + 1)),
        chunks_(count_chunks(p)),
        segment_(chunks_ * state_floats_ <= kSegment ? chunks_ : kSegment / state_floats_ + 1),
        states_(arena.take((segment_ + 1) * state_floats_)),
        starts_(arena.take(segment_ < chunks_ ? (chunks_ / segment_ + 1) * state_floats_ : 0)),
        d_state_(arena.take(state_floats_)),
        columns_(arena.take(int64_t{v_width_} * width_)),
        d_columns_(arena.take(int64_t{v_width_} * width_)),
        u_columns_(arena.take(int64_t{v_width_} * stride_)),
        queries_(rows(arena)),
        decayed_(rows(arena)),
        dq_(rows(arena)),
        written_(rows(arena)),
        dk_(rows(arena)),
        du_(arena.take(int64_t{stride_} * v_width_)),
        do_(arena.take(int64_t{stride_} * v_width_)),
        pairs_(arena.take(int64_t{stride_} * stride_)),
        d_pairs_(arena.take(int64_t{stride_} * stride_)),
        d_weight_(arena.take(stride_)),
        reads_(arena.take(int64_t{stride_} * chunk_.gate_width)),
        kept_(arena.take(chunk_.gate_width)),
        bytes_(arena.bytes()) {}

  size_t bytes() const { return bytes_; }

  void run(const RecurGradients& gradients, int32_t sequence, int32_t head) {
    g_ = &gradients;
    of_ = &p.sequences[sequence];
    head_ = head;
    const int64_t index = int64_t{sequence} * p.heads + head;
    const int64_t size = int64_t{p.head_dim} * p.v_head_dim;
    d_bonus_ = g_->d_bonus == nullptr ? nullptr : g_->d_bonus + index * p.head_dim;
    for (int32_t d = 0; d_bonus_ != nullptr && d < p.head_dim; ++d) d_bonus_[d] = 0;
    const auto pack = [&](const float* state, const float* norm, float* to) {
      pack_state(state == nullptr ? nullptr : state + index * size, p, to);
      for (int32_t d = 0; d < width_; ++d)
        norm_of(to)[d] = norm == nullptr || d >= p.head_dim ? 0 : norm[index * p.head_dim + d];
    };
    pack(g_->d_state, g_->d_norm, d_state_);
    const int32_t chunks = static_cast<int32_t>((of_->length + p.chunk - 1) / p.chunk);
    if (p.causal) {
      pack(p.initial, p.initial_norm, states_);
      back(chunks);
    } else {
      pack(p.state, p.norm, states_);
      for (int32_t i = 0; i < chunks; ++i) back_full(i, true);
      for (int32_t i = 0; i < chunks; ++i) back_full(i, false);
    }
    if (g_->d_initial != nullptr) unpack_state(d_state_, p, g_->d_initial + index * size);
    for (int32_t d = 0; g_->d_initial_norm != nullptr && d < p.head_dim; ++d)
      g_->d_initial_norm[index * p.head_dim + d] = norm_of(d_state_)[d];
  }

 private:
  // States kept at a time, in floats: beyond that, only one of so many, and those between are computed once more.
  static constexpr int64_t kSegment = 1 << 20;

  const Recurrence& p;
  Chunk chunk_;
  const int32_t width_, v_width_, stride_;
  const int64_t state_floats_, chunks_, segment_;
  float *states_, *starts_, *d_state_, *columns_, *d_columns_, *u_columns_;
  float *queries_, *decayed_, *dq_, *written_, *dk_, *du_, *do_, *pairs_, *d_pairs_, *d_weight_, *reads_, *kept_;
  size_t bytes_;
  const RecurGradients* g_ = nullptr;
  const Stretch* of_ = nullptr;
  float* d_bonus_ = nullptr;
  int32_t head_ = 0;

  float* rows(Arena& arena) const { return arena.take(int64_t{stride_} * width_); }
  static int64_t count_chunks(const Recurrence& p) {
    int64_t longest = 1;
    for (int32_t i = 0; i < p.num_sequences; ++i)
      if (p.sequences[i].length > longest) longest = p.sequences[i].length;
    return p.causal ? (longest - 1) / p.chunk + 1 : 1;
  }

  // The normaliser's state lies behind the state.
  float* norm_of(float* state) const { return state + int64_t{width_} * v_width_; }

  // The tokens of a chunk, none if there is no such chunk.
  Stretch chunk(int64_t i) const {
    const int64_t most = p.chunk, first = i * most, left = i < 0 ? 0 : of_->length - first;
    return {of_->batch, of_->first + first, left < most ? left : most};
  }

  void load_chunk(int64_t i) {
    const Stretch tokens = chunk(i);
    chunk_.load_keys(tokens.batch, head_, tokens.first, static_cast<int32_t>(tokens.length));
  }

  // What chunk i will read: in `parts` of which the first is fetched now.
  void fetch(int64_t i, int32_t parts, bool queries) {
    const Stretch next = chunk(i);
    const auto rows = static_cast<int32_t>(next.length);
    Upcoming& upcoming = chunk_.upcoming;
    upcoming.begin(parts);
    upcoming.add(p.k, p.dtype, next.batch, chunk_.key_head(head_), next.first, rows, p.head_dim);
    upcoming.add(p.v, p.dtype, next.batch, head_, next.first, rows, p.v_head_dim);
    if (queries) {
      const int32_t reader = head_ * p.readers();
      upcoming.add(p.q, p.dtype, next.batch, reader * p.q_heads / p.outputs(), next.first, rows, p.head_dim);
      upcoming.add(g_->d_o, p.dtype, next.batch, reader, next.first, rows, p.v_head_dim);
    }
    upcoming.part();
  }

  void copy_state(const float* from, float* to) const {
    for (int64_t i = 0; i < state_floats_; ++i) to[i] = from[i];
  }

  void step(int64_t i, const float* from, float* to) {
    load_chunk(i);
    fetch(i + 1, 2, false);
    chunk_.solve(from);
    chunk_.advance(from, to);
    if (!p.normalize) return;
    const float* before = from + int64_t{width_} * v_width_;
    for (int32_t d = 0; d < width_; ++d) norm_of(to)[d] = before[d];
    chunk_.advance_norm(norm_of(to));
  }

  void back(int64_t chunks) {
    const int64_t segments = chunks == 0 ? 0 : (chunks - 1) / segment_ + 1;
    for (int64_t s = 0; s + 1 < segments; ++s) {
      copy_state(states_, starts_ + s * state_floats_);
      for (int64_t i = 0; i < segment_; ++i) step(s * segment_ + i, states_, states_);
    }
    for (int64_t s = segments; s-- > 0;) {
      if (s + 1 < segments) copy_state(starts_ + s * state_floats_, states_);
      const int64_t first = s * segment_, count = chunks - first < segment_ ? chunks - first : segment_;
      for (int64_t i = 0; i < count; ++i)
        step(first + i, states_ + i * state_floats_, states_ + (i + 1) * state_floats_);
      for (int64_t i = count; i-- > 0;)
        back_chunk(first + i, states_ + i * state_floats_, states_ + (i + 1) * state_floats_);
    }
  }

  // Chunk i, between the states `s` and `after`.
  void back_chunk(int64_t i, float* s, float* after) {
    load_chunk(i);
    fetch(i - 1, 8, true);
    chunk_.solve(s);
    const int32_t n = chunk_.n;
    transpose(s, v_width_, p.head_dim, v_width_, columns_, width_);
    transpose(d_state_, v_width_, p.head_dim, v_width_, d_columns_, width_);
    transpose(chunk_.u.data, chunk_.u.stride, n, v_width_, u_columns_, padded(n));
    if (g_->d_gate != nullptr) keep_gates(after);
    to_writers();
    if (p.normalize)
      for (int32_t d = 0; d < width_; d += kLanes)
        if (chunk_.decays)
          store(norm_of(d_state_) + d, load(norm_of(d_state_) + d) *
                                           (chunk_.in_channels() ? load(chunk_.e.total + d) : set1(*chunk_.e.total)));
    const bool apart = chunk_.delta || p.bonus != nullptr;  // keys are not only written
    for (int32_t r = 0; apart && r < n * width_; ++r) dk_[r] = 0;
    for (int32_t r = 0; r < n * chunk_.gate_width; ++r) reads_[r] = 0;
    for (int32_t reader = 0; reader < p.readers(); ++reader)
      back_reader(head_ * p.readers() + reader, s, reader == 0 ? chunk_.total() : &kOne,
                  reader == 0 ? chunk_.total_step() : 0);
    if (chunk_.delta) back_delta();
    if (g_->d_gate != nullptr) write_gates();
    for (int32_t i = 0; apart && i < n * width_; i += kLanes) store(written_ + i, load(written_ + i) + load(dk_ + i));
    write_keys();
    write_values(du_);
  }

  // Without order: queries read the last state, then keys write to it.
  void back_full(int64_t i, bool queries) {
    load_chunk(i);
    chunk_.solve(nullptr);
    if (queries) {
      transpose(states_, v_width_, p.head_dim, v_width_, columns_, width_);
      for (int32_t reader = 0; reader < p.readers(); ++reader)
        back_reader(head_ * p.readers() + reader, states_, &kOne, 0);
      return;
    }
    transpose(d_state_, v_width_, p.head_dim, v_width_, d_columns_, width_);
    to_writers();
    write_keys();
    write_values(du_);
  }

  // Through S' = ... + (after K)^T U.
  void to_writers() {
    const int32_t n = chunk_.n;
    chunk_.upcoming.part();
    product<false>(chunk_.k_after.data, chunk_.k_after.stride, d_state_, v_width_, n, p.head_dim, v_width_,
                   {du_, v_width_});
    chunk_.upcoming.part();
    product<false>(chunk_.u.data, chunk_.u.stride, d_columns_, width_, n, p.v_head_dim, width_, {written_, width_});
    if (p.normalize)
      for (int32_t r = 0; r < n; ++r)
        for (int32_t d = 0; d < width_; d += kLanes)
          store(written_ + r * width_ + d, load(written_ + r * width_ + d) + load(norm_of(d_state_) + d));
    decay(written_, chunk_.e.after);
  }

  void decay(float* x, const float* factor) const { chunk_.times({x, width_}, factor, x); }

  // One head of queries.
  void back_reader(int32_t head, float* s, const float* total, int32_t total_step) {
    const int32_t n = chunk_.n;
    const bool lag = p.bonus != nullptr;
    const int32_t q_head = head * p.q_heads / p.outputs();
    const Rows q = mapped_rows(p, p.q, chunk_.batch, q_head, chunk_.token, n, queries_);
    const Rows reach = p.causal ? chunk_.times(q, chunk_.reading(), decayed_) : q;
    if (p.causal) chunk_.pairs(q, false, pairs_);
    read_cotangent(head, reach, s);
    const Rows d_o{do_, v_width_};
    const bool exact =
        !chunk_.finite() || !is_finite(d_o, n, v_width_) || !is_finite(q, n, width_) || !is_finite(chunk_.k, n, width_);
    chunk_.upcoming.part();
    product<false>(do_, v_width_, columns_, width_, n, p.v_head_dim, width_, {dq_, width_});
    if (p.normalize)
      for (int32_t r = 0; r < n; ++r)
        for (int32_t d = 0; d < width_; d += kLanes)
          store(dq_ + r * width_ + d, fma(set1(d_weight_[r]), load(norm_of(s) + d), load(dq_ + r * width_ + d)));
    if (p.causal) {
      product<true>(pairs_, stride_, do_, v_width_, n, n, v_width_, added_to(du_, v_width_), {Terms::from, exact});
      chunk_.upcoming.part();
      lower_product(d_o, u_columns_, n, p.v_head_dim, 1, d_pairs_, stride_);
      if (p.normalize)
        for (int32_t r = 0; r < n; ++r)
          for (int32_t c = 0; c <= r; c += kLanes)
            store(d_pairs_ + r * stride_ + c, load(d_pairs_ + r * stride_ + c) + set1(d_weight_[r]));
      if (!chunk_.in_channels()) decay_lower(d_pairs_, stride_, n, chunk_.decays ? chunk_.e.each : nullptr, false);
      decay(dq_, chunk_.reading());
      to_rows(d_pairs_, chunk_.k, !lag, exact, dq_);
      chunk_.upcoming.part();
      to_columns(d_pairs_, q, !lag, exact, written_);
      if (g_->d_gate != nullptr) along(q, dq_, 1, reads_);
      if (lag) back_bonus(q);
    }
    chunk_.upcoming.part();
    Sum sum{d_state_, v_width_, total, total_step};
    product<true>(reach.data, reach.stride, do_, v_width_, p.head_dim, n, v_width_, sum);
    if (p.normalize)
      for (int32_t r = 0; r < n; ++r)
        for (int32_t d = 0; d < width_; d += kLanes)
          store(norm_of(d_state_) + d,
                fma(set1(d_weight_[r]), load(reach.data + r * reach.stride + d), load(norm_of(d_state_) + d)));
    write_rows(p, tokens(), p.q, q_head, g_->dq, head, g_->dq_dtype, dq_, queries_);
  }

  // The cotangents of what a head of queries reads, and (d_weight_) of the sums of its weights.
  void read_cotangent(int32_t head, Rows reach, float* s) {
    const int32_t n = chunk_.n;
    const Rows rows = rows_of(g_->d_o, p.dtype, chunk_.batch, head, chunk_.token, n, p.v_head_dim, v_width_, do_);
    for (int32_t r = 0; r < n; ++r) {
      float factor = p.scale;
      if (p.normalize) {
        float total = dot(reach.data + r * reach.stride, norm_of(s), width_);
        for (int32_t c = 0; p.causal && c <= r; ++c) total += pairs_[r * stride_ + c];
        factor = over(p.scale, total, p.epsilon);
      }
      for (int32_t c = 0; c < v_width_; c += kLanes)
        store(do_ + r * v_width_ + c, load(rows.data + r * rows.stride + c) * set1(factor));
      d_weight_[r] = 0;
    }
    if (!p.normalize) return;
    with_elements(p.dtype, [&](auto* type) {
      for (int32_t r = 0; r < n; ++r) {
        const auto* o = row_of<decltype(type)>(p.o, chunk_.batch, head, chunk_.token + r);
        for (int32_t c = 0; c < p.v_head_dim; ++c)
          d_weight_[r] -= widen_one(o[c * p.o.stride[3]]) * do_[r * v_width_ + c];
      }
    });
  }

  void to_rows(const float* w, Rows right, bool diagonal, bool exact, float* to) const {
    const int32_t n = chunk_.n;
    if (chunk_.in_channels())
      return channels_to_rows(w, stride_, right, chunk_.e.each, n, width_, diagonal, p.bonus != nullptr, to);
    product<false>(w, stride_, right.data, right.stride, n, n, width_, added_to(to, width_), {Terms::up_to, exact});
  }
  void to_columns(const float* w, Rows left, bool diagonal, bool exact, float* to) const {
    const int32_t n = chunk_.n;
    if (chunk_.in_channels())
      return channels_to_columns(w, stride_, left, chunk_.e.each, n, width_, diagonal, p.bonus != nullptr, to);
    product<true>(w, stride_, left.data, left.stride, n, n, width_, added_to(to, width_), {Terms::from, exact});
  }

  // What a token reads of itself; the bonus's share is no gate's.
  void back_bonus(Rows q) {
    for (int32_t r = 0; r < chunk_.n; ++r) {
      const float w = d_pairs_[r * stride_ + r];
      for (int32_t d = 0; d < p.head_dim; ++d) {
        const float query = q.data[r * q.stride + d], key = chunk_.k.data[r * chunk_.k.stride + d];
        dq_[r * width_ + d] += w * chunk_.bonus()[d] * key;
        dk_[r * width_ + d] += w * chunk_.bonus()[d] * query;
        if (d_bonus_ != nullptr) d_bonus_[d] += w * query * key;
      }
    }
  }

  // From the gradient of U to that of what it solves; dV ends in du_.
  void back_delta() {
    const int32_t n = chunk_.n;
    const float *corrections = chunk_.corrections(), *beta = chunk_.beta();
    float* d_beta = g_->d_beta == nullptr
                        ? nullptr
                        : g_->d_beta + (int64_t{chunk_.batch} * p.heads + head_) * p.tokens + chunk_.token;
    for (int32_t r = (n - 1) / 16 * 16; r >= 0; r -= 16) {
      const int32_t end = n - r < 16 ? n : r + 16;
      if (end < n)
        product<true>(corrections + end * stride_ + r, stride_, du_ + end * v_width_, v_width_, end - r, n - end,
                      v_width_, added_to(du_ + r * v_width_, v_width_, -1));
      for (int32_t row = end - 1; row >= r; --row) {
        float* du = du_ + row * v_width_;
        if (d_beta != nullptr) d_beta[row] = dot(du, chunk_.unscaled() + row * v_width_, v_width_);
        for (int32_t c = 0; c < v_width_; c += kLanes) store(du + c, load(du + c) * set1(beta[row]));
        for (int32_t s = r; s < row; ++s)
          for (int32_t c = 0; c < v_width_; c += kLanes)
            store(du_ + s * v_width_ + c,
                  fma(set1(-corrections[row * stride_ + s]), load(du + c), load(du_ + s * v_width_ + c)));
      }
    }
    const Rows d_values{du_, v_width_};
    const bool exact = !chunk_.finite() || !is_finite(d_values, n, v_width_) || !is_finite(chunk_.k, n, width_);
    Sum sum{dq_, width_};  // what keys read, where queries' have been written already
    sum.sign = -1;
    product<false>(du_, v_width_, columns_, width_, n, p.v_head_dim, width_, sum);
    decay(dq_, chunk_.e.up_to);
    lower_product(d_values, u_columns_, n, p.v_head_dim, -1, d_pairs_, stride_);
    if (!chunk_.in_channels()) decay_lower(d_pairs_, stride_, n, chunk_.decays ? chunk_.e.each : nullptr, true);
    to_rows(d_pairs_, chunk_.k, false, exact, dq_);
    to_columns(d_pairs_, chunk_.k, false, exact, written_);
    if (g_->d_gate != nullptr) along(chunk_.k, dq_, 1, reads_);
    for (int32_t i = 0; i < n * width_; i += kLanes) store(dk_ + i, load(dk_ + i) + load(dq_ + i));
    product<true>(chunk_.k_up_to.data, chunk_.k_up_to.stride, du_, v_width_, p.head_dim, n, v_width_,
                  added_to(d_state_, v_width_, -1));
  }

  // to[r] += sign * x_r y_r, per channel or summed.
  void along(Rows x, const float* y, float sign, float* to) const {
    for (int32_t r = 0; r < chunk_.n; ++r) {
      const float* row = x.data + r * x.stride;
      if (!chunk_.in_channels()) {
        to[r] += sign * dot(row, y + r * width_, width_);
        continue;
      }
      for (int32_t d = 0; d < width_; d += kLanes)
        store(to + r * width_ + d,
              fma(load(row + d) * set1(sign), load(y + r * width_ + d), load(to + r * width_ + d)));
    }
  }

  // S dS of the state after the chunk: every gate of the chunk has a share in all of it.
  void keep_gates(float* after) {
    for (int32_t d = 0; d < chunk_.gate_width; ++d) kept_[d] = 0;
    for (int32_t d = 0; d < p.head_dim; ++d) {
      float sum = dot(after + d * v_width_, d_state_ + d * v_width_, v_width_);
      if (p.normalize) sum += norm_of(after)[d] * norm_of(d_state_)[d];
      kept_[chunk_.in_channels() ? d : 0] += sum;
    }
  }

  void write_gates() {
    const bool lag = p.bonus != nullptr, channels = p.channels;
    const int32_t width = chunk_.gate_width, out = channels ? p.head_dim : 1;
    float* to = g_->d_gate + ((int64_t{chunk_.batch} * p.heads + head_) * p.tokens + chunk_.token) * out;
    for (int32_t r = chunk_.n - 1; r >= 0; --r) {
      const float *key = chunk_.k.data + r * chunk_.k.stride, *written = written_ + r * width_;
      float all = 0;
      for (int32_t d = 0; d < width; ++d) {
        if (!lag) kept_[d] += reads_[r * width + d];
        kept_[d] -= chunk_.in_channels() ? key[d] * written[d] : dot(key, written, width_);
        // Nothing crosses a gate that forgets everything: not even what rounding left of sums that cancel.
        if (chunk_.e.each[r * width + d] == 0) kept_[d] = 0;
        if (channels && d < out) to[r * out + d] = kept_[d];
        all += kept_[d];
        if (lag) kept_[d] += reads_[r * width + d];
      }
      if (!channels) to[r] = all;
    }
  }

  Stretch tokens() const { return {chunk_.batch, chunk_.token, chunk_.n}; }

  void write_keys() {
    write_rows(p, tokens(), p.k, head_ / (p.heads / p.k_heads), g_->dk, head_, g_->dk_dtype, written_, queries_);
  }

  void write_values(const float* dv) {
    with_elements(p.dtype, [&](auto* type) {
      for (int32_t r = 0; r < chunk_.n; ++r)
        narrow_row(row_of<decltype(type)>(g_->dv, chunk_.batch, head_, chunk_.token + r), g_->dv.stride[3],
                   dv + r * v_width_, p.v_head_dim, 1);
    });
  }
};
