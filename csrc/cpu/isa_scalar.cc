// The kernels for any machine: the compiler's own four-lane vectors, no instruction-set flags. Slow, and always there.
#include "call.h"

namespace attnkit::cpu {
namespace {
inline constexpr int kLanes = 4;
// 16 registers: 8 accumulators leave room for the streamed operands on every 64-bit architecture.
inline constexpr int kAccumulators = 8, kQueryVecs = 2, kMaxKeyRows = 8;
inline constexpr int kOutRows = 4, kOutVecs = 2;
#include "simd-inl.h"
#include "tile_ops-inl.h"
#include "kernel-inl.h"
#include "probe-inl.h"
}  // namespace

const Kernel kScalarKernel{"scalar", workspace_bytes, run, evaluate, fma_burst, read_burst};

}  // namespace attnkit::cpu
