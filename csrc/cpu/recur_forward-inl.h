// The forward pass of a recurrence, for one state head of one sequence.

// o = scale * o / (scale * total + epsilon), 0 where that would divide by 0.
inline float over(float scale, float total, float epsilon) {
  const float sum = scale * total + epsilon;
  return sum == 0 ? 0 : scale / sum;
}

// One state's rows [head_dim, v_head_dim] to or from rows padded to whole vectors.
inline void pack_state(const float* from, const Recurrence& p, float* to) {
  const int32_t v_width = padded(p.v_head_dim);
  for (int32_t d = 0; d < padded(p.head_dim); ++d)
    for (int32_t c = 0; c < v_width; ++c)
      to[d * v_width + c] = from != nullptr && d < p.head_dim && c < p.v_head_dim ? from[d * p.v_head_dim + c] : 0;
}
inline void unpack_state(const float* from, const Recurrence& p, float* to) {
  for (int32_t d = 0; d < p.head_dim; ++d)
    for (int32_t c = 0; c < p.v_head_dim; ++c) to[d * p.v_head_dim + c] = from[d * padded(p.v_head_dim) + c];
}

class RecurForward {
 public:
  RecurForward(const Recurrence& problem, Arena arena)
      : p(problem),
        chunk_(p, arena),
        state_(arena.take(int64_t{chunk_.width} * chunk_.v_width)),
        norm_(arena.take(chunk_.width)),
        queries_(arena.take(int64_t{chunk_.stride} * chunk_.width)),
        decayed_(arena.take(int64_t{chunk_.stride} * chunk_.width)),
        pairs_(arena.take(int64_t{chunk_.stride} * chunk_.stride)),
        out_(arena.take(int64_t{chunk_.stride} * chunk_.v_width)),
        bytes_(arena.bytes()) {}

  size_t bytes() const { return bytes_; }

  void run(int32_t sequence, int32_t head) {
    const Stretch& of = p.sequences[sequence];
    const int64_t index = int64_t{sequence} * p.heads + head;
    const int64_t size = int64_t{p.head_dim} * p.v_head_dim;
    const float* initial = p.initial == nullptr ? nullptr : p.initial + index * size;
    float* result = p.state + index * size;
    // Where rows are whole vectors, the state grows where it will be returned.
    const bool in_place = p.v_head_dim == chunk_.v_width;
    float* state = in_place ? result : state_;
    if (!in_place) {
      pack_state(initial, p, state);
      initial = state;
    }
    if (p.normalize)
      for (int32_t d = 0; d < chunk_.width; ++d)
        norm_[d] = d < p.head_dim && p.initial_norm != nullptr ? p.initial_norm[index * p.head_dim + d] : 0;

    const float* before = initial;
    const int32_t most = p.chunk;
    const auto tokens = [&](int64_t t) { return static_cast<int32_t>(of.length - t < most ? of.length - t : most); };
    const auto each_chunk = [&](const auto& what) {
      for (int64_t t = 0; t < of.length; t += most) {
        chunk_.load_keys(of.batch, head, of.first + t, tokens(t));
        fetch(of.batch, head, of.first + t + most, tokens(t + most));
        what();
      }
    };
    const auto advance = [&] {
      chunk_.advance(before, state);
      if (p.normalize) chunk_.advance_norm(norm_);
      before = state;
    };
    each_chunk([&] {
      chunk_.solve(before);
      if (p.causal) read(before);
      advance();
    });
    if (of.length == 0 && in_place)
      for (int64_t i = 0; i < size; ++i) state[i] = initial == nullptr ? 0 : initial[i];
    if (!p.causal) each_chunk([&] { read(state); });
    if (!in_place) unpack_state(state, p, result);
    if (p.normalize)
      for (int32_t d = 0; d < p.head_dim; ++d) p.norm[index * p.head_dim + d] = norm_[d];
  }

 private:
  const Recurrence& p;
  Chunk chunk_;
  float *state_, *norm_, *queries_, *decayed_, *pairs_, *out_;
  size_t bytes_;

  // Of the next chunk, if there is one.
  void fetch(int32_t batch, int32_t head, int64_t token, int32_t rows) {
    Upcoming& upcoming = chunk_.upcoming;
    upcoming.begin(4);
    upcoming.add(p.k, p.dtype, batch, chunk_.key_head(head), token, rows, p.head_dim);
    upcoming.add(p.v, p.dtype, batch, head, token, rows, p.v_head_dim);
    upcoming.add(p.q, p.dtype, batch, head * p.readers() * p.q_heads / p.outputs(), token, rows, p.head_dim);
    upcoming.part();
  }

  // What the chunk's queries read of the state before it, and of the chunk.
  void read(const float* state) {
    const int32_t readers = p.readers(), n = chunk_.n;
    for (int32_t reader = 0; reader < readers; ++reader) {
      const int32_t head = chunk_.head * readers + reader;
      const Rows q = mapped_rows(p, p.q, chunk_.batch, head * p.q_heads / p.outputs(), chunk_.token, n, queries_);
      const Rows reach = p.causal ? chunk_.times(q, chunk_.reading(), decayed_) : q;
      if (p.causal) chunk_.pairs(q, false, pairs_);
      const bool direct = !p.normalize && p.dtype == DType::f32 && p.o.stride[3] == 1 && p.v_head_dim == chunk_.v_width;
      float* o = direct ? row_of<float*>(p.o, chunk_.batch, head, chunk_.token) : out_;
      const int64_t stride = direct ? p.o.stride[2] : chunk_.v_width;
      Sum sum{o, stride};
      sum.sign = p.normalize ? 1 : p.scale;
      chunk_.upcoming.part();
      const Operands own{pairs_, chunk_.stride, chunk_.u.data, chunk_.u.stride, n, Terms::up_to};
      const Operands past{
          reach.data, reach.stride, state, chunk_.v_width, p.head_dim, Terms::all, p.causal ? &own : nullptr};
      product<false>(state == nullptr ? own : past, n, chunk_.v_width, sum, p.causal && !chunk_.finite());
      if (direct) continue;
      with_elements(p.dtype, [&](auto* type) {
        for (int32_t r = 0; r < n; ++r) {
          const float factor = p.normalize ? over(p.scale, weight(reach, r), p.epsilon) : 1;
          narrow_row(row_of<decltype(type)>(p.o, chunk_.batch, head, chunk_.token + r), p.o.stride[3],
                     out_ + r * chunk_.v_width, p.v_head_dim, factor);
        }
      });
    }
  }

  // The sum of what row r's values are multiplied with.
  float weight(Rows reach, int32_t r) const {
    float total = dot(reach.data + r * reach.stride, norm_, chunk_.width);
    if (!p.causal) return total;
    vf sum{};
    for (int32_t s = 0; s <= r; s += kLanes) sum += load(pairs_ + r * chunk_.stride + s);
    return total + sum_of_lanes(sum);
  }
};
