// Which blocks of pairs a mask leaves empty, partly visible or full: for the tiles of one task, and for whole masks.
#pragma once
#include <vector>

#include "analysis.h"
#include "call.h"

namespace attnkit::cpu {

constexpr int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// The key ranges one row of tiles must visit. Bisects the keys: a mask's structure costs its border, not its area.
class RowPlan {
 public:
  RowPlan(const Program& program, const Problem& problem, const Call& call, const Analysis& proven, const Facts& facts);

  const std::vector<KeyRange>& plan(const Task& task);

 private:
  const std::vector<KeyRange>& find(const Task& task, int64_t kv_first, int64_t kv_end);
  const std::vector<KeyRange>& within(const std::vector<KeyRange>& row, int64_t kv_first, int64_t kv_end);
  Range keys(int64_t first, int64_t end) const;
  Block classify(int64_t first, int64_t end);
  void descend(int64_t tile, int64_t tile_end);
  void trim(int64_t first, int64_t end);
  void add(int64_t first, int64_t end, bool full);

  const Problem& problem_;
  const Call& call_;
  Analysis analysis_;
  const bool trust_full_;  // a mask that reads outside its buffers must be evaluated to be caught at it
  const bool keep_;        // whether plans are worth keeping for the next heads
  int32_t sequence_ = 0;
  Range q_{};
  int64_t kv_end_ = 0;
  std::vector<KeyRange> ranges_;
  int32_t kept_sequence_ = -1;
  std::vector<std::vector<KeyRange>> kept_;  // of that sequence, by block of queries
  std::vector<uint8_t> is_kept_;
};

// Blocks first .. end - 1 of a row; what no run covers is empty.
struct Run {
  int32_t first, end;
  int32_t kind;  // a Block
};

struct BlockRuns {
  Status status;
  bool per_batch = false, per_head = false;  // else one stands for all
  std::vector<int64_t> offsets;              // of each row: batch entry by batch entry, head by head
  std::vector<Run> runs;
};

// The structure of a whole mask. All sequences of the problem have the lengths of the first.
BlockRuns block_runs(const Program& program, const Problem& problem, int32_t q_block, int32_t kv_block);

}  // namespace attnkit::cpu
