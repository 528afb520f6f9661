// Queries that choose their blocks of keys one by one. Of neighbours that choose differently every tile is there and
// none is full, so tiles are filled with the queries that chose a block, wherever they lie. (As the kernels of mixture
// of block attention do, arXiv 2502.13189; but what a query has summed waits for its next block, and no parts are
// merged.) No bit depends on whether the forward does so.
#pragma once
#include <optional>
#include <span>
#include <vector>

#include "attend.h"
#include "blocks.h"

namespace attnkit::cpu {

// Of some queries of one head the blocks of keys, and who chose each.
struct Choosers {
  std::vector<int32_t> first;    // of each block, where its queries begin; and their end
  std::vector<int32_t> queries;  // ascending

  std::span<const int32_t> of(int64_t block) const {
    const auto at = static_cast<size_t>(block);
    return {queries.data() + first[at], queries.data() + first[at + 1]};
  }
};

// The next of these queries, at most `most`, with the sequence, head and keys of `of`.
inline Task take_listed(Task of, std::span<const int32_t>& left, int32_t most) {
  of.listed = left.data();
  of.q_count = left.size() < static_cast<size_t>(most) ? static_cast<int32_t>(left.size()) : most;
  left = left.subspan(static_cast<size_t>(of.q_count));
  return of;
}

// The map of a program's choice (bytecode.h) in one call.
class ChosenMap {
 public:
  // Nothing where the program has no choice, where its map has not been proven to be large enough, or where tiles of
  // so many keys lie across its blocks.
  static std::optional<ChosenMap> of(const Program& program, const Problem& problem, Analysis& proven,
                                     const Facts& facts, int32_t tile_kv);

  int64_t block() const { return block_; }  // keys
  int64_t blocks(int32_t sequence) const { return blocks_of(problem_->sequences[sequence].kv_len, block_); }
  void find(int32_t sequence, int32_t head, int64_t q_first, int64_t q_end, Choosers& out) const;

 private:
  const Problem* problem_;
  int64_t block_, query_stride_, key_stride_;
  std::vector<const uint8_t*> at_;  // of each sequence and head, its map
};

// How many tiles of keys `attend` would compute, of queries that it would gather: those whose every pair exists, and
// the others. Nothing where it would not gather.
struct GatheredTiles {
  int64_t full = 0, partial = 0;
};
std::optional<GatheredTiles> gathered_tiles(const Program& program, const Problem& problem, const Config& config);

// `attend` with pieces that are gathered; `chosen` and what is proven of it are of the pairs that are chosen.
Status attend_gathered(const Program& chosen, const Problem& problem, const ChosenMap& map, const Config& config,
                       int threads);

}  // namespace attnkit::cpu
