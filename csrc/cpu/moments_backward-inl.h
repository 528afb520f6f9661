// The gradients of MomentForward. Moments only ever grow, so queries are followed forwards, with the moments of keys,
// and keys backwards, with those of queries: nothing is kept between chunks but two numbers for each query.

class MomentBackward {
 public:
  MomentBackward(const Recurrence& problem, Arena arena)
      : p(problem),
        chunk_(p, arena),
        moments_(chunk_.moments(arena)),
        d_moments_(chunk_.moments(arena)),
        do_(arena.take(int64_t{chunk_.stride} * chunk_.v_width)),
        dv_(arena.take(int64_t{chunk_.stride} * chunk_.v_width)),
        dx_(arena.take(int64_t{chunk_.stride} * chunk_.width)),
        d_pairs_(arena.take(int64_t{chunk_.stride} * chunk_.stride)),
        slopes_(arena.take(int64_t{chunk_.stride} * chunk_.stride)),
        dx_columns_(arena.take(int64_t{chunk_.stride} * chunk_.width)),
        do_columns_(arena.take(int64_t{chunk_.v_width} * chunk_.stride)),
        v_columns_(arena.take(int64_t{chunk_.v_width} * chunk_.stride)),
        raw_(arena.take(int64_t{chunk_.stride} * chunk_.width)),
        factors_(arena.take(longest(p) * p.readers())),
        weights_(arena.take(longest(p) * p.readers())),
        bytes_(arena.bytes()) {}

  size_t bytes() const { return bytes_; }

  void run(const RecurGradients& gradients, int32_t sequence, int32_t head) {
    g_ = &gradients;
    of_ = &p.sequences[sequence];
    head_ = head;
    const int64_t index = int64_t{sequence} * p.heads + head, rows = p.features();
    const auto at = [&](auto* x, int64_t size) { return x == nullptr ? nullptr : x + index * size; };
    const float *d_state = at(g_->d_state, rows * p.v_head_dim), *d_norm = at(g_->d_norm, rows);
    if (p.causal)
      chunk_.pack(at(p.initial, rows * p.v_head_dim), at(p.initial_norm, rows), false, moments_);
    else
      chunk_.pack(at(p.state, rows * p.v_head_dim), at(p.norm, rows), false, moments_);
    // The gradient of a packed feature: what both of its places have.
    chunk_.pack(d_state, d_norm, true, d_moments_);
    const int64_t chunks = (of_->length + p.chunk - 1) / p.chunk;
    for (int64_t i = 0; i < chunks; ++i) {
      take(i);
      each_reader([&](int32_t reader) { back_queries(reader); });
      if (p.causal)
        chunk_.write(moments_, kPlain, chunk_.keys, chunk_.v, nullptr);
      else
        each_reader([&](int32_t reader) { write_queries(reader); });
    }
    for (int64_t i = chunks; i-- > 0;) {
      take(i);
      back_keys();
    }
    if (g_->d_initial != nullptr) unpack_initial(index, d_state, d_norm);
  }

 private:
  const Recurrence& p;
  MomentChunk chunk_;
  Moments moments_, d_moments_;
  float *do_, *dv_, *dx_, *d_pairs_, *slopes_, *dx_columns_, *do_columns_, *v_columns_, *raw_, *factors_, *weights_;
  size_t bytes_;
  const RecurGradients* g_ = nullptr;
  const Stretch* of_ = nullptr;
  int32_t head_ = 0;
  int64_t token_ = 0;  // of the sequence

  static int64_t longest(const Recurrence& p) {
    int64_t most = 1;
    for (int32_t i = 0; i < p.num_sequences; ++i)
      if (p.sequences[i].length > most) most = p.sequences[i].length;
    return most;
  }

  void take(int64_t i) {
    token_ = i * p.chunk;
    const int64_t left = of_->length - token_;
    chunk_.load_keys(*of_, head_, of_->first + token_, static_cast<int32_t>(left < p.chunk ? left : p.chunk));
    transpose(chunk_.v.data, chunk_.v.stride, chunk_.n, chunk_.v_width, v_columns_, padded(chunk_.n));
  }

  template <class F>
  void each_reader(F f) {
    for (int32_t reader = 0; reader < p.readers(); ++reader) f(reader);
  }
  int32_t head_of(int32_t reader) const { return head_ * p.readers() + reader; }
  // 1 over the sum of weights, and the gradient of that sum, of the chunk's queries.
  float* factors(int32_t reader) const { return factors_ + reader * longest(p) + token_; }
  float* weights(int32_t reader) const { return weights_ + reader * longest(p) + token_; }

  // do_: the cotangents of o times the factors.
  void read_cotangent(int32_t reader) {
    const MomentChunk& c = chunk_;
    const Rows rows =
        rows_of(g_->d_o, p.dtype, of_->batch, head_of(reader), of_->first + token_, c.n, p.v_head_dim, c.v_width, do_);
    scale_rows(rows, factors(reader), c.n, c.v_width, do_);
  }

  // d_pairs_: the gradients of x = q k^T.
  void back_pairs(int32_t reader) {
    MomentChunk& c = chunk_;
    lower_product({do_, c.v_width}, v_columns_, c.n, p.v_head_dim, 1, d_pairs_, c.stride);
    c.polynomial(c.pairs, true, slopes_);
    for (int32_t r = 0; r < c.n; ++r)
      for (int32_t s = 0; s < c.stride && s < r + 16; s += kLanes) {
        const vf slope = load(slopes_ + r * c.stride + s);
        const vf d = load(d_pairs_ + r * c.stride + s) + set1(weights(reader)[r]);
        store(d_pairs_ + r * c.stride + s, select(slope == vf{}, vf{}, slope * d));
      }
  }

  void back_queries(int32_t reader) {
    MomentChunk& c = chunk_;
    c.load_queries(head_of(reader));
    c.read_forms(moments_);
    if (p.causal) {
      c.products();
      c.polynomial(c.pairs, false, d_pairs_);
    }
    for (int32_t r = 0; r < c.n; ++r) {
      float total = c.weight(moments_, r);
      for (int32_t s = 0; p.causal && s <= r; ++s) total += d_pairs_[r * c.stride + s];
      factors(reader)[r] = over(1, total, p.epsilon);
    }
    read_cotangent(reader);
    with_elements(p.dtype, [&](auto* type) {
      for (int32_t r = 0; r < c.n; ++r) {
        const auto* o = row_of<decltype(type)>(p.o, of_->batch, head_of(reader), of_->first + token_ + r);
        float sum = 0;
        for (int32_t i = 0; i < p.v_head_dim; ++i) sum -= widen_one(o[i * p.o.stride[3]]) * do_[r * c.v_width + i];
        weights(reader)[r] = sum;
      }
    });
    transpose(do_, c.v_width, c.n, c.v_width, do_columns_, padded(c.n));
    c.back(moments_, c.reads, c.queries, do_columns_, weights(reader), dx_columns_, dx_);
    if (p.causal) {
      back_pairs(reader);
      product<false>(d_pairs_, c.stride, c.keys, c.width, c.n, c.n, c.width, added_to(dx_, c.width),
                     {Terms::up_to, !is_finite({c.keys, c.width}, c.n, c.width)});
    }
    for (int32_t i = 0; i < c.n * c.width; i += kLanes) store(dx_ + i, load(dx_ + i) * set1(p.scale));
    const int32_t head = head_of(reader);
    write_rows(p, {of_->batch, of_->first + token_, c.n}, p.q, head * p.q_heads / p.outputs(), g_->dq, head,
               g_->dq_dtype, dx_, raw_);
  }

  // The chunk's queries join the moments that later keys' gradients are read from.
  void write_queries(int32_t reader) {
    chunk_.load_queries(head_of(reader));
    read_cotangent(reader);
    chunk_.write(d_moments_, chunk_.reads, chunk_.queries, {do_, chunk_.v_width}, weights(reader));
  }

  void back_keys() {
    MomentChunk& c = chunk_;
    for (int32_t i = 0; i < c.n * c.v_width; ++i) dv_[i] = 0;
    c.read(d_moments_, kPlain, c.keys, dv_);
    c.back(d_moments_, kPlain, c.keys, v_columns_, nullptr, dx_columns_, dx_);
    if (p.causal)
      each_reader([&](int32_t reader) {
        write_queries(reader);
        const bool exact =
            !is_finite({do_, c.v_width}, c.n, c.v_width) || !is_finite({c.queries, c.width}, c.n, c.width);
        c.products();
        back_pairs(reader);
        c.polynomial(c.pairs, false, c.pairs);
        product<true>(c.pairs, c.stride, do_, c.v_width, c.n, c.n, c.v_width, added_to(dv_, c.v_width),
                      {Terms::from, exact});
        product<true>(d_pairs_, c.stride, c.queries, c.width, c.n, c.n, c.width, added_to(dx_, c.width),
                      {Terms::from, exact});
      });
    write_rows(p, {of_->batch, of_->first + token_, c.n}, p.k, head_ / (p.heads / p.k_heads), g_->dk, head_,
               g_->dk_dtype, dx_, raw_);
    with_elements(p.dtype, [&](auto* type) {
      for (int32_t r = 0; r < c.n; ++r)
        narrow_row(row_of<decltype(type)>(g_->dv, of_->batch, head_, of_->first + token_ + r), g_->dv.stride[3],
                   dv_ + r * c.v_width, p.v_head_dim, 1);
    });
  }

  // Both places of a feature have what was read of it by half; the cotangents of the last state are their own.
  void unpack_initial(int64_t index, const float* d_state, const float* d_norm) {
    MomentChunk& c = chunk_;
    c.pack(d_state, d_norm, true, moments_);
    const int64_t floats = Moments::floats(c.dim, c.v_width, c.order);
    for (int64_t i = 0; i < floats; ++i) d_moments_.values[i] -= moments_.values[i];
    c.unpack_gradient(d_moments_, d_state, d_norm, g_->d_initial + index * p.features() * p.v_head_dim,
                      g_->d_initial_norm == nullptr ? nullptr : g_->d_initial_norm + index * p.features());
  }
};

inline size_t recur_bytes(const Recurrence& p) {
  return p.order > 0 ? MomentForward(p, Arena(nullptr)).bytes() : RecurForward(p, Arena(nullptr)).bytes();
}
inline void recur_forward(const Recurrence& p, int32_t sequence, int32_t head, float* workspace) {
  p.order > 0 ? MomentForward(p, Arena(workspace)).run(sequence, head)
              : RecurForward(p, Arena(workspace)).run(sequence, head);
}
inline size_t recur_backward_bytes(const Recurrence& p) {
  return p.order > 0 ? MomentBackward(p, Arena(nullptr)).bytes() : RecurBackward(p, Arena(nullptr)).bytes();
}
inline void recur_backward(const Recurrence& p, const RecurGradients& g, int32_t sequence, int32_t head,
                           float* workspace) {
  p.order > 0 ? MomentBackward(p, Arena(workspace)).run(g, sequence, head)
              : RecurBackward(p, Arena(workspace)).run(g, sequence, head);
}

inline constexpr RecurKernel kRecurKernel{recur_bytes, recur_forward, recur_backward_bytes, recur_backward};
