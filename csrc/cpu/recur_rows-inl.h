// The rows of a recurrence: tokens as floats, what norm and feature map make of them, and decays.

inline constexpr float kLayerEpsilon = 1e-6f;

inline int32_t padded(int32_t n) { return (n + 15) / 16 * 16; }

// Memory in pieces. Without a base it only counts.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += (floats + 15) / 16 * 16;
    return base_ == nullptr ? nullptr : base_ + at;
  }
  size_t bytes() const { return static_cast<size_t>(used_) * sizeof(float); }

 private:
  float* base_;
  int64_t used_ = 0;
};

// Rows that will be read next, fetched bit by bit while something else is computed: rows are short and heads far apart,
// and the machine by itself begins with each too late.
class Upcoming {
 public:
  // What was asked for before is forgotten. It comes in so many parts.
  void begin(int32_t parts) { count_ = at_ = row_ = lines_ = 0, parts_ = parts; }

  void add(const View& view, DType dtype, int32_t batch, int32_t head, int64_t token, int32_t rows, int32_t width) {
    const int64_t size = element_size(dtype);
    if (rows <= 0 || view.stride[3] != 1) return;
    const auto lines = static_cast<int32_t>((width * size - 1) / kLine + 1);
    rows_[count_++] = {view.data + (batch * view.stride[0] + head * view.stride[1] + token * view.stride[2]) * size,
                       view.stride[2] * size, rows, lines};
    lines_ += rows * lines;
  }

  void part() {
    for (int32_t left = lines_ / parts_ + 1; left > 0 && at_ < count_;) {
      const Some& some = rows_[at_];
      for (int32_t i = 0; i < some.lines; ++i) __builtin_prefetch(some.first + row_ * some.stride + i * kLine);
      left -= some.lines;
      if (++row_ < some.rows) continue;
      row_ = 0;
      ++at_;
    }
  }

 private:
  static constexpr int32_t kLine = 64;  // bytes
  struct Some {
    const char* first;
    int64_t stride;
    int32_t rows, lines;
  };
  Some rows_[4] = {};  // of q, k, v and one more
  int32_t count_ = 0, at_ = 0, row_ = 0, lines_ = 0, parts_ = 1;
};

// Lanes at and after `width - d` are zero.
ATTNKIT_INLINE vf keep(vf x, int32_t left) {
  vi lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return left >= kLanes ? x : select(lane < set1_int(left), x, vf{});
}

inline float dot(const float* a, const float* b, int32_t width) {
  vf sum{};
  for (int32_t d = 0; d < width; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
  return sum_of_lanes(sum);
}

// to[r] = factor[r * step] * from[r], or row by row with rows of factors.
inline void scale_rows(Rows from, const float* factor, int32_t rows, int32_t width, float* to) {
  for (int32_t r = 0; r < rows; ++r)
    for (int32_t d = 0; d < width; d += kLanes)
      store(to + r * width + d, load(from.data + r * from.stride + d) * set1(factor[r]));
}
inline void multiply_rows(Rows from, const float* factor, int32_t rows, int32_t width, float* to) {
  for (int32_t r = 0; r < rows; ++r)
    for (int32_t d = 0; d < width; d += kLanes)
      store(to + r * width + d, load(from.data + r * from.stride + d) * load(factor + r * width + d));
}

// elu + 1.
ATTNKIT_INLINE vf elu1(vf x) {
  const vf zero{};
  return select(x > zero, x + set1(1), exp(min_or_second(zero, x)));
}

// y = map(norm(x)), in place; what is beyond `width` stays zero.
inline void map_row(RowNorm norm, FeatureMap map, float* x, int32_t width, int32_t padded_width) {
  if (norm != RowNorm::none) {
    float mean = 0;
    if (norm == RowNorm::layer) {
      vf sum{};
      for (int32_t d = 0; d < padded_width; d += kLanes) sum += load(x + d);
      mean = sum_of_lanes(sum) / static_cast<float>(width);
    }
    vf squares{};
    for (int32_t d = 0; d < padded_width; d += kLanes) {
      const vf y = keep(load(x + d) - set1(mean), width - d);
      squares = fma(y, y, squares);
      store(x + d, y);
    }
    const float square = sum_of_lanes(squares);
    const float size = norm == RowNorm::l2 ? __builtin_sqrtf(square)
                                           : __builtin_sqrtf(square / static_cast<float>(width) + kLayerEpsilon);
    const vf factor = set1(size == 0 ? 1.0f : 1 / size);
    for (int32_t d = 0; d < padded_width; d += kLanes) store(x + d, load(x + d) * factor);
  }
  if (map == FeatureMap::elu1)
    for (int32_t d = 0; d < padded_width; d += kLanes) store(x + d, keep(elu1(load(x + d)), width - d));
}

inline Rows mapped_rows(const Recurrence& p, const View& view, int32_t batch, int32_t head, int64_t token, int32_t rows,
                        float* to) {
  const int32_t width = padded(p.head_dim);
  const Rows raw = rows_of(view, p.dtype, batch, head, token, rows, p.head_dim, width, to);
  if (p.row_norm == RowNorm::none && p.map == FeatureMap::identity) return raw;
  if (raw.data != to)
    for (int32_t r = 0; r < rows; ++r)
      for (int32_t d = 0; d < width; d += kLanes) store(to + r * width + d, load(raw.data + r * raw.stride + d));
  for (int32_t r = 0; r < rows; ++r) map_row(p.row_norm, p.map, to + r * width, p.head_dim, width);
  return {to, width};
}

// How a chunk decays. For each token r, as one factor or (channels) one for each channel: its own decay e_r; from the
// state before the chunk to it, up_to[r] = e_0 ... e_r; from it to the end, after[r] = e_{r+1} ...; and all together.
// Products, never quotients or differences of sums: a decay of 0 forgets exactly, and nothing overflows.
struct Decays {
  float *each, *ones, *up_to, *after, *total;

  Decays(Arena& arena, int32_t tokens, int32_t width)
      : each(arena.take(int64_t{tokens} * width)),
        ones(arena.take(width)),  // lies before up_to: with it, rows that lag by one
        up_to(arena.take(int64_t{tokens} * width)),
        after(arena.take(int64_t{tokens} * width)),
        total(arena.take(width)) {}

  // From `each`. `width` is 1, or whole vectors.
  void multiply_out(int32_t tokens, int32_t width) {
    if (width == 1)
      return multiply_column<float>(
          tokens, 1, 0, [](const float* x) { return *x; }, [](float* x, float y) { *x = y; }, 1.0f);
    for (int32_t d = 0; d < width; d += kLanes)
      multiply_column<vf>(
          tokens, width, d, [](const float* x) { return load(x); }, [](float* x, vf y) { store(x, y); }, set1(1));
  }

 private:
  template <class T, class Get, class Put>
  ATTNKIT_INLINE void multiply_column(int32_t tokens, int32_t width, int32_t d, Get get, Put put, T one) {
    T product = one;
    put(ones + d, one);
    for (int32_t r = 0; r < tokens; ++r) put(up_to + r * width + d, product *= get(each + r * width + d));
    put(total + d, product);
    product = one;
    for (int32_t r = tokens - 1; r >= 0; --r) {
      put(after + r * width + d, product);
      product *= get(each + r * width + d);
    }
  }
};

inline float exp_one(float x) { return exp(set1(x))[0]; }

// The decays of a chunk's tokens, `width` for each: 1, or (channels) the padded head_dim; 1 beyond the last channel.
inline void read_decays(const Recurrence& p, int32_t batch, int32_t head, int64_t token, int32_t tokens, int32_t width,
                        float* each) {
  const float* from = p.gate.at + batch * p.gate.stride[0] + head * p.gate.stride[1];
  const bool adjacent = width == p.head_dim && p.gate.stride[3] == 1;
  for (int32_t r = 0; r < tokens; ++r) {
    const float* row = from + (token + r) * p.gate.stride[2];
    if (adjacent)
      for (int32_t d = 0; d < width; d += kLanes) store(each + r * width + d, load(row + d));
    else
      for (int32_t d = 0; d < width; ++d) each[r * width + d] = d < p.head_dim ? row[d * p.gate.stride[3]] : 0;
  }
  const int32_t count = tokens * width;
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(each + i, exp(load(each + i)));
  for (; i < count; ++i) each[i] = exp_one(each[i]);
}

// The gradient of a row x as it was, from that of map(norm(x)): in place in `dy`. `x` is overwritten.
inline void map_row_backward(RowNorm norm, FeatureMap map, float* x, float* dy, int32_t width, int32_t padded_width) {
  const float count = static_cast<float>(width);
  float factor = 1;
  if (norm != RowNorm::none) {
    vf sum{}, squares{};
    for (int32_t d = 0; d < padded_width; d += kLanes) sum += load(x + d);
    const vf mean = set1(norm == RowNorm::layer ? sum_of_lanes(sum) / count : 0);
    for (int32_t d = 0; d < padded_width; d += kLanes) {
      const vf y = keep(load(x + d) - mean, width - d);
      squares = fma(y, y, squares);
      store(x + d, y);
    }
    const float square = sum_of_lanes(squares);
    const float size = norm == RowNorm::l2 ? __builtin_sqrtf(square) : __builtin_sqrtf(square / count + kLayerEpsilon);
    factor = size == 0 ? 1 : 1 / size;
    for (int32_t d = 0; d < padded_width; d += kLanes) store(x + d, load(x + d) * set1(factor));
  }
  if (map == FeatureMap::elu1)
    for (int32_t d = 0; d < padded_width; d += kLanes) {
      const vf y = load(x + d), zero{};
      store(dy + d, load(dy + d) * select(y > zero, set1(1), exp(min_or_second(zero, y))));
    }
  if (norm == RowNorm::none) return;
  vf along{}, sum{};
  for (int32_t d = 0; d < padded_width; d += kLanes) {
    along = fma(load(x + d), load(dy + d), along);
    sum += keep(load(dy + d), width - d);
  }
  const vf share = set1(sum_of_lanes(along) / (norm == RowNorm::layer ? count : 1));
  const vf mean = set1(norm == RowNorm::layer ? sum_of_lanes(sum) / count : 0);
  for (int32_t d = 0; d < padded_width; d += kLanes)
    store(dy + d, (load(dy + d) - mean - load(x + d) * share) * set1(factor));
}

// Gradients of mapped rows, as those of what was mapped, to where they belong. `raw` is room for that.
inline void write_rows(const Recurrence& p, const Stretch& of, const View& from, int32_t from_head, const View& to,
                       int32_t to_head, DType dtype, float* d_rows, float* raw) {
  const int32_t n = static_cast<int32_t>(of.length), width = padded(p.head_dim);
  if (p.row_norm != RowNorm::none || p.map != FeatureMap::identity) {
    const Rows x = rows_of(from, p.dtype, of.batch, from_head, of.first, n, p.head_dim, width, raw);
    if (x.data != raw)
      for (int32_t r = 0; r < n; ++r)
        for (int32_t d = 0; d < width; d += kLanes) store(raw + r * width + d, load(x.data + r * x.stride + d));
    for (int32_t r = 0; r < n; ++r)
      map_row_backward(p.row_norm, p.map, raw + r * width, d_rows + r * width, p.head_dim, width);
  }
  with_elements(dtype, [&](auto* type) {
    for (int32_t r = 0; r < n; ++r)
      narrow_row(row_of<decltype(type)>(to, of.batch, to_head, of.first + r), to.stride[3], d_rows + r * width,
                 p.head_dim, 1);
  });
}
