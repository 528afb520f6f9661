// The kernels for any machine: the compiler's own four-lane vectors, no instruction-set flags. Slow, and always there.
#include "call.h"

namespace attnkit::cpu {
namespace {
inline constexpr int kLanes = 4;
// 16 registers: 8 accumulators leave room for the streamed operands on every 64-bit architecture.
inline constexpr int kAccumulators = 8, kQueryVecs = 2, kTwoVecKeys = 4, kMaxKeyRows = 8;
inline constexpr int kOutRows = 4, kOutVecs = 2;
inline constexpr int kSoftmaxKeys = 2;
#include "simd-inl.h"

template <class F>
ATTNKIT_INLINE vf lanes_of(F f) {
  vf r{};
  for (int i = 0; i < kLanes; ++i) r[i] = f(i);
  return r;
}

ATTNKIT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // rounded twice: the machine may have nothing better
ATTNKIT_INLINE vf max_or_second(vf a, vf b) { return a > b ? a : b; }
ATTNKIT_INLINE vf min_or_second(vf a, vf b) { return a < b ? a : b; }
ATTNKIT_INLINE vf round_nearest(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  const vf r = (x + magic) - magic;
  return (x < set1(4194304.0f)) & (x > set1(-4194304.0f)) ? r : x;
}
ATTNKIT_INLINE vf floor(vf x) {
  return lanes_of([&](int i) { return __builtin_floorf(x[i]); });
}
ATTNKIT_INLINE vf scale_by_power(vf p, vf n) { return scale_in_two_steps(p, to_int(floor(n))); }
ATTNKIT_INLINE vf scale_or_zero(vf p, vf n, float least) { return select(n < set1(least), vf{}, scale_by_power(p, n)); }
ATTNKIT_INLINE vf sqrt(vf x) {
  return lanes_of([&](int i) { return __builtin_sqrtf(x[i]); });
}
ATTNKIT_INLINE bool any(vi mask) {
  int32_t r = 0;
  for (int i = 0; i < kLanes; ++i) r |= mask[i];
  return r != 0;
}
ATTNKIT_INLINE uint32_t lane_bits(vi mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (static_cast<uint32_t>(mask[i]) >> 31) << i;
  return bits;
}
ATTNKIT_INLINE vf gather(const float* base, vi offset) {
  return lanes_of([&](int i) { return base[offset[i]]; });
}
ATTNKIT_INLINE vf load_halves(const float* low, const float* high) { return vf{low[0], low[1], high[0], high[1]}; }
ATTNKIT_INLINE vh load_halves(const uint16_t* low, const uint16_t* high) {
  return vh{low[0], low[1], high[0], high[1]};
}
ATTNKIT_INLINE vf widen_halves(vh x) {
  const vi h = __builtin_convertvector(x, vi), magnitude = h & 0x7fff;
  const vi subnormal = as_int(to_float(magnitude) * set1(0x1p-24f)), normal = (magnitude + (112 << 10)) << 13;
  const vi special = (magnitude >= 0x7c00) & 0x7f800000;
  return as_float((magnitude < 0x400 ? subnormal : normal) | special | (h & 0x8000) << 16);
}
template <int kSize>
ATTNKIT_INLINE vf look_up(const float (&table)[kSize], vi i) {
  return lanes_of([&](int lane) { return table[i[lane] & (kSize - 1)]; });
}
ATTNKIT_INLINE vl multiply_low(vl a, vl b) { return (a & 0xffffffff) * (b & 0xffffffff); }
ATTNKIT_INLINE vi dot_halves(vi sum, vi a, vi b) {
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}

#include "level-inl.h"
}  // namespace

constexpr Kernel kScalarKernel = level("scalar");

}  // namespace attnkit::cpu
