// Attention by a polynomial, forwards, for one state head of one sequence.

class MomentForward {
 public:
  MomentForward(const Recurrence& problem, Arena arena)
      : p(problem),
        chunk_(p, arena),
        moments_(chunk_.moments(arena)),
        out_(arena.take(int64_t{chunk_.stride} * chunk_.v_width)),
        written_(arena.take(p.features())),
        read_(arena.take(p.features())),
        bytes_(arena.bytes()) {}

  size_t bytes() const { return bytes_; }

  void run(int32_t sequence, int32_t head) {
    const Stretch& of = p.sequences[sequence];
    const int64_t index = int64_t{sequence} * p.heads + head, rows = p.features();
    const auto at = [&](auto* x, int64_t size) { return x == nullptr ? nullptr : x + index * size; };
    const float* initial = at(p.initial, rows * p.v_head_dim);
    const float* initial_norm = at(p.initial_norm, rows);
    float *state = at(p.state, rows * p.v_head_dim), *norm = at(p.norm, rows);
    if (p.causal && of.length > 0 && of.length <= kFew && p.v_head_dim == chunk_.v_width)
      return steps(of, head, initial, initial_norm, state, norm);
    chunk_.pack(initial, initial_norm, false, moments_);
    const auto each_chunk = [&](const auto& what) {
      for (int64_t t = 0; t < of.length; t += p.chunk) {
        chunk_.load_keys(of, head, of.first + t,
                         static_cast<int32_t>(of.length - t < p.chunk ? of.length - t : p.chunk));
        what(of.first + t);
      }
    };
    each_chunk([&](int64_t token) {
      if (p.causal) read(of.batch, head, token);
      chunk_.write(moments_, kPlain, chunk_.keys, chunk_.v, nullptr);
    });
    if (!p.causal) each_chunk([&](int64_t token) { read(of.batch, head, token); });
    chunk_.unpack(moments_, initial, initial_norm, state, norm);
  }

 private:
  const Recurrence& p;
  MomentChunk chunk_;
  Moments moments_;
  float *out_, *written_, *read_;
  size_t bytes_;

  // Tokens, of which each reads and writes the state as it lies: that takes less than packing and unpacking it.
  static constexpr int64_t kFew = 4;
  static constexpr int64_t kLater = 2048;  // floats from what is computed to what is fetched
  static constexpr int kLineVecs = 16 / kLanes;  // vectors of a line

  void steps(const Stretch& of, int32_t head, const float* initial, const float* initial_norm, float* state,
             float* norm) {
    const int64_t rows = p.features();
    const Factors all{chunk_.reads.one, chunk_.reads.linear, chunk_.reads.square, chunk_.reads.square, 1};
    for (int64_t t = 0; t < of.length; ++t) {
      const float *from = t == 0 ? initial : state, *from_norm = t == 0 ? initial_norm : norm;
      chunk_.load_keys(of, head, of.first + t, 1);
      fill_rows(kPlain, chunk_.keys, written_);
      for (int64_t i = 0; i < rows; ++i) norm[i] = (from_norm == nullptr ? 0 : from_norm[i]) + written_[i];
      for (int32_t reader = 0; reader < p.readers(); ++reader) {
        chunk_.load_queries(head * p.readers() + reader);
        fill_rows(all, chunk_.queries, read_);
        if (reader == 0)
          step<true>(from, state);
        else
          step<false>(state, state);
        vf total{};
        int64_t i = 0;
        for (; i + kLanes <= rows; i += kLanes) total = fma(load(read_ + i), load(norm + i), total);
        float weight = sum_of_lanes(total);
        for (; i < rows; ++i) weight += read_[i] * norm[i];
        write_out(of.batch, head * p.readers() + reader, of.first + t, 0, over(1, weight, p.epsilon));
      }
    }
  }

  // The features of a token as the rows of a state are: 1, x, and all of x (x) x.
  void fill_rows(Factors a, const float* x, float* to) const {
    const auto row = [&](float factor) {
      int32_t d = 0;
      for (; d + kLanes <= p.head_dim; d += kLanes) store(to + d, set1(factor) * load(x + d));
      for (; d < p.head_dim; ++d) to[d] = factor * x[d];
      to += p.head_dim;
    };
    *to++ = a.one;
    row(a.linear);
    for (int32_t i = 0; p.order == 2 && i < p.head_dim; ++i) row(a.square * x[i]);
  }

  // out_ = what read_ reads of a state, to which (kWrite) written_ times the token's values are added before. Null is
  // a state of zeros.
  template <bool kWrite>
  void step(const float* from, float* to) const {
    int32_t column = 0;
    for (; column + 8 * kLanes <= p.v_head_dim; column += 8 * kLanes) step_columns<kWrite, 8>(from, to, column);
    for (; column + 4 * kLanes <= p.v_head_dim; column += 4 * kLanes) step_columns<kWrite, 4>(from, to, column);
    for (; column + 2 * kLanes <= p.v_head_dim; column += 2 * kLanes) step_columns<kWrite, 2>(from, to, column);
    for (; column < p.v_head_dim; column += kLanes) step_columns<kWrite, 1>(from, to, column);
  }
  template <bool kWrite, int kVecs>
  void step_columns(const float* from, float* to, int32_t column) const {
    const int64_t rows = p.features(), width = p.v_head_dim;
    vf value[kVecs], sum[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      value[v] = load(chunk_.v.data + column + v * kLanes);
      sum[v] = vf{};
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t later = i * width + column + kLater;
      for (int v = 0; v < kVecs; v += kLineVecs) {
        __builtin_prefetch(from + later + v * kLanes);
        if constexpr (kWrite) __builtin_prefetch(to + later + v * kLanes, 1);
      }
      const vf written = set1(written_[i]), read = set1(read_[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const int64_t at = i * width + column + v * kLanes;
        vf x = from == nullptr ? vf{} : load(from + at);
        if constexpr (kWrite) store(to + at, x = fma(written, value[v], x));
        sum[v] = fma(read, x, sum[v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(out_ + column + v * kLanes, sum[v]);
  }

  void write_out(int32_t batch, int32_t reader, int64_t token, int32_t row, float factor) const {
    with_elements(p.dtype, [&](auto* type) {
      narrow_row(row_of<decltype(type)>(p.o, batch, reader, token), p.o.stride[3], out_ + row * chunk_.v_width,
                 p.v_head_dim, factor);
    });
  }

  void read(int32_t batch, int32_t head, int64_t token) {
    MomentChunk& c = chunk_;
    for (int32_t reader = head * p.readers(); reader < (head + 1) * p.readers(); ++reader) {
      c.load_queries(reader);
      if (p.causal) {
        c.products();
        c.polynomial(c.pairs, false, c.pairs);
        product<false>(c.pairs, c.stride, c.v.data, c.v.stride, c.n, c.n, c.v_width, {out_, c.v_width},
                       {Terms::up_to, !c.finite});
      } else {
        for (int32_t i = 0; i < c.n * c.v_width; ++i) out_[i] = 0;
      }
      c.read(moments_, c.reads, c.queries, out_);
      c.read_forms(moments_);
      for (int32_t r = 0; r < c.n; ++r) {
        float total = c.weight(moments_, r);
        for (int32_t s = 0; p.causal && s <= r; ++s) total += c.pairs[r * c.stride + s];
        write_out(batch, reader, token + r, r, over(1, total, p.epsilon));
      }
    }
  }
};
