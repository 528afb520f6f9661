// The kernels for AVX2 with FMA. Everything lies in an anonymous namespace, as in isa_avx512.cc.
#include <immintrin.h>

#include "call.h"

namespace attnkit::cpu {
namespace {
inline constexpr int kLanes = 8;
// 16 registers: 12 accumulators, 2 or 3 vectors of the streamed operand, one broadcast. Two multiply-adds a cycle of 4
// or 5 cycles each need 8 to 10 sums in flight.
inline constexpr int kAccumulators = 12, kQueryVecs = 3, kTwoVecKeys = 6, kMaxKeyRows = 8;
inline constexpr int kOutRows = 6, kOutVecs = 2;
inline constexpr int kSoftmaxKeys = 2;
#include "simd-inl.h"

ATTNKIT_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ATTNKIT_INLINE vf max_or_second(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
ATTNKIT_INLINE vf min_or_second(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
ATTNKIT_INLINE vf round_nearest(vf x) {
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ATTNKIT_INLINE vf floor(vf x) { return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
ATTNKIT_INLINE vf scale_by_power(vf p, vf n) { return scale_in_two_steps(p, to_int(floor(n))); }
ATTNKIT_INLINE vf scale_or_zero(vf p, vf n, float least) { return select(n < set1(least), vf{}, scale_by_power(p, n)); }
ATTNKIT_INLINE vf sqrt(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
ATTNKIT_INLINE bool any(vi mask) { return _mm256_testz_si256((__m256i)mask, (__m256i)mask) == 0; }
ATTNKIT_INLINE uint32_t lane_bits(vi mask) { return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask)); }
ATTNKIT_INLINE vf gather(const float* base, vi offset) { return (vf)_mm256_i32gather_ps(base, (__m256i)offset, 4); }
ATTNKIT_INLINE vf load_halves(const float* low, const float* high) {
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
ATTNKIT_INLINE vh load_halves(const uint16_t* low, const uint16_t* high) {
  return (vh)_mm_unpacklo_epi64(_mm_loadu_si64(low), _mm_loadu_si64(high));
}
ATTNKIT_INLINE vf widen_halves(vh x) { return (vf)_mm256_cvtph_ps((__m128i)x); }
ATTNKIT_INLINE vf look_up_16(const float* table, vi i) {
  const __m256 low = _mm256_permutevar8x32_ps((__m256)load(table), (__m256i)i);
  const __m256 high = _mm256_permutevar8x32_ps((__m256)load(table + 8), (__m256i)i);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(i << 28));
}
ATTNKIT_INLINE vf look_up(const float (&table)[16], vi i) { return look_up_16(table, i); }
ATTNKIT_INLINE vf look_up(const float (&table)[32], vi i) {
  return (vf)_mm256_blendv_ps((__m256)look_up_16(table, i), (__m256)look_up_16(table + 16, i), (__m256)(i << 27));
}
ATTNKIT_INLINE vl multiply_low(vl a, vl b) { return (vl)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
ATTNKIT_INLINE vi dot_halves(vi sum, vi a, vi b) {
  sum += (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
  asm("" : "+x"(sum));  // at once: the compiler would keep all products first, and add them in another order
  return sum;
}

#include "level-inl.h"
}  // namespace

constexpr Kernel kAvx2Kernel = level("avx2");

}  // namespace attnkit::cpu
