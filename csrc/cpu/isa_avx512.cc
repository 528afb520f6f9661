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
#include "simd-inl.h"
#include "tile_ops-inl.h"
#include "kernel-inl.h"
#include "probe-inl.h"
}  // namespace

const Kernel kAvx512Kernel{"avx512", workspace_bytes, run, evaluate, fma_burst, read_burst};

}  // namespace attnkit::cpu
