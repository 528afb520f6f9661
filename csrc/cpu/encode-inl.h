// Tokens as int8: see encode.h. Every step is exact or rounded once, in an order that no number of lanes changes.

typedef int8_t vb __attribute__((vector_size(kLanes), may_alias, aligned(1)));

class Encoder {
 public:
  Encoder(const EncodeTask& t, float* workspace)
      : t_(t), width_(round_up(t.channels, 16)), mean_(workspace), sums_(mean_ + width_), rows_(sums_ + 3 * width_) {}

  void run() {
    for (int32_t d = 0; d < width_; ++d) mean_[d] = 0;
    if (t_.mean != nullptr) {
      find_mean();
      __builtin_memcpy(t_.mean, mean_, static_cast<size_t>(width_) * sizeof(float));
    }
    for (int64_t first = 0; first < t_.count; first += t_.tile) {
      const int64_t count = t_.count - first < t_.tile ? t_.count - first : t_.tile;
      put(first, count, t_.steps[first / t_.tile] = step(first, count));
    }
  }

 private:
  // Calls f(token as floats, its number).
  template <class F>
  ATTNKIT_INLINE void each(int64_t first, int64_t count, F f) {
    for (int64_t n = first; n < first + count; n += kEncodeRows) {
      const int64_t left = first + count - n;
      const int32_t some = left < kEncodeRows ? static_cast<int32_t>(left) : kEncodeRows;
      const Rows x = rows_of(*t_.x, t_.dtype, t_.batch, t_.head, t_.first + n, some, t_.channels, width_, rows_);
      for (int32_t i = 0; i < some; ++i) f(x.data + i * x.stride, n + i);
    }
  }

  // Sums of some tokens in float, and of these sums in double.
  void find_mean() {
    constexpr int64_t kTogether = 64;
    double* total = reinterpret_cast<double*>(sums_ + width_);
    for (int32_t d = 0; d < width_; ++d) total[d] = 0;
    for (int64_t first = 0; first < t_.count; first += kTogether) {
      for (int32_t d = 0; d < width_; ++d) sums_[d] = 0;
      each(first, t_.count - first < kTogether ? t_.count - first : kTogether, [&](const float* x, int64_t) {
        for (int32_t d = 0; d < width_; d += kLanes) store(sums_ + d, load(sums_ + d) + load(x + d));
      });
      for (int32_t d = 0; d < width_; ++d) total[d] += static_cast<double>(sums_[d]);
    }
    for (int32_t d = 0; d < width_; ++d) mean_[d] = static_cast<float>(total[d] / static_cast<double>(t_.count));
  }

  float step(int64_t first, int64_t count) {
    vf most{}, zero{};  // x * 0 is NaN for infinities and NaN
    each(first, count, [&](const float* x, int64_t) {
      for (int32_t d = 0; d < width_; d += kLanes) {
        const vf y = load(x + d) - load(mean_ + d);
        most = max_or_second(magnitude(y), most);
        zero = fma(y, vf{}, zero);
      }
    });
    if (any(zero != vf{})) return __builtin_nanf("");
    return static_cast<float>(static_cast<double>(largest_lane(most)) / 127 + 1e-7);
  }

  void put(int64_t first, int64_t count, float step) {
    const bool no_number = step != step;
    each(first, count, [&](const float* x, int64_t n) {
      int8_t* to = t_.codes + n * t_.stride;
      if (no_number || width_ < t_.stride) __builtin_memset(to, 0, static_cast<size_t>(t_.stride));
      vf sum{};
      for (int32_t d = 0; d < width_ && !no_number; d += kLanes) {
        const vf y = load(x + d) - load(mean_ + d);
        const vi size = to_int(magnitude(y) / set1(step) + set1(0.5f)), code = y < vf{} ? -size : size;
        *reinterpret_cast<vb*>(to + d) = __builtin_convertvector(code, vb);
        sum += to_float(code);
      }
      if (t_.starts != nullptr) t_.starts[n] = -128 * static_cast<int32_t>(sum_of_lanes(sum));
    });
  }

  const EncodeTask& t_;
  const int32_t width_;
  float *mean_, *sums_, *rows_;
};

void encode_tokens(const EncodeTask& t, float* workspace) { Encoder(t, workspace).run(); }
