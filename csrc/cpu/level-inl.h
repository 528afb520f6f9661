// What every instruction set is compiled from, each file building on those before it; then what it provides, by the
// names that they define. A set that has a better way to do something replaces it there.
#include "math-inl.h"
#include "storage-inl.h"
#include "store-inl.h"
#include "decode_store-inl.h"
#include "tile_ops-inl.h"
#include "tile-inl.h"
#include "products-inl.h"
#include "decode-inl.h"
#include "code_tile-inl.h"
#include "encode-inl.h"
#include "fold-inl.h"
#include "dropout-inl.h"
#include "kept-inl.h"
#include "layout-inl.h"
#include "kernel-inl.h"
#include "kernel_float-inl.h"
#include "code_decode-inl.h"
#include "code_halves-inl.h"
#include "gather-inl.h"
#include "carry-inl.h"
#include "readout-inl.h"
#include "kernel_encoded-inl.h"
#include "backward_products-inl.h"
#include "backward_loads-inl.h"
#include "backward_rows-inl.h"
#include "backward_layout-inl.h"
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
#include "moments_forward-inl.h"
#include "moments_backward-inl.h"
#include "groups-inl.h"
#include "select-inl.h"

constexpr Kernel level(const char* name) {
  return {
      .name = name,
      .workspace_bytes = workspace_bytes,
      .run = run_floats<FloatForward>,
      .gather = gather<FloatForward>,
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
      .readout = kReadoutKernel,
  };
}
