// Attention whose queries carry something onto keys, which later queries subtract, or whatever their score makes of it.
//
// Queries go in waves: blocks of them that are computed at once, in two steps. First the head that selects gives, for
// every key, the sums before each query of the wave (by keys); then all heads attend (by heads and blocks). Memory is
// that of one wave.
#pragma once
#include <vector>

#include "attend.h"
#include "schedule.h"

namespace attnkit::cpu {

struct Carry {
  int32_t head;  // whose scores are carried
  int32_t budget;  // the most keys that a query sees; 0: any number
  // [batch, key], rows one after the other, of so many keys: what was carried onto each key before, and then after.
  float* sums;
  int64_t keys;
  int32_t* gone;  // likewise: the first query that no longer sees it. Null where there is no budget
};

// `score` reads s and f; `carry` is the same program with another score, which reads s of the head that selects.
// A fault of `carry` is marked by kOfCarry in its value.
inline constexpr int32_t kOfCarry = 1 << 30;
bool subtracts(const Program& program);  // whether the score is s - f, and no more
Status attend_carried(const Program& score, const Program& carry, const Problem& problem, const Carry& what,
                      const Config& config);

// The blocks of queries of one wave, and where what is carried lies for each.
class Wave {
 public:
  Wave(const Problem& problem, int32_t tile_q, int32_t tile_kv);

  void clear() { slices_.clear(); }
  void add(int32_t sequence, Window blocks);
  void extend() { ++slices_.back().blocks.end; }
  bool empty() const { return slices_.empty(); }

  struct Slice {
    int32_t sequence;
    Window blocks;
    size_t at;  // its first float
    size_t first_block;  // of all blocks of the wave
  };
  const std::vector<Slice>& slices() const { return slices_; }
  std::vector<Window> windows() const;  // of every sequence

  size_t floats() const;
  void lies_at(float* memory);
  Carried of(const Task& task);

 private:
  size_t floats_of_block(int32_t sequence) const;
  int64_t padded_keys(int32_t sequence) const;

  const Problem& problem_;
  const int32_t tile_q_, tile_kv_;
  std::vector<Slice> slices_;
  float* memory_ = nullptr;
  std::vector<float> norms_, least_;  // see Carried
  std::vector<size_t> norms_at_;  // of each sequence
  size_t most_tiles_ = 0;
};

}  // namespace attnkit::cpu
