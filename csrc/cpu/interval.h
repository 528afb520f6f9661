// Interval arithmetic over the bytecode: what every value of a program can be on a box of (b, h, q_idx, kv_idx).
// Sound, not exact: a mask that is true (false) on a whole box makes its tile FULL (EMPTY); anything else is PARTIAL.
#pragma once
#include <vector>

#include "problem.h"

namespace attnkit::cpu {

struct Box {  // inclusive ranges
  int64_t b[2], h[2], q[2], kv[2], q_len[2], kv_len[2];
};

struct Interval {
  double lo, hi;  // exact for ints and bools, rounded outward for floats
  bool nan;       // a float that may be NaN
};

enum class Block : uint8_t { empty, partial, full };

// What is proven once per call, over the box of the whole problem.
struct Facts {
  Status status;
  std::vector<uint8_t> load_in_bounds;  // per instruction
  bool all_loads_in_bounds = true;
};

class IntervalAnalysis {
 public:
  IntervalAnalysis(const Program& program, const Problem& problem);

  Facts prove(const Box& whole);
  Block classify(const Box& box);

 private:
  Interval eval(size_t i, const Box& box);
  Interval eval_load(const Instruction& in, size_t i);
  Interval buffer_range(size_t buffer);

  const Program& program_;
  const Problem& problem_;
  std::vector<Interval> value_;
  std::vector<Interval> whole_buffer_;  // lazily, lo > hi: not yet known
  std::vector<int32_t> mask_code_;
  Facts* facts_ = nullptr;  // set while proving
};

}  // namespace attnkit::cpu
