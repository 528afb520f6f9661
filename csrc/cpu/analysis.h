// What a program can be on a box of (b, h, q_idx, kv_idx): sound always, exact for comparisons of linear expressions.
// A mask that is true (false) on a whole box makes it FULL (EMPTY); anything else is PARTIAL.
#pragma once
#include <vector>

#include "interval.h"
#include "zones.h"

namespace attnkit::cpu {

struct Range {
  int64_t lo, hi;  // inclusive
  bool operator==(const Range&) const = default;
};

// What does not change within a row of blocks.
struct Frame {
  Range b, h, q_len, kv_len;
  bool operator==(const Frame&) const = default;
};

enum class Block : uint8_t { empty, partial, full };

// What is proven once per call, over the box of the whole problem.
struct Facts {
  Status status;
  std::vector<uint8_t> load_in_bounds;  // per instruction
  bool all_loads_in_bounds = true;
  bool mask_loads_in_bounds = true;
};

class Analysis {
 public:
  // `proven` has finished; its zone maps are read too.
  Analysis(const Program& program, const Problem& problem, const Analysis* proven = nullptr);
  Analysis(const Problem& problem, const Analysis& proven) : Analysis(proven.program_, problem, &proven) {}

  // Evaluates everything (or the mask alone) over all pairs: integers fit 32 bits, divisors are not zero, loads stay
  // inside. To be called once, by itself or on the analysis given as `proven`, before anything below.
  Facts prove(bool mask_only = false);

  // The mask on a box. Queries and keys that were just asked about are not evaluated again.
  void frame(const Frame& frame);
  void queries(Range q);
  const Interval& at(int32_t value) const { return value_[static_cast<size_t>(value)]; }  // of the mask
  Block classify(Range kv);

  // The same for a box that `classify` has left open: looks for a pair that exists and one that does not, in ever
  // smaller parts. Open still (PARTIAL) only if both are there, or if it takes too long to tell.
  Block settle(Range q, Range kv);

 private:
  void eval(size_t i);
  Interval evaluate(size_t i);
  Interval eval_sum(const Instruction& in, const BoxStep& step);
  bool avoids_zero(const BoxStep& step) const;
  Interval eval_load(const Instruction& in, size_t i);
  void eval_order(int reads);

  const Program& program_;
  const Problem& problem_;
  Zones zones_;
  Frame frame_{};
  Range q_{}, kv_{};
  bool stale_frame_ = true, stale_q_ = true, stale_kv_ = true;
  std::vector<Interval> value_;
  Facts* facts_ = nullptr;  // set while proving
};

}  // namespace attnkit::cpu
