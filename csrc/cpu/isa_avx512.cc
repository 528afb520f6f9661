// The kernels for AVX-512 (F, DQ, BW, VL). Everything lies in an anonymous namespace: no symbol of this file may be
// shared with code compiled for a lesser machine.
#include <immintrin.h>

#include "call.h"

// GCC 12 takes the undefined pass-through operand of its own intrinsics for an uninitialised read (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace attnkit::cpu {
namespace {
inline constexpr int kLanes = 16;
// 32 registers: 24 accumulators, 3 or 4 vectors of the streamed operand, one broadcast.
inline constexpr int kAccumulators = 24, kQueryVecs = 3, kMaxKeyRows = 16;
inline constexpr int kOutRows = 6, kOutVecs = 4;
inline constexpr int kSoftmaxVecs = 3;
#include "simd-inl.h"

ATTNKIT_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ATTNKIT_INLINE vf max_or_second(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
ATTNKIT_INLINE vf min_or_second(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
ATTNKIT_INLINE vf round_nearest(vf x) {
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ATTNKIT_INLINE vf floor(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
ATTNKIT_INLINE vf scale_by_power(vf p, vf n) { return (vf)_mm512_scalef_ps((__m512)p, (__m512)n); }
ATTNKIT_INLINE vf sqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
ATTNKIT_INLINE bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
ATTNKIT_INLINE vf gather(const float* base, vi offset) { return (vf)_mm512_i32gather_ps((__m512i)offset, base, 4); }

#include "math-inl.h"
#include "storage-inl.h"
#include "tile_ops-inl.h"
#include "tile-inl.h"
#include "products-inl.h"
#include "kernel-inl.h"
#include "backward_products-inl.h"
#include "backward_loads-inl.h"
#include "backward-inl.h"
#include "probe-inl.h"
}  // namespace

const Kernel kAvx512Kernel{"avx512", workspace_bytes, run,       backward_bytes, backward_rows,
                           backward, evaluate,        fma_burst, read_burst};

}  // namespace attnkit::cpu
