// The kernels for AVX-512 (F, DQ, BW, VL). Everything lies in an anonymous namespace: no symbol of this file may be
// shared with code compiled for a lesser machine.
#include <immintrin.h>

#include "call.h"

// GCC 12 takes the undefined pass-through operand of its own intrinsics for an uninitialised read (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace attnkit::cpu {
namespace {
#include "simd_avx512-inl.h"
#include "level-inl.h"
}  // namespace

constexpr Kernel kAvx512Kernel = level("avx512");

}  // namespace attnkit::cpu
