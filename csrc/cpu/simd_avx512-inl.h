// The vectors of AVX-512 (F, DQ, BW, VL).
#ifdef ATTNKIT_EMULATE
#include "../emulate/avx512.h"
#endif

inline constexpr int kLanes = 16;
// 32 registers: 24 accumulators, 3 or 4 vectors of the streamed operand, one broadcast. By two vectors of queries 8
// keys: tiles are multiples of 8, and 12 would compute some twice.
inline constexpr int kAccumulators = 24, kQueryVecs = 3, kTwoVecKeys = 8, kMaxKeyRows = 16;
inline constexpr int kOutRows = 6, kOutVecs = 4;
inline constexpr int kSoftmaxKeys = 4;
#include "simd-inl.h"

ATTNKIT_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ATTNKIT_INLINE vf max_or_second(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
ATTNKIT_INLINE vf min_or_second(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
ATTNKIT_INLINE vf round_nearest(vf x) {
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ATTNKIT_INLINE vf floor(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
ATTNKIT_INLINE vf scale_by_power(vf p, vf n) { return (vf)_mm512_scalef_ps((__m512)p, (__m512)n); }
ATTNKIT_INLINE vf scale_or_zero(vf p, vf n, float least) {
  return (vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)n, (__m512)set1(least), _CMP_NLT_UQ), (__m512)p,
                                    (__m512)n);
}
ATTNKIT_INLINE vf sqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
ATTNKIT_INLINE bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
ATTNKIT_INLINE uint32_t lane_bits(vi mask) { return _mm512_movepi32_mask((__m512i)mask); }
ATTNKIT_INLINE vf gather(const float* base, vi offset) { return (vf)_mm512_i32gather_ps((__m512i)offset, base, 4); }
ATTNKIT_INLINE vf load_halves(const float* low, const float* high) {
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
}
ATTNKIT_INLINE vh load_halves(const uint16_t* low, const uint16_t* high) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
  return (vh)_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}
ATTNKIT_INLINE vf widen_halves(vh x) { return (vf)_mm512_cvtph_ps((__m256i)x); }
ATTNKIT_INLINE vf look_up(const float (&table)[16], vi i) {
  return (vf)_mm512_permutexvar_ps((__m512i)i, (__m512)load(table));
}
ATTNKIT_INLINE vf look_up(const float (&table)[32], vi i) {
  return (vf)_mm512_permutex2var_ps((__m512)load(table), (__m512i)i, (__m512)load(table + 16));
}
ATTNKIT_INLINE vl multiply_low(vl a, vl b) { return (vl)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
ATTNKIT_INLINE vi dot_halves(vi sum, vi a, vi b) {
  sum += (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#ifndef ATTNKIT_EMULATE
  asm("" : "+v"(sum));  // at once: the compiler would keep all products first, and add them in another order
#endif
  return sum;
}
