// One call as the kernels see it: the verified program, the problem, what was proven, and the tile sizes. Shared by the
// scheduler and by every instruction set.
#pragma once
#include <cstddef>

#include "bytecode.h"
#include "problem.h"

namespace attnkit::cpu {

inline constexpr int kMaxTileQ = 96;  // lanes: two micro-tiles of 48 queries
inline constexpr int kMaxTileKv = 128;
inline constexpr int kStrip = 16;  // keys a tile instruction handles at once: its operands stay in L1

// A view of the program without std types, for the files compiled per instruction set.
struct CodeView {
  const Instruction* code;
  const int32_t* order[4];
  int32_t order_size[4];
  int32_t slots[4];
  int32_t score, mask;
  const uint8_t* load_in_bounds;
  bool all_loads_in_bounds;
};

struct Call {
  CodeView code;
  const Problem* problem;
  int32_t tile_q, tile_kv;
  int32_t heads;  // query heads a task takes together; they share a kv head
  bool has_score, has_mask;
};

// The same queries of one or a few heads. They are the lanes of its tiles: head by head, at most kMaxTileQ.
struct Task {
  int32_t sequence, head, heads;
  int64_t q_first;
  int32_t q_count;

  int32_t lanes() const { return heads * q_count; }
};

// Stretches of keys that a row of tiles must visit, in order. Filled by the scheduler's block analysis.
struct KeyRange {
  int64_t first;
  int32_t count;
  bool full;
};

// What one instruction set provides.
struct Kernel {
  const char* name;
  size_t (*workspace_bytes)(const Call&);
  // Runs one task over the given key ranges. Returns the instruction of an out-of-range load, or -1.
  int32_t (*run)(const Call&, const Task&, const KeyRange*, size_t num_ranges, float* workspace);
  // dst[i] = op(a[i], b[i], c[i]) over n lanes, n a multiple of 16: the expression routines by themselves, for tests.
  void (*evaluate)(Op, float* dst, const float* const* args, int32_t n);
  // Fused multiply-adds on registers alone; returns the floating-point operations done. The compute ceiling.
  double (*fma_burst)(int64_t rounds);
  // Reads n floats once; the memory ceiling. The sum keeps the reads alive.
  float (*read_burst)(const float* p, int64_t n);
};

extern const Kernel kScalarKernel;
#ifdef ATTNKIT_HAS_AVX2
extern const Kernel kAvx2Kernel;
#endif
#ifdef ATTNKIT_HAS_AVX512
extern const Kernel kAvx512Kernel;
#endif

}  // namespace attnkit::cpu
