// How a call is cut into tasks. Nothing here changes a bit of a result: which task sums a stretch of keys, beside which
// others, does not matter to the sum.
#pragma once
#include <span>
#include <vector>

#include "call.h"

namespace attnkit::cpu {

// Blocks of queries first .. end - 1 of one sequence.
struct Window {
  int64_t first = 0, end = 0;
};

class Schedule {
 public:
  // Sets the call's tile_q, which is at most `lanes`. Of queries to which something is carried there are windows, one
  // for each sequence: the rest of them comes with another schedule.
  Schedule(const Problem& problem, Call& call, int32_t lanes, int threads, std::span<const Window> windows = {});

  int64_t num_tasks() const { return cuts_.back().first_task; }
  int64_t num_units() const { return cuts_.back().first_unit; }  // of those whose keys several tasks share
  int64_t num_parts() const { return cuts_.back().first_part; }  // stretches of all units
  int64_t num_floats() const { return cuts_.back().first_float; }  // that the parts take

  struct Item {
    Task task;
    int64_t pieces = 1;  // tasks that share its lanes; where it is one, the rest says nothing
    int64_t unit = 0, first_part = 0, first_float = 0, stretches = 0;
  };
  Item item(int64_t i) const;

 private:
  // One sequence, and where what it adds begins. The last is the end.
  struct Cut {
    int32_t heads;  // query heads a task takes together
    int64_t first_block, blocks, stretches, pieces;  // of queries; of keys; tasks that share the stretches
    int64_t first_task, first_unit, first_part, first_float;
  };

  const Problem& problem_;
  const Call& call_;
  std::vector<Cut> cuts_;
};

}  // namespace attnkit::cpu
