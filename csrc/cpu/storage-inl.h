// Elements of q, k, v and o as they lie in memory. Everything is computed on float32: these are the ways there and
// back.

#include "half-inl.h"
typedef uint16_t vh __attribute__((vector_size(2 * kLanes), may_alias, aligned(2)));

ATTNKIT_INLINE vu widen_bits(const void* p) { return __builtin_convertvector(*static_cast<const vh*>(p), vu); }

ATTNKIT_INLINE vf widen(const float* p) { return load(p); }
ATTNKIT_INLINE vf widen(const Bf16* p) { return as_float(vi(widen_bits(p) << 16)); }
// The exponent is rebiased by a multiplication, which also makes subnormals normal; infinities and NaN keep theirs.
ATTNKIT_INLINE vf widen_half(vu h) {
  const vu magnitude = (h & 0x7fff) << 13;
  const vu x = vu(as_int(as_float(vi(magnitude)) * set1(0x1p112f)));
  const vu special = vu(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return as_float(vi(x | special | ((h & 0x8000) << 16)));
}
ATTNKIT_INLINE vf widen(const F16* p) { return widen_half(widen_bits(p)); }

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

// Where they lie, if they lie so; else they are packed into `to`.
inline Rows rows_of(const View& view, DType dtype, int32_t batch, int32_t head, int64_t token, int32_t rows,
                    int32_t width, int32_t padded, float* to) {
  if (dtype == DType::f32 && view.stride[3] == 1 && width == padded)
    return {row_of<float*>(view, batch, head, token), view.stride[2]};
  with_elements(dtype, [&](auto* type) {
    widen_rows(row_of<decltype(type)>(view, batch, head, token), view.stride[2], view.stride[3], rows, width, padded,
               to);
  });
  return {to, padded};
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
