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
#include "math-inl.h"
#include "storage-inl.h"
#include "store-inl.h"
#include "decode_store-inl.h"
#include "tile_ops-inl.h"
#include "tile-inl.h"
#include "products-inl.h"
#include "decode-inl.h"
#include "encode-inl.h"
#include "fold-inl.h"
#include "dropout-inl.h"
#include "kernel-inl.h"
#include "kernel_float-inl.h"
#include "carry-inl.h"
#include "kernel_encoded-inl.h"
#include "backward_products-inl.h"
#include "backward_loads-inl.h"
#include "backward_rows-inl.h"
#include "backward-inl.h"
#include "carry_backward-inl.h"
#include "probe-inl.h"
#include "recur_products-inl.h"
#include "recur_rows-inl.h"
#include "recur-inl.h"
#include "recur_forward-inl.h"
#include "recur_pairs-inl.h"
#include "recur_backward-inl.h"
#include "moments-inl.h"
#include "moments_backward-inl.h"
#include "groups-inl.h"
#include "select-inl.h"
}  // namespace

const Kernel kAvx512Kernel{
    .name = "avx512",
    .workspace_bytes = workspace_bytes,
    .run = run_floats<FloatForward>,
    .merge = merge_parts,
    .encode = encode_tokens,
    .backward_bytes = backward_bytes,
    .backward_rows = backward_rows,
    .backward = backward,
    .evaluate = evaluate,
    .fma_burst = fma_burst,
    .read_burst = read_burst,
    .recur = kRecurKernel,
    .groups = kGroupKernel,
    .select = kSelectKernel,
    .carry = kCarryKernel,
};

}  // namespace attnkit::cpu
