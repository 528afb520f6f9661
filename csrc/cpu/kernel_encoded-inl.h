// Queries and keys as int8 (encode.h). Their dot products are integers, and exact; scales join them once a tile, and
// what the mean key adds to a query's scores. What instructions multiply codes is a `Product`:
//   Dot                            see products-inl.h, with kCodes codes in a unit
//   pack(rows, queries, ...)       queries to lanes; zeros beyond the last
//   key_units(...)                 rows of keys as units
//   code(queries, channel, bm)     a channel of a vector of queries

// Codes are whole numbers, and floats hold their sums exactly up to 1040 channels.
struct FloatProduct {
  struct Dot : FloatDot {
    const int32_t* starts;  // not needed: no code is moved
    const float *factor, *shift;

    Dot(const int32_t* s, const float* f, const float* h) : starts(s), factor(f), shift(h) {}
    ATTNKIT_INLINE Dot at(int32_t key, int32_t lane) const { return {starts + key, factor + lane, shift + lane}; }
    ATTNKIT_INLINE vf finish(vf sum, int32_t, int v, bool first) const {
      return fma(sum, load(factor + v * kLanes), first ? load(shift + v * kLanes) : vf{});
    }
  };
  static constexpr int32_t kCodes = 1;

  static void pack(const int8_t* const* rows, int32_t queries, int32_t channels, float* qt, int32_t bm) {
    for (int32_t d = 0; d < channels; ++d, qt += bm)
      for (int32_t m = 0; m < bm; ++m) qt[m] = m < queries ? rows[m][d] : 0;
  }
  static KeyRows key_units(const int8_t* codes, int64_t stride, int32_t count, int32_t channels, float* to) {
    for (int32_t n = 0; n < count; ++n)
      for (int32_t d = 0; d < channels; ++d) to[n * channels + d] = codes[n * stride + d];
    return {reinterpret_cast<const char*>(to), int64_t{4} * channels};
  }
  static ATTNKIT_INLINE vf code(const float* qt, int32_t channel, int32_t bm) { return load(qt + channel * bm); }
};

// Four codes in a unit. Rows of them are whole cache lines, with zeros behind the last.
struct ByteUnits {
  static constexpr int32_t kCodes = 4;

  // f(x): a unit, or a vector of them, as it is multiplied.
  template <class F>
  static void pack_units(const int8_t* const* rows, int32_t queries, int32_t channels, F f, float* qt, int32_t bm) {
    const float* units[kMaxTileQ];
    for (int32_t m = 0; m < queries; ++m) units[m] = reinterpret_cast<const float*>(rows[m]);
    transpose_rows(units, queries, round_up(channels, 64) / kCodes, f, qt, bm);
  }
  static KeyRows key_units(const int8_t* codes, int64_t stride, int32_t, int32_t, float*) {
    return {reinterpret_cast<const char*>(codes), stride};
  }
};

template <class Products, class Product>
class EncodedForward : public Products {
 protected:
  using Products::at_;
  using Products::c_;
  using Products::p_;
  using Products::seq_;
  using Products::t_;
  using Products::ws_;

 public:
  EncodedForward(const Call& c, const Task& t, float* workspace) : Products(c, t, workspace, false) {}

  void pack_queries() {
    const Codes& q = p_.codes[0];
    const int8_t* rows[kMaxTileQ];
    float *step = ws_ + at_.steps, *shift = ws_ + at_.shift;
    for (int32_t m = 0; m < at_.bm; ++m) {
      step[m] = 0;
      if (m >= t_.lanes()) continue;
      const int32_t head = this->head_of(m);
      const int64_t token = t_.q_first + m % t_.q_count;
      rows[m] = q.data + q.row(t_.sequence, seq_.q_len, head, token) * q.stride;
      step[m] = q.step(t_.sequence, seq_.q_len, head, token) * p_.scale;
    }
    Product::pack(rows, t_.lanes(), p_.head_dim, ws_ + at_.qt, at_.bm);
    // The mean key gives each query's scores the same. Channel by channel, so that the order of the sum is one.
    const Codes& k = p_.codes[1];
    const float* mean = k.means + (t_.sequence * k.heads + this->kv_head_) * k.width;
    for (int32_t lane = 0; lane < at_.bm; lane += kLanes) {
      vf sum{};
      for (int32_t d = 0; p_.encoding.center && d < p_.head_dim; ++d)
        sum = fma(Product::code(ws_ + at_.qt + lane, d, at_.bm), set1(mean[d]), sum);
      store(shift + lane, sum * load(step + lane));
    }
  }

 protected:
  // Calls f(keys, row, count, live, dot) for the keys of a tile that share a step, from row `row` of the tile on, with
  // what makes scores of products with the lanes of a span; `live`: what each vector of queries sees of the tile, and
  // of these keys.
  template <class F>
  void each_step(int64_t first, int32_t count, Span lanes, const Span* live, F f) {
    const Codes& k = p_.codes[1];
    for (int32_t n = 0, some; n < count; n += some) {
      const auto left = static_cast<int32_t>(k.tile - (first + n) % k.tile);
      some = left < count - n ? left : count - n;
      const int64_t row = k.row(t_.sequence, seq_.kv_len, this->kv_head_, first + n);
      const vf step = set1(k.step(t_.sequence, seq_.kv_len, this->kv_head_, first + n));
      Span seen[kMaxTileQ / kLanes];
      for (int32_t lane = lanes.first; lane < lanes.end; lane += kLanes) {
        store(ws_ + at_.factor + lane, load(ws_ + at_.steps + lane) * step);
        if (live == nullptr) continue;
        const Span all = live[lane / kLanes];
        seen[lane / kLanes] = {all.first < n ? 0 : all.first - n, all.end < n + some ? all.end - n : some};
      }
      const KeyRows keys = Product::key_units(k.data + row * k.stride, k.stride, some, p_.head_dim, ws_ + at_.k);
      f(keys, n, some, live == nullptr ? nullptr : seen,
        typename Product::Dot{k.starts + row, ws_ + at_.factor, ws_ + at_.shift});
    }
  }
};

template <class Products, class Product>
class EncodedUnits : public EncodedForward<Products, Product> {
 public:
  using EncodedForward<Products, Product>::EncodedForward;

 protected:
  void scores(int64_t first, int32_t count, bool full) override {
    const int32_t bm = this->at_.bm, units = (this->p_.head_dim + Product::kCodes - 1) / Product::kCodes;
    float* largest = this->start_largest(full);
    this->each_step(first, count, {0, bm}, this->live(full),
                    [&](const KeyRows& keys, int32_t row, int32_t some, const Span* live, const auto& dot) {
                      float* s = this->ws_ + this->at_.s + static_cast<int64_t>(row) * bm;
                      qk_units(this->ws_ + this->at_.qt, bm, keys, some, live, units, dot, s, largest);
                    });
  }
};

// Where only floats are multiplied.
template <class Products>
int32_t run_floats(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, const Parts* parts,
                   float* workspace) {
  auto* run_it = run_of_codes(*c.problem, t);
  if (c.problem->codes != nullptr) run_it = run<EncodedUnits<Products, FloatProduct>>;
  if (run_it == nullptr) run_it = run<Products>;
  return run_it(c, t, ranges, num_ranges, parts, workspace);
}
