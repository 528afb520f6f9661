// What AVX-512 with dot products of bfloat16 and of bytes has beyond isa_avx512.cc. Everything lies in an anonymous
// namespace: no symbol of this file may be shared with code compiled for a lesser machine.
#include <immintrin.h>

#include "call.h"

// GCC 12 takes the undefined pass-through operand of its own intrinsics for an uninitialised read (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace attnkit::cpu {
namespace {
#include "simd_avx512-inl.h"
#include "level-inl.h"

#ifndef ATTNKIT_EMULATE
// sum + u . s of four unsigned and four signed bytes in each lane. The compiler's own would keep sums on the stack.
template <class V>
ATTNKIT_INLINE void dot_bytes(V& sum, V u, V s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
}
#endif

#include "kernel_bf16-inl.h"
#include "code_pairs-inl.h"
#include "code_bytes-inl.h"
#include "kernel_bytes-inl.h"
#include "backward_bf16-inl.h"

double dot_burst(int64_t rounds) {
  constexpr int kChains = kAccumulators;
  __m512 acc[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3c00);  // 0.5, 0.0078125
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, b);
  }
  __m512 sum = acc[0];
#pragma GCC unroll 32
  for (int i = 1; i < kChains; ++i) sum += acc[i];
  asm volatile("" : : "m"(sum));  // or the loop could be dropped
  return 4.0 * kLanes * kChains * static_cast<double>(rounds);
}
}  // namespace

Kernel with_dot_products(const Kernel& avx512) {
  Kernel found = avx512;
  found.name = "avx512bf16";
  found.run = run_by_dtype;
  found.gather = gather_by_dtype;
  found.backward_bytes = backward_bytes_by_dtype;
  found.backward = backward_by_dtype;
  found.carry.select = select_by_dtype;
  found.carry.backward_bytes = carried_backward_bytes_by_dtype;
  found.carry.backward = carried_backward_by_dtype;
  found.dot_burst = dot_burst;
  return found;
}

}  // namespace attnkit::cpu
