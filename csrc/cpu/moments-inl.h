// Attention by a polynomial of the dot product, f(x) = a0 + a1 x + a2 x^2, for one state head of one sequence: its sums
// factor into moments of the keys. A feature is 1, x_i, or x_i x_j for i <= j: the other half of x (x) x is the same.
// The moments of a chunk's past are its features' sums of values; within a chunk the weights are there one by one.

// Some features: 1 and x (`first` < 0), or x_i x_j for the i from first to end - 1.
struct Features {
  int32_t dim, order;
  int32_t first = -2, end = -1, count = 0;
  int64_t before = 0;  // rows of the blocks before this one

  static constexpr int32_t kMost = 128;  // but one i has to fit

  bool next() {
    before += padded(count);
    if (first == -2) {
      first = -1;
      end = 0;
      count = 1 + dim;
      return true;
    }
    if (order < 2 || end >= dim) return false;
    first = end;
    count = 0;
    do {
      count += dim - end;
      ++end;
    } while (end < dim && count + dim - end <= kMost);
    return true;
  }
  static int32_t most(int32_t dim) { return dim + 1 > kMost ? dim + 1 : kMost; }
  static int64_t rows(int32_t dim, int32_t order) {
    Features f{dim, order};
    while (f.next()) {
    }
    return f.before;
  }
};

// What features are multiplied with: of queries the polynomial's coefficients, pairs of channels counted twice.
// `share`: of a square, of what pairs have.
struct Factors {
  float one, linear, square, pair, share;
};
inline constexpr Factors kPlain{1, 1, 1, 1, 1};

// The features of tokens that lie side by side, as theirs will: x [channel][token], whole vectors of them.
__attribute__((noinline)) inline void fill_features(const Features& f, Factors a, const float* x, int32_t tokens,
                                                    float* to) {
  for (int32_t t = 0; t < tokens; t += kLanes) {
    float* row = to + t;
    const auto put = [&](vf feature) {
      store(row, feature);
      row += tokens;
    };
    const auto at = [&](int32_t channel) { return load(x + channel * tokens + t); };
    if (f.first < 0) {
      put(set1(a.one));
      for (int32_t i = 0; i < f.dim; ++i) put(set1(a.linear) * at(i));
    }
    for (int32_t i = f.first; i >= 0 && i < f.end; ++i) {
      const vf factor = set1(a.pair) * at(i);
      put(set1(a.square) * at(i) * at(i));
      for (int32_t j = i + 1; j < f.dim; ++j) put(factor * at(j));
    }
  }
}

// dx += what the gradients of features say of x; all as above.
__attribute__((noinline)) inline void back_features(const Features& f, Factors a, const float* x, const float* d,
                                                    int32_t tokens, float* dx) {
  for (int32_t t = 0; t < tokens; t += kLanes) {
    const float* row = d + t;
    const auto next = [&] {
      const vf slope = load(row);
      row += tokens;
      return slope;
    };
    const auto at = [&](int32_t channel) { return load(x + channel * tokens + t); };
    const auto add = [&](int32_t channel, vf slope, vf other) {
      float* to = dx + channel * tokens + t;
      store(to, fma(slope, other, load(to)));
    };
    if (f.first < 0) {
      next();
      for (int32_t i = 0; i < f.dim; ++i) add(i, next(), set1(a.linear));
    }
    for (int32_t i = f.first; i >= 0 && i < f.end; ++i) {
      const vf own = at(i);
      vf sum = next() * set1(2 * a.share * a.pair) * own;
      for (int32_t j = i + 1; j < f.dim; ++j) {
        const vf slope = next() * set1(a.pair);
        sum = fma(slope, at(j), sum);
        add(j, slope, own);
      }
      add(i, sum, set1(1));
    }
  }
}

// to = a x + b y, `count` floats.
inline void mix(float* to, float a, const float* x, float b, const float* y, int32_t count) {
  int32_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, fma(set1(a), load(x + c), set1(b) * load(y + c)));
  for (; c < count; ++c) to[c] = a * x[c] + b * y[c];
}

// The moments of some tokens: of their values, and of a value of 1: z0, z1 and the symmetric z2.
struct Moments {
  float *values, *one, *linear, *square;

  static int64_t floats(int32_t dim, int32_t v_width, int32_t order) {
    return Features::rows(dim, order) * v_width + 16 + padded(dim) * int64_t{padded(dim) + 1};
  }
  Moments(float* at, int32_t dim, int32_t v_width, int32_t order)
      : values(at), one(at + Features::rows(dim, order) * v_width), linear(one + 16), square(linear + padded(dim)) {}
};

class MomentChunk {
 public:
  const Recurrence& p;
  const int32_t dim, order, width, v_width, stride;
  const Factors reads;
  int32_t n = 0;
  float *keys, *queries, *features, *pairs, *columns, *forms;  // columns: of keys
  Rows v{};
  bool finite = true;

  MomentChunk(const Recurrence& problem, Arena& arena)
      : p(problem),
        dim(p.head_dim),
        order(p.order),
        width(padded(dim)),
        v_width(padded(p.v_head_dim)),
        stride(padded(p.chunk)),
        reads{p.coefficients[0], p.coefficients[1], p.coefficients[2], 2 * p.coefficients[2], 0.5f},
        keys(arena.take(int64_t{stride} * width)),
        queries(arena.take(int64_t{stride} * width)),
        features(arena.take(int64_t{stride} * Features::most(dim))),
        pairs(arena.take(int64_t{stride} * stride)),
        columns(arena.take(int64_t{stride} * width)),
        forms(arena.take(int64_t{stride} * width)),
        values_(arena.take(int64_t{stride} * v_width)),
        turned_(arena.take(int64_t{stride} * width)) {}

  Moments moments(Arena& arena) const {
    float* at = arena.take(Moments::floats(dim, v_width, order));
    return {at, dim, v_width, order};
  }

  void load_keys(const Stretch& of, int32_t head, int64_t token, int32_t tokens) {
    batch_ = of.batch;
    token_ = token;
    n = tokens;
    rows(p.k, head / (p.heads / p.k_heads), 1, keys);
    v = rows_of(p.v, p.dtype, batch_, head, token, n, p.v_head_dim, v_width, values_);
    transpose(keys, width, n, width, columns, padded(n));
    finite = is_finite(v, n, v_width);
  }

  void load_queries(int32_t head) { rows(p.q, head * p.q_heads / p.outputs(), p.scale, queries); }

  // pairs: x = q k^T, lower half.
  void products() { lower_product({queries, width}, columns, n, dim, 1, pairs, stride); }

  // f(x), or (`slope`) f'(x), 0 above the diagonal as far as products of halves read.
  void polynomial(const float* x, bool slope, float* to) const {
    vi lane{};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const vf a0 = set1(slope ? reads.linear : reads.one), a1 = set1(slope ? reads.pair : reads.linear);
    const vf a2 = set1(slope ? 0 : reads.square);
    for (int32_t r = 0; r < n; ++r)
      for (int32_t c = 0; c < stride && c < r + 16; c += kLanes) {
        const vf at = load(x + r * stride + c);
        const vf f = fma(fma(a2, at, a1), at, a0);
        store(to + r * stride + c, select(lane + c <= set1_int(r), f, vf{}));
      }
  }

  // The sums of weights of tokens before the chunk, for each query.
  float weight(const Moments& m, int32_t r) const {
    const float* q = queries + r * width;
    return reads.one * *m.one + reads.linear * dot(q, m.linear, width) +
           reads.square * (order == 2 ? dot(q, forms + r * width, width) : 0);
  }
  void read_forms(const Moments& m) {
    if (order == 2) product<false>(queries, width, m.square, width, n, dim, width, {forms, width});
  }

  template <class F>
  void each_block(F f) const {
    for (Features block{dim, order}; block.next();) f(block);
  }

  // out[r] += sum of the features of row r times rows of moments.
  void read(const Moments& m, Factors a, const float* x, float* out) {
    const float* turned = turn(x);
    each_block([&](const Features& block) {
      fill_features(block, a, turned, padded(n), features);
      product<true>(features, padded(n), m.values + block.before * v_width, v_width, n, block.count, v_width,
                    added_to(out, v_width));
    });
  }

  // m += the features of x, each row with its values and what stands for its value of 1.
  void write(Moments& m, Factors a, const float* x, Rows values, const float* ones) {
    const float* turned = turn(x);
    each_block([&](const Features& block) {
      fill_features(block, a, turned, padded(n), features);
      product<false>(features, padded(n), values.data, values.stride, block.count, n, v_width,
                     added_to(m.values + block.before * v_width, v_width));
    });
    for (int32_t r = 0; r < n; ++r) {
      const float weight = ones == nullptr ? 1 : ones[r];
      *m.one += a.one * weight;
      const vf factor = set1(weight);
      for (int32_t d = 0; d < width; d += kLanes) {
        const vf y = factor * load(x + r * width + d);
        store(forms + r * width + d, y * set1(a.square));
        store(m.linear + d, fma(set1(a.linear), y, load(m.linear + d)));
      }
    }
    if (order == 2) product<true>(x, width, forms, width, dim, n, width, added_to(m.square, width));
  }

  // dx, from the cotangents of what rows read of moments: `d` of values, as columns, `ones` of a value of 1. `scratch`:
  // room for the columns of dx.
  void back(const Moments& m, Factors a, const float* x, const float* d, const float* ones, float* scratch, float* dx) {
    const int32_t tokens = padded(n);
    const float* turned = turn(x);
    for (int32_t i = 0; i < width * tokens; ++i) scratch[i] = 0;
    each_block([&](const Features& block) {
      product<false>(m.values + block.before * v_width, v_width, d, tokens, block.count, p.v_head_dim, tokens,
                     {features, tokens});
      back_features(block, a, turned, features, tokens, scratch);
    });
    transpose(scratch, tokens, width, tokens, dx, width);
    if (order == 2) product<false>(x, width, m.square, width, n, dim, width, {forms, width});
    for (int32_t r = 0; r < n; ++r)
      for (int32_t c = 0; c < width; c += kLanes) {
        vf slope = set1(a.linear) * load(m.linear + c);
        if (order == 2) slope = fma(set1(2 * a.square), load(forms + r * width + c), slope);
        store(dx + r * width + c, fma(set1(ones == nullptr ? 1.0f : ones[r]), slope, load(dx + r * width + c)));
      }
  }

  // Between packed moments and those that are returned, which have all of x (x) x. What an initial state has beyond
  // the symmetric stays as it is.
  void pack(const float* state, const float* norm, bool twice, Moments& m) const {
    const int64_t floats = Moments::floats(dim, v_width, order);
    for (int64_t i = 0; i < floats; ++i) m.values[i] = 0;
    if (state == nullptr && norm == nullptr) return;
    each_pair([&](int64_t row, int64_t a, int64_t b) {
      const float share = twice ? 1.0f : 0.5f;
      float* to = m.values + row * v_width;
      if (state == nullptr) return;
      if (a == b)
        __builtin_memcpy(to, state + a * p.v_head_dim, static_cast<size_t>(p.v_head_dim) * sizeof(float));
      else
        mix(to, share, state + a * p.v_head_dim, share, state + b * p.v_head_dim, p.v_head_dim);
    });
    if (norm == nullptr) return;
    *m.one = norm[0];
    for (int32_t i = 0; i < dim; ++i) m.linear[i] = norm[1 + i];
    for (int32_t i = 0; order == 2 && i < dim; ++i)
      for (int32_t j = 0; j < dim; ++j)
        m.square[i * width + j] = 0.5f * (norm[1 + dim + i * dim + j] + norm[1 + dim + j * dim + i]);
  }
  // `initial` may be null.
  void unpack(const Moments& m, const float* initial, const float* initial_norm, float* state, float* norm) const {
    each_pair([&](int64_t row, int64_t a, int64_t b) {
      const float* values = m.values + row * v_width;
      for (const int64_t at : {a, b}) {
        float* to = state + at * p.v_head_dim;
        __builtin_memcpy(to, values, static_cast<size_t>(p.v_head_dim) * sizeof(float));
        if (initial == nullptr || a == b) continue;
        const int64_t other = at == a ? b : a;
        mix(to, 1, to, 0.5f, initial + at * p.v_head_dim, p.v_head_dim);
        mix(to, 1, to, -0.5f, initial + other * p.v_head_dim, p.v_head_dim);
      }
    });
    if (norm == nullptr) return;
    norm[0] = *m.one;
    for (int32_t i = 0; i < dim; ++i) norm[1 + i] = m.linear[i];
    for (int32_t i = 0; order == 2 && i < dim; ++i)
      for (int32_t j = 0; j < dim; ++j) {
        const int64_t a = 1 + dim + int64_t{i} * dim + j, b = 1 + dim + int64_t{j} * dim + i;
        norm[a] = m.square[i * width + j] + (initial_norm == nullptr ? 0 : 0.5f * (initial_norm[a] - initial_norm[b]));
      }
  }
  // The gradient of an initial state, of whose feature both places are read by half, and which is a part of the last.
  void unpack_gradient(const Moments& read, const float* d_state, const float* d_norm, float* d_initial,
                       float* d_initial_norm) const {
    each_pair([&](int64_t row, int64_t a, int64_t b) {
      for (int32_t c = 0; c < p.v_head_dim; ++c)
        for (const int64_t at : {a, b})
          d_initial[at * p.v_head_dim + c] = (a == b ? 1.0f : 0.5f) * read.values[row * v_width + c] +
                                             (d_state == nullptr ? 0 : d_state[at * p.v_head_dim + c]);
    });
    if (d_initial_norm == nullptr) return;
    for (int64_t i = 0; i < p.features(); ++i) d_initial_norm[i] = d_norm == nullptr ? 0 : d_norm[i];
    d_initial_norm[0] += *read.one;
    for (int32_t i = 0; i < dim; ++i) d_initial_norm[1 + i] += read.linear[i];
    for (int32_t i = 0; order == 2 && i < dim; ++i)
      for (int32_t j = 0; j < dim; ++j) d_initial_norm[1 + dim + i * dim + j] += read.square[i * width + j];
  }

 private:
  // f(packed row, row, the same with channels exchanged) of every feature.
  template <class F>
  void each_pair(F f) const {
    each_block([&](const Features& block) {
      int64_t row = block.before;
      if (block.first < 0)
        for (int32_t i = 0; i <= dim; ++i, ++row) f(row, i, i);
      for (int64_t i = block.first; i >= 0 && i < block.end; ++i)
        for (int64_t j = i; j < dim; ++j, ++row) f(row, 1 + dim + i * dim + j, 1 + dim + j * dim + i);
    });
  }

  // Rows as columns of whole vectors, zeros beyond them.
  const float* turn(const float* x) {
    if (x == keys) return columns;
    transpose(x, width, n, width, turned_, padded(n));
    return turned_;
  }

  void rows(const View& view, int32_t head, float factor, float* to) const {
    const Rows mapped = mapped_rows(p, view, batch_, head, token_, n, to);
    for (int32_t r = 0; r < n; ++r)
      for (int32_t d = 0; d < width; d += kLanes)
        store(to + r * width + d, load(mapped.data + r * mapped.stride + d) * set1(factor));
  }

  float *values_, *turned_;
  int32_t batch_ = 0;
  int64_t token_ = 0;
};
