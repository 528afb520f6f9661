// Elements of q, k, v and o as they lie in memory. Everything is computed on float32: these are the ways there and
// back.

#include "half-inl.h"

ATTNKIT_INLINE vu widen_bits(const void* p) { return __builtin_convertvector(*static_cast<const vh*>(p), vu); }

ATTNKIT_INLINE vf widen(const float* p) { return load(p); }
ATTNKIT_INLINE vf widen(const Bf16* p) { return as_float(vi(widen_bits(p) << 16)); }
ATTNKIT_INLINE vf widen(const F16* p) { return widen_halves(*reinterpret_cast<const vh*>(p)); }

// Calls f with a null pointer of the element type.
template <class F>
ATTNKIT_INLINE auto with_elements(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16: return f(static_cast<Bf16*>(nullptr));
    case DType::f16: return f(static_cast<F16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

// Rows of `width` elements as rows of `padded` floats, times `factor`; what is added is zero.
template <class T>
void widen_rows(const T* from, int64_t row_stride, int64_t stride, int32_t rows, int32_t width, int32_t padded,
                float* to) {
  for (int32_t r = 0; r < rows; ++r, from += row_stride, to += padded) {
    int32_t d = 0;
    if (stride == 1)
      for (; d + kLanes <= width; d += kLanes) store(to + d, widen(from + d));
    for (; d < width; ++d) to[d] = widen_one(from[d * stride]);
    for (; d < padded; ++d) to[d] = 0;
  }
}

template <class T>
void narrow_row(T* to, int64_t stride, const float* from, int32_t width, float factor) {
  if (stride == 1)
    for (int32_t d = 0; d < width; ++d) narrow_to(to + d, from[d] * factor);
  else
    for (int32_t d = 0; d < width; ++d) narrow_to(to + d * stride, from[d] * factor);
}

// Rows of channels, adjacent and padded with zeros to whole vectors.
struct Rows {
  const float* data;
  int64_t stride;
};

template <class P>  // a pointer to the elements
P row_of(const View& view, int32_t batch, int32_t head, int64_t token) {
  return reinterpret_cast<P>(view.data) + batch * view.stride[0] + head * view.stride[1] + token * view.stride[2];
}

// The tokens of a tile as they lie in memory. Each kRun of them are adjacent, for no page holds fewer: an address is
// worked out once for a run, and whoever goes through rows need not know of pages.
struct Lines {
  static constexpr int32_t kRun = Pages::kLeast, kRuns = 16;
  static_assert(kRuns * kRun >= kMaxTileKv && (kRuns & (kRuns - 1)) == 0);  // a remainder would take registers

  const char* run[kRuns] = {};
  int64_t stride = 0;  // in bytes
  int32_t bytes = 0, count = 0;

  constexpr Lines() = default;
  Lines(const void* first, int64_t row_stride, int32_t row_bytes, int32_t rows)
      : stride(row_stride), bytes(row_bytes), count(rows) {
    put(0, kRuns * kRun, static_cast<const char*>(first));
  }

  // Beyond the last row anything, to be fetched at most.
  ATTNKIT_INLINE const char* at(int32_t n) const {
    const auto row = static_cast<uint32_t>(n);
    return run[row / kRun % kRuns] + row % kRun * stride;
  }

  // How many rows from n on lie one after the other, of at most `most`.
  int32_t adjacent(int32_t n, int32_t most) const {
    int32_t end = (n / kRun + 1) * kRun;
    while (end < n + most && run[end / kRun] == run[end / kRun - 1] + kRun * stride) end += kRun;
    return end < n + most ? end - n : most;
  }

  // Rows n to end - 1, n a multiple of kRun, lie one after the other.
  void put(int32_t n, int32_t end, const char* first) {
    for (; n < end; n += kRun, first += kRun * stride) run[n / kRun] = first;
  }
};

inline Lines lines_of(const View& view, const Pages& pages, DType dtype, int32_t batch, int32_t head, int64_t token,
                      int32_t rows, int32_t width) {
  const int64_t size = element_size(dtype);
  const auto address = [&](int64_t first, int64_t at) {
    return view.data + (first * view.stride[0] + head * view.stride[1] + at * view.stride[2]) * size;
  };
  const auto bytes = static_cast<int32_t>(width * size);
  if (pages.table == nullptr) return {address(batch, token), view.stride[2] * size, bytes, rows};
  Lines lines;
  lines.stride = view.stride[2] * size;
  lines.bytes = bytes;
  lines.count = rows;
  const int64_t page_size = int64_t{1} << pages.shift;
  const int32_t* page = pages.table + batch * pages.columns + (token >> pages.shift);
  int64_t slot = token & (page_size - 1);
  for (int64_t n = 0, end; n < rows; n = end, slot = 0, ++page) {
    end = page_size - slot < rows - n ? n + page_size - slot : Lines::kRuns * Lines::kRun;
    lines.put(static_cast<int32_t>(n), static_cast<int32_t>(end), address(*page, slot));
  }
  return lines;
}

// Listed tokens, counted from `start`, whose channels are adjacent: copied to `to`, one after the other, in rows of
// whole vectors.
inline int32_t listed_stride(DType dtype, int32_t width) {
  return (width * element_size(dtype) + kBytes - 1) / kBytes * kBytes;
}
inline Lines listed_lines(const View& view, DType dtype, int32_t batch, int32_t head, int64_t start,
                          const int32_t* tokens, int32_t rows, int32_t width, void* to) {
  const int64_t size = element_size(dtype), stride = view.stride[2] * size;
  const auto bytes = static_cast<int32_t>(width * size), row = listed_stride(dtype, width),
             whole = bytes / kBytes * kBytes;
  const char* from = view.data + (batch * view.stride[0] + head * view.stride[1] + start * view.stride[2]) * size;
  char* out = static_cast<char*>(to);
  for (int32_t n = 0; n < rows; ++n, out += row) {
    const char* token = from + tokens[n] * stride;
    for (int32_t i = 0; i < whole; i += kBytes)
      store(reinterpret_cast<float*>(out + i), load(reinterpret_cast<const float*>(token + i)));
    if (whole < bytes) __builtin_memcpy(out + whole, token + whole, static_cast<size_t>(bytes - whole));
  }
  return {to, row, bytes, rows};
}

// Where they lie, if they lie so; else they are packed into `to`. `channel`: elements from one channel to the next.
// `close`: they are packed too if they lie apart, as tokens of several heads do. Such rows share few sets of the cache.
inline Rows rows_of(const Lines& lines, DType dtype, int64_t channel, int32_t width, int32_t padded, float* to,
                    bool close = false) {
  const int32_t count = lines.count;
  if (dtype == DType::f32 && channel == 1 && width == padded && lines.adjacent(0, count) == count &&
      !(close && lines.stride != 4 * width))
    return {reinterpret_cast<const float*>(lines.at(0)), lines.stride / 4};
  with_elements(dtype, [&](auto* type) {
    for (int32_t n = 0, some; n < count; n += some) {
      some = lines.adjacent(n, count - n);
      widen_rows(reinterpret_cast<const std::remove_pointer_t<decltype(type)>*>(lines.at(n)),
                 lines.stride / static_cast<int64_t>(sizeof(*type)), channel, some, width, padded,
                 to + static_cast<int64_t>(n) * padded);
    }
  });
  return {to, padded};
}

inline Rows rows_of(const View& view, DType dtype, int32_t batch, int32_t head, int64_t token, int32_t rows,
                    int32_t width, int32_t padded, float* to) {
  return rows_of(lines_of(view, {}, dtype, batch, head, token, rows, width), dtype, view.stride[3], width, padded, to);
}

inline bool is_finite(Rows rows, int32_t count, int32_t width) {
  vf zero[4] = {};  // x * 0 is NaN for infinities and NaN, and NaN stays
  for (int32_t d = 0; d < width; d += kLanes)
    for (int32_t n = 0; n < count; n += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int32_t row = n + i < count ? n + i : n;
        zero[i] = fma(load(rows.data + row * rows.stride + d), vf{}, zero[i]);
      }
  return !any((zero[0] + zero[1]) + (zero[2] + zero[3]) != vf{});
}
