#include "schedule.h"

#include <algorithm>

#include "blocks.h"

namespace attnkit::cpu {
namespace {

// Enough that a thread which loses its core for a while leaves little to wait for.
constexpr int64_t kTasksPerThread = 8;

}  // namespace

Schedule::Schedule(const Problem& p, Call& call, int32_t lanes, int threads, std::span<const Window> windows)
    : problem_(p), call_(call) {
  int64_t longest = 1;
  for (int32_t i = 0; i < p.num_sequences; ++i) longest = std::max(longest, p.sequences[i].q_len);
  call.tile_q = static_cast<int32_t>(std::min<int64_t>(lanes, longest));
  cuts_.resize(static_cast<size_t>(p.num_sequences) + 1);

  // Few queries: the heads of a group share the lanes of a task, and their keys and values are read once. Not so far
  // that a thread would have nothing to do.
  const int32_t group = p.num_heads / p.num_kv_heads;
  int64_t pieces = 0;  // as many tasks as there could be
  for (int32_t most = group; pieces < threads && most > 0; --most) {
    if (group % most != 0) continue;
    pieces = 0;
    for (int32_t i = 0; i < p.num_sequences; ++i) {
      const Sequence& s = p.sequences[i];
      Cut& cut = cuts_[static_cast<size_t>(i)];
      cut.heads = p.skip > 0 ? 1 : most;  // which 16 queries leave out a tile together, threads may not decide
      const int64_t together = windows.empty() || s.q_len == 1 ? lanes : 1;  // heads share rows of what is carried
      while (group % cut.heads != 0 || (cut.heads > 1 && cut.heads * s.q_len > together)) --cut.heads;
      const Window window =
          windows.empty() ? Window{0, blocks_of(s.q_len, call.tile_q)} : windows[static_cast<size_t>(i)];
      cut.first_block = window.first;
      cut.blocks = window.end - window.first;
      cut.stretches = std::max<int64_t>(blocks_of(s.kv_len, call.split_kv), 1);
      pieces += p.heads_of(i) / cut.heads * cut.blocks * cut.stretches;
    }
  }

  const int64_t together = threads <= 1 ? INT64_MAX : std::max<int64_t>(pieces / (kTasksPerThread * threads), 1);
  for (int32_t i = 0; i < p.num_sequences; ++i) {
    Cut &cut = cuts_[static_cast<size_t>(i)], &next = cuts_[static_cast<size_t>(i) + 1];
    cut.pieces = together < cut.stretches ? blocks_of(cut.stretches, together) : 1;
    const int64_t units = p.heads_of(i) / cut.heads * cut.blocks, shared = cut.pieces > 1 ? units : 0;
    const auto most_lanes = static_cast<int32_t>(cut.heads * std::min<int64_t>(call.tile_q, p.sequences[i].q_len));
    next.first_task = cut.first_task + units * cut.pieces;
    next.first_unit = cut.first_unit + shared;
    next.first_part = cut.first_part + shared * cut.stretches;
    next.first_float = cut.first_float + shared * cut.stretches * part_floats(p, most_lanes);
  }
}

// Tasks are numbered head by head, so that threads share one head's K and V in cache; within a head the last queries
// come first, because under a causal mask they have the most to do.
Schedule::Item Schedule::item(int64_t i) const {
  const auto after =
      std::upper_bound(cuts_.begin(), cuts_.end(), i, [](int64_t a, const Cut& b) { return a < b.first_task; });
  const auto sequence = static_cast<int32_t>(after - cuts_.begin() - 1);
  const Cut& cut = cuts_[static_cast<size_t>(sequence)];
  const Sequence& s = problem_.sequences[sequence];
  const int64_t in_sequence = i - cut.first_task, piece = in_sequence % cut.pieces, unit = in_sequence / cut.pieces;
  const int64_t block = cut.first_block + cut.blocks - 1 - unit % cut.blocks;
  const auto head = problem_.first_head(sequence) + static_cast<int32_t>(unit / cut.blocks) * cut.heads;
  Item item{{sequence, head, cut.heads, block * call_.tile_q, 0}};
  item.task.q_count = static_cast<int32_t>(std::min<int64_t>(call_.tile_q, s.q_len - item.task.q_first));
  if (cut.pieces == 1) return item;
  item.task.kv_first = piece * cut.stretches / cut.pieces * call_.split_kv;
  item.task.kv_end = (piece + 1) * cut.stretches / cut.pieces * call_.split_kv;
  item.pieces = cut.pieces;
  item.unit = cut.first_unit + unit;
  item.first_part = cut.first_part + unit * cut.stretches;
  const auto most_lanes = static_cast<int32_t>(cut.heads * std::min<int64_t>(call_.tile_q, s.q_len));
  item.first_float = cut.first_float + unit * cut.stretches * part_floats(problem_, most_lanes);
  item.stretches = cut.stretches;
  return item;
}

}  // namespace attnkit::cpu
