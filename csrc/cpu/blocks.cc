#include "blocks.h"

#include <bit>

namespace attnkit::cpu {
namespace {

// Where to cut a stretch of n blocks: at a power of two, so that the parts line up with zones and each other.
int64_t half(int64_t n) { return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n - 1))); }

Frame frame_of(const Problem& p, int32_t sequence, int32_t head, int32_t heads) {
  const int64_t entry = p.entry_of(sequence), q_len = p.q_len_of(sequence), kv_len = p.kv_len_of(sequence);
  return {{entry, entry}, {head, head + heads - 1}, {q_len, q_len}, {kv_len, kv_len}};
}

}  // namespace

RowPlan::RowPlan(const Program& program, const Problem& problem, const Call& call, const Analysis& proven,
                 const Facts& facts)
    : problem_(problem),
      call_(call),
      analysis_(program, problem, &proven),
      trust_full_(facts.mask_loads_in_bounds && !call.some_gone),
      keep_(program.mask >= 0 && !(program.boxes.mask_reads & kReadsHead)) {}

const std::vector<KeyRange>& RowPlan::plan(const Task& task) {
  const Sequence& s = problem_.sequences[task.sequence];
  const int64_t kv_end = std::min(task.kv_end, s.kv_len);
  if (!keep_ || task.listed != nullptr) return find(task, task.kv_first, kv_end);
  if (kept_sequence_ != task.sequence) {
    kept_sequence_ = task.sequence;
    kept_.assign(static_cast<size_t>(blocks_of(s.q_len, call_.tile_q)), {});
    is_kept_.assign(kept_.size(), 0);
  }
  const auto row = static_cast<size_t>(task.q_first / call_.tile_q);
  if (!is_kept_[row]) {
    kept_[row] = find(task, 0, s.kv_len);
    is_kept_[row] = 1;
  }
  return within(kept_[row], task.kv_first, kv_end);
}

// The part of a row's ranges between two ends of tiles.
const std::vector<KeyRange>& RowPlan::within(const std::vector<KeyRange>& row, int64_t kv_first, int64_t kv_end) {
  ranges_.clear();
  auto r =
      std::partition_point(row.begin(), row.end(), [&](const KeyRange& x) { return x.first + x.count <= kv_first; });
  for (; r != row.end() && r->first < kv_end; ++r)
    add(std::max(r->first, kv_first), std::min(r->first + r->count, kv_end), r->full);
  return ranges_;
}

const std::vector<KeyRange>& RowPlan::find(const Task& task, int64_t kv_first, int64_t kv_end) {
  ranges_.clear();
  kv_end_ = kv_end;
  if (kv_first >= kv_end) return ranges_;
  if (!call_.has_mask) {
    add(kv_first, kv_end, true);
    return ranges_;
  }
  analysis_.frame(frame_of(problem_, task.sequence, task.head, task.heads));
  sequence_ = task.sequence;
  q_ = {problem_.query_of(sequence_, task.query(0)), problem_.query_of(sequence_, task.last_query())};
  descend(kv_first / call_.tile_kv, blocks_of(kv_end, call_.tile_kv));
  return ranges_;
}

// Lists ascend: between the first and the last of a stretch lies all of it.
Range RowPlan::keys(int64_t first, int64_t end) const {
  return {problem_.key_of(sequence_, first), problem_.key_of(sequence_, end - 1)};
}

Block RowPlan::classify(int64_t first, int64_t end) {
  analysis_.queries(q_);
  return analysis_.classify(keys(first, end));
}

void RowPlan::descend(int64_t tile, int64_t tile_end) {
  const int64_t first = tile * call_.tile_kv, end = std::min(tile_end * call_.tile_kv, kv_end_);
  Block block = classify(first, end);
  if (block == Block::partial && tile_end - tile == 1) block = analysis_.settle(q_, keys(first, end));
  if (block == Block::full && !trust_full_) block = Block::partial;
  if (block == Block::empty) return;
  if (block == Block::full) return add(first, end, true);
  if (tile_end - tile == 1) return trim(first, end);
  const int64_t middle = tile + half(tile_end - tile);
  descend(tile, middle);
  descend(middle, tile_end);
}

// Drops the keys at either end of a partial tile that no query of it sees.
void RowPlan::trim(int64_t first, int64_t end) {
  const auto dead = [&](int64_t a, int64_t b) { return classify(a, b) == Block::empty; };
  while (first < end && dead(first, std::min(first + kStrip, end))) first = std::min(first + kStrip, end);
  while (first < end) {
    const int64_t last_strip = first + (end - first - 1) / kStrip * kStrip;
    if (!dead(last_strip, end)) break;
    end = last_strip;
  }
  if (first < end) add(first, end, false);
}

void RowPlan::add(int64_t first, int64_t end, bool full) {
  if (full && !ranges_.empty() && ranges_.back().full && ranges_.back().first + ranges_.back().count == first) {
    ranges_.back().count += static_cast<int32_t>(end - first);
  } else {
    ranges_.push_back({first, static_cast<int32_t>(end - first), full});
  }
}

namespace {

// Classifies the blocks of one head, large squares first, and splits what is undecided. Blocks of a row are met from
// left to right, so that runs grow at their end.
class Quadtree {
 public:
  Quadtree(Analysis& analysis, const Sequence& s, bool trust_full, int32_t q_block, int32_t kv_block)
      : analysis_(analysis), s_(s), trust_full_(trust_full), q_block_(q_block), kv_block_(kv_block) {}

  // Appends to `rows`, one for each block of queries.
  void run(std::vector<std::vector<Run>>& rows, bool row_by_row) {
    rows_ = &rows;
    const int64_t height = blocks_of(s_.q_len, q_block_), width = blocks_of(s_.kv_len, kv_block_);
    if (!row_by_row) return descend(0, height, 0, width);
    for (int64_t row = 0; row < height; ++row) descend(row, row + 1, 0, width);
  }

 private:
  void descend(int64_t top, int64_t bottom, int64_t left, int64_t right) {
    const Range q{top * q_block_, std::min(bottom * q_block_, s_.q_len) - 1};
    const Range kv{left * kv_block_, std::min(right * kv_block_, s_.kv_len) - 1};
    const int64_t height = bottom - top, width = right - left;
    analysis_.queries(q);
    Block block = analysis_.classify(kv);
    if (block == Block::partial && height * width == 1) block = analysis_.settle(q, kv);
    if (block == Block::full && !trust_full_) block = Block::partial;
    if (block == Block::empty) return;
    if (block == Block::full || height * width == 1) {
      for (int64_t row = top; row < bottom; ++row) append((*rows_)[static_cast<size_t>(row)], left, right, block);
      return;
    }
    const int64_t middle = top + (height > 1 ? half(height) : height),
                  centre = left + (width > 1 ? half(width) : width);
    for (const Range& r : {Range{top, middle}, Range{middle, bottom}})
      for (const Range& c : {Range{left, centre}, Range{centre, right}})
        if (r.lo < r.hi && c.lo < c.hi) descend(r.lo, r.hi, c.lo, c.hi);
  }

  static void append(std::vector<Run>& row, int64_t first, int64_t end, Block block) {
    const auto kind = static_cast<int32_t>(block);
    if (!row.empty() && row.back().end == first && row.back().kind == kind) {
      row.back().end = static_cast<int32_t>(end);
    } else {
      row.push_back({static_cast<int32_t>(first), static_cast<int32_t>(end), kind});
    }
  }

  Analysis& analysis_;
  const Sequence& s_;
  const bool trust_full_;
  const int64_t q_block_, kv_block_;
  std::vector<std::vector<Run>>* rows_ = nullptr;
};

}  // namespace

BlockRuns block_runs(const Program& program, const Problem& p, int32_t q_block, int32_t kv_block) {
  BlockRuns out;
  Analysis analysis(program, p);
  const Facts facts = analysis.prove(true);
  out.status = facts.status;
  if (facts.status.fault != Fault::none) return out;
  out.per_batch = (program.boxes.mask_reads & kReadsBatch) != 0;
  out.per_head = (program.boxes.mask_reads & kReadsHead) != 0;
  out.offsets.push_back(0);
  for (int32_t b = 0; b < (out.per_batch ? p.num_sequences : 1); ++b)
    for (int32_t h = 0; h < (out.per_head ? p.num_heads : 1); ++h) {
      const Sequence& s = p.sequences[b];
      std::vector<std::vector<Run>> rows(static_cast<size_t>(blocks_of(s.q_len, q_block)));
      analysis.frame(frame_of(p, b, h, 1));
      Quadtree(analysis, s, facts.mask_loads_in_bounds, q_block, kv_block).run(rows, program.boxes.dense);
      for (const std::vector<Run>& row : rows) {
        out.runs.insert(out.runs.end(), row.begin(), row.end());
        out.offsets.push_back(static_cast<int64_t>(out.runs.size()));
      }
    }
  return out;
}

}  // namespace attnkit::cpu
